"""Every kernel compiles for real chips without a GPU: no spills, shared memory that fits, the instructions meant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).resolve().parents[2]


def run_without_interpreter(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where kernels compile: this process may hold interpreted ones."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


# In the default run attention alone, on the chip that has wgmma and TMA; all kernels, and other chips, take longer.
@pytest.mark.parametrize(
    ("arch", "only"),
    [(90, "attention"), *(pytest.param(arch, "", marks=pytest.mark.slow) for arch in (80, 89, 90, 100))],
)
def test_no_spills_and_the_right_instructions(arch: int, only: str) -> None:
    run = run_without_interpreter("scripts/compile_kernels.py", "--arch", str(arch), "--only", only, "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    assert len(results) >= 10
    assert not [result["name"] for result in results if result["problems"] or result["local"]]
    committed = (ROOT / "kernels" / "COMPILED.md").read_text()
    if not only and f"Triton {triton.__version__} " in committed:
        section = run.stdout[run.stdout.index(f"## sm_{arch}") : run.stdout.rindex("|\n") + 2]
        assert section in committed, "kernels/COMPILED.md is old: python scripts/compile_kernels.py --write"


BAD_TILE = """
import sys
sys.path[:0] = ["kernels", "scripts"]
from dataclasses import replace
from compile_kernels import compile_case, find_cases
case = next(case for case in find_cases({arch}) if case.name == "{name}")
bad = replace(case, arguments=case.arguments | {change})
print(compile_case(bad, {arch}).problems)
"""


@pytest.mark.parametrize(
    ("arch", "name", "change", "problem"),
    [
        pytest.param(
            80,
            "attention/pointer/fp32-hd64",
            {"BLOCK_M": 64, "BLOCK_N": 64},
            "spills: ",
            id="spill",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            89,
            "attention/pointer/bf16-hd64",
            {"BLOCK_N": 128, "num_stages": 5},
            "shared memory: ",
            id="shared",
            marks=pytest.mark.slow,
        ),
        pytest.param(90, "attention/pointer/bf16-hd64", {"BLOCK_M": 32, "num_warps": 2}, "no HGMMA ", id="instruction"),
    ],
)
def test_the_check_can_fail(arch: int, name: str, change: dict, problem: str) -> None:
    run = run_without_interpreter("-c", BAD_TILE.format(arch=arch, name=name, change=change))
    assert problem in run.stdout, run.stdout + run.stderr


BAD_LOOPS = """
import sys
from pathlib import Path
sys.path[:0] = ["kernels", "scripts"]
from compile_kernels import check_loops, compile_case, find_cases
case = next(case for case in find_cases(90) if case.name == "attention/tma_ws_bounded/bf16-hd64")
result = compile_case(case, 90, Path(sys.argv[1]))
sass = next(Path(sys.argv[1]).iterdir()).read_text()
print(result.problems)
for old, new in (
    ("HGMMA.64x128x16", "HMMA.64x128x16"),
    ("gsb0, 0x1", "gsb0, 0x0"),
    (", 0x80", ""),
    ("WARPGROUP.DEPBAR.LE gsb0, 0x1", "NOP"),
):
    assert old in sass
    print(check_loops(sass.replace(old, new), case.loops))
"""


def test_the_check_of_specialised_loops_can_fail(tmp_path: Path) -> None:
    """The machine code as it is, then with fewer wgmma, only full waits, barriers of the block, and a wait less."""
    run = run_without_interpreter("-c", BAD_LOOPS, str(tmp_path))
    good, fewer, full, block, unwaited = run.stdout.splitlines()
    assert good == "[]"
    assert fewer.count("got 8 HGMMA, want 12") == 3
    assert full.count("every wait is for all wgmma") == 3
    assert block.count("a barrier of the whole block") == 3
    assert "a register of a running wgmma: FFMA" in unwaited


def test_a_cpu_tensor_is_refused_without_the_interpreter() -> None:
    program = (
        "import sys; sys.path.insert(0, 'kernels'); import torch; from cogvid_kernels import attention;"
        "x = torch.zeros(1, 2, 1, 64); attention(x, x, x)"
    )
    run = run_without_interpreter("-c", program)
    assert "ValueError: q: got device cpu, want cuda" in run.stderr
