"""What benchmarks, reports and tests share: the header of a table, errors, times and memory.

Importing this module makes the checkout importable, so that the scripts run where cogvid is not installed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PATHS = [str(ROOT), str(ROOT / "kernels")]
sys.path[:0] = PATHS

if TYPE_CHECKING:
    pass

MIB = 2**20
PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate")  # whose versions change a figure
SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


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


def caption(values: dict[str, Any]) -> str:
    """Return a header as one line, without its command."""
    versions = ", ".join(f"{name} {values[name]}" for name in PACKAGES)
    return f"commit {values['commit']}, {values['date']}, {values['machine']}, Python {values['python']}, {versions}"


def commit() -> str:
    """Return the checkout's commit, with "-dirty" where files were changed; "unknown" without git."""
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown"


def machine(device: torch.device) -> str:
    """Describe the GPU (driver, clocks, power limit) or the CPU (threads, cores)."""
    if device.type == "cuda":
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit"
        return _output("nvidia-smi", query, "--format=csv,noheader") or torch.cuda.get_device_name(device)
    from cogvid.run.machine import cpu_name  # here, because scripts set the path after this import

    return f"{cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no such program
        return ""


def status_mib(field: str) -> float | None:
    """Return a field of /proc/self/status in MiB: VmRSS, VmHWM, RssAnon; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":")), None)


def reset_peak() -> bool:
    """Reset VmHWM, the peak of resident memory; return whether that is possible here (Linux).

    Freed memory is returned to the system first. Kept by the allocator, it would hide what the next call takes.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # another C library
        return False
    return True


def peak_memory(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float | None]:
    """Warm `call` up, then return its value and the MiB that it added at its peak; None where that is unknown."""
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        value = call()
        torch.cuda.synchronize(device)
        return value, (torch.cuda.max_memory_allocated(device) - before) / MIB
    if not reset_peak():
        return call(), None
    before = status_mib("VmRSS") or 0
    value = call()
    return value, (status_mib("VmHWM") or 0) - before


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


def pooled_ratio(errors: Iterable[tuple[float, float]]) -> float:
    """Return the rms of the first of each pair over that of the second.

    The pairs are errors in low precision, ours and another's. The ratio of one pair depends on chance (0.65 to 1.25 for
    one model); that of several pairs is a property of the two computations.
    """
    ours, theirs = torch.tensor(list(errors), dtype=torch.float64).pow(2).mean(0).sqrt().tolist()
    return ours / theirs


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill fresh tensors with NaN (or the largest integer), so that an element left unwritten is found."""

    def poison(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **options: Any) -> Tensor:
            tensor = function(*args, **options)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

        return poisoned

    owners: list[tuple[Any, str]] = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
    owners += [(Tensor, "new_empty"), (Tensor, "new_empty_strided")]
    kept = [getattr(owner, name) for owner, name in owners]
    try:
        for (owner, name), function in zip(owners, kept, strict=True):
            setattr(owner, name, poison(function))
        yield
    finally:
        for (owner, name), function in zip(owners, kept, strict=True):
            setattr(owner, name, function)


def markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
