"""What a block computes between its linears: gated residual, LayerNorm, modulation; one pass over the tokens.

One kernel, three functions, equal to diffusers' `CogVideoXLayerNormZero` and the residual additions of its
`CogVideoXBlock`:

    layer_norm_modulate           LayerNorm(x) * (1 + scale) + shift
    gate_residual                 x + gate * y
    gate_residual_norm_modulate   the second, then the first on its result

Modulation has two rows, one for the text tokens and one for the video tokens after them, picked by token index.

Bound by memory. A program computes one row. Weight, bias, shift, scale and gate are a few rows that all tokens share,
so they come from the L1 cache. Kept in registers for several rows, they would fill half of the registers, and too few
programs would fit on a multiprocessor to keep enough loads in flight.

Letters: B batch, N tokens, D model width.
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
from cogvid_kernels._rows import check_parameter, check_rows, row_tile
from cogvid_kernels._tiles import architecture


@triton.jit
def _modulate_kernel(
    x,  # [B, N, D] by its strides
    y,  # [B, N, D] by its strides; read when GATE
    gate,  # [B, 2, D] by its strides; read when GATE
    weight,  # [D]; this and the next three are read when NORM
    bias,  # [D]
    shift,  # [B, 2, D] by its strides
    scale,  # [B, 2, D] by its strides
    out_sum,  # [B, N, D] contiguous; written when GATE
    out_norm,  # [B, N, D] contiguous; written when NORM
    stride_xb,
    stride_xn,
    stride_yb,
    stride_yn,
    stride_gate_b,
    stride_gate_row,
    stride_shift_b,
    stride_shift_row,
    stride_scale_b,
    stride_scale_row,
    num_tokens,
    num_rows,  # B * N
    text_len,
    eps,
    D: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_d = tl.arange(0, BLOCK_D)
    in_row = (o_d < D)[None, :]
    mask = (o_r < num_rows)[:, None] & in_row
    o_n = (o_r % num_tokens).to(tl.int64)
    o_b = (o_r // num_tokens).to(tl.int64)
    stream = (o_n >= text_len).to(tl.int64)
    o_out = o_r.to(tl.int64)[:, None] * D + o_d[None, :]

    p_x = x + (o_b * stride_xb + o_n * stride_xn)[:, None] + o_d[None, :]
    # Each token is read once; the L1 cache is for the few rows that all of them share.
    b_x = tl.load(p_x, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if GATE:
        p_y = y + (o_b * stride_yb + o_n * stride_yn)[:, None] + o_d[None, :]
        b_y = tl.load(p_y, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        p_gate = gate + (o_b * stride_gate_b + stream * stride_gate_row)[:, None] + o_d[None, :]
        b_sum = round_to(b_x + tl.load(p_gate, mask=mask, other=0.0).to(tl.float32) * b_y, x.dtype.element_ty)
        tl.store(out_sum + o_out, b_sum, mask=mask)
        # The norm sees the rounded sum, which is what the next residual adds to.
        b_x = b_sum.to(tl.float32)
    if NORM:
        b_x = tl.where(in_row, b_x - (tl.sum(b_x, 1) / D)[:, None], 0.0)
        b_inverse = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)
        p_shift = shift + (o_b * stride_shift_b + stream * stride_shift_row)[:, None] + o_d[None, :]
        p_scale = scale + (o_b * stride_scale_b + stream * stride_scale_row)[:, None] + o_d[None, :]
        b_w = tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_b = tl.load(bias + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_gain = 1 + tl.load(p_scale, mask=mask, other=0.0).to(tl.float32)
        b_shift = tl.load(p_shift, mask=mask, other=0.0).to(tl.float32)
        b_out = (b_x * b_inverse[:, None] * b_w[None, :] + b_b[None, :]) * b_gain + b_shift
        tl.store(out_norm + o_out, round_to(b_out, x.dtype.element_ty), mask=mask)


def layer_norm_modulate(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, *, text_len: int, eps: float
) -> Tensor:
    """Compute `LayerNorm(x) * (1 + scale) + shift`, forward only.

    Args:
        x: `[B, N, D]` fp32, bf16 or fp16, D at most 16384, any strides as long as the last one is 1.
        weight, bias: `[D]`, any of the three dtypes.
        shift, scale: `[B, 2, D]`, any of the three dtypes, any strides as long as the last one is 1: row 0 for the
            first `text_len` tokens, row 1 for the others.

    Returns:
        `[B, N, D]` in x's dtype, contiguous.

    Raises:
        ValueError: an argument is not as described; the message names it.
    """
    want_tensors(x=x, weight=weight, bias=bias, shift=shift, scale=scale)
    return _layer_norm_modulate_operator(x, weight, bias, shift, scale, text_len, eps)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, text_len: int) -> Tensor:
    """Compute `x + gate * y`; differentiable.

    Args:
        x, y: `[B, N, D]`, as x of `layer_norm_modulate`; both of one dtype.
        gate: `[B, 2, D]`, as shift of `layer_norm_modulate`.

    Returns:
        `[B, N, D]` in x's dtype, contiguous.

    Raises:
        ValueError: an argument is not as described; the message names it.
    """
    want_tensors(x=x, y=y, gate=gate)
    return _gate_residual_operator(x, y, gate, text_len)


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    text_len: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute `gate_residual`, then `layer_norm_modulate` of its result, in one pass; return both. Forward only.

    Arguments, results and errors are those of the two.
    """
    want_tensors(x=x, y=y, gate=gate, weight=weight, bias=bias, shift=shift, scale=scale)
    return _gate_residual_norm_modulate_operator(x, y, gate, weight, bias, shift, scale, text_len, eps)


