"""Fused attention, forward only: `softmax(q k^T * scale) v` over the whole sequence, without a mask.

Equal to `scaled_dot_product_attention` and so to the attention of diffusers' `CogVideoXAttnProcessor2_0`. q, k and v
are read where their projections left them and the output is written as the next linear wants it, so nothing is
transposed on either side.

Softmax runs in base 2: `exp(scale * s - max) = exp2(c * s - max')` with `c = scale * log2(e)`, one fused multiply-add
and one `ex2` per score. Folding c into the weight of the QK norm instead would save nothing here, because the
subtraction of the shift is the same instruction. A caller whose q is already scaled passes what is left as `scale`.

Letters: B batch, H heads, N query tokens, M key tokens, hd head_dim.

A `Variant` is one choice of each of these three:

- load: plain pointers, or TMA descriptors made by the host (Hopper and later).
- schedule: plain (a program computes one tile of queries), or one of three that need TMA. Persistent: a program
  computes several tiles of queries, one after the other. Ahead: the logits of the next keys are computed during the
  softmax of the present ones. Ws: warps are specialised, some load and some compute (`_attention_ws.py`); on Hopper,
  head_dim 64, bounded.
- softmax: online or bounded.
  Online: the running maximum of each row is the shift, and each tile rescales the sums so far (FlashAttention).
  Bounded: `|q_i| * max_j |k_j| * c` bounds every logit of row i (Cauchy-Schwarz). Any shift gives the same softmax as
  long as nothing over- or underflows. So the bound is the shift, fixed before the loop, and the loop has no maximum, no
  rescaling and no dependency between tiles. The row sum shows afterwards whether the bound was too loose: if it is at
  least 2**-80, then the keys lost to underflow (each below 2**-126) are less than M * 2**-46 of it. A tile with any row
  outside the safe range, or with NaN, is computed again in the online form: by the same program, or by a second launch
  after the specialised one. A loose bound costs time and never correctness.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cogvid_kernels import _attention_ws
from cogvid_kernels._cases import KernelCase
from cogvid_kernels._checks import check_alignment, check_runnable, check_tensor, is_aligned
from cogvid_kernels._descriptors import heads_first
from cogvid_kernels._interpreter import dot, round_to
from cogvid_kernels._key_norms import largest_key_norms
from cogvid_kernels._operators import register, want_tensors
from cogvid_kernels._softmax import bounding_shift, log_sum_exp, mask_keys, rows_are_safe, weights
from cogvid_kernels._tiles import ATTENTION_ORDER, INTERPRETER, Tile, architecture, tile_for


@dataclass(frozen=True)
class Variant:
    """One form of the attention kernel; the module's docstring explains the choices."""

    load: Literal["pointer", "tma"]
    schedule: Literal["plain", "persistent", "ahead", "ws"] = "plain"
    bounded: bool = False

    @property
    def name(self) -> str:
        """Return what `attention(variant=...)` takes, for example "tma_persistent_bounded"."""
        schedule = [] if self.schedule == "plain" else [self.schedule]
        return "_".join([self.load, *schedule, *(["bounded"] if self.bounded else [])])

    @property
    def tile_class(self) -> str:
        """Return the part of the tile table's shape class that depends on the variant."""
        return f"{self.load}_{self.schedule}" if self.schedule in ("ahead", "ws") else self.load


_PLACES: tuple[Any, ...] = (("pointer", "plain"), ("tma", "plain"), ("tma", "persistent"), ("tma", "ahead"))
VARIANTS = {v.name: v for place in _PLACES for v in (Variant(*place), Variant(*place, bounded=True))}
VARIANTS["tma_ws_bounded"] = Variant("tma", "ws", bounded=True)
MAX_HEAD_DIM = 128

