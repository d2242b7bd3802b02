"""What benchmarks, reports and tests share beside `cogvid.run.figures`: memory, pooled errors, poisoned memory.

Importing this module makes the checkout importable, so that the scripts run where cogvid is not installed.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PATHS = [str(ROOT), str(ROOT / "kernels")]
sys.path[:0] = PATHS

from cogvid.run.figures import PACKAGES, header, installed, machine, rel_rms, spread  # noqa: E402

__all__ = [
    "MIB", "PACKAGES", "PATHS", "ROOT", "SHORT", "caption", "header", "installed", "machine", "markdown_row",
    "peak_memory", "poisoned_memory", "pooled_ratio", "rel_rms", "reset_peak", "spread", "status_mib",
]  # fmt: skip

MIB = 2**20
SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def caption(values: dict[str, Any]) -> str:
    """Return a header as one line, without its command."""
    versions = ", ".join(f"{name} {values[name]}" for name in PACKAGES)
    return f"commit {values['commit']}, {values['date']}, {values['machine']}, Python {values['python']}, {versions}"


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
