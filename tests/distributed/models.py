"""Tiny transformers of every kind, split over processes, and what one process makes of the same inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from cogvid.config import TransformerConfig
from cogvid.models.transformer import Transformer
from cogvid.ops import Ops
from cogvid.parallel.mesh import Mesh, make_mesh
from cogvid.parallel.transformer import split_transformer
from cogvid.weights.parallel_option import Parallel
from references import perturb
from tests.checkpoints import TRANSFORMER

_change = dataclasses.replace
# One for each kind of the five checkpoints; 1.5 has patches of two frames, and its image-to-video model ofs.
KINDS: dict[str, TransformerConfig] = {
    "2B": _change(TRANSFORMER, use_rotary_positional_embeddings=False, num_attention_heads=3, attention_head_dim=16),
    "5B": _change(TRANSFORMER, num_attention_heads=6, attention_head_dim=16),
    "5B-I2V": _change(TRANSFORMER, in_channels=32, use_learned_positional_embeddings=True),
    "1.5": _change(TRANSFORMER, patch_size_t=2, num_attention_heads=5, attention_head_dim=16),
    "1.5-I2V": _change(TRANSFORMER, in_channels=32, patch_size_t=2, ofs_embed_dim=32),
}


def tiny(config: TransformerConfig, kind: type[Transformer] = Transformer, ops: Ops | None = None) -> Transformer:
    """Make the same random model in every process."""
    torch.manual_seed(0)
    return perturb(kind(config, ops)).eval().requires_grad_(False)


def inputs(
    config: TransformerConfig, batch: int = 2, size: tuple[int, int, int] = (4, 8, 12), text_len: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Make latents of T, h, w, text and timesteps, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, config.in_channels, *size, generator=generator)
    length = config.max_text_seq_length if text_len is None else text_len
    text = torch.randn(batch, length, config.text_embed_dim, generator=generator)
    return latents, text, torch.linspace(999, 3, batch).round()


_meshes: dict[Parallel, Mesh] = {}


def mesh_of(split: Parallel) -> Mesh:
    """Make the groups of a split once: each costs a connection between all processes."""
    if split not in _meshes:
        _meshes[split] = make_mesh(split, torch.device("cpu"))
    return _meshes[split]


def split_tiny(config: TransformerConfig, split: Parallel, **options: Any) -> Transformer:
    model = tiny(config, **options)
    split_transformer(model, mesh_of(split))
    return model
