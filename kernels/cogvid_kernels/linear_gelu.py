"""Linear and tanh-GELU: `gelu(x @ weight.T + bias)`, as in diffusers' `FeedForward("gelu-approximate")`.

cuBLAS computes the product. On CUDA, bias and GELU run in its epilogue (cublasLt), on the fp32 sums: no second pass
over the wide activation and no rounding before the GELU. PyTorch gives access to it as `torch._addmm_activation`. With
use_gelu this computes the tanh form on CUDA only, fused or not; on a CPU it computes the erf form.

Elsewhere, and for comparison in the benchmark, one kernel adds the bias and applies the GELU in place, after the
product.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from cogvid_kernels._cases import KernelCase
from cogvid_kernels._checks import check_alignment, check_runnable, check_tensor
from cogvid_kernels._interpreter import round_to
from cogvid_kernels._operators import register, want_tensors
from cogvid_kernels._tiles import architecture, tile_for

VARIANTS = ("epilogue", "kernel")


@triton.jit
def _bias_gelu_kernel(
    x,  # [rows * M] contiguous; overwritten
    bias,  # [M]
    num_elements,
    width,  # M
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    mask = start + o < num_elements
    o_bias = (start % width).to(tl.int32) + o
    # A block may span several rows when they are short.
    b_bias = tl.load(bias + o_bias % width, mask=mask, other=0.0).to(tl.float32)
    b_y = tl.load(x + start + o, mask=mask, other=0.0).to(tl.float32) + b_bias
    # 0.5 * (1 + tanh(z)) is sigmoid(2 z); 2 * sqrt(2 / pi) = 1.5957691216057308.
    b_z = 1.5957691216057308 * (b_y + 0.044715 * b_y * b_y * b_y)
    b_out = b_y / (1 + tl.exp(-b_z))
    tl.store(x + start + o, round_to(b_out, x.dtype.element_ty), mask=mask)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, variant: str | None = None) -> Tensor:
    """Compute `gelu(x @ weight.T + bias)`, the tanh form; differentiable (the product is computed again).

    Args:
        x: `[..., K]` fp32, bf16 or fp16, contiguous.
        weight: `[M, K]` contiguous, x's dtype.
        bias: `[M]`, x's dtype. Under torch.autocast all three are converted to its dtype, as those of a linear are.
        variant: "epilogue" (CUDA alone) or "kernel"; None takes the epilogue on CUDA.

    Returns:
        `[..., M]` in x's dtype, contiguous.

    Raises:
        ValueError: an argument is not as described; the message names it.
    """
    want_tensors(x=x, weight=weight, bias=bias)
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return _operator(x, weight, bias, variant)


def _outputs(x: Tensor, weight: Tensor, bias: Tensor, variant: str | None) -> Tensor:
    check_tensor("x", x, contiguous=True)
    if x.ndim == 0:
        raise ValueError("x: got shape [], want [..., K]")
    check_tensor("weight", weight, shape=(None, x.shape[-1]), dtypes=(x.dtype,), device=x.device, contiguous=True)
    check_tensor("bias", bias, shape=weight.shape[:1], dtypes=(x.dtype,), device=x.device, contiguous=True)
    if variant not in (None, *VARIANTS):
        raise ValueError(f"variant: got {variant!r}, want one of {', '.join(VARIANTS)}")
    if variant == "epilogue" and x.device.type not in ("cuda", "meta"):
        raise ValueError(f"variant: got 'epilogue' on {x.device}, want cuda: elsewhere it is not the tanh form")
    check_runnable("x", x, _bias_gelu_kernel)
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def _takes_epilogue(x: Tensor, variant: str | None) -> bool:
    return variant == "epilogue" or (variant is None and x.is_cuda)


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, variant: str | None) -> Tensor:
    out = _outputs(x, weight, bias, variant)
    check_alignment(x=x, weight=weight, bias=bias)
    rows, out_rows = x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if _takes_epilogue(x, variant):
        torch._addmm_activation(bias, rows, weight.T, use_gelu=True, out=out_rows)
        return out
    torch.mm(rows, weight.T, out=out_rows)
    arguments = _arguments(out_rows, bias, architecture(x))
    with torch.cuda.device_of(x):
        _bias_gelu_kernel[triton.cdiv(out.numel(), arguments["BLOCK"]),](**arguments)
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, weight, bias = ctx.saved_tensors
    grad = torch.ops.aten.gelu_backward(grad, F.linear(x, weight, bias), approximate="tanh")
    rows = grad.reshape(-1, grad.shape[-1])
    return grad @ weight, rows.T @ x.reshape(-1, x.shape[-1]), rows.sum(0), None


_operator = register(_linear_gelu, _outputs, setup_context=_setup_context, backward=_backward)


def _arguments(out: Tensor, bias: Tensor, arch: int) -> dict[str, Any]:
    return {
        "x": out,
        "bias": bias,
        "num_elements": out.numel(),
        "width": out.shape[-1],
        "enable_fp_fusion": True,
        **tile_for("elements", "any", arch).options,
    }


def compile_cases(arch: int) -> list[KernelCase]:
    """List the 5B's MLP."""
    return [
        KernelCase(
            f"linear_gelu/bias_gelu/{name}",
            _bias_gelu_kernel,
            _arguments(
                torch.empty(2 * 17776, 12288, dtype=dtype, device="meta"),
                torch.empty(12288, dtype=dtype, device="meta"),
                arch,
            ),
            sass=("LDG.E.128", "STG.E.128"),
        )
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    ]
