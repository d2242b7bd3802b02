"""Predict how fast the main loop of each attention kernel is on sm_90, from its machine code, without a GPU.

    python scripts/sass_model.py                     every variant at head_dim 64 in bf16
    python scripts/sass_model.py --only ws --phases 20

It issues the instructions of the loop, in order and with the control codes that ptxas wrote, for the warps that one
quarter of a multiprocessor holds, and counts clocks. The warps begin at random times, because the order in which they
meet may last. How a warp is chosen is not published, so two ways are tried: in turns, and the same one for as long as
it can. The table has the median and the range over all of these, as TFLOP/s of an H200.

It ranks variants and is no measurement. Known: what a unit is busy for with each instruction. Guessed: latencies, and
how many wgmma may wait in the queue. Left out: the L2 cache and DRAM, what comes before and after the loop, and power.
"""

from __future__ import annotations

import argparse
import heapq
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 1071.0  # TFLOP/s of a head_dim of 64 at 1.98 GHz: 512 clocks per 8,192 scores, for wgmma and for exp2 alike
TRIPS = 40
# Clocks for which an instruction of one warp keeps its unit, and after which its result is there.
BUSY = {"mufu": 8, "fma": 1, "alu": 2, "lsu": 4}
LATENCY = {"mufu": 22, "fma": 4, "alu": 6, "lsu": 26, "wgmma": 10, "sync": 30, "uniform": 12, "tma": 20}
BARRIER = 24
QUEUE = 2  # wgmma that may wait for the tensor core
TAIL = 40  # clocks from the end of a wgmma to the end of the wait for it


@dataclass(frozen=True)
class Instruction:
    """One line of SASS and its control code."""

    address: int
    opcode: str
    operands: str
    stall: int
    sets: tuple[int, ...]  # scoreboards that it holds until its result is there, or its operands are read
    waits: tuple[int, ...]  # scoreboards that must be free

    @property
    def unit(self) -> str:
        return next((unit for unit, prefixes in UNITS.items() if self.opcode.startswith(prefixes)), "alu")


UNITS: dict[str, tuple[str, ...]] = {  # by what an opcode begins with; the first that fits
    "wgmma": ("HGMMA",),
    "wait": ("WARPGROUP.DEPBAR",),
    "barrier": ("BAR.SYNC",),
    "mufu": ("MUFU",),
    "fma": ("FFMA", "FADD", "FMUL", "IMAD"),
    "lsu": ("SHFL", "LDS", "STS", "LDL", "STL"),
    "sync": ("SYNCS",),
    "tma": ("UTMALDG",),
    "uniform": ("U",),
}
LINE = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;?\s*/\* 0x[0-9a-f]+ \*/\n"
    r"\s+/\* 0x([0-9a-f]+) \*/"
)


def parse(sass: str) -> list[Instruction]:
    """Read what `cuobjdump -sass` prints."""
    found = []
    for address, opcode, operands, high in LINE.findall(sass):
        control = int(high, 16) >> 41
        held = ((control >> 5) & 7, (control >> 8) & 7)  # 7 is none
        waits = tuple(i for i in range(6) if control >> 11 >> i & 1)
        sets = tuple(i for i in held if i < 6)
        found.append(Instruction(int(address, 16), opcode, operands, max(control & 15, 1), sets, waits))
    return found


