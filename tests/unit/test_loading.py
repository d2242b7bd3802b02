"""A load resolves each thing once and reads each file once; `qk_norm` by name."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import cogvid
from cogvid.ops import Ops
from cogvid.weights.hub import PACKS
from cogvid.weights.load import load_transformer
from measure import rel_rms
from references import picture
from tests.tolerances import QK_NORM_RMS_BF16, QK_NORM_RMS_FP32

QUICK: dict[str, Any] = {"num_inference_steps": 2, "num_frames": 9, "seed": 1, "progress": False}


def test_a_load_resolves_once_and_reads_each_config_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    names = ("cogvid.weights.placement", "cogvid.weights.checkpoint", "cogvid.weights.hub")
    modules = [importlib.import_module(name) for name in names]
    for name in ("find", "resolve_device", "resolve_dtype", "resolve_ops"):
        homes = [module for module in modules if hasattr(module, name)]
        assert homes
        for module in homes:
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    open_file, opened = os.open, Counter()

    def opening(path: Any, *args: Any, **kwargs: Any) -> int:
        opened[str(path)] += 1
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", opening)
    cogvid.load("tiny-i2v", device="cpu")
    assert calls == {"find": 1, "resolve_device": 1, "resolve_dtype": 1, "resolve_ops": 1}
    configs = {path: count for path, count in opened.items() if path.endswith(".json") and str(PACKS) in path}
    read = {Path(path).relative_to(PACKS / "tiny-i2v").as_posix(): count for path, count in configs.items()}
    # The text encoder's config is read for its width, and by its own loader for all the rest.
    assert read == {
        "model_index.json": 1, "transformer/config.json": 1, "vae/config.json": 1, "scheduler/scheduler_config.json": 1,
        "text_encoder/config.json": 2, "tokenizer/tokenizer_config.json": 1,
    }  # fmt: skip


def test_the_placement_does_not_depend_on_a_parameter() -> None:
    """Offloading leaves parameters on the meta device; the pipeline still knows where it runs."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

    pipe, options = cogvid.load("tiny-i2v", device="cpu"), {**QUICK, "output_type": "pt", "image": picture(64, 64)}
    expected = pipe("the red circle moves right", **options).frames
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder.t5):
        accelerate.cpu_offload(part, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in part.parameters())
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    assert rel_rms(pipe("the red circle moves right", **options).frames, expected) < 1e-5


def centred_calls(calls: list[bool]) -> Ops:
    def qk_norm_rope(*args: Any, centred: bool = False, **kwargs: Any) -> Any:
        calls.append(centred)
        return Ops.torch().qk_norm_rope(*args, centred=centred, **kwargs)

    return dataclasses.replace(Ops.torch(), qk_norm_rope=qk_norm_rope)


@pytest.mark.parametrize("name", ["tiny-t2v", "tiny-i2v"])
def test_rms_is_the_same_function_as_layer(name: str) -> None:
    calls: list[bool] = []
    image = {"image": picture(64, 64)} if name == "tiny-i2v" else {}
    options = {"output_type": "latent", **QUICK, **image}
    layer = cogvid.load(name, device="cpu")("the red circle moves right", **options)
    rms = cogvid.load(name, device="cpu", ops=centred_calls(calls), qk_norm="rms")
    out = rms("the red circle moves right", **options)
    assert calls
    assert all(calls)
    assert rel_rms(out.frames, layer.frames) < QK_NORM_RMS_FP32
    assert (layer.provenance["qk_norm"], out.provenance["qk_norm"]) == ("layer", "rms")


def test_rms_in_bf16_rounds_the_centred_weights_anew() -> None:
    """Against fp64: how much is lost by it, beside what bf16 loses anyway."""
    directory = PACKS / "tiny-i2v"
    exact, layer, rms = (
        load_transformer(directory, dtype=dtype, qk_norm=norm)
        for dtype, norm in (("float32", "layer"), ("bfloat16", "layer"), ("bfloat16", "rms"))
    )
    exact = exact.double()
    errors = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, 32, 5, 8, 8, generator=generator).bfloat16()
        text, timestep = torch.randn(1, 16, 64, generator=generator).bfloat16(), torch.tensor([500])
        truth = exact(latents.double(), text.double(), timestep)
        errors.append([rel_rms(model(latents, text, timestep), truth) ** 2 for model in (rms, layer)])
    ours, plain = (sum(column) ** 0.5 for column in zip(*errors, strict=True))
    assert ours / plain < QK_NORM_RMS_BF16, ours / plain


def test_rms_falls_back_to_layer_where_a_projection_is_not_plain() -> None:
    """An adapter's part of the sum is not centred, so LayerNorm must run there."""
    peft = pytest.importorskip("peft", reason="needs peft")

    calls: list[bool] = []
    models = [load_transformer(PACKS / "tiny-t2v", dtype="float32", qk_norm=norm) for norm in ("layer", "rms")]
    for model in models:
        config = peft.LoraConfig(r=2, target_modules=r"blocks\.1\.k_proj", init_lora_weights=False)
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, model)
    models[1].set_ops(centred_calls(calls))
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 5, 8, 8, generator=generator), torch.randn(1, 16, 64, generator=generator)
    layer, rms = (model(latents, text, torch.tensor([500])) for model in models)
    assert calls == [layer_index != 1 for layer_index in range(6)]
    assert rel_rms(rms, layer) < QK_NORM_RMS_FP32


def test_rms_ends_where_other_weights_are_loaded() -> None:
    calls: list[bool] = []
    layer, rms = (load_transformer(PACKS / "tiny-t2v", dtype="float32", qk_norm=norm) for norm in ("layer", "rms"))
    rms.set_ops(centred_calls(calls))
    rms.load_state_dict(layer.state_dict())
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 5, 8, 8, generator=generator), torch.randn(1, 16, 64, generator=generator)
    assert torch.equal(rms(latents, text, torch.tensor([500])), layer(latents, text, torch.tensor([500])))
    assert calls == [False] * 6


def test_an_unknown_norm_is_refused_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogvid.weights.hub._fetch", None)
    with pytest.raises(ValueError, match=r"^qk_norm: got 'none', want one of layer, rms$"):
        cogvid.load("zai-org/CogVideoX-2b", device="cpu", qk_norm="none")
    with pytest.raises(ValueError, match=r"^qk_norm: got 'none', want one of layer, rms$"):
        load_transformer(PACKS / "tiny-t2v", qk_norm="none")