def _layer_norm_modulate_outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    text_len: int,
    eps: float,  # noqa: ARG001 - the operator's arguments
) -> Tensor:
    _check(x, text_len, {"weight": weight, "bias": bias}, {"shift": shift, "scale": scale})
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _layer_norm_modulate(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, text_len: int, eps: float
) -> Tensor:
    out = _layer_norm_modulate_outputs(x, weight, bias, shift, scale, text_len, eps)
    _launch(_arguments(x, None, None, weight, bias, shift, scale, None, out, text_len, eps, architecture(x)))
    return out


def _gate_residual_outputs(x: Tensor, y: Tensor, gate: Tensor, text_len: int) -> Tensor:
    _check(x, text_len, {}, {"gate": gate}, y)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _gate_residual(x: Tensor, y: Tensor, gate: Tensor, text_len: int) -> Tensor:
    out = _gate_residual_outputs(x, y, gate, text_len)
    _launch(_arguments(x, y, gate, None, None, None, None, out, None, text_len, 0.0, architecture(x)))
    return out


def _gate_residual_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, y, gate, ctx.text_len = inputs
    ctx.save_for_backward(y, gate)


def _gate_residual_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    y, gate = ctx.saved_tensors
    sizes = [ctx.text_len, y.shape[1] - ctx.text_len]
    # Products in fp32, because gate may be of another dtype than y.
    streams = list(zip(grad.float().split(sizes, 1), y.float().split(sizes, 1), gate.float().split(1, 1), strict=True))
    grad_y = torch.cat([g * row for g, _, row in streams], dim=1)
    grad_gate = torch.stack([(g * part).sum(1) for g, part, _ in streams], dim=1)
    return grad, grad_y.to(y.dtype), grad_gate.to(gate.dtype), None


def _gate_residual_norm_modulate_outputs(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    text_len: int,
    eps: float,  # noqa: ARG001 - the operator's arguments
) -> tuple[Tensor, Tensor]:
    _check(x, text_len, {"weight": weight, "bias": bias}, {"gate": gate, "shift": shift, "scale": scale}, y)
    out_sum, out_norm = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    return out_sum, out_norm


def _gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    text_len: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    outputs = _gate_residual_norm_modulate_outputs(x, y, gate, weight, bias, shift, scale, text_len, eps)
    _launch(_arguments(x, y, gate, weight, bias, shift, scale, *outputs, text_len, eps, architecture(x)))
    return outputs