_FLOAT_MIN: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _load_tile(
    source,  # pointer to this head's token 0, or a descriptor over [B, H, tokens, hd]
    stride,
    batch,
    head,
    start,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Load the tokens from `start` on of one head as [BLOCK, BLOCK_D]; what lies outside is zero."""
    if TMA:
        return source.load([batch, head, start, 0]).reshape(BLOCK, BLOCK_D)
    else:
        o_n = tl.arange(0, BLOCK)
        o_d = tl.arange(0, BLOCK_D)
        # `start` is an int in the interpreter and a scalar tensor elsewhere; full() takes both.
        p_x = source + tl.full([], start, tl.int64) * stride + o_n[:, None] * stride + o_d[None, :]
        if MASKED or BLOCK_D != HEAD_DIM:
            return tl.load(p_x, mask=(start + o_n < num_tokens)[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
        else:
            return tl.load(p_x)


@triton.jit
def _logits(
    b_q,  # [BLOCK_M, BLOCK_D]
    k,
    stride_k,
    batch,
    head,
    start,
    num_keys,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Return q k^T, unscaled, for BLOCK_N keys from `start` on: [BLOCK_M, BLOCK_N] fp32."""
    b_k = _load_tile(
        k, stride=stride_k, batch=batch, head=head, start=start, num_tokens=num_keys,
        HEAD_DIM=HEAD_DIM, BLOCK=BLOCK_N, BLOCK_D=b_q.shape[1], MASKED=MASKED, TMA=TMA,
    )  # fmt: skip
    return dot(b_q, b_k.T, tl.zeros([b_q.shape[0], BLOCK_N], tl.float32))


@triton.jit
def _add_keys(
    b_s,  # [BLOCK_M, BLOCK_N] fp32, the logits of the keys from `start` on
    b_acc,  # [BLOCK_M, BLOCK_D] fp32
    b_sum,  # [BLOCK_M] fp32
    b_shift,  # [BLOCK_M] fp32, base 2
    v,
    stride_v,
    batch,
    head,
    start,
    num_keys,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Add these keys to the running sums."""
    if MASKED:
        b_s = mask_keys(b_s, start + tl.arange(0, b_s.shape[1]), num_keys)
    if not BOUNDED:
        b_max = tl.maximum(b_shift, tl.max(b_s, 1) * scale_log2)
        b_decay = tl.exp2(b_shift - b_max)
        b_sum = b_sum * b_decay
        b_acc = b_acc * b_decay[:, None]
        b_shift = b_max
    b_p = weights(b_s, b_shift, scale_log2)
    b_sum += tl.sum(b_p, 1)
    b_v = _load_tile(
        v, stride=stride_v, batch=batch, head=head, start=start, num_tokens=num_keys,
        HEAD_DIM=HEAD_DIM, BLOCK=b_s.shape[1], BLOCK_D=b_acc.shape[1], MASKED=MASKED, TMA=TMA,
    )  # fmt: skip
    return dot(round_to(b_p, b_v.dtype), b_v, b_acc), b_sum, b_shift


@triton.jit
def _attend(
    b_q,  # [BLOCK_M, BLOCK_D]
    b_shift,  # [BLOCK_M] fp32, base 2: the bound, or where the running maximum begins
    k,
    v,
    stride_k,
    stride_v,
    batch,
    head,
    num_keys,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    AHEAD: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Attend from one tile of queries to every key. Returns the weighted values, the row sums and the shifts."""
    b_acc = tl.zeros([b_q.shape[0], b_q.shape[1]], tl.float32)
    b_sum = tl.zeros([b_q.shape[0]], tl.float32)
    # The last, partial tile is computed after the loop, so that no other tile needs a mask. Not in fp32, which is bound
    # by its multiplications: a second copy of them takes more registers than there are.
    peel: tl.constexpr = b_q.dtype != tl.float32
    full = num_keys // BLOCK_N * BLOCK_N if peel else num_keys
    if AHEAD:
        b_s = _logits(
            b_q, k, stride_k=stride_k, batch=batch, head=head, start=0, num_keys=num_keys,
            HEAD_DIM=HEAD_DIM, BLOCK_N=BLOCK_N, MASKED=True, TMA=TMA,
        )  # fmt: skip
    for start in tl.range(0, full, BLOCK_N):
        if AHEAD:
            # These logits do not depend on this tile's weights, so their wgmma runs during this tile's exp2. The last
            # pass asks for keys after the end, which a descriptor reads as zeros.
            b_next = _logits(
                b_q, k, stride_k=stride_k, batch=batch, head=head, start=start + BLOCK_N, num_keys=num_keys,
                HEAD_DIM=HEAD_DIM, BLOCK_N=BLOCK_N, MASKED=True, TMA=TMA,
            )  # fmt: skip
        else:
            b_s = _logits(
                b_q, k, stride_k=stride_k, batch=batch, head=head, start=start, num_keys=num_keys,
                HEAD_DIM=HEAD_DIM, BLOCK_N=BLOCK_N, MASKED=not peel, TMA=TMA,
            )  # fmt: skip
        b_acc, b_sum, b_shift = _add_keys(
            b_s, b_acc, b_sum, b_shift, v, stride_v=stride_v, batch=batch, head=head, start=start, num_keys=num_keys,
            scale_log2=scale_log2, HEAD_DIM=HEAD_DIM, MASKED=not peel, TMA=TMA, BOUNDED=BOUNDED,
        )  # fmt: skip
        if AHEAD:
            b_s = b_next
    # A branch at run time, not a constexpr: as straight-line code after the loop, the tail makes ptxas wait after every
    # wgmma of the kernel.
    if peel and full < num_keys:
        b_s = _logits(
            b_q, k, stride_k=stride_k, batch=batch, head=head, start=full, num_keys=num_keys,
            HEAD_DIM=HEAD_DIM, BLOCK_N=BLOCK_N, MASKED=True, TMA=TMA,
        )  # fmt: skip
        b_acc, b_sum, b_shift = _add_keys(
            b_s, b_acc, b_sum, b_shift, v, stride_v=stride_v, batch=batch, head=head, start=full, num_keys=num_keys,
            scale_log2=scale_log2, HEAD_DIM=HEAD_DIM, MASKED=True, TMA=TMA, BOUNDED=BOUNDED,
        )  # fmt: skip
    return b_acc, b_sum, b_shift


@triton.jit
def _attention_kernel(
    q,  # [B, N, H, hd] by its strides, or a descriptor over [B, H, N, hd]
    k,  # [B, M, H, hd], the same
    v,  # [B, M, H, hd], the same
    key_norms,  # [B, H] fp32, the largest |k_j| of each head; read when BOUNDED
    out,  # [B, N, H * hd] contiguous
    lse,  # [B, H, N] fp32 contiguous; written when WRITE_LSE
    redo,  # [num_tiles] int32, or None: only the tiles with a 1 are computed; not with PERSISTENT
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    num_queries,
    num_keys,
    num_heads,
    num_tiles,  # ceil(N / BLOCK_M) * B * H; tiles of one head are neighbours, so its keys stay in the L2 cache
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    AHEAD: tl.constexpr,
    BOUNDED: tl.constexpr,
    PERSISTENT: tl.constexpr,
    WRITE_LSE: tl.constexpr,
):
    if PERSISTENT:
        first = tl.program_id(0)
        stop = num_tiles
        step = tl.num_programs(0)
    else:  # one pass; the compiler removes the loop, because these are constants
        first = 0
        stop = 1
        step = 1
        if redo is not None:
            stop = tl.load(redo + tl.program_id(0))
    for i in tl.range(first, stop, step):
        i_tile = i if PERSISTENT else tl.program_id(0)
        tiles_per_head = tl.cdiv(num_queries, BLOCK_M)
        i_bh = i_tile // tiles_per_head
        i_b = i_bh // num_heads
        i_h = i_bh % num_heads
        start_m = i_tile % tiles_per_head * BLOCK_M
        if TMA:
            q_head = q
            k_head = k
            v_head = v
        else:
            q_head = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
            k_head = k + i_b.to(tl.int64) * stride_kb + i_h.to(tl.int64) * stride_kh
            v_head = v + i_b.to(tl.int64) * stride_vb + i_h.to(tl.int64) * stride_vh

        b_q = _load_tile(
            q_head, stride=stride_qn, batch=i_b, head=i_h, start=start_m, num_tokens=num_queries,
            HEAD_DIM=HEAD_DIM, BLOCK=BLOCK_M, BLOCK_D=BLOCK_D, MASKED=True, TMA=TMA,
        )  # fmt: skip
        # Not -inf: a first tile of logits that are all -inf must not turn later, finite ones into NaN.
        b_lowest = tl.full([BLOCK_M], _FLOAT_MIN, tl.float32)
        if BOUNDED:
            b_first = bounding_shift(b_q, tl.load(key_norms + i_bh), scale_log2)
        else:
            b_first = b_lowest
        b_acc, b_sum, b_shift = _attend(
            b_q, b_first, k_head, v_head, stride_k=stride_kn, stride_v=stride_vn, batch=i_b, head=i_h,
            num_keys=num_keys, scale_log2=scale_log2, HEAD_DIM=HEAD_DIM, BLOCK_N=BLOCK_N, TMA=TMA, AHEAD=AHEAD,
            BOUNDED=BOUNDED,
        )  # fmt: skip
        if BOUNDED:
            safe = rows_are_safe(b_sum, b_acc, num_keys, b_q.dtype)
            if tl.min(safe.to(tl.int32), 0) == 0:
                b_acc, b_sum, b_shift = _attend(
                    b_q, b_lowest, k_head, v_head, stride_k=stride_kn, stride_v=stride_vn, batch=i_b, head=i_h,
                    num_keys=num_keys, scale_log2=scale_log2, HEAD_DIM=HEAD_DIM, BLOCK_N=BLOCK_N, TMA=TMA, AHEAD=AHEAD,
                    BOUNDED=False,
                )  # fmt: skip

        b_out = b_acc / b_sum[:, None]
        o_m = start_m + tl.arange(0, BLOCK_M)
        o_d = tl.arange(0, BLOCK_D)
        p_row = out + ((i_b.to(tl.int64) * num_queries + o_m) * num_heads + i_h) * HEAD_DIM
        m_out = (o_m < num_queries)[:, None] & (o_d < HEAD_DIM)[None, :]
        tl.store(p_row[:, None] + o_d[None, :], round_to(b_out, out.dtype.element_ty), mask=m_out)
        if WRITE_LSE:
            p_lse = lse + i_bh.to(tl.int64) * num_queries + o_m
            tl.store(p_lse, log_sum_exp(b_shift, b_sum), mask=o_m < num_queries)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    variant: str | None = None,
    tile: Tile | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every query to every key: `softmax(q k^T * scale) v`, without a mask, forward only.

    Args:
        q: `[B, N, H, hd]` fp32, bf16 or fp16, any strides as long as the last one is 1; hd at most 128.
        k, v: `[B, M, H, hd]`, q's dtype and device.
        scale: factor of the logits, above zero; None is `hd ** -0.5`.
        variant: a name in VARIANTS; None takes `default_variant`. A variant that cannot take these tensors raises.
        tile: block sizes; None takes those of the committed table.
        return_lse: also return `log(sum(exp(scale * q k^T)))`.

    Returns:
        `[B, N, H * hd]` in q's dtype, contiguous; with return_lse also `[B, H, N]` fp32.

    Raises:
        ValueError: an argument is not as described, or the variant cannot take it; the message names it.
    """
    want_tensors(q=q, k=k, v=v)
    # An operator takes numbers, not a Tile.
    blocks = None if tile is None else [tile.blocks["BLOCK_M"], tile.blocks["BLOCK_N"], tile.num_warps, tile.num_stages]
    out, lse = _operator(q, k, v, scale, variant, blocks, return_lse)
    return (out, lse) if return_lse else out


def _outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    variant: str | None,
    blocks: Sequence[int] | None,  # noqa: ARG001 - the operator's arguments
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, scale, variant)
    check_runnable("q", q, _attention_kernel)
    batch, num_queries, num_heads, head_dim = q.shape
    out = torch.empty(batch, num_queries, num_heads * head_dim, dtype=q.dtype, device=q.device)
    # An operator has the same outputs in every call; one that was not asked for is empty.
    lse_shape = (batch, num_heads, num_queries) if return_lse else (0,)
    return out, torch.empty(lse_shape, dtype=torch.float32, device=q.device)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    variant: str | None,
    blocks: Sequence[int] | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(q, k, v, scale, variant, blocks, return_lse)
    check_alignment(q=q, k=k, v=v)
    arch = architecture(q)
    chosen = default_variant(q, k, v, arch) if variant is None else VARIANTS[variant]
    if refusal := _refusal(chosen, q, arch):
        raise ValueError(refusal)
    if chosen.load == "tma":
        check_alignment(16, q=q, k=k, v=v)
    tile = None if blocks is None else _tile(*blocks)
    if chosen.schedule == "ws":
        _launch_ws(q, k, v, out, lse if return_lse else None, scale, chosen, arch, tile)
        return out, lse
    key_norms = largest_key_norms(k) if chosen.bounded else None
    arguments = _arguments(q, k, v, out, lse if return_lse else None, key_norms, scale, chosen, arch, tile)
    programs = arguments["num_tiles"]
    if chosen.schedule == "persistent":
        programs = min(programs, _programs_at_once(q.device, chosen))
    with torch.cuda.device_of(q):
        _attention_kernel[(programs,)](**arguments)
    return out, lse


_operator = register(_attention, _outputs)


def _launch_ws(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    scale: float | None,
    variant: Variant,
    arch: int,
    tile: Tile | None,
) -> None:
    """Launch the specialised kernel, and the online one for the tiles whose bound was too loose."""
    tile = tile or tile_for("attention", f"{variant.tile_class}/16x64", arch)
    block_m = tile.blocks["BLOCK_M"]
    if (block_m, tile.num_warps) != (_attention_ws.BLOCK_M, 4):
        want = f"{_attention_ws.BLOCK_M} and 4"
        raise ValueError(f"tile: got BLOCK_M {block_m} and {tile.num_warps} warps with {variant.name!r}, want {want}")
    online = _arguments(q, k, v, out, lse, None, scale, Variant("tma"), arch, None)
    redo = torch.zeros(online["num_tiles"], dtype=torch.int32, device=q.device)
    bounded = _attention_ws.arguments(
        q, k, v, out, lse, largest_key_norms(k), redo, online["BLOCK_M"], online["scale_log2"], tile
    )
    with torch.cuda.device_of(q):
        _attention_ws.launch(triton.cdiv(q.shape[1], block_m) * q.shape[0] * q.shape[2], bounded)
        _attention_kernel[(online["num_tiles"],)](**online | {"redo": redo})


def _tile(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Tile:
    return Tile({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps, num_stages)


def _programs_at_once(device: torch.device, variant: Variant) -> int:
    if device.type != "cuda":
        return 3  # the interpreter: few, so that each program takes several tiles
    # The bounded form takes 138 registers in each of 256 threads, so only one program fits on a multiprocessor.
    per_multiprocessor = 1 if variant.bounded else 2
    return per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count


def default_variant(q: Tensor, k: Tensor, v: Tensor, arch: int) -> Variant:
    """Return the variant that runs when none is asked for: the table's first that can take the tensors."""
    aligned = all(is_aligned(x, 16) for x in (q, k, v))
    variants = [VARIANTS[name] for name in ATTENTION_ORDER[arch]]
    return next(x for x in variants if not _refusal(x, q, arch) and (aligned or x.load == "pointer"))


def _refusal(variant: Variant, q: Tensor, arch: int | None = None) -> str | None:
    """Say why the variant cannot run, or None; without `arch` only what holds everywhere."""
    got = f"variant: got {variant.name!r}"
    if variant.load == "tma" and q.element_size() != 2:
        return f"{got} with {q.dtype}, want bfloat16 or float16 for TMA"
    if variant.schedule == "ws" and q.shape[3] != _attention_ws.HEAD_DIM:
        return f"{got} with head_dim {q.shape[3]}, want head_dim {_attention_ws.HEAD_DIM}"
    runs_on = (90,) if variant.schedule == "ws" else (INTERPRETER, 90, 100)
    if arch is None or variant.load == "pointer" or arch in runs_on:
        return None
    place = "in Triton's interpreter"
    if arch != INTERPRETER:
        place = "on compute capability {}.{}".format(*torch.cuda.get_device_capability(q.device))
    return f"{got} {place}, want compute capability {'9.0' if runs_on == (90,) else '9.0, 10.x or 11.x'}"


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None, variant: str | None) -> None:
    check_tensor("q", q, shape=(None, None, None, None))
    batch, _, num_heads, head_dim = q.shape
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"q: got head_dim {head_dim}, want at most {MAX_HEAD_DIM}")
    check_tensor("k", k, shape=(batch, None, num_heads, head_dim), dtypes=(q.dtype,), device=q.device)
    check_tensor("v", v, shape=k.shape, dtypes=(q.dtype,), device=q.device)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        # Offsets inside one tile of at most 128 tokens are 32-bit.
        if tensor.stride(1) >= 2**24:
            raise ValueError(f"{name}: got a stride of {tensor.stride(1)} between tokens, want less than {2**24}")
    # Not `scale <= 0`, which would let NaN pass.
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale: got {scale}, want a finite number above 0")
    if variant is not None:
        if variant not in VARIANTS:
            raise ValueError(f"variant: got {variant!r}, want one of {', '.join(VARIANTS)}")
        if refusal := _refusal(VARIANTS[variant], q):
            raise ValueError(refusal)


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    key_norms: Tensor | None,
    scale: float | None,
    variant: Variant,
    arch: int,
    tile: Tile | None,
) -> dict[str, Any]:
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys = k.shape[1]
    block_d = max(16, triton.next_power_of_2(head_dim))
    if tile is None:
        tile = tile_for("attention", f"{variant.tile_class}/{8 * q.element_size()}x{max(64, block_d)}", arch)
    block_m, block_n = tile.blocks["BLOCK_M"], tile.blocks["BLOCK_N"]

    def source(x: Tensor, block: int) -> Tensor | TensorDescriptor:
        if variant.load == "pointer":
            return x
        view, strides = heads_first(x)
        return TensorDescriptor(view, list(view.shape), strides, [1, 1, block, block_d])

    return {
        "q": source(q, block_m),
        "k": source(k, block_n),
        "v": source(v, block_n),
        "key_norms": key_norms,
        "out": out,
        "lse": lse,
        "redo": None,
        "stride_qb": q.stride(0),
        "stride_qn": q.stride(1),
        "stride_qh": q.stride(2),
        "stride_kb": k.stride(0),
        "stride_kn": k.stride(1),
        "stride_kh": k.stride(2),
        "stride_vb": v.stride(0),
        "stride_vn": v.stride(1),
        "stride_vh": v.stride(2),
        "num_queries": num_queries,
        "num_keys": num_keys,
        "num_heads": num_heads,
        "num_tiles": triton.cdiv(num_queries, block_m) * batch * num_heads,
        "scale_log2": (head_dim**-0.5 if scale is None else scale) * math.log2(math.e),
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "TMA": variant.load == "tma",
        "AHEAD": variant.schedule == "ahead",
        "BOUNDED": variant.bounded,
        "PERSISTENT": variant.schedule == "persistent",
        "WRITE_LSE": lse is not None,
        # One FMA for `scale * s - shift`; Triton's own default differs between versions.
        "enable_fp_fusion": True,
        **tile.options,
    }


