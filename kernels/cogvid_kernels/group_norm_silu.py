"""GroupNorm and SiLU of the VAE, and GroupNorm modulated by the latents (spatial norm) and SiLU; forward only.

    group_norm_silu      silu(GroupNorm(x)), the encoder's norm
    spatial_norm_silu    silu(GroupNorm(x) * up(scale) + up(shift)): diffusers' `CogVideoXSpatialNorm3D` after its
                         convolutions, which run at latent resolution; `up` takes the nearest latent
    channel_statistics   the first half of both, and norm_silu the second: for a picture that several devices share

Bound by memory: x is read twice and written once. Three kernels:

- statistics: each program reads a range of positions of some channels and writes the mean and the sum of squared
  differences of each channel. It sums differences from the mean of its own first tile, so nothing cancels, however
  large the mean is.
- merge: one program per group merges these by the formula of Chan, Golub and LeVeque, relative to one of the means.
- apply: each program writes a part of one row of pixels of one frame. So the latent's frame and row are two numbers,
  and only its column is computed per pixel.

Contiguous `[B, C, T, H, W]` and channels-last memory are both read in place: a tile is positions x channels with one
stride each, and the compiler puts the threads along the stride that is 1. Every index is 64-bit before it is multiplied
by a stride, because one activation at full size has more than 2**31 elements.

Letters: B batch, C channels, T H W frames, height and width, P = T * H * W positions; t h w the latents' T H W.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogvid_kernels._cases import KernelCase
from cogvid_kernels._checks import check_alignment, check_runnable, check_tensor
from cogvid_kernels._interpreter import round_to
from cogvid_kernels._operators import register, want_tensors
from cogvid_kernels._rows import check_parameter
from cogvid_kernels._tiles import architecture, tile_for

# Ranges of positions per sample: enough programs to fill the largest GPU several times, few enough to merge cheaply.
MAX_SPLITS = 1024
# With fewer tiles per program, reading the first one twice would cost a large share of the time.
_MIN_TILES = 8
_MERGE_BLOCK = 64
_LATENTS = ("scale", "shift")


@triton.jit
def _statistics_kernel(
    x,  # [B, C, P] by its strides
    means,  # [B, splits, C] fp32 contiguous
    squares,  # the same: sums of squared differences from the mean
    stride_b,
    stride_c,
    stride_p,
    num_channels,
    num_positions,
    span,  # positions per program, a multiple of BLOCK_P
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_split = tl.program_id(0)
    start_c = tl.program_id(1) * BLOCK_C
    i_b = tl.program_id(2).to(tl.int64)
    start = i_split.to(tl.int64) * span
    stop = tl.minimum(start + span, num_positions)
    o_p = tl.arange(0, BLOCK_P)
    o_c = tl.arange(0, BLOCK_C)
    in_channels = (start_c + o_c < num_channels)[None, :]
    x_run = x + i_b * stride_b + start_c.to(tl.int64) * stride_c + start * stride_p
    o_x = o_p.to(tl.int64)[:, None] * stride_p + o_c.to(tl.int64)[None, :] * stride_c
    count = (stop - start).to(tl.int32)

    b_first = tl.load(x_run + o_x, mask=(o_p < count)[:, None] & in_channels, other=0.0).to(tl.float32)
    b_center = tl.sum(b_first, 0) / tl.minimum(count, BLOCK_P)
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_square = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for offset in tl.range(0, count, BLOCK_P):
        mask = (offset + o_p < count)[:, None] & in_channels
        p_x = x_run + tl.full([], offset, tl.int64) * stride_p + o_x
        b_difference = tl.load(p_x, mask=mask, other=0.0).to(tl.float32) - b_center[None, :]
        b_difference = tl.where(mask, b_difference, 0.0)
        b_sum += b_difference
        b_square += b_difference * b_difference
    b_shift = tl.sum(b_sum, 0) / count
    o_out = (i_b * tl.num_programs(0) + i_split) * num_channels + start_c + o_c
    mask_out = start_c + o_c < num_channels
    tl.store(means + o_out, b_center + b_shift, mask=mask_out)
    tl.store(squares + o_out, tl.sum(b_square, 0) - b_shift * b_shift * count, mask=mask_out)


@triton.jit
def _merge_kernel(
    means,  # [B, splits, C] fp32 contiguous
    squares,  # the same
    group_means,  # [B, groups] fp32 contiguous
    group_inverses,  # the same: 1 / sqrt(variance + eps)
    num_channels,
    num_positions,
    num_splits,
    span,
    eps,
    CHANNELS: tl.constexpr,  # in a group
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_g = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    o_c = tl.arange(0, BLOCK_C)
    base = i_b * num_splits * num_channels + i_g * CHANNELS
    center = tl.load(means + base)
    b_sum = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    b_square = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in tl.range(0, num_splits, BLOCK_S):
        o_split = (start + o_s).to(tl.int64)
        mask = (o_split < num_splits)[:, None] & (o_c < CHANNELS)[None, :]
        # The last range is shorter; ranges after it are empty.
        b_count = tl.maximum(tl.minimum(num_positions - o_split * span, span), 0).to(tl.float32)[:, None]
        o_in = base + o_split[:, None] * num_channels + o_c[None, :]
        b_difference = tl.load(means + o_in, mask=mask, other=0.0) - center
        b_difference = tl.where(mask, b_difference, 0.0)
        b_sum += b_count * b_difference
        b_square += tl.load(squares + o_in, mask=mask, other=0.0) + b_count * b_difference * b_difference
    count = num_positions.to(tl.float32) * CHANNELS
    shift = tl.sum(tl.sum(b_sum, 1), 0) / count
    # Rounding can leave a group of equal values a little below zero.
    variance = tl.maximum(tl.sum(tl.sum(b_square, 1), 0) / count - shift * shift, 0.0, tl.PropagateNan.ALL)
    o_out = i_b * tl.num_programs(0) + i_g
    tl.store(group_means + o_out, center + shift)
    tl.store(group_inverses + o_out, tl.rsqrt(variance + eps))


@triton.jit
def _apply_kernel(
    x,  # [B, C, T * H rows, W] by its strides
    out,  # in the same memory layout
    group_means,  # [B, groups] fp32 contiguous
    group_inverses,  # the same
    weight,  # [C]
    bias,  # [C]
    scale,  # [B, C, t, h, w] by its strides; read when SPATIAL
    shift,  # the same shape
    stride_b,
    stride_c,
    stride_p,
    stride_scale_b,
    stride_scale_c,
    stride_scale_t,
    stride_scale_h,
    stride_scale_w,
    stride_shift_b,
    stride_shift_c,
    stride_shift_t,
    stride_shift_h,
    stride_shift_w,
    num_channels,
    num_groups,
    num_rows,  # frames * height
    frames,
    latent_frames,
    height,
    width,
    CHANNELS: tl.constexpr,  # in a group
    SPATIAL: tl.constexpr,
    ALONE: tl.constexpr,  # the first frame has the first latent frame to itself
    UP_H: tl.constexpr,  # height / h
    UP_W: tl.constexpr,  # width / w
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pieces = tl.cdiv(width, BLOCK_P)
    i_row = tl.program_id(0) // pieces * ROWS
    o_w = tl.program_id(0) % pieces * BLOCK_P
    start_c = tl.program_id(1) * BLOCK_C
    i_b = tl.program_id(2).to(tl.int64)
    if ROWS == 1:
        o_w += tl.arange(0, BLOCK_P)
        in_frames = o_w < width
    else:
        # Here the row is one number per pixel; in the other branch it is one number per program.
        o_w += tl.arange(0, ROWS * BLOCK_P) % BLOCK_P
        i_row += tl.arange(0, ROWS * BLOCK_P) // BLOCK_P
        in_frames = (o_w < width) & (i_row < num_rows)
    o_c = start_c + tl.arange(0, BLOCK_C).to(tl.int64)
    in_channels = o_c < num_channels
    mask = in_frames[:, None] & in_channels[None, :]

    o_x = i_b * stride_b + ((i_row.to(tl.int64) * width + o_w) * stride_p)[:, None] + (o_c * stride_c)[None, :]
    b_x = tl.load(x + o_x, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    o_group = i_b * num_groups + o_c // CHANNELS
    b_mean = tl.load(group_means + o_group, mask=in_channels, other=0.0)
    b_gain = tl.load(group_inverses + o_group, mask=in_channels, other=0.0)
    b_gain *= tl.load(weight + o_c, mask=in_channels, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + o_c, mask=in_channels, other=0.0).to(tl.float32)
    # The mean is subtracted first: bias - mean * gain would cancel where the mean is large.
    b_y = (b_x - b_mean[None, :]) * b_gain[None, :] + b_bias[None, :]

    if SPATIAL:
        i_t = i_row // height
        if ALONE:
            latent_t = tl.where(i_t == 0, 0, 1 + (i_t - 1) * (latent_frames - 1) // (frames - 1))
        else:
            latent_t = i_t * latent_frames // frames
        latent_h = i_row % height // UP_H
        latent_w = o_w // UP_W
        # Only now, because a 64-bit division takes many instructions.
        latent_t, latent_h, latent_w = latent_t.to(tl.int64), latent_h.to(tl.int64), latent_w.to(tl.int64)
        row_scale = latent_t * stride_scale_t + latent_h * stride_scale_h
        row_shift = latent_t * stride_shift_t + latent_h * stride_shift_h
        o_scale = (row_scale + latent_w * stride_scale_w)[:, None] + (o_c * stride_scale_c)[None, :]
        o_shift = (row_shift + latent_w * stride_shift_w)[:, None] + (o_c * stride_shift_c)[None, :]
        b_scale = tl.load(scale + i_b * stride_scale_b + o_scale, mask=mask, other=0.0).to(tl.float32)
        b_shift = tl.load(shift + i_b * stride_shift_b + o_shift, mask=mask, other=0.0).to(tl.float32)
        b_y = b_y * b_scale + b_shift

    b_y = b_y / (1 + tl.exp(-b_y))
    tl.store(out + o_x, round_to(b_y, out.dtype.element_ty), mask=mask)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int, eps: float) -> Tensor:
    """Compute `silu(GroupNorm(x))`, statistics over all frames given; forward only.

    Args:
        x: `[B, C, T, H, W]` fp32, bf16 or fp16, contiguous or channels-last.
        weight, bias: `[C]`, any of the three dtypes.

    Returns:
        `[B, C, T, H, W]` in x's dtype and memory layout.

    Raises:
        ValueError: an argument is not as described; the message names it.
    """
    want_tensors(x=x, weight=weight, bias=bias)
    return _group_norm_silu_operator(x, weight, bias, num_groups, eps)


def spatial_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, *, num_groups: int, eps: float
) -> Tensor:
    """Compute `silu(GroupNorm(x) * up(scale) + up(shift))`, `up` being nearest upsampling to x's frames and size.

    When T is odd and above 1, frame 0 takes latent frame 0 and the other frames are upsampled from the others. Forward
    only.

    Args:
        x: `[B, C, T, H, W]` fp32, bf16 or fp16, contiguous or channels-last.
        weight, bias: `[C]`, any of the three dtypes.
        scale, shift: `[B, C, t, h, w]`, any of the three dtypes, any strides; t at most T (and at least 2 when T is odd
            and above 1), H a multiple of h and W of w.

    Returns:
        `[B, C, T, H, W]` in x's dtype and memory layout.

    Raises:
        ValueError: an argument is not as described; the message names it.
    """
    want_tensors(x=x, weight=weight, bias=bias, scale=scale, shift=shift)
    return _spatial_norm_silu_operator(x, weight, bias, scale, shift, num_groups, eps)


def channel_statistics(x: Tensor) -> Tensor:
    """Return the mean and the variance of each channel; forward only.

    Args:
        x: `[B, C, T, H, W]` fp32, bf16 or fp16, contiguous or channels-last.

    Returns:
        `[2, B, C]` fp64.

    Raises:
        ValueError: x is not as described.
    """
    want_tensors(x=x)
    return _channel_statistics_operator(x)


def norm_silu(
    x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, *modulation: Tensor, num_groups: int, eps: float
) -> Tensor:
    """Compute `group_norm_silu`, or `spatial_norm_silu` if modulation is scale and shift, from given statistics.

    Args:
        statistics: `[2, B, C]` fp64, the mean and the variance of each channel.
        The others are those of `spatial_norm_silu`; forward only.

    Raises:
        ValueError: an argument is not as described; the message names it.
    """
    if len(modulation) not in (0, 2):
        raise ValueError(f"modulation: got {len(modulation)} tensors, want scale and shift or none")
    want_tensors(x=x, statistics=statistics, weight=weight, bias=bias, **dict(zip(_LATENTS, modulation, strict=False)))
    return _norm_silu_operator(x, statistics, weight, bias, list(modulation), num_groups, eps)


def _group_norm_silu_outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,  # noqa: ARG001 - the operator's arguments
) -> Tensor:
    _check(x, weight, bias, num_groups)
    return torch.empty_like(x)


def _group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    out = _group_norm_silu_outputs(x, weight, bias, num_groups, eps)
    check_alignment(x=x, weight=weight, bias=bias)
    _launch(x, out, weight, bias, None, None, num_groups, eps)
    return out


def _spatial_norm_silu_outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    num_groups: int,
    eps: float,  # noqa: ARG001 - the operator's arguments
) -> Tensor:
    _check(x, weight, bias, num_groups)
    _check_modulation(scale, shift, x)
    return torch.empty_like(x)


def _spatial_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, num_groups: int, eps: float
) -> Tensor:
    out = _spatial_norm_silu_outputs(x, weight, bias, scale, shift, num_groups, eps)
    check_alignment(x=x, weight=weight, bias=bias, scale=scale, shift=shift)
    _launch(x, out, weight, bias, scale, shift, num_groups, eps)
    return out


def _channel_statistics_outputs(x: Tensor) -> Tensor:
    _check_x(x)
    return x.new_empty(2, *x.shape[:2], dtype=torch.float64)


def _channel_statistics(x: Tensor) -> Tensor:
    _check_x(x)
    check_alignment(x=x)
    with torch.cuda.device_of(x):
        means, squares, span = _statistics(x)
    means, squares, positions = means.double(), squares.double(), x[0, 0].numel()
    counts = (positions - span * torch.arange(means.shape[1], device=x.device)).clamp(max=span).double()
    shares = (counts / positions)[:, None]
    mean = (shares * means).sum(1)  # [B, C]
    return torch.stack([mean, squares.sum(1) / positions + (shares * (means - mean[:, None]) ** 2).sum(1)])


def _norm_silu_outputs(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    modulation: list[Tensor],
    num_groups: int,
    eps: float,  # noqa: ARG001
) -> Tensor:
    _check(x, weight, bias, num_groups)
    if modulation:
        _check_modulation(*modulation, x)
    wanted = [2, *x.shape[:2]]
    if list(statistics.shape) != wanted:
        raise ValueError(f"statistics: got shape {list(statistics.shape)}, want {wanted}")
    if (statistics.dtype, statistics.device) != (torch.float64, x.device):
        raise ValueError(f"statistics: got {statistics.dtype} on {statistics.device}, want float64 on {x.device}")
    return torch.empty_like(x)


def _norm_silu(
    x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, modulation: list[Tensor], num_groups: int, eps: float
) -> Tensor:
    out = _norm_silu_outputs(x, statistics, weight, bias, modulation, num_groups, eps)
    check_alignment(x=x, weight=weight, bias=bias, **dict(zip(_LATENTS, modulation, strict=False)))
    mean, variance = statistics.unflatten(2, (num_groups, -1))  # [B, groups, C / groups]
    # The variance of a group is the mean of the variances of its channels plus the variance of their means.
    between, group_means = torch.var_mean(mean, dim=2, correction=0)
    group_inverses = (variance.mean(2) + between + eps).rsqrt()
    with torch.cuda.device_of(x):
        _apply(x, out, group_means.float(), group_inverses.float(), weight, bias, *(modulation or (None, None)))
    return out


_group_norm_silu_operator = register(_group_norm_silu, _group_norm_silu_outputs)
_spatial_norm_silu_operator = register(_spatial_norm_silu, _spatial_norm_silu_outputs)
_channel_statistics_operator = register(_channel_statistics, _channel_statistics_outputs)
_norm_silu_operator = register(_norm_silu, _norm_silu_outputs)


def _check_x(x: Tensor) -> None:
    if x.ndim != 5:
        raise ValueError(f"x: got shape {list(x.shape)}, want [B, C, T, H, W]")
    check_tensor("x", x, any_strides=True)
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last_3d)):
        raise ValueError(f"x: got strides {x.stride()} of shape {list(x.shape)}, want contiguous or channels-last")
    check_runnable("x", x, _apply_kernel)


def _check(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int) -> None:
    _check_x(x)
    channels = x.shape[1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_parameter(name, parameter, (channels,), x.device)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups: got {num_groups}, want a divisor of {channels}, the number of channels")


def _check_modulation(scale: Tensor, shift: Tensor, x: Tensor) -> None:
    for name, tensor in zip(_LATENTS, (scale, shift), strict=True):
        _check_latent(name, tensor, x)
    if shift.shape != scale.shape:
        raise ValueError(f"shift: got shape {list(shift.shape)}, want that of scale, {list(scale.shape)}")


def _check_latent(name: str, latent: Tensor, x: Tensor) -> None:
    shape = (*x.shape[:2], None, None, None)
    check_tensor(name, latent, shape=shape, device=x.device, any_strides=True)
    frames, height, width = x.shape[2:]
    latent_frames, latent_height, latent_width = latent.shape[2:]
    least = 2 if _first_is_alone(frames) else 1
    if not least <= latent_frames <= frames or height % latent_height or width % latent_width:
        raise ValueError(
            f"{name}: got t, h, w = {latent_frames}, {latent_height}, {latent_width} for T, H, W = {frames}, {height},"
            f" {width}, want t from {least} to T, and divisors of H and W"
        )


def _first_is_alone(frames: int) -> bool:
    return frames > 1 and frames % 2 == 1


def _launch(
    x: Tensor,
    out: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
) -> None:
    with torch.cuda.device_of(x):
        means, squares, span = _statistics(x)
        group_means, group_inverses = (x.new_empty(len(x), num_groups, dtype=torch.float32) for _ in range(2))
        _merge_kernel[num_groups, len(x)](**_merge_arguments(means, squares, group_means, group_inverses, x, span, eps))
        _apply(x, out, group_means, group_inverses, weight, bias, scale, shift)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the mean and the sum of squared differences of each channel in each range, and the positions of a range.

    The first two are `[B, ranges, C]` fp32.
    """
    arguments = _statistics_arguments(x, architecture(x))
    splits, blocks = _statistics_grid(x, arguments)
    means, squares = (x.new_empty(len(x), splits, x.shape[1], dtype=torch.float32) for _ in range(2))
    _statistics_kernel[splits, blocks, len(x)](means=means, squares=squares, **arguments)
    return means, squares, arguments["span"]


