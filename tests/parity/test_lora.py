"""LoRA adapters against diffusers and peft: every linear, every format, single and stacked, at several scales."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from cogvid.models.transformer import Transformer
from cogvid.weights.lora import Loras
from measure import pooled_ratio, rel_rms
from references import TRANSFORMER_VARIANTS, tiny_transformer
from tests.parity.test_transformer import SIZES, inputs, ours_like, run_reference
from tests.tolerances import LORA_BF16, LORA_FP32

SCALES = (0.0, 0.5, 1.0, -1.0)
RANK, OTHER_RANK = 4, 6
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"to_k": OTHER_RANK, "transformer_blocks.1.ff.net.2": 1},
    "alpha_pattern": {"to_k": 12, "patch_embed.proj": 3},
}


def linears(reference: CogVideoXTransformer3DModel) -> list[str]:
    return [name for name, module in reference.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def random_adapter(reference: CogVideoXTransformer3DModel, seed: int, **config: Any) -> tuple[LoraConfig, Any]:
    """Return a config over every linear, and a copy of the reference with random matrices in it."""
    options = {"r": RANK, "lora_alpha": 2, "target_modules": linears(reference), "init_lora_weights": False}
    made = LoraConfig(**{**options, **config})
    torch.manual_seed(seed)
    adapted = deepcopy(reference)
    adapted.add_adapter(made)
    return made, adapted


def save_diffusers(
    reference: CogVideoXTransformer3DModel,
    directory: Path,
    seed: int,
    dtype: torch.dtype = torch.float32,
    metadata: bool = True,
    **config: Any,
) -> Path:
    """Write a random adapter as diffusers does."""
    made, adapted = random_adapter(reference, seed, **config)
    state: dict[str, Any] = {name: tensor.to(dtype) for name, tensor in get_peft_model_state_dict(adapted).items()}
    values = made.to_dict() if metadata else None
    if values is not None:
        values["target_modules"] = sorted(values["target_modules"])
    CogVideoXPipeline.save_lora_weights(str(directory), state, transformer_lora_adapter_metadata=values)
    return directory


def with_diffusers(reference: CogVideoXTransformer3DModel, paths: Sequence[Path], scale: float = 1.0) -> Any:
    """Load adapters with diffusers into a copy of the reference."""
    adapted = deepcopy(reference)
    for path in paths:
        state, metadata = CogVideoXPipeline.lora_state_dict(str(path), return_lora_metadata=True)
        CogVideoXPipeline.load_lora_into_transformer(state, adapted, adapter_name=path.name, metadata=metadata)
    adapted.set_adapters([path.name for path in paths], weights=[scale] * len(paths))
    return adapted


def with_ours(
    reference: CogVideoXTransformer3DModel, paths: Sequence[Path], scale: float = 1.0
) -> tuple[Transformer, Loras]:
    model = ours_like(reference)
    loras = Loras(model)
    for path in paths:
        loras.load(path, scale, None)
    return model, loras


@pytest.mark.parametrize("variant", TRANSFORMER_VARIANTS)
def test_one_adapter_on_every_linear(variant: str, tmp_path: Path) -> None:
    """Beside the weights and in them; after that the weights are what they were."""
    reference = tiny_transformer(variant)
    path = save_diffusers(reference, tmp_path / "a", seed=1, **PATTERNS)
    expected = with_diffusers(reference, [path])
    model, loras = with_ours(reference, [path])
    args = inputs(model, SIZES["trained"])
    plain = run_reference(reference, *args)
    for scale in SCALES:
        expected.set_adapters(["a"], weights=[scale])
        truth = run_reference(expected, *args)
        assert torch.equal(plain, truth) if scale == 0 else rel_rms(plain, truth) > 0.05
        loras.scale("a", scale)
        assert rel_rms(model(*args), truth) < LORA_FP32
        loras.fuse()
        assert rel_rms(model(*args), truth) < LORA_FP32
        loras.unload(None)
        assert torch.equal(model(*args), ours_like(reference)(*args))
        loras.load(path, 1.0, None)


@pytest.mark.parametrize("variant", TRANSFORMER_VARIANTS)
def test_stacked_adapters(variant: str, tmp_path: Path) -> None:
    """Three on the same linears, of other ranks and dtypes, at scales that change; with and without fusing."""
    reference = tiny_transformer(variant)
    few = {"r": 3, "target_modules": ["to_q", "proj", "norm1.linear"]}
    paths = [
        save_diffusers(reference, tmp_path / "a", 1, **PATTERNS),
        save_diffusers(reference, tmp_path / "b", 2, torch.bfloat16, **few),
        save_diffusers(reference, tmp_path / "c", 3, torch.float16, metadata=False, r=2, lora_alpha=2),
    ]
    expected = with_diffusers(reference, paths)
    model, loras = with_ours(reference, paths)
    args = inputs(model, SIZES["trained"])
    for scales in ((1.0, 1.0, 1.0), (0.5, -1.0, 0.0), (-1.0, 0.5, 0.7)):
        expected.set_adapters(["a", "b", "c"], weights=list(scales))
        for path, scale in zip(paths, scales, strict=True):
            loras.scale(path.name, scale)
        assert rel_rms(model(*args), run_reference(expected, *args)) < LORA_FP32
    loras.fuse()
    assert rel_rms(model(*args), run_reference(expected, *args)) < LORA_FP32
    loras.unload("b")
    expected.set_adapters(["a", "c"], weights=[-1.0, 0.7])
    assert rel_rms(model(*args), run_reference(expected, *args)) < LORA_FP32


@pytest.mark.parametrize("config", [{}, PATTERNS, {"use_rslora": True}], ids=["plain", "patterns", "rslora"])
def test_peft_writes_it(config: dict[str, Any], tmp_path: Path) -> None:
    reference = tiny_transformer("1.5-5b-i2v")
    torch.manual_seed(4)
    options = {"r": RANK, "lora_alpha": 7, "target_modules": linears(reference), "init_lora_weights": False, **config}
    expected: Any = get_peft_model(deepcopy(reference), LoraConfig(**options))
    expected.save_pretrained(str(tmp_path / "a"))
    model, _ = with_ours(reference, [tmp_path / "a"])
    args = inputs(model, SIZES["trained"])
    assert rel_rms(model(*args), run_reference(expected.base_model.model, *args)) < LORA_FP32


def test_diffusers_writes_the_adapter_of_a_transformer(tmp_path: Path) -> None:
    """Names without `transformer.`, and the metadata too."""
    reference = tiny_transformer("2b")
    _, expected = random_adapter(reference, 5, lora_alpha=9)
    expected.save_lora_adapter(str(tmp_path))
    model, _ = with_ours(reference, [tmp_path])
    args = inputs(model, SIZES["trained"])
    assert rel_rms(model(*args), run_reference(expected, *args)) < LORA_FP32


def test_the_merged_projection_of_q_k_and_v(tmp_path: Path) -> None:
    reference = tiny_transformer("5b")
    merged = deepcopy(reference)
    merged.fuse_qkv_projections()
    save_diffusers(merged, tmp_path, 6, target_modules=["to_qkv", "to_out.0"])
    expected = with_diffusers(merged, [tmp_path], 0.5)
    model, _ = with_ours(reference, [tmp_path], 0.5)
    args = inputs(model, SIZES["trained"])
    assert rel_rms(model(*args), run_reference(expected, *args)) < LORA_FP32


def merge(reference: CogVideoXTransformer3DModel, module: str, up: Tensor, down: Tensor, factor: float) -> None:
    """Add an update to a weight, as VideoX-Fun's `merge_lora` does."""
    weight = reference.get_submodule(module).weight
    assert isinstance(weight, Tensor)
    weight += factor * (up @ down).view_as(weight)


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
def test_kohya(alpha: float | None, tmp_path: Path) -> None:
    reference = tiny_transformer("1.5-5b")
    expected, generator = deepcopy(reference), torch.Generator().manual_seed(7)
    state: dict[str, Tensor] = {}
    for module in linears(reference):
        weight = reference.get_submodule(module).weight
        assert isinstance(weight, Tensor)
        up, down = (torch.randn(*size, generator=generator) * 0.1 for size in ((len(weight), 3), (3, weight.shape[1])))
        name = "lora_unet__" + module.replace(".", "_")
        state |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha)
        merge(expected, module, up, down, 0.5 * (1 if alpha is None else alpha / 3))
    save_file(state, tmp_path / "a.safetensors")
    model, _ = with_ours(reference, [tmp_path / "a.safetensors"], 0.5)
    args = inputs(model, SIZES["trained"])
    assert rel_rms(model(*args), run_reference(expected, *args)) < LORA_FP32