def compile_cases(arch: int) -> list[KernelCase]:
    """List what is compiled without a GPU: every variant at CogVideoX's own shape, every dtype and head_dim once."""
    default, pointer = Variant("tma" if arch == 90 else "pointer"), Variant("pointer")
    variants = [v for v in VARIANTS.values() if v.schedule != "ws" and (arch >= 90 or v.load == "pointer")]
    cases = [_case(variant, torch.bfloat16, 64, arch) for variant in variants]
    if arch == 90:
        cases.append(_case(default, torch.bfloat16, 64, arch, redo=True))
    cases += [_case(default, torch.bfloat16, head_dim, arch) for head_dim in (32, 80, 96, 128)]
    cases.append(_case(default, torch.float16, 64, arch))
    return cases + [_case(pointer, torch.float32, head_dim, arch) for head_dim in (64, 128)]


def _case(variant: Variant, dtype: torch.dtype, head_dim: int, arch: int, redo: bool = False) -> KernelCase:
    q, k, v = (torch.empty(2, 17776, 48, head_dim, dtype=dtype, device="meta") for _ in range(3))
    out = torch.empty(2, 17776, 48 * head_dim, dtype=dtype, device="meta")
    norms = torch.empty(2, 48, dtype=torch.float32, device="meta") if variant.bounded else None
    arguments = _arguments(q, k, v, out, None, norms, None, variant, arch, None)
    if redo:
        arguments["redo"] = torch.empty(arguments["num_tiles"], dtype=torch.int32, device="meta")
    if dtype == torch.float32:
        sass = ("FFMA",)
    else:
        multiply = {90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")
        copy = "UTMALDG" if variant.load == "tma" else "LDGSTS.128"
        sass = (multiply, copy, "MUFU.EX2", "STG.E.128")
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    name = f"attention/{variant.name}{'_redo' * redo}/{short}-hd{head_dim}"
    return KernelCase(name, _attention_kernel, arguments, sass)
