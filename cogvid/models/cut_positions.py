"""CogVideoX 1.0 with the position tables that the authors' own code (SAT) takes at other sizes than the trained one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cogvid.config import Grid
from cogvid.models.rope import Positions, index_positions
from cogvid.models.transformer import Transformer


class CutPositions(Transformer):
    """Cut the tables out of those of the trained size: `dit_video_concat.py` of SAT.

    The rotary table is cut along each axis. The sin-cos table of 2B is a list of the trained grid's tokens, of which
    the first are taken, whatever the shape of the grid.
    """

    def _rotary_positions(self, grid: Grid, device: torch.device) -> Positions:
        self._check_grid(grid)
        return index_positions(grid, device)

    def _sincos_table(self, grid: Grid, device: torch.device | None = None) -> Tensor:
        self._check_grid(grid)
        return super()._sincos_table(self.config.trained_grid, device)[: math.prod(grid)]

    def _check_grid(self, grid: Grid) -> None:
        trained = self.config.trained_grid
        if any(n > most for n, most in zip(grid, trained, strict=True)):
            got, want = ("x".join(map(str, each)) for each in (grid, trained))
            raise ValueError(f"latents: got {got} patches, want at most {want} with position_tables='sat'")
