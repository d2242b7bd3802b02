"""The VAE by rows of the picture over several processes, against one process and against diffusers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cogvid.config import VAEConfig
from cogvid.models.vae import VAE, DiagonalGaussian, NormSiLU
from cogvid.parallel.mesh import Mesh, make_mesh
from cogvid.parallel.vae import split_vae
from cogvid.weights.parallel_option import Parallel
from measure import rel_rms
from tests.checkpoints import VAE_CONFIG
from tests.distributed.ranks import Ranks
from tests.tolerances import VAE_SPLIT_FP32

OfRanks = Callable[[int], Ranks]
CPU = torch.device("cpu")

# kind, batch, frames (of latents to decode), rows and columns of latents: uneven, few and many rows, every kind of
# chunk, and fewer rows than processes.
CASES = [
    ("decode", 2, 3, 5, 3),
    ("decode", 1, 1, 1, 4),
    ("decode", 1, 4, 8, 2),
    ("encode", 2, 9, 5, 3),
    ("encode", 1, 1, 3, 2),
    ("encode", 1, 16, 1, 2),
    ("whole", 1, 17, 4, 2),
]
FEW = [CASES[0], CASES[1], CASES[3]]


def build(config: VAEConfig = VAE_CONFIG, seed: int = 0) -> VAE:
    """Return a VAE with random weights, those of the norms too; the same in all processes."""
    torch.manual_seed(seed)
    vae = VAE(config).eval().requires_grad_(False)
    for module in vae.modules():
        if isinstance(module, NormSiLU):
            module.weight.add_(0.3 * torch.randn(module.weight.shape))
            module.bias.add_(0.3 * torch.randn(module.bias.shape))
    return vae


def inputs(config: VAEConfig, kind: str, batch: int, frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    if kind == "decode":
        return torch.randn(batch, config.latent_channels, frames, height, width, generator=generator)
    return torch.randn(batch, 3, frames, 8 * height, 8 * width, generator=generator).clamp(-1, 1)


def result(vae: VAE, kind: str, x: Tensor) -> Tensor:
    return vae.decode(x) if kind == "decode" else parameters(vae.encode(x, whole=kind == "whole"))


def parameters(found: DiagonalGaussian) -> Tensor:
    return torch.cat([found.mean, found.logvar], dim=1)


def mesh_of_all() -> Mesh:
    return make_mesh(Parallel(ulysses=dist.get_world_size()), CPU)


def split(vae: VAE) -> VAE:
    split_vae(vae, mesh_of_all())
    return vae


def answer(x: Tensor) -> tuple[str, np.ndarray | None]:
    """Return a digest from each rank, and the values from the first one."""
    values = x.float().contiguous().numpy()
    return hashlib.sha256(values.tobytes()).hexdigest(), values if dist.get_rank() == 0 else None


def same_on_all(answers: list[tuple[str, np.ndarray | None]]) -> Tensor:
    """Return the result of the ranks, which must have the same bits on each."""
    assert len({digest for digest, _ in answers}) == 1
    return torch.from_numpy(answers[0][1])


def _results(config: VAEConfig, cases: list[Any], dtype: torch.dtype = torch.float32) -> list[Any]:
    vae = split(build(config).to(dtype))
    return [answer(result(vae, case[0], inputs(config, *case).to(dtype))) for case in cases]


def check_results(ranks: Ranks, config: VAEConfig, cases: list[Any]) -> None:
    vae, answers = build(config), ranks.run(_results, config, cases)
    for case, got in zip(cases, map(same_on_all, zip(*answers, strict=True)), strict=True):
        want = result(vae, case[0], inputs(config, *case))
        assert got.shape == want.shape, case
        assert rel_rms(got, want) <= VAE_SPLIT_FP32, case


@pytest.mark.parametrize("count", [2, 3])
def test_the_result_is_that_of_one_process(ranks: OfRanks, count: int) -> None:
    check_results(ranks(count), VAE_CONFIG, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_every_kind_of_video(ranks: OfRanks, count: int) -> None:
    check_results(ranks(count), VAE_CONFIG, CASES)
