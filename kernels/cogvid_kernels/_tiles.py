"""Block sizes per operation, shape class and architecture: one committed table, no autotuning at run time.

`scripts/gpu_session.py` measures candidates. The fastest are written here by hand, and the measurement goes into
`kernels/RESULTS.md`. Entries that were not measured yet were chosen from compiler output alone: no spills, a fit in
shared memory, the instructions that the kernel was written for, and how many programs fit on one multiprocessor.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

INTERPRETER = 0
ARCHITECTURES = (80, 89, 90, 100)


@dataclass(frozen=True)
class Tile:
    """Block sizes by the names of the kernel's constexpr arguments, and the launch options they were chosen with."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        """Return block sizes and launch options as the keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@functools.cache
def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a CUDA device, or None where it is not there (a FakeTensor may name it)."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def architecture(tensor: Tensor) -> int:
    """Return the table's column for the tensor's device: 80, 89, 90, 100, or INTERPRETER for a CPU.

    A chip without a column of its own takes one that it can run: that of a chip with no more shared memory.
    """
    if tensor.device.type == "cpu":
        return INTERPRETER
    capability = compute_capability(tensor.device) or (0, 0)
    if capability[0] == 9:
        return 90
    if capability[0] in (10, 11):
        return 100
    # 8.6, 8.9 and 12.x have 99 KiB of shared memory a block, 8.0 and 8.7 have 163.
    return 80 if capability in ((8, 0), (8, 7)) else 89


def tile_for(operation: str, shape_class: str, arch: int) -> Tile:
    """Look one tile up.

    Raises:
        ValueError: the table has no entry for it.
    """
    try:
        return TILES[operation, shape_class][arch]
    except KeyError:
        known = sorted(name for op, name in TILES if op == operation)
        raise ValueError(
            f"{operation}: got shape class {shape_class!r} on architecture {arch}, want one of {known}"
        ) from None


def _attention(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Tile:
    return Tile({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps, num_stages)


def _everywhere(tile: Tile, interpreter: Tile) -> dict[int, Tile]:
    """Give every architecture one tile.

    The tile of a kernel that is bound by memory depends on the shape alone: 16 bytes per load, and enough loads in
    flight. The interpreter takes larger tiles, because its time depends on the number of programs.
    """
    return {INTERPRETER: interpreter} | dict.fromkeys(ARCHITECTURES, tile)


def _rows(block_rows: int, num_warps: int) -> Tile:
    return Tile({"BLOCK_ROWS": block_rows}, num_warps)


def _positions(block_p: int, block_c: int, rows: int | None = None) -> Tile:
    blocks = {"BLOCK_P": block_p, "BLOCK_C": block_c}
    return Tile(blocks if rows is None else {**blocks, "ROWS": rows})


# Small, so that a few hundred tokens are several tiles.
_TOY = _attention(32, 32, 4, 1)

# Shape classes of attention: variant, bits of an element, head_dim rounded up to a power of two.
_POINTER_16x64 = {
    INTERPRETER: _TOY,
    80: _attention(128, 64, 8, 3),
    89: _attention(128, 64, 8, 3),
    90: _attention(128, 128, 8, 2),
    100: _attention(128, 64, 8, 3),
}
_POINTER_16x128 = {
    INTERPRETER: _TOY,
    80: _attention(128, 32, 8, 2),
    89: _attention(128, 32, 8, 2),
    90: _attention(128, 64, 8, 3),
    100: _attention(128, 64, 8, 2),
}
# fp32 runs on the CUDA cores (no tensor core multiplies fp32 exactly): small tiles, whose operands stay in registers.
_POINTER_32x64 = {arch: _attention(32, 16, 4, 1) for arch in (INTERPRETER, *ARCHITECTURES)}
_POINTER_32x128 = {arch: _attention(16, 16, 4, 1) for arch in (INTERPRETER, *ARCHITECTURES)}
# On Hopper 128x128 takes 154 registers in each of 256 threads, so one program fits on a multiprocessor and its warps
# wait for each other. 128x64 takes 106, so two fit, and the softmax of one can run during the wgmma of the other.
_TMA_16x64 = {
    INTERPRETER: _TOY,
    90: _attention(128, 64, 8, 3),
    100: _attention(128, 64, 8, 3),
}
_TMA_16x128 = {
    INTERPRETER: _TOY,
    90: _attention(128, 64, 8, 3),
    100: _attention(128, 64, 8, 2),
}
# 232 registers per thread, so one program fits; it computes its own next logits during its softmax.
_TMA_AHEAD_16x64 = {
    INTERPRETER: _TOY,
    90: _attention(128, 128, 8, 2),
    100: _attention(128, 64, 8, 2),
}
_TMA_AHEAD_16x128 = {
    INTERPRETER: _TOY,
    90: _attention(128, 64, 8, 2),
    100: _attention(128, 64, 8, 2),
}

# Three warpgroups of 64 rows; the stages are slots of 32 KiB for keys and values, beside 24 KiB of queries. A power of
# two makes a slot's number a mask. Two warpgroups, or 64 keys a tile, are slower by the model (kernels/RESULTS.md).
_TMA_WS_16x64 = {90: _attention(192, 128, 4, 4)}

# The variants of attention that may run when none is asked for; the first that can take the tensors runs. An entry
# changes only with a measurement in kernels/RESULTS.md; `scripts/gpu_session.py` proposes one. On Hopper
# "tma_bounded" is expected to be faster than "tma", and "tma_ws_bounded" than both, which has never run.
ATTENTION_ORDER: dict[int, tuple[str, ...]] = {
    INTERPRETER: ("pointer",),
    80: ("pointer",),
    89: ("pointer",),
    90: ("tma", "pointer"),
    100: ("pointer",),
}

TILES: dict[tuple[str, str], dict[int, Tile]] = {
    ("attention", "pointer/16x64"): _POINTER_16x64,
    ("attention", "pointer/16x128"): _POINTER_16x128,
    ("attention", "pointer/32x64"): _POINTER_32x64,
    ("attention", "pointer/32x128"): _POINTER_32x128,
    ("attention", "tma/16x64"): _TMA_16x64,
    ("attention", "tma/16x128"): _TMA_16x128,
    ("attention", "tma_ahead/16x64"): _TMA_AHEAD_16x64,
    ("attention", "tma_ahead/16x128"): _TMA_AHEAD_16x128,
    ("attention", "tma_ws/16x64"): _TMA_WS_16x64,
    ("rows", "128"): _everywhere(_rows(32, 4), _rows(64, 4)),
    ("rows", "1024"): _everywhere(_rows(2, 4), _rows(16, 4)),
    ("rows", "4096"): _everywhere(_rows(1, 4), _rows(16, 4)),
    ("rows", "16384"): _everywhere(_rows(1, 16), _rows(4, 16)),
    ("group_norm/statistics", "channels_last"): _everywhere(_positions(16, 128), _positions(256, 64)),
    ("group_norm/apply", "channels_last"): _everywhere(_positions(32, 128, 1), _positions(64, 64, 64)),
    ("group_norm/statistics", "contiguous"): _everywhere(_positions(2048, 1), _positions(256, 64)),
    ("group_norm/apply", "contiguous"): _everywhere(_positions(1024, 1, 1), _positions(64, 64, 64)),
    ("elements", "any"): _everywhere(Tile({"BLOCK": 1024}), Tile({"BLOCK": 8192})),
}
