"""Commands under torchrun, with one thread each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULTY = str(Path(__file__).with_name("faulty.py"))


@dataclass(frozen=True)
class Ended:
    """What a command left. errors: the lines of cogvid's errors. ended: when it did, by the monotonic clock."""

    status: int
    out: str
    err: str
    ended: float

    @property
    def seconds(self) -> float:
        """How long it lived after a fault of faulty.py."""
        [fault] = [line for line in self.err.splitlines() if line.startswith("fault at ")]
        return self.ended - float(fault.removeprefix("fault at "))

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("cogvid: error: ")]


def start(count: int, program: Sequence[str], *, nodes: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start a program on so many processes. nodes: the options of torchrun for several nodes."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    environment.pop("WORLD_SIZE", None)
    command = [sys.executable, "-m", "torch.distributed.run", *nodes, "--nproc-per-node", str(count), *program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait(process: subprocess.Popen[str], limit: float = 200) -> Ended:
    """Wait for a program of `start`; what takes longer than `limit` seconds fails, and is killed with its group."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate(timeout=60)
        raise
    return Ended(process.returncode, out, err, time.monotonic())


def cogvid(count: int, *arguments: str) -> Ended:
    """Run the command of cogvid on so many processes."""
    return wait(start(count, ["-m", "cogvid", *arguments]))


def faulty(fault: str, rank: int, step: int, *arguments: str, count: int = 2) -> Ended:
    """Run it with a fault in one rank: see faulty.py."""
    return wait(start(count, [FAULTY, fault, str(rank), str(step), *arguments]))
