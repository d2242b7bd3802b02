"""The largest key norm of each head, by which the bounded attention bounds its logits; one pass over k."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogvid_kernels._cases import KernelCase

_BLOCK_N = 128


@triton.jit
def _key_norms_kernel(
    k,  # [B, M, H, hd] by its strides
    key_norms,  # [B, H] fp32, zero before the launch
    stride_kb,
    stride_kn,
    stride_kh,
    num_keys,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_bh = tl.program_id(1)
    i_b = (i_bh // num_heads).to(tl.int64)
    i_h = (i_bh % num_heads).to(tl.int64)
    start = tl.program_id(0) * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    k_head = k + i_b * stride_kb + i_h * stride_kh + start.to(tl.int64) * stride_kn
    mask = (start + o_n < num_keys)[:, None] & (o_d < HEAD_DIM)[None, :]
    b_k = tl.load(k_head + o_n[:, None] * stride_kn + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.atomic_max(key_norms + i_bh, tl.max(tl.sqrt(tl.sum(b_k * b_k, 1)), 0))


def largest_key_norms(k: Tensor) -> Tensor:
    """Return the largest length of a key in each head, fp32 `[B, H]`; k: `[B, M, H, hd]`, checked by the caller."""
    batch, num_keys, num_heads, _ = k.shape
    key_norms = torch.zeros(batch, num_heads, dtype=torch.float32, device=k.device)
    with torch.cuda.device_of(k):
        _key_norms_kernel[triton.cdiv(num_keys, _BLOCK_N), batch * num_heads](**_arguments(k, key_norms))
    return key_norms


def _arguments(k: Tensor, key_norms: Tensor) -> dict[str, Any]:
    head_dim = k.shape[3]
    return {
        "k": k,
        "key_norms": key_norms,
        "stride_kb": k.stride(0),
        "stride_kn": k.stride(1),
        "stride_kh": k.stride(2),
        "num_keys": k.shape[1],
        "num_heads": k.shape[2],
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_N": _BLOCK_N,
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def compile_cases(arch: int) -> list[KernelCase]:  # noqa: ARG001 - one tile for every architecture
    """List CogVideoX's own shape."""
    k = torch.empty(2, 17776, 48, 64, dtype=torch.bfloat16, device="meta")
    arguments = _arguments(k, torch.empty(2, 48, dtype=torch.float32, device="meta"))
    return [KernelCase("attention/key_norms/bf16-hd64", _key_norms_kernel, arguments, sass=("LDG.E.128",))]
