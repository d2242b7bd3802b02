"""Weights in shards, for devices that cannot hold them: each process keeps a part of every matrix, with FSDP2.

`torch.distributed.fsdp.fully_shard` does it. Each block of the transformer and of T5 is a unit, and what else they have
is one unit each. A unit is gathered from all processes when it is called, and freed after the call. So there are at
most the rest of one model and one of its blocks in full; on CUDA also the block after it, because FSDP2 begins to
gather it, on a stream of its own, while the one before computes. Nothing was added for that.

All processes must call every unit equally often, also one that has no work for a block (`transformer.py`).

Inside a call the weights are ordinary parameters, whole, so that fused operations and adapters work as without. At
rest they are `DTensor`s, which nothing computes with: `can_fuse` says no, and adapters cannot be put into them. Buffers
(5B-I2V's table of positions, adapters) and the VAE, 0.4 GB in bf16, are whole on every process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cogvid.models.text import TextEncoder
from cogvid.models.transformer import Transformer
from cogvid.parallel.mesh import Mesh
from cogvid.weights.pages import drop_pages
from cogvid.weights.placement import run_dtype

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # those that are cast; float8 is not


def shard_weights(transformer: Transformer, text_encoder: TextEncoder, mesh: Mesh) -> None:
    """Shard the weights of both models over all processes of the mesh, in place; all of them must call it.

    Matrices may be where and as they are stored, such as in a mapped file. A unit at a time comes to the device in the
    run's dtype (those of the last norm of the transformer), and all but this process's part of it is dropped.

    Raises:
        ValueError: a weight is not an ordinary tensor, as with torchao's or after a first call; nothing has changed.
    """
    like = transformer.norm_out.weight
    models = ((transformer, transformer.blocks), (text_encoder.t5, text_encoder.t5.encoder.block))
    for model, _ in models:
        for name, parameter in model.named_parameters():
            if type(parameter) is not nn.Parameter:
                raise ValueError(f"shard_weights: got a {type(parameter).__name__} at {name}, want ordinary weights")
    everyone = init_device_mesh(like.device.type, (mesh.size,))
    for model, blocks in models:
        for unit in (*blocks, model):
            stored = _bring(unit, blocks if unit is model else (), like)
            fully_shard(unit, mesh=everyone, reshard_after_forward=True)
            drop_pages(stored)


def _bring(module: nn.Module, without: Iterable[nn.Module], like: Tensor) -> list[Tensor]:
    """Have all that a unit owns where it runs, in the dtype that it runs in, and return what was there before.

    without: modules of other units.
    """
    before = []
    for table, key, name in _owned(module, without):
        stored = table[key]
        dtype = run_dtype(name, like.dtype) if stored.dtype in _FLOATS else stored.dtype
        came = stored.to(like.device, dtype)
        if came is not stored:
            table[key] = nn.Parameter(came, requires_grad=False) if isinstance(stored, nn.Parameter) else came
        before.append(stored)
    return before


def _owned(module: nn.Module, without: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield (table of the module, key, whole name) of each weight and buffer."""
    seen: set[nn.Module] = {inner for each in without for inner in each.modules()}
    for path, each in module.named_modules():
        if each in seen:
            continue
        for table in (each._parameters, each._buffers):
            yield from ((table, key, f"{path}.{key}") for key, tensor in table.items() if tensor is not None)
