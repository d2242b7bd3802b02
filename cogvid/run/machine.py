"""The machine: its processor's name and how much memory it has."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """Where a run would take place. device: "cpu" or "cuda". total, free: bytes; of a CPU with its swap."""

    device: str
    total: int
    free: int


def look_at(device: torch.device) -> Machine:
    """Return the memory of a device; that of a CPU within the limits of this process and its control group."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Machine("cuda", total, free)
    fields = _fields(Path("/proc/meminfo"))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = fields.get("MemTotal", pages) + fields.get("SwapTotal", 0)
    free = fields.get("MemAvailable", total) + fields.get("SwapFree", 0)
    taken = _fields(Path("/proc/self/status"))
    for limit, used in (
        (_group_limit(), taken.get("VmRSS", 0)),
        (_address_space(), taken.get("VmSize", 0)),
    ):
        if limit is not None:
            total, free = min(total, limit), min(free, max(limit - used, 0))
    # What this process has already is part of a run, and not in what is free.
    return Machine("cpu", total, min(free + taken.get("VmRSS", 0), total))


def _address_space() -> int | None:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _group_limit() -> int | None:
    """Return the memory limit of the control group (of either version) that a container sees as its own."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = Path("/sys/fs/cgroup", name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return int(text)
    return None


def _fields(path: Path) -> dict[str, int]:
    """Read a file of /proc with lines such as `MemTotal: 1234 kB`, in bytes; empty where there is none."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
