"""What the kernels that work on rows share: how many rows a program computes, and how a tensor is read as rows."""

import torch
import triton
from torch import Tensor

from cogvid_kernels._checks import FLOATS, check_tensor
from cogvid_kernels._tiles import Tile, tile_for

MAX_WIDTH = 16384
_CLASSES = (128, 1024, 4096, MAX_WIDTH)


def row_tile(width: int, arch: int) -> Tile:
    """Return the tile for rows of so many elements; a block is as wide as the row, rounded up to a power of two."""
    shape_class = next(limit for limit in _CLASSES if width <= limit)
    tile = tile_for("rows", str(shape_class), arch)
    return Tile({**tile.blocks, "BLOCK_D": triton.next_power_of_2(width)}, tile.num_warps, tile.num_stages)


def check_rows(name: str, x: Tensor, ndim: int | None = None) -> None:
    """Raise ValueError unless x is `[..., D]` as the kernels take it."""
    check_tensor(name, x, shape=None if ndim is None else (None,) * ndim)
    if x.ndim == 0 or x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"{name}: got shape {list(x.shape)}, want a last size of at most {MAX_WIDTH}")


def check_parameter(name: str, parameter: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ValueError unless it is a tensor of that shape, in any of the dtypes: kernels widen it to fp32."""
    check_tensor(name, parameter, shape=shape, dtypes=FLOATS, device=device)


def as_rows(name: str, x: Tensor) -> tuple[int, int, int, int]:
    """Describe `[..., D]` as outer x inner rows.

    Returns:
        outer, inner, and the stride of each.

    Raises:
        ValueError: more than two strides would be needed.
    """
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = axes[-1][0] * size, stride
        else:
            axes.append((size, stride))
    if len(axes) > 2:
        raise ValueError(f"{name}: got strides {x.stride()}, want leading axes that merge into at most two")
    while len(axes) < 2:
        axes.append((1, 0))
    (outer, stride_outer), (inner, stride_inner) = axes
    return outer, inner, stride_outer, stride_inner