def test_sat(tmp_path: Path) -> None:
    """Against what the authors' exporter writes of it, at the scale of their code: alpha / r with alpha = 1."""
    reference, generator, rank = tiny_transformer("5b"), torch.Generator().manual_seed(8), 5
    saved: dict[str, Tensor] = {
        "model.diffusion_model.transformer.layers.0.attention.dense.original.weight": torch.ones(1)
    }
    exported: dict[str, Tensor] = {}
    width = reference.config["num_attention_heads"] * reference.config["attention_head_dim"]
    modules = {"query_key_value": ("to_q", "to_k", "to_v"), "dense": ("to_out.0",)}
    for layer in range(2):
        for sat, names in modules.items():
            for part, name in enumerate(names):
                for matrix, size in (("A", (rank, width)), ("B", (width, rank))):
                    tensor = torch.randn(*size, generator=generator).half()
                    prefix = f"model.diffusion_model.transformer.layers.{layer}.attention"
                    saved[f"{prefix}.{sat}.matrix_{matrix}.{part}"] = tensor
                    exported[f"transformer.transformer_blocks.{layer}.attn1.{name}.lora_{matrix}.weight"] = tensor
    torch.save({"module": saved}, tmp_path / "mp_rank_00_model_states.pt")
    (tmp_path / "hf").mkdir()
    save_file(exported, tmp_path / "hf" / "pytorch_lora_weights.safetensors")
    expected = with_diffusers(reference, [tmp_path / "hf"], 1 / rank)
    model, _ = with_ours(reference, [tmp_path])
    args = inputs(model, SIZES["trained"])
    assert rel_rms(model(*args), run_reference(expected, *args)) < LORA_FP32


