"""Builders of tiny reference models (the real diffusers classes with random weights) and the measures of error.

Only the builders need diffusers, so that where it is absent the tests without them run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from measure import rel_rms
from tests.tolerances import FRAMES_FP32, FRAMES_MAX_ABS

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

Module = TypeVar("Module", bound=nn.Module)

TRANSFORMER_VARIANTS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")

# Small, but every width differs from every other one, so that a swapped axis cannot pass.
_TINY: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "num_layers": 2,
    "in_channels": 16,
    "out_channels": 16,
    "text_embed_dim": 40,
    "time_embed_dim": 24,
    "max_text_seq_length": 10,
    "sample_frames": 9,
    "sample_height": 8,
    "sample_width": 12,
}
_ROTARY: dict[str, Any] = {"use_rotary_positional_embeddings": True}
_V15: dict[str, Any] = {
    **_ROTARY,
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_frames": 13,
    "sample_height": 300,
    "sample_width": 300,
}
_VARIANTS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": _ROTARY,
    "5b-i2v": {**_ROTARY, "in_channels": 32, "use_learned_positional_embeddings": True},
    "1.5-5b": _V15,
    "1.5-5b-i2v": {**_V15, "in_channels": 32, "ofs_embed_dim": 24},
}


def perturb(module: Module, seed: int = 0, scale: float = 0.1) -> Module:
    """Add seeded noise to every parameter, norms and biases included, so that a dropped or swapped one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return module


def tiny_transformer(variant: str, seed: int = 0, **overrides: Any) -> CogVideoXTransformer3DModel:
    """Build the real diffusers transformer of one of `TRANSFORMER_VARIANTS`, tiny, every parameter perturbed."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(seed)
    model = perturb(CogVideoXTransformer3DModel(**{**_TINY, **_VARIANTS[variant], **overrides}), seed)
    if model.config["use_learned_positional_embeddings"]:
        # The learned table starts as the sin-cos one; noise makes the two distinguishable.
        table = model.patch_embed.pos_embedding
        model.patch_embed.pos_embedding = torch.randn(table.shape, generator=torch.Generator().manual_seed(seed))
    return model.eval().requires_grad_(False)


def tiny_vae(seed: int = 0, **overrides: Any) -> AutoencoderKLCogVideoX:
    """Build the real diffusers VAE, tiny, every parameter perturbed."""
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "block_out_channels": (8, 16, 16, 24),
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "sample_height": 64,
        "sample_width": 96,
    }
    return perturb(AutoencoderKLCogVideoX(**{**config, **overrides}), seed).eval().requires_grad_(False)


def pooled_ratio(errors: Iterable[tuple[float, float]]) -> float:
    """Return the rms of the first of each pair over that of the second.

    For errors of low precision, ours and those of another: how many roundings went which way decides the ratio of one
    pair (0.65 to 1.25 for one model), and of several it is a property of the two computations.
    """
    ours, theirs = torch.tensor(list(errors), dtype=torch.float64).pow(2).mean(0).sqrt().tolist()
    return ours / theirs


def assert_frames_equal(
    actual: np.ndarray, expected: np.ndarray, *, rms: float = FRAMES_FP32, max_abs: float = FRAMES_MAX_ABS
) -> None:
    """Hold frames of any shape against diffusers' float32 frames in [0, 1] of the same run.

    actual: float32 in [0, 1], which is held to an error; or uint8 levels, which must be those of `expected` wherever
    such an error cannot carry it over a tie (a level and a half), and one off at most where it can.
    """
    assert actual.shape == expected.shape
    exact = expected.astype(np.float64) * 255
    # A clamped picture would agree whatever was computed.
    assert ((exact > 0.5) & (exact < 254.5)).mean() > 0.9
    if actual.dtype == np.uint8:
        levels = actual.astype(np.float64)
    else:
        assert float(np.abs(actual - expected).max()) <= max_abs
        assert rel_rms(torch.from_numpy(actual), torch.from_numpy(expected)) <= rms
        levels = np.round(actual.astype(np.float64) * 255)
    off = np.abs(levels - np.round(exact))
    to_a_tie = np.abs(exact - np.floor(exact) - 0.5)
    assert off.max() <= 1
    assert off[to_a_tie > 255 * max_abs].max(initial=0) == 0
