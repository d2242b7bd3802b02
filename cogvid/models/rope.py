"""Position tables of the video tokens, and the rules that give each token its position. Pure functions.

`rotary_table` must equal diffusers' `get_3d_rotary_pos_embed` and `sincos_table` its `get_3d_sincos_pos_embed`.
A grid is (frames, height, width) in patches. Tokens are in that order, width fastest.
`widths` are the numbers of channels for time, height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvid.config import Grid

Positions = tuple[Tensor, Tensor, Tensor]

THETA = 10000.0


def rotary_table(positions: Positions, widths: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotation of every token, one angle per pair of neighbouring channels.

    positions: fp32 `[frames]`, `[height]`, `[width]`, from one of the two grid rules below.
    Returns two fp32 tensors `[frames * height * width, sum(widths) / 2]`.
    """
    time, rows, columns = (_angles(p, width) for p, width in zip(positions, widths, strict=True))
    angles = time[:, None, None], rows[None, :, None], columns[None, None, :]
    # Cosine and sine are computed along each axis, which is short, and then expanded over the grid.
    return _over_grid(*(a.cos() for a in angles)), _over_grid(*(a.sin() for a in angles))


def _angles(position: Tensor, width: int) -> Tensor:
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=position.device) / width
    return torch.outer(position, 1.0 / THETA**exponent)


def resize_crop_positions(grid: Grid, base: tuple[int, int], device: torch.device | None = None) -> Positions:
    """Fit the grid into the training grid, as CogVideoX 1.0 does: keep its aspect ratio, centre it, scale its steps.

    base: height and width, in patches, of the videos that the model was trained on. Frames are numbered from 0.
    At the training size the positions are 0, 1, 2, ... along every axis.
    """
    frames, height, width = grid
    base_height, base_width = base
    if height / width > base_height / base_width:
        fit_height, fit_width = base_height, round(base_height / height * width)
    else:
        fit_height, fit_width = round(base_width / width * height), base_width
    top = round((base_height - fit_height) / 2.0)
    left = round((base_width - fit_width) / 2.0)
    return (
        torch.arange(frames, dtype=torch.float32, device=device),
        _steps(top, top + fit_height, height, device),
        _steps(left, left + fit_width, width, device),
    )


def _steps(start: int, stop: int, count: int, device: torch.device | None) -> Tensor:
    # The last position is a fraction of `stop`, not of `stop - start`. That is exact only if start is 0, but it is how
    # the models run.
    return torch.linspace(start, stop * (count - 1) / count, count, dtype=torch.float32, device=device)


def index_positions(grid: Grid, device: torch.device | None = None) -> Positions:
    """Return positions 0, 1, 2, ... along every axis, as CogVideoX 1.5 does.

    diffusers slices the same numbers from a table of the configured size, and fails if the grid is larger.
    """
    frames, height, width = (torch.arange(n, dtype=torch.float32, device=device) for n in grid)
    return frames, height, width


def sincos_table(
    grid: Grid,
    widths: tuple[int, int, int],
    *,
    spatial_scale: float,
    temporal_scale: float,
    device: torch.device | None = None,
) -> Tensor:
    """Return the table that CogVideoX-2B adds to its video tokens, fp64 `[frames * height * width, sum(widths)]`.

    spatial_scale, temporal_scale: positions are divided by them. The channels are those of time, then of WIDTH, then
    of height (upstream swaps the two); in each, sines come before cosines.
    """
    frames, height, width = index_positions(grid, device)
    time_width, height_width, width_width = widths
    time = _sincos(frames / temporal_scale, time_width)
    rows = _sincos(height / spatial_scale, height_width)
    columns = _sincos(width / spatial_scale, width_width)
    return _over_grid(time[:, None, None], columns[None, None, :], rows[None, :, None])


def _sincos(position: Tensor, width: int) -> Tensor:
    exponent = torch.arange(width // 2, dtype=torch.float64, device=position.device) / (width / 2)
    angle = torch.outer(position.double(), 1.0 / THETA**exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _over_grid(*tables: Tensor) -> Tensor:
    """Expand tables `[frames or 1, height or 1, width or 1, channels]` over the grid and concatenate their channels."""
    grid = torch.broadcast_shapes(*(table.shape[:3] for table in tables))
    return torch.cat([table.expand(*grid, -1) for table in tables], dim=-1).flatten(0, 2)