def _apply(
    x: Tensor,
    out: Tensor,
    group_means: Tensor,
    group_inverses: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    apply = _apply_arguments(x, out, group_means, group_inverses, weight, bias, scale, shift, architecture(x))
    rows, pieces = triton.cdiv(apply["num_rows"], apply["ROWS"]), triton.cdiv(apply["width"], apply["BLOCK_P"])
    _apply_kernel[rows * pieces, triton.cdiv(x.shape[1], apply["BLOCK_C"]), len(x)](**apply)


def _layout(x: Tensor) -> tuple[str, int, int]:
    """Return the shape class and the strides of channels and positions."""
    if x.is_contiguous():
        return "contiguous", x[0, 0].numel(), 1
    return "channels_last", 1, x.shape[1]


def _blocks(operation: str, x: Tensor, positions: int, arch: int) -> dict[str, int]:
    """Return the table's tile, made no larger than the tensor."""
    options = tile_for(operation, _layout(x)[0], arch).options
    limits = {"BLOCK_C": x.shape[1], "BLOCK_P": positions}
    return options | {name: min(options[name], triton.next_power_of_2(limit)) for name, limit in limits.items()}


def _statistics_arguments(x: Tensor, arch: int) -> dict[str, Any]:
    _, stride_c, stride_p = _layout(x)
    positions = x[0, 0].numel()
    options = _blocks("group_norm/statistics", x, positions, arch)
    tiles = triton.cdiv(positions, options["BLOCK_P"])
    return {
        "x": x,
        "stride_b": x[0].numel(),
        "stride_c": stride_c,
        "stride_p": stride_p,
        "num_channels": x.shape[1],
        "num_positions": positions,
        "span": max(triton.cdiv(tiles, MAX_SPLITS), _MIN_TILES) * options["BLOCK_P"],
        "enable_fp_fusion": True,
        **options,
    }


def _statistics_grid(x: Tensor, arguments: dict[str, Any]) -> tuple[int, int]:
    splits = triton.cdiv(arguments["num_positions"], arguments["span"])
    return splits, triton.cdiv(x.shape[1], arguments["BLOCK_C"])


def _merge_arguments(
    means: Tensor, squares: Tensor, group_means: Tensor, group_inverses: Tensor, x: Tensor, span: int, eps: float
) -> dict[str, Any]:
    channels = x.shape[1] // group_means.shape[1]
    return {
        "means": means,
        "squares": squares,
        "group_means": group_means,
        "group_inverses": group_inverses,
        "num_channels": x.shape[1],
        "num_positions": x[0, 0].numel(),
        "num_splits": means.shape[1],
        "span": span,
        "eps": eps,
        "CHANNELS": channels,
        "BLOCK_S": _MERGE_BLOCK,
        "BLOCK_C": triton.next_power_of_2(channels),
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def _apply_arguments(
    x: Tensor,
    out: Tensor,
    group_means: Tensor,
    group_inverses: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    arch: int,
) -> dict[str, Any]:
    _, stride_c, stride_p = _layout(x)
    _, channels, frames, height, width = x.shape
    if scale is None:
        # Nothing depends on the position: all positions are one row.
        frames, height, width = 1, 1, frames * height * width
    latent = (1, height, width) if scale is None else tuple(scale.shape[2:])
    strides = {
        f"stride_{name}_{axis}": 0 if tensor is None else tensor.stride(i)
        for name, tensor in (("scale", scale), ("shift", shift))
        for i, axis in enumerate("bcthw")
    }
    return {
        "x": x,
        "out": out,
        "group_means": group_means,
        "group_inverses": group_inverses,
        "weight": weight,
        "bias": bias,
        "scale": scale,
        "shift": shift,
        "stride_b": x[0].numel(),
        "stride_c": stride_c,
        "stride_p": stride_p,
        **strides,
        "num_channels": channels,
        "num_groups": group_means.shape[1],
        "num_rows": frames * height,
        "frames": frames,
        "latent_frames": latent[0],
        "height": height,
        "width": width,
        "CHANNELS": channels // group_means.shape[1],
        "SPATIAL": scale is not None,
        "ALONE": scale is not None and _first_is_alone(frames),
        "UP_H": height // latent[1],
        "UP_W": width // latent[2],
        "enable_fp_fusion": True,
        **_blocks("group_norm/apply", x, width, arch),
    }


def compile_cases(arch: int) -> list[KernelCase]:
    """List the norms of the largest and of the widest stage, in both layouts."""
    cases = []
    sass = ("LDG.E.128",)
    for name, shape, dtype, layout in (
        ("bf16-128x9x480x720-channels_last", (1, 128, 9, 480, 720), torch.bfloat16, torch.channels_last_3d),
        ("bf16-512x2x60x90-channels_last", (1, 512, 2, 60, 90), torch.bfloat16, torch.channels_last_3d),
        ("bf16-128x9x480x720-contiguous", (1, 128, 9, 480, 720), torch.bfloat16, torch.contiguous_format),
        ("fp32-128x9x480x720-channels_last", (1, 128, 9, 480, 720), torch.float32, torch.channels_last_3d),
    ):
        x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
        latent = torch.empty(
            *shape[:2], (shape[2] + 1) // 4 + 1, 60, 90, dtype=dtype, device="meta", memory_format=layout
        )
        statistics = _statistics_arguments(x, arch)
        means = torch.empty(1, _statistics_grid(x, statistics)[0], shape[1], dtype=torch.float32, device="meta")
        groups = torch.empty(1, 32, dtype=torch.float32, device="meta")
        affine = x.new_empty(shape[1])
        forms = {"group_norm_silu": (None, None), "spatial_norm_silu": (latent, latent)}
        cases.append(
            KernelCase(
                f"group_norm/statistics/{name}",
                _statistics_kernel,
                {**statistics, "means": means, "squares": means},
                sass,
            )
        )
        for form, modulation in forms.items():
            arguments = _apply_arguments(x, x, groups, groups, affine, affine, *modulation, arch)
            cases.append(KernelCase(f"{form}/apply/{name}", _apply_kernel, arguments, (*sass, "STG.E.128")))
    merge = _merge_arguments(means, means, groups, groups, x, statistics["span"], 1e-6)
    return [*cases, KernelCase("group_norm/merge/32", _merge_kernel, merge)]
