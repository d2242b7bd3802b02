"""Position tables against diffusers' functions and the grid rules of its pipelines."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cogvid.models.rope import Positions, index_positions, resize_crop_positions, rotary_table, sincos_table

GRIDS = {
    "native": (13, 30, 45),
    "portrait": (13, 45, 30),
    "wider": (3, 20, 45),
    "taller": (3, 30, 31),
    "larger": (2, 48, 85),
    "portrait-odd": (2, 37, 22),
    "one-patch": (1, 1, 1),
}
WIDTHS = (16, 24, 24)


def pipeline_rope(
    grid: tuple[int, int, int], patch_size_t: int | None, sample_height: int, sample_width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the method of diffusers' pipeline, which reads only these attributes of its object."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    config = SimpleNamespace(
        patch_size=2,
        patch_size_t=patch_size_t,
        sample_height=sample_height,
        sample_width=sample_width,
        attention_head_dim=sum(WIDTHS),
    )
    pipeline = SimpleNamespace(vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=config))
    frames, height, width = grid
    return diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipeline, height * 16, width * 16, frames * (patch_size_t or 1), torch.device("cpu")
    )


def assert_same_rotation(positions: Positions, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    for ours, theirs in zip(rotary_table(positions, WIDTHS), expected, strict=True):
        assert ours.dtype == torch.float32
        # Theirs has every angle twice, once for each channel of a pair.
        assert torch.equal(ours.repeat_interleave(2, dim=1), theirs)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_resize_crop_rotation_is_that_of_the_pipeline(grid: tuple[int, int, int]) -> None:
    assert_same_rotation(resize_crop_positions(grid, (30, 45)), pipeline_rope(grid, None, 60, 90))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("sample", [(300, 300), (96, 170)], ids=["300x300", "96x170"])
def test_index_rotation_is_that_of_the_pipeline(grid: tuple[int, int, int], sample: tuple[int, int]) -> None:
    """The two sizes in 1.5 configs give the same numbers, wherever upstream does not fail."""
    if grid[1] * 2 > sample[0] or grid[2] * 2 > sample[1]:
        with pytest.raises(RuntimeError):
            pipeline_rope(grid, 2, *sample)
    else:
        assert_same_rotation(index_positions(grid), pipeline_rope(grid, 2, *sample))


def test_resize_crop_counts_at_the_training_size() -> None:
    for ours, count in zip(resize_crop_positions((13, 30, 45), (30, 45)), (13, 30, 45), strict=True):
        torch.testing.assert_close(ours, torch.arange(count, dtype=torch.float32), rtol=2e-7, atol=0)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("scales", [(1.875, 1.0), (1.0, 1.5)], ids=["2b", "other-scales"])
def test_sincos_table_is_that_of_diffusers(grid: tuple[int, int, int], scales: tuple[float, float]) -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings", reason="needs diffusers")
    frames, height, width = grid
    theirs = embeddings.get_3d_sincos_pos_embed(sum(WIDTHS), (width, height), frames, *scales).flatten(0, 1)
    ours = sincos_table(grid, WIDTHS, spatial_scale=scales[0], temporal_scale=scales[1])
    # Compared in fp64. After rounding to fp32, as in the models, some values near a tie could differ.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-15)
