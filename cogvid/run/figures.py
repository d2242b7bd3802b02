"""What benchmarks and reports share: the header that a table of figures must have, relative errors, spreads."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvid.run.machine import cpu_name

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, if it is one
PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate")  # whose versions change a figure


def installed(name: str) -> str:
    """Return the version of a package, or "absent"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def header(device: torch.device, command: str) -> dict[str, Any]:
    """Return what a table of figures must name: command, commit, date, machine, versions."""
    return {
        "command": command,
        "commit": commit(),
        "date": date.today().isoformat(),
        "machine": machine(device),
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
    }


def commit(directory: Path = ROOT) -> str:
    """Return a checkout's commit, with "-dirty" where files were changed; "unknown" without git or for a wheel."""
    if not (directory / ".git").exists():  # else git would find a repository that holds the environment
        return "unknown"
    return _output("git", "-C", str(directory), "describe", "--always", "--dirty") or "unknown"


def machine(device: torch.device) -> str:
    """Describe the GPU (driver, clocks, power limit) or the CPU (threads, cores)."""
    if device.type == "cuda":
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit"
        return _output("nvidia-smi", query, "--format=csv,noheader") or torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no such program
        return ""


def spread(values: list[float]) -> tuple[float, float, float]:
    """Return the median and the 20th and 80th percentiles."""
    ordered = sorted(values)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    return statistics.median(ordered), low, high


def rel_rms(actual: Tensor, expected: Tensor) -> float:
    """Return `rms(actual - expected) / rms(expected)`, computed in fp64."""
    if actual.shape != expected.shape:
        raise ValueError(f"actual: got shape {tuple(actual.shape)}, want {tuple(expected.shape)}")
    difference = total = torch.zeros((), dtype=torch.float64, device=expected.device)
    # In parts: a video at its full size is 17 GB in fp64.
    for a, e in zip(*(x.detach().flatten().split(2**24) for x in (actual, expected)), strict=True):
        difference = difference + (a.double() - e.double()).square().sum()
        total = total + e.double().square().sum()
    return float((difference / total).sqrt())