_layer_norm_modulate_operator = register(_layer_norm_modulate, _layer_norm_modulate_outputs)
_gate_residual_operator = register(
    _gate_residual,
    _gate_residual_outputs,
    setup_context=_gate_residual_setup_context,
    backward=_gate_residual_backward,
)
_gate_residual_norm_modulate_operator = register(_gate_residual_norm_modulate, _gate_residual_norm_modulate_outputs)


def _check(
    x: Tensor, text_len: int, affine: dict[str, Tensor], modulation: dict[str, Tensor], y: Tensor | None = None
) -> None:
    check_rows("x", x, ndim=3)
    batch, num_tokens, width = x.shape
    if y is not None:
        check_tensor("y", y, shape=x.shape, dtypes=(x.dtype,), device=x.device)
    for name, parameter in affine.items():
        check_parameter(name, parameter, (width,), x.device)
    for name, parameter in modulation.items():
        check_parameter(name, parameter, (batch, 2, width), x.device)
    if not 0 <= text_len <= num_tokens:
        raise ValueError(f"text_len: got {text_len}, want 0 to {num_tokens}, the number of tokens")
    check_runnable("x", x, _modulate_kernel)


def _launch(arguments: dict[str, Any]) -> None:
    names = ("x", "y", "gate", "weight", "bias", "shift", "scale")
    check_alignment(**{name: arguments[name] for name in names})
    with torch.cuda.device_of(arguments["x"]):
        _modulate_kernel[triton.cdiv(arguments["num_rows"], arguments["BLOCK_ROWS"]),](**arguments)


def _arguments(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    out_sum: Tensor | None,
    out_norm: Tensor | None,
    text_len: int,
    eps: float,
    arch: int,
) -> dict[str, Any]:
    batch, num_tokens, width = x.shape

    def stride(tensor: Tensor | None, axis: int) -> int:
        return 0 if tensor is None else tensor.stride(axis)

    return {
        "x": x,
        "y": y,
        "gate": gate,
        "weight": weight,
        "bias": bias,
        "shift": shift,
        "scale": scale,
        "out_sum": out_sum,
        "out_norm": out_norm,
        "stride_xb": x.stride(0),
        "stride_xn": x.stride(1),
        "stride_yb": stride(y, 0),
        "stride_yn": stride(y, 1),
        "stride_gate_b": stride(gate, 0),
        "stride_gate_row": stride(gate, 1),
        "stride_shift_b": stride(shift, 0),
        "stride_shift_row": stride(shift, 1),
        "stride_scale_b": stride(scale, 0),
        "stride_scale_row": stride(scale, 1),
        "num_tokens": num_tokens,
        "num_rows": batch * num_tokens,
        "text_len": text_len,
        "eps": eps,
        "D": width,
        "GATE": y is not None,
        "NORM": weight is not None,
        "enable_fp_fusion": True,
        **row_tile(width, arch).options,
    }


def compile_cases(arch: int) -> list[KernelCase]:
    """List each function at the widths of the 2B and the 5B, modulation being views of one linear's output."""
    cases = []
    for width, num_tokens, dtype in (
        (1920, 17776, torch.bfloat16),
        (3072, 17776, torch.bfloat16),
        (3072, 45106, torch.bfloat16),
        (3072, 17776, torch.float32),
    ):
        x = torch.empty(2, num_tokens, width, dtype=dtype, device="meta")
        shift, scale, gate = x.new_empty(2, 2, 3, width).unbind(2)
        affine = x.new_empty(width)
        forms = {
            "layer_norm_modulate": (None, None, affine, affine, shift, scale, None, x),
            "gate_residual": (x, gate, None, None, None, None, x, None),
            "gate_residual_norm_modulate": (x, gate, affine, affine, shift, scale, x, x),
        }
        short = "fp32" if dtype == torch.float32 else "bf16"
        for form, tensors in forms.items():
            arguments = _arguments(x, *tensors, 226, 1e-5, arch)
            name = f"{form}/{short}-{2 * num_tokens}x{width}"
            cases.append(KernelCase(name, _modulate_kernel, arguments, sass=("LDG.E.128", "STG.E.128")))
    return cases
