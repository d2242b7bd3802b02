"""Bounded attention with warp specialisation, for Hopper and head_dim 64, in Gluon.

A block computes 192 queries of one head. One warp, the producer, does nothing but ask for tiles of 128 keys and values.
Three warpgroups, the consumers, have 64 queries each: while one computes exp2, the others use the tensor cores.
Registers are moved from the producer to the consumers (setmaxnreg).

Keys and values are in a ring of slots in shared memory. Each slot has two barriers:

- full: the producer announces the bytes of a tile, and the copy engine completes the phase when they have arrived;
- empty: each consumer arrives once when it has read the tile's keys and values.

A visit of a slot is one phase of each of its barriers. `slot_of`, `full_parity` and `empty_parity` are all that the
producer and the consumers know of each other. `tests/kernels/ring_checker.py` runs this file's own functions and tries
every order of their steps.

A trip is the work on one tile of keys. Within a consumer the order is:

    logits of tile i (asynchronous); P V of tile i - 1 (asynchronous); wait for the logits alone; exp2 of tile i; wait
    for P V; give the slot of tile i - 1 back

so P V runs during exp2 of the next tile. The softmax is bounded: no maximum and no rescaling, so tiles may come in any
order, and the last one, which may be partial, comes first. Then no tile in the loop needs a mask.

A row for which the bound is too loose is not computed again here but noted in `redo`; a second launch, of the online
kernel of `attention.py`, computes the tiles noted there. Registers would allow an online loop here. But the consumers
would have to agree on a second round and tell the producer, which is one more protocol of barriers for a case that a
model with normalised queries and keys hardly meets. The second launch reads one flag per tile and ends.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cogvid_kernels._cases import KernelCase, MainLoops
from cogvid_kernels._descriptors import heads_first
from cogvid_kernels._softmax import bounding_shift, log_sum_exp, mask_keys, rows_are_safe, weights
from cogvid_kernels._tiles import Tile, tile_for

HEAD_DIM = 64
BLOCK_M = 192  # three consumers of 64 rows

_D: gl.constexpr = gl.constexpr(HEAD_DIM)
_ROWS: gl.constexpr = gl.constexpr(64)  # of one wgmma
_CONSUMERS: gl.constexpr = gl.constexpr(3)
# With the 168 that the first consumer keeps, and four warps' worth for the producer, these are all of 65,536.
_CONSUMER_REGISTERS: gl.constexpr = gl.constexpr(160)
_PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(24)

# Triton 3.9 has another name for it than 3.6.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


# The schedule: which slot and which phase belongs to a trip. A barrier's phases are counted modulo two.


@gluon.jit
def slot_of(trip, SLOTS: gl.constexpr):
    """Return the slot of the ring that holds the tile of this trip."""
    return trip % SLOTS


@gluon.jit
def full_parity(trip, SLOTS: gl.constexpr):
    """Return which phase of `full` a consumer waits for: that of this trip's visit of the slot."""
    return (trip // SLOTS) & 1


@gluon.jit
def empty_parity(trip, SLOTS: gl.constexpr):
    """Return which phase of `empty` the producer waits for: that of the visit before, which the first passes."""
    return ((trip // SLOTS) & 1) ^ 1


@gluon.jit
def first_key(trip, num_tiles, BLOCK_N: gl.constexpr):
    """Return where the tile of this trip begins: the last tile, which may be partial, then all others in order."""
    return (trip + num_tiles - 1) % num_tiles * BLOCK_N


@gluon.jit
def _produce(q, k, v, q_tiles, k_ring, v_ring, q_full, full, empty, i_b, i_h, start_m, num_tiles):
    """Load the queries, then all tiles of keys and values, each as soon as its slot is empty."""
    SLOTS: gl.constexpr = k_ring.type.shape[0]
    BLOCK_N: gl.constexpr = k_ring.type.shape[3]
    mbarrier.expect(q_full, _CONSUMERS * _ROWS * _D * 2)
    for i in gl.static_range(_CONSUMERS):
        _load(q, [i_b, i_h, start_m + i * _ROWS, 0], q_full, q_tiles.index(i))
    for trip in range(num_tiles):
        slot = slot_of(trip, SLOTS)
        start = first_key(trip, num_tiles, BLOCK_N)
        mbarrier.wait(empty.index(slot), empty_parity(trip, SLOTS))
        mbarrier.expect(full.index(slot), 2 * BLOCK_N * _D * 2)
        _load(k, [i_b, i_h, start, 0], full.index(slot), k_ring.index(slot))
        _load(v, [i_b, i_h, start, 0], full.index(slot), v_ring.index(slot))


@gluon.jit
def _logits(b_q, k_ring, slot):
    """Begin q k^T of one tile; the result is there after a wait."""
    BLOCK_N: gl.constexpr = k_ring.type.shape[3]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    b_k = k_ring.index(slot).reshape([BLOCK_N, _D])
    b_zero = gl.zeros([_ROWS, BLOCK_N], gl.float32, S)
    return warpgroup_mma(b_q, b_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)


@gluon.jit
def _add_values(b_packed, v_ring, slot, b_acc):
    """Begin acc + P V of one tile; the result is there after a wait."""
    BLOCK_N: gl.constexpr = v_ring.type.shape[3]
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _D, 16])  # noqa: E741
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    b_v = v_ring.index(slot).reshape([BLOCK_N, _D])
    return warpgroup_mma(_unpack(b_packed, v_ring.dtype, P), b_v, b_acc, is_async=True)


@gluon.jit
def _pack(b_p, dtype: gl.constexpr):
    """Round weights to dtype, to nearest, and put the two of neighbouring keys into one int32: [rows, keys / 2].

    16-bit values that live from one pass of the loop to the next get a register each, and 32 instructions bring them
    together again. An int32 stays as it is.
    """
    b_even, b_odd = gl.split(b_p.reshape([b_p.shape[0], b_p.shape[1] // 2, 2]))
    asm: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [b_even, b_odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _unpack(b_packed, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Undo `_pack`; no instruction is left of it."""
    b_even, b_odd = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [b_packed], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    b_p = gl.join(b_even, b_odd).reshape([b_packed.shape[0], b_packed.shape[1] * 2])
    return gl.convert_layout(b_p.to(DTYPE, bitcast=True), LAYOUT)


@gluon.jit
def _thread_sums(b_p):
    """Sum the weights of each row that one thread holds: [rows, 4]. The four threads meet after the loop."""
    b_parts = b_p.reshape([b_p.shape[0], b_p.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(b_parts, 3), 1)


@gluon.jit
def _consume(
    q_tile,
    start_m,
    redo,  # to the flag of this tile
    k_ring,
    v_ring,
    q_full,
    full,
    empty,
    out,  # to token 0 of this head
    lse,  # the same; not written when lse_wanted is zero
    key_norm,
    num_queries,
    num_keys,
    num_tiles,
    stride_out,
    lse_wanted,
    scale_log2,
):
    """Attend from 64 queries to every key."""
    SLOTS: gl.constexpr = k_ring.type.shape[0]
    BLOCK_N: gl.constexpr = k_ring.type.shape[3]
    DTYPE: gl.constexpr = q_tile.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _D, 16])  # noqa: E741
    ROW: gl.constexpr = gl.SliceLayout(1, O)
    b_q = q_tile.reshape([_ROWS, _D])
    mbarrier.wait(q_full, 0)
    b_bound = bounding_shift(b_q.load(O), key_norm, scale_log2)
    b_shift = gl.convert_layout(b_bound, gl.SliceLayout(1, S))

    mbarrier.wait(full.index(slot_of(0, SLOTS)), full_parity(0, SLOTS))
    b_s = warpgroup_mma_wait(0, [_logits(b_q, k_ring, slot_of(0, SLOTS))])
    o_n = first_key(0, num_tiles, BLOCK_N) + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S))
    b_p = weights(mask_keys(b_s, o_n, num_keys), b_shift, scale_log2)
    b_sums = _thread_sums(b_p)
    b_packed = _pack(b_p, DTYPE)
    b_acc = warpgroup_mma_init(gl.zeros([_ROWS, _D], gl.float32, O))
    for trip in range(1, num_tiles):
        slot = slot_of(trip, SLOTS)
        before = slot_of(trip - 1, SLOTS)
        mbarrier.wait(full.index(slot), full_parity(trip, SLOTS))
        b_s = _logits(b_q, k_ring, slot)
        b_acc = _add_values(b_packed, v_ring, before, b_acc)
        b_s = warpgroup_mma_wait(1, [b_s])
        b_p = weights(b_s, b_shift, scale_log2)
        b_sums += _thread_sums(b_p)
        # Weights may be packed only now: ptxas serialises a wgmma whose registers are written while another one runs.
        b_acc = warpgroup_mma_init(warpgroup_mma_wait(0, [b_acc]))
        mbarrier.arrive(empty.index(before), count=1)
        b_packed = _pack(b_p, DTYPE)
    b_acc = warpgroup_mma_wait(0, [_add_values(b_packed, v_ring, slot_of(num_tiles - 1, SLOTS), b_acc)])

    b_sum = gl.convert_layout(gl.sum(b_sums, 1), ROW)
    o_m = start_m + gl.arange(0, _ROWS, layout=ROW)
    safe = rows_are_safe(b_sum, b_acc, num_keys, DTYPE)
    gl.store(redo + o_m * 0, gl.full([_ROWS], 1, gl.int32, ROW), mask=(o_m < num_queries) & (safe == 0))
    gl.store(lse + o_m, log_sum_exp(b_bound, b_sum), mask=(o_m < num_queries) & (lse_wanted != 0))
    # 16 bytes a thread: a row of the output is 128 bytes.
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    b_out = gl.convert_layout((b_acc / b_sum[:, None]).to(DTYPE), STORE)
    o_m = start_m + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, STORE))
    o_d = gl.arange(0, _D, layout=gl.SliceLayout(0, STORE))
    p_out = out + o_m.to(gl.int64)[:, None] * stride_out + o_d[None, :]
    gl.store(p_out, b_out, mask=(o_m < num_queries)[:, None] & (o_d < _D)[None, :])


# Sizes are not specialised: no address depends on what divides them, and a size of 1 needs no code of its own.
@gluon.jit(do_not_specialize=["num_queries", "num_keys", "num_heads", "lse_wanted"])
def _attention_ws_kernel(
    q,  # a descriptor over [B, H, N, 64] with blocks of 64 tokens
    k,  # a descriptor over [B, H, M, 64] with blocks of BLOCK_N tokens
    v,  # the same
    key_norms,  # [B, H] fp32, the largest |k_j| of each head
    out,  # [B, N, H * 64] contiguous
    lse,  # [B, H, N] fp32 contiguous, or anything when lse_wanted is zero
    redo,  # [B, H, ceil(N / REDO_M)] int32, zero before the launch; 1 where a tile must be computed again
    num_queries,
    num_keys,
    num_heads,
    lse_wanted,
    scale_log2,
    BLOCK_N: gl.constexpr,
    SLOTS: gl.constexpr,
    REDO_M: gl.constexpr,  # a multiple of 64
):
    q_tiles = gl.allocate_shared_memory(q.dtype, [_CONSUMERS, 1, 1, _ROWS, _D], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [SLOTS, 1, 1, BLOCK_N, _D], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [SLOTS, 1, 1, BLOCK_N, _D], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=_CONSUMERS)
    fence_async_shared()

    tiles_per_head = gl.cdiv(num_queries, _CONSUMERS * _ROWS)
    i_bh = gl.program_id(0) // tiles_per_head
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    m0 = gl.program_id(0) % tiles_per_head * (_CONSUMERS * _ROWS)
    m1 = m0 + _ROWS
    m2 = m1 + _ROWS
    num_tiles = gl.cdiv(num_keys, BLOCK_N)
    key_norm = gl.load(key_norms + i_bh)
    stride_out = num_heads * _D
    out_head = out + (i_b.to(gl.int64) * num_queries * num_heads + i_h) * _D
    lse_head = lse + i_bh.to(gl.int64) * num_queries
    redo_head = redo + i_bh * gl.cdiv(num_queries, REDO_M)
    # A tile of 64 rows that begins after the last query may have no flag of its own; it never sets one.
    rings = (k_ring, v_ring, q_full, full, empty)
    rest = (out_head, lse_head, key_norm, num_queries, num_keys, num_tiles, stride_out, lse_wanted, scale_log2)
    first = (q_tiles.index(0), m0, redo_head + m0 // REDO_M)
    second = (q_tiles.index(1), m1, redo_head + m1 // REDO_M)
    third = (q_tiles.index(2), m2, redo_head + m2 // REDO_M)
    loads = (q, k, v, q_tiles)
    place = (i_b, i_h, m0, num_tiles)
    gl.warp_specialize(
        [
            (_consume, first + rings + rest),
            (_consume, second + rings + rest),
            (_consume, third + rings + rest),
            (_produce, loads + rings + place),
        ],
        [4, 4, 1],
        [_CONSUMER_REGISTERS, _CONSUMER_REGISTERS, _PRODUCER_REGISTERS],
    )


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    key_norms: Tensor,
    redo: Tensor,
    redo_block: int,
    scale_log2: float,
    tile: Tile,
) -> dict[str, Any]:
    """Return the launch's arguments; everything was checked by the caller.

    redo: `[B, H, ceil(N / redo_block)]` int32 zeros. lse: `[B, H, N]` fp32, or None.
    tile: BLOCK_M is 192; its stages are the slots of the ring.
    """
    block_n = tile.blocks["BLOCK_N"]

    def source(x: Tensor, block: int) -> TensorDescriptor:
        view, strides = heads_first(x)
        shape = [1, 1, block, HEAD_DIM]
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
        return TensorDescriptor(view, list(view.shape), strides, shape, layout)

    return {
        "q": source(q, BLOCK_M // 3),
        "k": source(k, block_n),
        "v": source(v, block_n),
        "key_norms": key_norms,
        "out": out,
        "lse": key_norms if lse is None else lse,
        "redo": redo,
        "num_queries": q.shape[1],
        "num_keys": k.shape[1],
        "num_heads": q.shape[2],
        "lse_wanted": int(lse is not None),
        "scale_log2": scale_log2,
        "BLOCK_N": block_n,
        "SLOTS": tile.num_stages,
        "REDO_M": redo_block,
        "num_warps": tile.num_warps,
        "enable_fp_fusion": True,
    }


def launch(programs: int, values: dict[str, Any]) -> None:
    """Compute all but the tiles that it notes in `redo`."""
    _attention_ws_kernel[(programs,)](**values)


def compile_cases(arch: int) -> list[KernelCase]:
    """List CogVideoX's own shape in bf16 and fp16; every other shape runs the same machine code."""
    if arch != 90:
        return []
    return [_case(torch.bfloat16), _case(torch.float16)]


def _case(dtype: torch.dtype) -> KernelCase:
    q, k, v = (torch.empty(2, 17776, 48, HEAD_DIM, dtype=dtype, device="meta") for _ in range(3))
    out = torch.empty(2, 17776, 48 * HEAD_DIM, dtype=dtype, device="meta")
    norms = torch.empty(2, 48, dtype=torch.float32, device="meta")
    redo = torch.empty(2, 48, triton.cdiv(17776, 128), dtype=torch.int32, device="meta")
    tile = tile_for("attention", "tma_ws/16x64", 90)
    values = arguments(q, k, v, out, None, norms, redo, 128, 0.18, tile)
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    # Logits of 128 keys are four wgmma of 16 channels, P V is eight of 16 keys.
    loops = MainLoops(count=3, hgmma=HEAD_DIM // 16 + tile.blocks["BLOCK_N"] // 16)
    sass = ("HGMMA", "UTMALDG", "MUFU.EX2", "STG.E.128", "USETMAXREG")
    return KernelCase(f"attention/tma_ws_bounded/{short}-hd64", _attention_ws_kernel, values, sass, loops=loops)
