"""The norm of q and k over head_dim, then the rotation of the video tokens: one pass over both.

Equal to what diffusers' `CogVideoXAttnProcessor2_0` does to q and k before its attention. Bound by memory: q and k are
read once where their projections left them and written once.

The norm is LayerNorm, or RMSNorm for a caller that centred the projections when it loaded them: LayerNorm of a row is
RMSNorm of that row less its mean. Both forms move the same bytes. A row is in registers, so its mean costs three
shuffles, which the second form saves.

Letters: B batch, N tokens (text first), S video tokens, H heads, hd head_dim.
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
def _norm(
    p_x,  # [BLOCK_ROWS, BLOCK_D] pointers
    weight,
    bias,
    mask,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Load rows and norm them in fp32."""
    o_d = tl.arange(0, BLOCK_D)
    in_row = o_d < HEAD_DIM
    b_x = tl.load(p_x, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if not CENTRED:
        b_x = tl.where(in_row[None, :], b_x - (tl.sum(b_x, 1) / HEAD_DIM)[:, None], 0.0)
    b_inverse = tl.rsqrt(tl.sum(b_x * b_x, 1) / HEAD_DIM + eps)
    b_w = tl.load(weight + o_d, mask=in_row, other=0.0).to(tl.float32)
    b_b = tl.load(bias + o_d, mask=in_row, other=0.0).to(tl.float32)
    return b_x * b_inverse[:, None] * b_w[None, :] + b_b[None, :]


@triton.jit
def _rotate(b_x, b_cos, b_sin, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rotate pairs of neighbouring channels by [BLOCK_ROWS, BLOCK_D / 2] angles."""
    b_even, b_odd = tl.split(b_x.reshape(BLOCK_ROWS, BLOCK_D // 2, 2))
    turned = tl.join(b_even * b_cos - b_odd * b_sin, b_odd * b_cos + b_even * b_sin)
    return turned.reshape(BLOCK_ROWS, BLOCK_D)


@triton.jit
def _qk_norm_rope_kernel(
    q,  # [B, N, H, hd] by its strides
    k,  # the same, by its own
    q_weight,  # [hd]
    q_bias,  # [hd]
    k_weight,  # [hd]
    k_bias,  # [hd]
    cos,  # [S, hd / 2] fp32 contiguous
    sin,  # the same
    out_q,  # [B, N, H, hd] contiguous
    out_k,  # the same
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    num_tokens,
    num_heads,
    num_rows,  # B * N * H
    text_len,
    eps,
    HEAD_DIM: tl.constexpr,
    CENTRED: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_d = tl.arange(0, BLOCK_D)
    in_rows = o_r < num_rows
    mask = in_rows[:, None] & (o_d < HEAD_DIM)[None, :]
    o_token = o_r // num_heads
    o_n = o_token % num_tokens
    i_b = (o_token // num_tokens).to(tl.int64)
    i_n = o_n.to(tl.int64)
    i_h = (o_r % num_heads).to(tl.int64)
    p_q = q + (i_b * stride_qb + i_n * stride_qn + i_h * stride_qh)[:, None] + o_d[None, :]
    p_k = k + (i_b * stride_kb + i_n * stride_kn + i_h * stride_kh)[:, None] + o_d[None, :]
    b_q = _norm(p_q, q_weight, q_bias, mask, eps, HEAD_DIM, BLOCK_D, CENTRED)
    b_k = _norm(p_k, k_weight, k_bias, mask, eps, HEAD_DIM, BLOCK_D, CENTRED)
    if ROTATE:
        o_pair = tl.arange(0, BLOCK_D // 2)
        half: tl.constexpr = HEAD_DIM // 2
        is_video = (in_rows & (o_n >= text_len))[:, None] & (o_pair < half)[None, :]
        o_angle = (i_n - text_len)[:, None] * half + o_pair[None, :]
        # Text takes the angle zero, which changes no value.
        b_cos = tl.load(cos + o_angle, mask=is_video, other=1.0)
        b_sin = tl.load(sin + o_angle, mask=is_video, other=0.0)
        b_q = _rotate(b_q, b_cos, b_sin, BLOCK_ROWS, BLOCK_D)
        b_k = _rotate(b_k, b_cos, b_sin, BLOCK_ROWS, BLOCK_D)
    o_out = o_r.to(tl.int64)[:, None] * HEAD_DIM + o_d[None, :]
    tl.store(out_q + o_out, round_to(b_q, out_q.dtype.element_ty), mask=mask)
    tl.store(out_k + o_out, round_to(b_k, out_k.dtype.element_ty), mask=mask)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    *,
    text_len: int,
    eps: float,
    centred: bool = False,
) -> tuple[Tensor, Tensor]:
    """Norm q and k over head_dim, then rotate the video tokens; forward only.

    Args:
        q, k: `[B, N, H, hd]` fp32, bf16 or fp16, both of one dtype; any strides as long as the last one is 1.
        q_weight, q_bias, k_weight, k_bias: `[hd]`, any of the three dtypes.
        rope: None, or cos and sin, each fp32 `[S, hd / 2]`: one angle per pair of neighbouring channels, for the S =
            N - text_len tokens from `text_len` on.
        centred: False: the norm is LayerNorm. True: q and k have mean zero over each head, because their projections
            were centred; the norm is then RMSNorm with this weight and bias.

    Returns:
        q and k, each `[B, N, H, hd]` in q's dtype, contiguous.

    Raises:
        ValueError: an argument is not as described; the message names it.
    """
    want_tensors(q=q, k=k, q_weight=q_weight, q_bias=q_bias, k_weight=k_weight, k_bias=k_bias)
    if rope is None:
        cos, sin = None, None
    else:
        cos, sin = rope
        want_tensors(**{"rope[0]": cos, "rope[1]": sin})
    return _operator(q, k, q_weight, q_bias, k_weight, k_bias, cos, sin, text_len, eps, centred)


def _outputs(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    text_len: int,
    eps: float,  # noqa: ARG001 - the operator's arguments
    centred: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    check_rows("q", q, ndim=4)
    check_tensor("k", k, shape=q.shape, dtypes=(q.dtype,), device=q.device)
    num_tokens, head_dim = q.shape[1], q.shape[3]
    names = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    for name, parameter in names.items():
        check_parameter(name, parameter, (head_dim,), q.device)
    if not 0 <= text_len <= num_tokens:
        raise ValueError(f"text_len: got {text_len}, want 0 to {num_tokens}, the number of tokens")
    if cos is not None and sin is not None:
        if head_dim % 2:
            raise ValueError(f"q: got head_dim {head_dim} with rope, want an even one")
        for name, table in (("rope[0]", cos), ("rope[1]", sin)):
            if text_len < num_tokens:
                check_tensor(
                    name,
                    table,
                    shape=(num_tokens - text_len, head_dim // 2),
                    dtypes=(torch.float32,),
                    device=q.device,
                    contiguous=True,
                )
    check_runnable("q", q, _qk_norm_rope_kernel)
    out_q, out_k = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    return out_q, out_k


def _qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    text_len: int,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    affine = (q_weight, q_bias, k_weight, k_bias)
    outputs = _outputs(q, k, *affine, cos, sin, text_len, eps, centred)
    check_alignment(q=q, k=k, q_weight=q_weight, q_bias=q_bias, k_weight=k_weight, k_bias=k_bias)
    check_alignment(**{"rope[0]": cos, "rope[1]": sin})
    arguments = _arguments(q, k, affine, cos, sin, outputs, text_len, eps, centred, architecture(q))
    with torch.cuda.device_of(q):
        _qk_norm_rope_kernel[triton.cdiv(arguments["num_rows"], arguments["BLOCK_ROWS"]),](**arguments)
    return outputs


_operator = register(_qk_norm_rope, _outputs)


def _arguments(
    q: Tensor,
    k: Tensor,
    affine: tuple[Tensor, ...],
    cos: Tensor | None,
    sin: Tensor | None,
    outputs: tuple[Tensor, Tensor],
    text_len: int,
    eps: float,
    centred: bool,
    arch: int,
) -> dict[str, Any]:
    batch, num_tokens, num_heads, head_dim = q.shape
    return {
        "q": q,
        "k": k,
        **dict(zip(("q_weight", "q_bias", "k_weight", "k_bias"), affine, strict=True)),
        "cos": cos,
        "sin": sin,
        **dict(zip(("out_q", "out_k"), outputs, strict=True)),
        "stride_qb": q.stride(0),
        "stride_qn": q.stride(1),
        "stride_qh": q.stride(2),
        "stride_kb": k.stride(0),
        "stride_kn": k.stride(1),
        "stride_kh": k.stride(2),
        "num_tokens": num_tokens,
        "num_heads": num_heads,
        "num_rows": batch * num_tokens * num_heads,
        "text_len": text_len,
        "eps": eps,
        "HEAD_DIM": head_dim,
        "CENTRED": centred,
        "ROTATE": cos is not None,
        "enable_fp_fusion": True,
        **row_tile(head_dim, arch).options,
    }


def compile_cases(arch: int) -> list[KernelCase]:
    """List the 5B's shape in every form, and fp32."""
    cases = []
    for name, dtype, rotate, centred in (
        ("rope/bf16", torch.bfloat16, True, False),
        ("rope-centred/bf16", torch.bfloat16, True, True),
        ("plain/bf16", torch.bfloat16, False, False),
        ("plain-centred/bf16", torch.bfloat16, False, True),
        ("rope/fp32", torch.float32, True, False),
        ("rope-centred/fp32", torch.float32, True, True),
    ):
        q = torch.empty(2, 17776, 48, 64, dtype=dtype, device="meta")
        table = torch.empty(17550, 32, device="meta") if rotate else None
        affine = (q.new_empty(64),) * 4
        arguments = _arguments(q, q, affine, table, table, (q, q), 226, 1e-6, centred, arch)
        sass = ("LDG.E.128", "STG.E.128")
        cases.append(KernelCase(f"qk_norm_rope/{name}-hd64", _qk_norm_rope_kernel, arguments, sass))
    return cases
