"""Compile every Triton kernel for real architectures, without a GPU, and check what came out.

Each module of `cogvid_kernels` that has `compile_cases(architecture)` is compiled for sm_80, sm_89, sm_90 and sm_100. A
case fails if it does not compile, spills registers to local memory, needs more shared memory than a block may have,
lacks an instruction that it was written for (wgmma, TMA, 128-bit loads), or, if it is specialised, has main loops that
do not overlap.

    python scripts/compile_kernels.py                       check everything, print the table
    python scripts/compile_kernels.py --write               and write it to kernels/COMPILED.md
    python scripts/compile_kernels.py --arch 90 --only attention/tma --sass out/

The exit status is 1 when a case fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "kernels"))

ARCHITECTURES = (80, 89, 90, 100)
# Shared memory that one block may have, in bytes (CUDA programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Counted in the table. A name counts every opcode that begins with it.
COUNTED = (
    "HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "LDGSTS", "LDG.E.128", "STG.E.128", "MUFU.EX2", "SHFL", "BAR.SYNC",
    "USETMAXREG",
)  # fmt: skip


@dataclass
class Result:
    """What one case compiled to; `problems` is empty when it is as wanted."""

    name: str
    arch: int
    seconds: float = 0.0
    warps: int = 0
    registers: int = 0
    shared: int = 0
    local: int = 0
    instructions: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def specialise(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[tuple, list]]:
    """Return signature, constants and attributes as a launch with these arguments would specialise them.

    The rules are those of `JITFunction.run`: None and 1 are constants; addresses and integers that 16 divides say so,
    but for integers that the kernel names in do_not_specialize.
    """
    import torch
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
    from triton.tools.tensor_descriptor import TensorDescriptor

    short = {
        "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int64": "i64", "uint8": "u8",
    }  # fmt: skip
    divisible = [["tt.divisibility", 16]]
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple, list] = {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        fixed = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not fixed):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, (TensorDescriptor, GluonDescriptor)):
            dtype = short[str(value.base.dtype).removeprefix("torch.")]
            layout = f",{value.layout!r}" if isinstance(value, GluonDescriptor) else ""
            signature[parameter.name] = f"tensordesc<{dtype}{list(value.block_shape)}{layout}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + short[str(value.dtype).removeprefix("torch.")]
            if value.data_ptr() % 16 == 0:
                attributes[parameter.num,] = divisible
        elif isinstance(value, bool):
            signature[parameter.name] = "u1"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not fixed:
                attributes[parameter.num,] = divisible
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            raise ValueError(f"{parameter.name}: got {type(value).__name__}, want a tensor, a number or None")
    return signature, constants, attributes


def compile_case(case: Any, arch: int, sass_directory: Path | None = None) -> Result:
    """Compile one case and hold it against what it promises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    result = Result(case.name, arch)
    signature, constants, attributes = specialise(case.kernel, case.arguments)
    options = {name: value for name, value in case.arguments.items() if name not in signature}
    # A Gluon kernel is compiled from another kind of source; its own binder knows which.
    source_class = ASTSource
    if case.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source_class
    source = source_class(case.kernel, signature, constants, attributes)
    begin = time.perf_counter()
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # the compiler raises many kinds, and each is a finding of this one case
        text = f"{error}\n{error.__cause__ or ''}"
        lines = [line.strip(" ^") for line in text.splitlines()]
        reason = " / ".join(line for line in lines if line)
        result.problems.append(f"does not compile: {type(error).__name__}: {reason[-300:]}")
        return result
    result.seconds = round(time.perf_counter() - begin, 2)
    result.shared = compiled.metadata.shared
    result.warps = compiled.metadata.num_warps
    sass, usage = disassemble(compiled.asm["cubin"])
    if sass_directory is not None:
        sass_directory.mkdir(parents=True, exist_ok=True)
        (sass_directory / f"{case.name.replace('/', '_')}-sm{arch}.sass").write_text(sass)
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]+)", sass, re.MULTILINE))
    result.instructions = sum(count for opcode, count in opcodes.items() if opcode != "NOP")
    result.registers, result.local = usage["REG"], usage["STACK"] + usage["LOCAL"]
    result.counts = {name: count_opcode(opcodes, name) for name in COUNTED}
    check(result, case, opcodes)
    if case.loops is not None:
        result.problems += check_loops(sass, case.loops)
    return result


def count_opcode(opcodes: Counter[str], wanted: str) -> int:
    """Count the opcodes of that name which have all of its modifiers (LDG.E.128 is also LDG.E.STRONG.128)."""
    head, *rest = wanted.split(".")
    return sum(
        count
        for opcode, count in opcodes.items()
        if opcode.split(".")[0] == head and set(rest) <= set(opcode.split("."))
    )