def test_cogkit(tmp_path: Path) -> None:
    """A file of peft's name without a config, and the config that CogKit's code has."""
    reference = tiny_transformer("5b")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    _, expected = random_adapter(reference, 9, r=128, lora_alpha=64, target_modules=targets)
    save_file(get_peft_model_state_dict(expected), tmp_path / "adapter_model.safetensors")
    model, loras = with_ours(reference, [tmp_path])
    args = inputs(model, SIZES["trained"])
    assert rel_rms(model(*args), run_reference(expected, *args)) < LORA_FP32
    [lora] = loras.add([])
    assert (lora.format, lora.ranks, lora.alphas) == ("cogkit", (128,), (64.0,))


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_bf16_is_no_worse_than_diffusers(fused: bool, tmp_path: Path) -> None:
    """Both errors are against diffusers in fp64, whose weights and matrices are the bf16 ones."""
    errors = []
    for seed in range(4):
        wide: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 2}
        reference = tiny_transformer("5b", seed, **wide).bfloat16()
        path = save_diffusers(reference, tmp_path / str(seed), seed, torch.bfloat16)
        truth = with_diffusers(deepcopy(reference).double(), [path], 0.5)
        expected = with_diffusers(reference, [path], 0.5)
        model, loras = with_ours(reference, [path], 0.5)
        if fused:
            expected.fuse_lora()
            loras.fuse()
        latents, text, timestep = inputs(model, SIZES["trained"], seed=seed)
        args = latents.bfloat16(), text.bfloat16(), timestep
        exact = run_reference(truth, args[0].double(), args[1].double(), timestep)
        errors.append((rel_rms(model(*args), exact), rel_rms(run_reference(expected, *args), exact)))
    assert pooled_ratio(errors) < LORA_BF16
