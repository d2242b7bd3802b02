"""Recognising and refusing checkpoints; what loading costs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvid import weights
from cogvid.config import CONFIGS, SchedulerConfig
from cogvid.transformer import Transformer
from cogvid.vae import VAE
from cogvid.weights import (
    load_scheduler_config,
    load_state,
    load_transformer,
    load_vae,
    read_model_config,
    resolve_device,
    resolve_dtype,
    save_vae,
    unmap_state_dict,
)
from tests.checkpoints import TRANSFORMER, VAE_CONFIG, WEIGHTS, digest, edit_json, write_checkpoint, write_json


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own, to damage."""
    return shutil.copytree(pristine, tmp_path / "checkpoint")


# Recognition.


def test_an_unknown_model_has_the_settings_of_its_configs(pristine: Path) -> None:
    model = read_model_config(pristine)
    assert (model.name, model.repo, model.dtype) == ("custom-t2v", None, "float32")
    assert (model.height, model.width, model.num_frames, model.max_frames) == (64, 96, 17, 17)
    assert (model.fps, model.frame_multiple) == (8, 8)
    assert (model.transformer, model.vae) == (TRANSFORMER, VAE_CONFIG)
    assert model.scheduler == SchedulerConfig(snr_shift_scale=1.0)


@pytest.mark.parametrize("name", [name for name, model in CONFIGS.items() if model.repo])
def test_official_models_are_recognised_by_their_config(tmp_path: Path, name: str) -> None:
    known = CONFIGS[name]
    directory = tmp_path / "cogvideox-2b"  # a name that lies for four of the five
    class_name = "CogVideoXImageToVideoPipeline" if known.transformer.takes_image else "CogVideoXPipeline"
    write_json(
        directory / "model_index.json",
        {"_class_name": class_name, **{part: ["library", classes[0]] for part, classes in weights.CLASSES.items()}},
    )
    write_json(
        directory / "transformer" / "config.json",
        {"_class_name": "CogVideoXTransformer3DModel", **known.transformer.to_dict()},
    )
    write_json(directory / "vae" / "config.json", {"_class_name": "AutoencoderKLCogVideoX", **known.vae.to_dict()})
    write_json(
        directory / "scheduler" / "scheduler_config.json",
        {"_class_name": "CogVideoXDDIMScheduler", **known.scheduler.to_dict()},
    )
    write_json(directory / "text_encoder" / "config.json", {"d_model": 4096})
    assert read_model_config(directory) == known
    # 1.5 is hosted with sizes that mean nothing; those of 1.0 are what the model was made for.
    edit_json(directory / "transformer" / "config.json", sample_height=96, sample_width=170)
    model = read_model_config(directory)
    assert model.name == name
    official = known.transformer.patch_size_t is not None
    assert (model.height, model.width) == ((known.height, known.width) if official else (768, 1360))


def test_a_15_style_image_model_is_recognised(tmp_path: Path) -> None:
    config = dataclasses.replace(TRANSFORMER, in_channels=32, patch_size_t=2, ofs_embed_dim=64)
    model = read_model_config(write_checkpoint(tmp_path, config))
    assert (model.name, model.fps, model.frame_multiple) == ("custom-i2v", 16, 16)


def test_scheduler_config(pristine: Path) -> None:
    expected = SchedulerConfig(snr_shift_scale=1.0)
    assert load_scheduler_config(pristine) == load_scheduler_config(pristine / "scheduler") == expected


# Device and dtype.


