"""RMSNorm over the last axis: `x / sqrt(mean(x^2) + eps) * weight`, statistics in fp32.

Equal to transformers' `T5LayerNorm`. Bound by memory: one read and one write. A program computes one long row or
several short ones.

Letters: D row width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogvid_kernels._cases import KernelCase
from cogvid_kernels._checks import check_alignment, check_runnable
from cogvid_kernels._interpreter import round_to
from cogvid_kernels._operators import register, want_tensors
from cogvid_kernels._rows import as_rows, check_parameter, check_rows, row_tile
from cogvid_kernels._tiles import architecture


@triton.jit
def _rms_norm_kernel(
    x,  # [outer, inner, D] by its strides
    weight,  # [D]
    out,  # [outer * inner, D] contiguous
    stride_outer,
    stride_inner,
    inner,
    num_rows,
    eps,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_r < num_rows)[:, None] & (o_d < D)[None, :]
    o_x = (o_r // inner).to(tl.int64) * stride_outer + (o_r % inner).to(tl.int64) * stride_inner
    # x is read once; the L1 cache is for the weight, which every row shares.
    b_x = tl.load(x + o_x[:, None] + o_d[None, :], mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    b_w = tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_out = b_x * tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None] * b_w[None, :]
    p_out = out + o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_out, round_to(b_out, out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Compute `x / sqrt(mean(x^2) + eps) * weight` over the last axis; differentiable.

    Args:
        x: `[..., D]` fp32, bf16 or fp16, D at most 16384, last stride 1; the other axes must merge into at most two
            (those of q within a packed q, k, v do).
        weight: `[D]`, any of the three dtypes.

    Returns:
        `[..., D]` in x's dtype, contiguous.

    Raises:
        ValueError: an argument is not as described; the message names it.
    """
    want_tensors(x=x, weight=weight)
    return _operator(x, weight, eps)


def _outputs(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ARG001 - the operator's arguments
    check_rows("x", x)
    check_parameter("weight", weight, (x.shape[-1],), x.device)
    as_rows("x", x)
    check_runnable("x", x, _rms_norm_kernel)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = _outputs(x, weight, eps)
    check_alignment(x=x, weight=weight)
    arguments = _arguments(x, weight, out, eps, architecture(x))
    with torch.cuda.device_of(x):
        _rms_norm_kernel[triton.cdiv(arguments["num_rows"], arguments["BLOCK_ROWS"]),](**arguments)
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """With n = x / rms(x): dn = grad * weight, dx = (dn - n * mean(n * dn)) / rms(x), dweight = sum(grad * n)."""
    x, weight = ctx.saved_tensors
    wide, grad = x.float(), grad.float()
    inverse = (wide.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
    normed, grad_normed = wide * inverse, grad * weight.float()
    grad_x = (grad_normed - normed * (normed * grad_normed).mean(-1, keepdim=True)) * inverse
    return grad_x.to(x.dtype), (grad * normed).flatten(0, -2).sum(0).to(weight.dtype), None


_operator = register(_rms_norm, _outputs, setup_context=_setup_context, backward=_backward)


def _arguments(x: Tensor, weight: Tensor, out: Tensor, eps: float, arch: int) -> dict[str, Any]:
    outer, inner, stride_outer, stride_inner = as_rows("x", x)
    return {
        "x": x,
        "weight": weight,
        "out": out,
        "stride_outer": stride_outer,
        "stride_inner": stride_inner,
        "inner": inner,
        "num_rows": outer * inner,
        "eps": eps,
        "D": x.shape[-1],
        "enable_fp_fusion": True,
        **row_tile(x.shape[-1], arch).options,
    }


def compile_cases(arch: int) -> list[KernelCase]:
    """List T5's norm and the one over head_dim of a packed projection."""
    text = torch.empty(2, 226, 4096, dtype=torch.bfloat16, device="meta")
    q = torch.empty(2, 17776, 3, 48, 64, dtype=torch.bfloat16, device="meta")[:, :, 0]
    return [
        KernelCase(
            f"rms_norm/{name}",
            _rms_norm_kernel,
            _arguments(x, x.new_empty(x.shape[-1]), x.new_empty(x.shape), 1e-6, arch),
            sass=("LDG.E.128", "STG.E.128"),
        )
        for name, x in (("bf16-4096", text), ("fp32-4096", text.float()), ("bf16-packed-64", q))
    ]
