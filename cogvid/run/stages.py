"""Seconds and memory of the stages of a run, for whoever listens; a stage costs nothing where nobody does."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from cogvid.run.signals import stop_if_asked


@dataclass(frozen=True)
class Stage:
    """A stage that ended. seconds: on the clock. memory, peak: bytes.

    On CUDA they are what PyTorch's tensors take, on all GPUs: at the end, and at most during the stage. On a CPU they
    are what the process has in memory: at the end, and at most since the process began.
    """

    name: str
    seconds: float
    memory: int
    peak: int

    def __str__(self) -> str:
        return f"{self.name}: {self.seconds:.2f} s, {self.memory / 2**20:.0f} MiB, peak {self.peak / 2**20:.0f} MiB"


Listener = Callable[[Stage], None]
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextlib.contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Call `listener` with each stage that ends within the block, in this thread."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Measure the block, or the function that this decorates, as a stage of this name; stop if a signal asks for it."""
    stop_if_asked()
    listeners = _listeners.get()
    if not listeners:
        yield
        stop_if_asked()
        return
    gpus = _gpus_in_use()
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
    begun = time.perf_counter()
    yield
    stop_if_asked()
    for gpu in (gpus := _gpus_in_use()):
        torch.cuda.synchronize(gpu)
    seconds = time.perf_counter() - begun
    memory, peak = _process_memory()
    if gpus:
        memory = sum(torch.cuda.memory_allocated(gpu) for gpu in gpus)
        peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    announce(Stage(name, seconds, memory, peak))


def announce(stage: Stage) -> None:
    """Tell whoever listens of a stage that ended, here or in another process."""
    for listener in _listeners.get():
        listener(stage)


def print_stage(stage: Stage) -> None:
    """Print a stage on stderr, above the bars that are there."""
    tqdm.write(f"cogvid: {stage}", file=sys.stderr)


def _gpus_in_use() -> list[int]:
    """The GPUs that hold tensors; to ask another one would take memory there."""
    if not torch.cuda.is_initialized():
        return []
    return [gpu for gpu in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(gpu)]


def _process_memory() -> tuple[int, int]:
    """What the process has in memory, now and at most: bytes. Zeros where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # no Linux
        return 0, 0
    found = {name: 1024 * int(kib) for name, kib in re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status)}
    return found.get("VmRSS", 0), found.get("VmHWM", 0)