@pytest.mark.parametrize(
    ("asked", "stored", "expected"),
    [
        ("float32", torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (None, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_is_what_was_asked_for_or_stored(asked: Any, stored: torch.dtype, expected: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_dtype(asked, torch.device("cpu"), stored) is expected


@pytest.mark.parametrize(("asked", "stored"), [("float16", torch.float32), (None, torch.float16)])
def test_float16_is_not_run_on_a_cpu(asked: str | None, stored: torch.dtype) -> None:
    with pytest.warns(UserWarning, match=r"^float16 arithmetic is not run on a CPU: running in (bfloat16|float32)"):
        chosen = resolve_dtype(asked, torch.device("cpu"), stored)
    assert chosen in (torch.bfloat16, torch.float32)
    assert resolve_dtype(asked, torch.device("cuda"), stored) is torch.float16


@pytest.mark.parametrize("dtype", ["fp16", "int8", "", torch.float64, 16])
def test_unknown_dtypes_are_refused_with_the_known_ones(pristine: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"^dtype: got .*, wanted float32, float16, bfloat16$"):
        load_transformer(pristine, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "meta", "cuda:99"])
def test_unknown_devices_are_refused(pristine: Path, device: str) -> None:
    with pytest.raises(ValueError, match=r"^device: got "):
        load_vae(pristine, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^device: got 'cuda', but PyTorch sees 0 CUDA GPUs here$"):
        resolve_device("cuda")


# What is refused, and in which words: (what is done to a good checkpoint, what is said).

Damage = Callable[[Path], Any]


def drop_tensor(path: Path, name: str, rename: str | None = None) -> None:
    state = load_file(path)
    tensor = state.pop(name)
    save_file({**state, rename: tensor} if rename else state, path)


def reshape_tensor(path: Path, name: str) -> None:
    state = load_file(path)
    save_file({**state, name: torch.cat([state[name]] * 2)}, path)


def shard(directory: Path, second: str = "b.safetensors") -> None:
    """Split the weights of a directory into two files and an index, which gives the second another name."""
    state = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name] for name in part}, directory / file)
    listed = {name: (second if file == "b.safetensors" else file) for file, part in halves.items() for name in part}
    write_json(directory / f"{WEIGHTS}.index.json", {"weight_map": listed})


FFN = "transformer_blocks.1.ff.net.2.weight"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no-model-index": (lambda d: (d / "model_index.json").unlink(), r"model_index\.json: no such file$"),
    "empty-model-index": (lambda d: (d / "model_index.json").write_text(""), r"model_index\.json: not JSON \("),
    "broken-model-index": (lambda d: (d / "model_index.json").write_text('{"a": '), r"model_index\.json: not JSON \("),
    "binary-model-index": (lambda d: (d / "model_index.json").write_bytes(b"\xff\x00"), r"index\.json: not JSON \("),
    "model-index-is-a-list": (lambda d: (d / "model_index.json").write_text("[]"), r"wanted a JSON object$"),
    "other-pipeline": (
        lambda d: edit_json(d / "model_index.json", _class_name="FluxPipeline"),
        r"is of class FluxPipeline, wanted CogVideoXPipeline or CogVideoXVideoToVideoPipeline or CogVideoXImage",
    ),
    "wrong-task": (
        lambda d: edit_json(d / "model_index.json", _class_name="CogVideoXImageToVideoPipeline"),
        r"the transformer's in_channels is 16, but 32 goes with the other components of this CogVideoXImageToVideo",
    ),
    "other-vae-class": (
        lambda d: edit_json(d / "model_index.json", vae=["diffusers", "AutoencoderKL"]),
        r"vae is of class AutoencoderKL, wanted AutoencoderKLCogVideoX$",
    ),
    "component-null": (lambda d: edit_json(d / "model_index.json", vae=[None, None]), r"vae is of class None, wanted"),
    "text-width": (
        lambda d: edit_json(d / "text_encoder" / "config.json", d_model=512),
        r"the transformer's text_embed_dim is 48, but 512 goes with",
    ),
    "no-config": (lambda d: (d / "transformer" / "config.json").unlink(), r"transformer/config\.json: no such file$"),
    "broken-config": (lambda d: (d / "vae" / "config.json").write_text("{"), r"vae/config\.json: not JSON \("),
    "wrong-class": (
        lambda d: edit_json(d / "transformer" / "config.json", _class_name="UNet2DModel"),
        r"is of class UNet2DModel, wanted CogVideoXTransformer3DModel$",
    ),
    "another-activation": (
        lambda d: edit_json(d / "transformer" / "config.json", activation_fn="geglu"),
        r"config\.json: activation_fn is 'geglu'; only 'gelu-approximate' is implemented$",
    ),
    "quant-conv": (
        lambda d: edit_json(d / "vae" / "config.json", use_quant_conv=True),
        r"use_quant_conv is True; only",
    ),
    "config-string-for-number": (
        lambda d: edit_json(d / "transformer" / "config.json", num_layers="2"),
        r"config\.json: num_layers: got '2', wanted a positive integer$",
    ),
    "config-negative": (
        lambda d: edit_json(d / "transformer" / "config.json", num_layers=-1),
        r"num_layers: got -1, wanted a positive integer$",
    ),
    "config-nan": (
        lambda d: edit_json(d / "vae" / "config.json", scaling_factor=float("nan")),
        r"got nan, wanted a num",
    ),
    "config-list": (
        lambda d: edit_json(d / "vae" / "config.json", block_out_channels=[8, "x"]),
        r"block_out_channels: got \(8, 'x'\), wanted a list of positive integers$",
    ),
    "scheduler-beta": (
        lambda d: edit_json(d / "scheduler" / "scheduler_config.json", beta_schedule="linear"),
        r"beta_schedule is 'linear'; only 'scaled_linear' is implemented$",
    ),
    "scheduler-incomplete": (
        lambda d: write_json(d / "scheduler" / "scheduler_config.json", {"_class_name": "CogVideoXDPMScheduler"}),
        r"scheduler_config\.json: no num_train_timesteps, beta_start,",
    ),
    "no-weights": (
        lambda d: (d / "vae" / WEIGHTS).unlink(),
        r"vae/diffusion_pytorch_model\.safetensors: no such file$",
    ),
    "other-weights": (
        lambda d: (d / "vae" / WEIGHTS).rename(d / "vae" / "model.fp16.safetensors"),
        r"no such file; there is model\.fp16\.safetensors$",
    ),
    "empty-weights": (lambda d: (d / "vae" / WEIGHTS).write_bytes(b""), r"not a whole safetensors file \("),
    "git-lfs-pointer": (
        lambda d: (d / "vae" / WEIGHTS).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        ),
        r"not a whole safetensors file \(",
    ),
    "truncated-weights": (
        lambda d: os.truncate(d / "transformer" / WEIGHTS, (d / "transformer" / WEIGHTS).stat().st_size - 1),
        r"transformer/diffusion_pytorch_model\.safetensors: not a whole safetensors file \(",
    ),
    "truncated-header": (lambda d: os.truncate(d / "vae" / WEIGHTS, 100), r"not a whole safetensors file \("),
    "weights-directory": (
        lambda d: ((d / "vae" / WEIGHTS).unlink(), (d / "vae" / WEIGHTS).mkdir()),
        r"diffusion_pytorch_model\.safetensors: no such file",
    ),
    "missing-shard": (
        lambda d: shard(d / "vae", "c.safetensors"),
        r"vae/c\.safetensors: no such file; there is a\.saf",
    ),
    "shard-elsewhere": (
        lambda d: shard(d / "vae", "../b.safetensors"),
        r"index\.json: wanted a 'weight_map' of tensor",
    ),
    "broken-index": (
        lambda d: (d / "vae" / f"{WEIGHTS}.index.json").write_text("{}"),
        r"index\.json: wanted a 'weight_map' of tensor names to file names$",
    ),
    "index-of-other-shard": (
        lambda d: (shard(d / "vae"), shutil.copy(d / "vae" / "a.safetensors", d / "vae" / "b.safetensors")),
        r"index\.json: \d+ tensors not in the shard it names \(.*, and \d+ more\)$",
    ),
    "missing-tensor": (
        lambda d: drop_tensor(d / "transformer" / WEIGHTS, FFN),
        r"transformer: the weights do not fit the config: 1 missing \(transformer_blocks\.1\.ff\.net\.2\.weight\)$",
    ),
    "renamed-tensor": (
        lambda d: drop_tensor(d / "transformer" / WEIGHTS, FFN, "transformer_blocks.1.ffn.2.weight"),
        r"1 missing \(transformer_blocks\.1\.ff\.net\.2\.weight \[nearest: transformer_blocks\.1\.ffn\.2\.weight\]\); "
        r"1 unexpected \(transformer_blocks\.1\.ffn\.2\.weight \[nearest: transformer_blocks\.1\.ff\.net\.2\.",
    ),
    "another-shape": (
        lambda d: reshape_tensor(d / "vae" / WEIGHTS, "decoder.conv_out.conv.bias"),
        r"vae: .*: 1 of another shape \(decoder\.conv_out\.conv\.bias is \[6\], wanted \[3\]\)$",
    ),
    "more-layers-than-configured": (
        lambda d: edit_json(d / "transformer" / "config.json", num_layers=1),
        r"\d+ unexpected \(transformer_blocks\.1\..* \[nearest: transformer_blocks\.0\..*, and \d+ more\)$",
    ),
    "integer-weights": (
        lambda d: save_file(
            {k: v.to(torch.int8) for k, v in load_file(d / "vae" / WEIGHTS).items()}, d / "vae" / WEIGHTS
        ),
        r"vae: the weights are torch\.int8, wanted float32, float16, bfloat16$",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line(checkpoint: Path, damage: str) -> None:
    do, words = DAMAGES[damage]
    do(checkpoint)
    with pytest.raises(ValueError, match=words) as caught:
        load_all(checkpoint)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_the_undamaged_checkpoint_loads(pristine: Path) -> None:
    load_all(pristine)


def load_all(checkpoint: Path) -> None:
    model = read_model_config(checkpoint)
    assert load_vae(checkpoint).config == model.vae
    assert load_transformer(checkpoint).config == model.transformer


def test_a_sharded_checkpoint_loads(checkpoint: Path) -> None:
    whole = load_state(checkpoint / "vae")
    whole = {name: tensor.clone() for name, tensor in whole.items()}
    shard(checkpoint / "vae")
    state = unmap_state_dict(load_vae(checkpoint))
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())


def test_a_component_is_not_another(pristine: Path) -> None:
    with pytest.raises(ValueError, match=r"is of class AutoencoderKLCogVideoX, wanted CogVideoXTransformer3DModel$"):
        load_transformer(pristine / "vae")
    with pytest.raises(ValueError, match=r"neither a vae/ nor a config\.json in it$"):
        load_vae(pristine / "scheduler")


# What loading costs.

MEASURE = """
import json, os, sys, torch
from cogvid.weights import load_transformer
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
load_transformer(sys.argv[2])  # the imports and caches of a first call
written = []
def note(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(str(args[0]))
sys.addaudithook(note)
before = anonymous()
model = load_transformer(sys.argv[1])
loaded = anonymous() - before
for parameter in model.parameters():  # reads every page
    parameter.view(torch.int16).amax()
print(json.dumps({"loaded": loaded, "read": anonymous() - before, "written": written,
                  "parameters": sum(p.numel() for p in model.parameters()), "dtype": str(model.proj_out.weight.dtype)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_no_memory_that_cannot_be_dropped(pristine: Path, tmp_path: Path) -> None:
    """0.6 B parameters: five layers of the width of 5B, in bfloat16. Nor is any file written."""
    config = dataclasses.replace(CONFIGS["cogvideox-5b"].transformer, num_layers=5)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in unmap_state_dict(Transformer(config)).items()}
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**14), 2**14, (2**25,), generator=generator, dtype=torch.int16)
    state = {
        name: bits[: shape.numel()].clone().view(torch.bfloat16).view(shape) if shape.numel() <= 2**25
        else bits.repeat(2)[: shape.numel()].view(torch.bfloat16).view(shape)
        for name, shape in shapes.items()
    }  # fmt: skip
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    del state
    write_json(tmp_path / "config.json", {"_class_name": "CogVideoXTransformer3DModel", **config.to_dict()})

    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(pristine)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["dtype"] == "torch.bfloat16"
    assert 0.6e9 < measured["parameters"] < 0.7e9
    smallest_matrix = config.hidden_size**2 * 2  # bytes: what copying one of them would take
    assert measured["loaded"] < 0.2 * smallest_matrix, measured
    assert measured["read"] < 0.2 * smallest_matrix, measured
    assert measured["written"] == []


def test_loaded_weights_can_be_written_without_touching_the_file(checkpoint: Path) -> None:
    digest_before = digest((checkpoint / "transformer" / WEIGHTS).read_bytes())
    model = load_transformer(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(not parameter.any() for parameter in model.parameters())
    assert digest((checkpoint / "transformer" / WEIGHTS).read_bytes()) == digest_before


def test_saving_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(OSError, match=WEIGHTS):
        save_vae(VAE(VAE_CONFIG), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


def test_the_key_map_in_the_documentation_is_the_one_in_the_code() -> None:
    text = (Path(weights.__file__).parents[1] / "weights.md").read_text()
    rows = [line for line in text.split("## Key map")[1].splitlines() if line.startswith("| `")]
    assert rows == [f"| `{a}` | `{b}` |" for a, b in (*weights.TRANSFORMER_NAMES.items(), *weights.VAE_NAMES.items())]