def main_loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Return the innermost loops that hold both wgmma and exp2.

    A jump back from code that lies after the loop, as that of a barrier that is not ready, looks like a longer loop.
    """
    place = {instruction.address: i for i, instruction in enumerate(code)}
    spans = []
    for end, instruction in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", instruction.operands) if instruction.opcode.startswith("BRA") else None
        begin = place.get(int(target[1], 16), len(code)) if target else len(code)
        opcodes = [x.opcode for x in code[begin : end + 1]]
        if any(x.startswith("HGMMA") for x in opcodes) and any(x.startswith("MUFU.EX2") for x in opcodes):
            spans.append((begin, end))
    kept: list[tuple[int, int]] = []
    for begin, end in sorted(spans, key=lambda span: span[1] - span[0]):
        if all(end < other or begin > last for other, last in kept):
            kept.append((begin, end))
    return [list(code[begin : end + 1]) for begin, end in sorted(kept)]


def wgmma_clocks(instruction: Instruction) -> int:
    """Return for how long a wgmma of 64 x n x 16 keeps the tensor core: 4,096 FLOP a clock and multiprocessor."""
    shape = re.search(r"64x(\d+)x16", instruction.opcode)
    if shape is None:
        raise ValueError(f"instruction: got {instruction.opcode}, want one of 64xNx16")
    return int(shape[1]) // 2


def left_running(instruction: Instruction) -> int:
    """Return how many groups of wgmma a wait leaves."""
    return int(instruction.operands.split(",")[1], 16)


def is_of_one_warpgroup(barrier: Instruction) -> bool:
    """Say whether so few threads meet; a barrier of the whole block does not name their number."""
    return barrier.operands.split(",")[-1].strip() == "0x80"


def misused_registers(body: Sequence[Instruction]) -> list[str]:
    """Return the instructions of a loop that touch a register while a wgmma writes it, or write one that it reads.

    Two passes, because a wgmma may run from one to the next. A group of wgmma ends with the one that names gsb0. Of an
    instruction that writes several registers only the first is looked at.
    """
    problems: list[str] = []
    groups: list[tuple[set[int], set[int]]] = [(set(), set())]  # what each group writes and reads; the last is open
    for instruction in [*body, *body]:
        operands = instruction.operands.split(", ")
        registers = [int(r) for r in re.findall(r"\bR(\d+)\b", instruction.operands)]
        if instruction.unit == "wait":
            closed = groups[:-1]
            groups = [*closed[len(closed) - left_running(instruction) :], groups[-1]]
        elif instruction.unit == "wgmma":
            written, read = groups[-1]
            # 64 x n fp32 are n / 2 registers in each of 128 threads, 64 x 16 of 16 bits are four.
            written.update(range(registers[0], registers[0] + wgmma_clocks(instruction)))
            if operands[1].startswith("R"):
                read.update(range(registers[1], registers[1] + 4))
            if "gsb0" in operands:
                groups.append((set(), set()))
        else:
            written = set().union(*(group[0] for group in groups))
            read = set().union(*(group[1] for group in groups))
            target = {registers[0]} if re.match(r"(PT, |P\d, )?R\d", instruction.operands) else set()
            if written & set(registers) or read & target:
                problems.append(f"{instruction.opcode} {instruction.operands}")
    return problems


class Quarter:
    """The warps of one quarter of a multiprocessor, their units, and the clock.

    bodies: the loop of each warp. starts: when it begins. program: so many warps meet at a barrier of the whole block.
    """

    def __init__(self, bodies: Sequence[Sequence[Instruction]], starts: Sequence[int], program: int) -> None:
        self.bodies, self.program, self.now = bodies, program, 0
        self.warps = range(len(bodies))
        self.place, self.trip, self.ready = [0 for _ in bodies], [0 for _ in bodies], list(starts)
        self.done: list[list[int]] = [[] for _ in bodies]  # when each trip of a warp ended
        self.boards = [[0] * 6 for _ in bodies]
        self.releases: list[tuple[int, int, int]] = []
        self.free = dict.fromkeys(BUSY, 0)
        self.queue: list[int] = []  # when each wgmma ends
        self.groups: list[list[int]] = [[] for _ in bodies]  # when the last few groups of each warp end
        self.arrived: dict[int, list[int]] = {}

    def may_issue(self, w: int) -> bool:
        instruction = self.bodies[w][self.place[w]]
        unit = instruction.unit
        if self.trip[w] > min(self.trip) + 3:  # the ring lets a warp be no further ahead
            return False
        if self.ready[w] > self.now or any(self.boards[w][i] for i in instruction.waits):
            return False
        if unit == "wgmma":
            return sum(end > self.now for end in self.queue) < QUEUE
        if unit == "wait":
            groups = self.groups[w]
            return all(end <= self.now for end in groups[: len(groups) - left_running(instruction)])
        return self.free.get(unit, 0) <= self.now

    def release(self) -> None:
        """Let go of the scoreboards whose time has come."""
        while self.releases and self.releases[0][0] <= self.now:
            _, w, board = heapq.heappop(self.releases)
            self.boards[w][board] -= 1

    def issue(self, w: int) -> None:
        """Issue the next instruction of a warp, which takes one clock."""
        instruction = self.bodies[w][self.place[w]]
        unit = instruction.unit
        self.ready[w] = self.now + instruction.stall
        if unit in BUSY:
            self.free[unit] = self.now + BUSY[unit]
        elif unit == "wgmma":
            self.queue = [end for end in self.queue if end > self.now]
            self.queue.append(max([self.now, *self.queue[-1:]]) + wgmma_clocks(instruction))
            if "gsb0" in instruction.operands:
                self.groups[w] = [*self.groups[w][-3:], self.queue[-1] + TAIL]
        elif unit == "barrier":
            self._meet(w, instruction)
        for board in instruction.sets:
            self.boards[w][board] += 1
            heapq.heappush(self.releases, (self.now + LATENCY.get(unit, 1), w, board))
        self.place[w] += 1
        if self.place[w] == len(self.bodies[w]):
            self.place[w] = 0
            self.trip[w] += 1
            self.done[w].append(self.now)
        self.now += 1

    def _meet(self, w: int, instruction: Instruction) -> None:
        self.ready[w] = self.now + BARRIER
        if is_of_one_warpgroup(instruction):  # a warpgroup has one warp here
            return
        group = self.arrived.setdefault(w // self.program, [])
        group.append(w)
        self.ready[w] = 10**9
        if len(group) == self.program:
            for each in group:
                self.ready[each] = self.now + BARRIER
            group.clear()


def clocks_per_trip(
    bodies: Sequence[Sequence[Instruction]], starts: Sequence[int], program: int, greedy: bool
) -> float:
    """Return the clocks that one trip of one warp takes once all are under way.

    bodies, starts, program: see `Quarter`. greedy: a warp issues for as long as it can; otherwise they take turns.
    """
    quarter, last = Quarter(bodies, starts, program), 0
    warps = quarter.warps
    while min(quarter.trip) < TRIPS:
        quarter.release()
        first = last if greedy else last + 1
        chosen = next((w for w in (*warps[first:], *warps[:first]) if quarter.may_issue(w)), None)
        if chosen is not None:
            last = chosen
            quarter.issue(chosen)
            continue
        quarter.now += 1
        if quarter.now > 10**7:
            raise RuntimeError(f"loop: got no end after {quarter.now} clocks, want {TRIPS} trips of every warp")
    half = TRIPS // 2
    return statistics.mean((done[TRIPS - 1] - done[half]) / (TRIPS - 1 - half) for done in quarter.done)


def predict(loops: Sequence[Sequence[Instruction]], keys: int, warps: int, programs: int, phases: int) -> list[float]:
    """Return TFLOP/s for each phase and way to choose among warps, in order.

    loops: of one program; one for all its warpgroups, or one for each.
    keys: of one trip. warps: of a program in a quarter. programs: of a multiprocessor.
    """
    bodies = [loops[i % len(loops)] for i in range(warps)] * programs
    found = []
    for seed in range(phases):
        random_start = random.Random(seed)
        shifts = [random_start.randrange(1200) for _ in bodies]
        if len(loops) == 1:  # the warps of a program begin together
            shifts = [shifts[w // warps] for w in range(len(bodies))]
        scores = 64 * keys * len(bodies)
        for greedy in (False, True):
            found.append(LIMIT * 512 / (clocks_per_trip(bodies, shifts, warps, greedy) / (scores / 8192)))
    return sorted(found)


def describe(case: Any, registers: int, shared: int) -> tuple[int, int, int, int]:
    """Return rows and keys of a tile, warps of a program in a quarter, and programs of a multiprocessor."""
    values = case.arguments
    if "SLOTS" in values:  # specialised: three consumers, all of the registers
        return 192, values["BLOCK_N"], 3, 1
    threads = 32 * values["num_warps"]
    programs = min(65536 // (-(-registers // 8) * 8 * threads), 227 * 1024 // (shared + 1024))
    return values["BLOCK_M"], values["BLOCK_N"], values["num_warps"] // 4, programs


def main(argv: Sequence[str] | None = None) -> None:
    """Compile the attention kernels for sm_90 and print the table."""
    import compile_kernels

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name contains this")
    parser.add_argument("--phases", type=int, default=7, help="random beginnings")
    args = parser.parse_args(argv)
    if args.phases < 1:
        parser.error(f"--phases: got {args.phases}, want at least 1")
    print("| variant | rows x keys | programs | instructions a trip | median | lowest | highest |")
    print("|---|---|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as directory:
        for case in compile_kernels.find_cases(90):
            parts = case.name.split("/")
            if parts[0] != "attention" or parts[-1] != "bf16-hd64" or "norms" in case.name or "redo" in case.name:
                continue
            if args.only not in parts[1]:
                continue
            result = compile_kernels.compile_case(case, 90, Path(directory))
            code = parse((Path(directory) / f"{case.name.replace('/', '_')}-sm90.sass").read_text())
            rows, keys, warps, programs = describe(case, result.registers, result.shared)
            loops = main_loops(code)
            # A kernel that is not specialised has its fallback's loop too, which comes second.
            loops = loops if case.loops else loops[:1]
            rates = predict(loops, keys, warps, programs, args.phases)
            numbers = " | ".join(f"{rate:.0f}" for rate in (statistics.median(rates), rates[0], rates[-1]))
            print(f"| {parts[1]} | {rows}x{keys} | {programs} | {len(loops[0])} | {numbers} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
