"""Quantised linears against diffusers: torchao with the same config on the same modules, and layerwise casting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from torch import Tensor, nn

from cogvid.config import TransformerConfig
from cogvid.models import quantize
from cogvid.models.transformer import Transformer
from cogvid.weights.names import TRANSFORMER_NAMES, map_transformer_state_dict
from measure import rel_rms
from references import call_diffusers, rotary_table, tiny_encoder, tiny_transformer
from tests.tolerances import TRANSFORMER_FP32

VARIANTS = ("2b", "5b", "1.5-5b-i2v")
WITH_TORCHAO = ("int8", "int8-dynamic", "fp8")


def ours_like(reference: Any) -> Transformer:
    config = TransformerConfig.from_dict(dict(reference.config))
    model = Transformer(config).to(reference.dtype)
    model.load_state_dict(map_transformer_state_dict(reference.state_dict(), config))
    return model.eval().requires_grad_(False)


def quantised(part: Any, method: str) -> list[str]:
    """Quantise a part in place; return the names of the linears."""
    names = quantize.linears_to_quantize(part)
    for name in names:
        part.set_submodule(name, quantize.quantized(part.get_submodule(name), method, name))
    return names


def upstream(names: list[str]) -> set[str]:
    back = {ours: theirs for theirs, ours in TRANSFORMER_NAMES.items()}
    parts = [name.split(".") for name in names]
    return {back[f"blocks.{{}}.{leaf}"].format(layer) for _, layer, leaf in parts}


def outputs(theirs: Any, ours: Transformer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator, config = torch.Generator().manual_seed(1), ours.config
    latents = torch.randn(2, config.in_channels, 4, 8, 12, generator=generator).to(dtype)
    text = torch.randn(2, config.max_text_seq_length, config.text_embed_dim, generator=generator).to(dtype)
    timestep = torch.tensor([999, 137])
    expected = call_diffusers(theirs, latents, text, timestep, rotary_table(theirs, latents))
    return expected, ours(latents, text, timestep)


@pytest.mark.parametrize("method", WITH_TORCHAO)
@pytest.mark.parametrize("variant", VARIANTS)
def test_torchao_on_the_same_linears_of_diffusers(variant: str, method: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs the extra quant")
    theirs = tiny_transformer(variant)
    ours = ours_like(theirs)
    plain, _ = outputs(theirs, ours, torch.float32)
    names = upstream(quantised(ours, method))
    config = getattr(quantization, quantize.CONFIGS[method])()
    quantization.quantize_(theirs, config, filter_fn=lambda _, name: name in names)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        keep = lambda _m, x, y, name=name: seen.__setitem__(name, (x[0], y))  # noqa: E731
        theirs.get_submodule(name).register_forward_hook(keep)
    expected, actual = outputs(theirs, ours, torch.float32)
    lost = rel_rms(expected, plain)
    assert 1e-3 < lost < 0.2
    assert len(quantize.quantized_linears(ours)) == len(names)
    if method != "int8-dynamic":
        assert rel_rms(actual, expected) < TRANSFORMER_FP32
        return
    # Activations are rounded to 8 bits too, and those that differ in the last bit may fall to either side, more so
    # from block to block. So each linear is compared with the same input.
    for name in quantize.quantized_linears(ours):
        x, y = seen[upstream([name]).pop()]
        assert torch.equal(ours.get_submodule(name)(x), y)
    assert rel_rms(actual, plain) < 2 * lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fp8_storage_is_the_layerwise_casting_of_diffusers(variant: str, dtype: torch.dtype) -> None:
    """With its default patterns of what is left out, and the embeddings of time and ofs besides."""
    theirs = tiny_transformer(variant).to(dtype)
    ours, exact = ours_like(theirs), ours_like(theirs)
    plain, _ = outputs(theirs, exact, dtype)
    names = upstream(quantised(ours, "fp8-storage"))
    patterns = (*DEFAULT_SKIP_MODULES_PATTERN, *theirs._skip_layerwise_casting_patterns)
    theirs.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn,
        compute_dtype=dtype,
        skip_modules_pattern=(*patterns, "time_embedding", "ofs_embedding"),
    )
    cast = {name for name, module in theirs.named_modules() if getattr(module, "weight", None) is not None}
    cast = {name for name in cast if theirs.get_submodule(name).weight.dtype == torch.float8_e4m3fn}
    assert cast == names
    expected, actual = outputs(theirs, ours, dtype)
    lost = rel_rms(expected, plain)
    assert 1e-3 < lost < 0.2
    # In bf16 both round, each in its own places, as they do without casting.
    assert rel_rms(actual, expected) < (TRANSFORMER_FP32 if dtype == torch.float32 else lost / 2)


@pytest.mark.parametrize("method", [*WITH_TORCHAO, "fp8-storage"])
def test_the_text_encoder(method: str) -> None:
    """All of its linears, against transformers' own with torchao's, or with diffusers' casting hooks."""
    if method in WITH_TORCHAO:
        quantization = pytest.importorskip("torchao.quantization", reason="needs the extra quant")
    theirs, ours = tiny_encoder(300), tiny_encoder(300)
    ids = torch.arange(2 * 10).view(2, 10)
    plain = theirs(ids).last_hidden_state
    names = quantised(ours, method)
    assert len(names) == 7 * 3
    if method in WITH_TORCHAO:
        quantization.quantize_(theirs, getattr(quantization, quantize.CONFIGS[method])())
        expected = theirs(ids).last_hidden_state
    else:
        for name in names:  # its hooks would give T5's `wo` activations in float8
            linear = theirs.get_submodule(name)
            linear.weight = nn.Parameter(linear.weight.to(torch.float8_e4m3fn).float(), requires_grad=False)
        expected = theirs(ids).last_hidden_state
    assert 1e-3 < rel_rms(expected, plain) < 0.3
    assert torch.equal(ours(ids).last_hidden_state, expected)