def check(result: Result, case: Any, opcodes: Counter[str]) -> None:
    """Add to the result's problems what is not as the case promises."""
    if result.local or count_opcode(opcodes, "LDL") or count_opcode(opcodes, "STL"):
        result.problems.append(f"spills: {result.local} bytes of local memory a thread")
    # An asynchronous chain of wgmma has one wait; where ptxas cannot prove the chain safe it waits after each.
    if 0 < count_opcode(opcodes, "HGMMA") <= count_opcode(opcodes, "WARPGROUP.DEPBAR"):
        result.problems.append("serialized: a wait after every HGMMA")
    if result.shared > SHARED_LIMIT[result.arch]:
        result.problems.append(f"shared memory: {result.shared} bytes, the chip has {SHARED_LIMIT[result.arch]}")
    result.problems += [f"no {name} in the machine code" for name in case.sass if not count_opcode(opcodes, name)]
    result.problems += [f"{name} in the machine code" for name in case.absent if count_opcode(opcodes, name)]


def check_loops(sass: str, wanted: Any) -> list[str]:
    """Say what is wrong with the main loops of a specialised kernel; `wanted` is a MainLoops."""
    from sass_model import is_of_one_warpgroup, left_running, main_loops, misused_registers, parse

    loops = main_loops(parse(sass))
    problems = [] if len(loops) == wanted.count else [f"main loops: got {len(loops)}, want {wanted.count}"]
    for i, loop in enumerate(loops):
        units = Counter(instruction.unit for instruction in loop)
        if units["wgmma"] != wanted.hgmma:
            problems.append(f"loop {i}: got {units['wgmma']} HGMMA, want {wanted.hgmma}")
        if not any(left_running(x) for x in loop if x.unit == "wait"):
            problems.append(f"loop {i}: every wait is for all wgmma")
        if not all(is_of_one_warpgroup(x) for x in loop if x.unit == "barrier"):
            problems.append(f"loop {i}: a barrier of the whole block")
        problems += [f"loop {i}: a register of a running wgmma: {line}" for line in misused_registers(loop)]
    return problems


def disassemble(cubin: bytes) -> tuple[str, dict[str, int]]:
    """Return the machine code as text, and the registers, stack and local memory a thread uses."""
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    return sass, {name: int(found[name]) for name in ("REG", "STACK", "SHARED", "LOCAL")}


def find_cases(arch: int) -> list[Any]:
    """Collect the cases of every kernel module for one architecture."""
    package = importlib.import_module("cogvid_kernels")
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"cogvid_kernels.{name}") for name in names]
    return [case for module in modules if hasattr(module, "compile_cases") for case in module.compile_cases(arch)]


def table(results: list[Result]) -> str:
    """Lay the results out as one Markdown table per architecture."""
    parts = []
    for arch in sorted({result.arch for result in results}):
        rows = [result for result in results if result.arch == arch]
        seen = [name for name in COUNTED if any(row.counts.get(name) for row in rows)]
        head = ["kernel", "warps", "registers", "shared", "local", "instructions", *seen]
        lines = [f"## sm_{arch}", "", "| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
        for row in rows:
            numbers = [row.warps, row.registers, row.shared, row.local, row.instructions]
            numbers += [row.counts.get(name, 0) for name in seen]
            lines.append(f"| {row.name} | " + " | ".join(f"{n:,}" for n in numbers) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def document(results: list[Result]) -> str:
    """Return the text of kernels/COMPILED.md."""
    import triton

    return (
        "# What the kernels compile to\n\n"
        "Written by `python scripts/compile_kernels.py --write`, without a GPU. Do not edit. "
        f"Triton {triton.__version__} and its own ptxas.\n\n"
        "Registers and local memory are per thread, shared memory is per block; memory is in bytes. Local memory above "
        "zero is a spill and fails the check. The other columns count instructions in the machine code, not how often "
        "they run: HGMMA is wgmma, UTCHMMA a product on fifth-generation tensor cores, UTMALDG a TMA load, LDGSTS an "
        "asynchronous copy to shared memory.\n\n" + table(results)
    )


def main(argv: list[str] | None = None) -> int:
    """Run the checks; return 1 when a case fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--write", action="store_true", help="write kernels/COMPILED.md (whole runs only)")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON list, last line of stdout")
    parser.add_argument("--sass", type=Path, metavar="DIRECTORY", help="keep the machine code there")
    args = parser.parse_args(argv)
    if args.write and (args.only or set(args.arch) != set(ARCHITECTURES)):
        parser.error("--write: got a part of the cases, want all of them (no --only, no --arch)")
    # An interpreted kernel cannot be compiled, and the choice is made when the module is imported.
    os.environ.pop("TRITON_INTERPRET", None)

    results = []
    for arch in args.arch:
        for case in find_cases(arch):
            if args.only in case.name:
                result = compile_case(case, arch, args.sass)
                results.append(result)
                state = "; ".join(result.problems) or f"{result.registers} registers, {result.shared} shared"
                print(f"sm_{arch} {result.name}: {state} ({result.seconds} s)", file=sys.stderr, flush=True)
    if not results:
        parser.error(f"--only: got {args.only!r}, want a part of a case's name")
    print(table(results))
    failed = [result for result in results if result.problems]
    for result in failed:
        print(f"FAILED sm_{result.arch} {result.name}: {'; '.join(result.problems)}")
    if args.write and not failed:
        (ROOT / "kernels" / "COMPILED.md").write_text(document(results))
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
