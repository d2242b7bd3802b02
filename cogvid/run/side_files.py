"""What a run writes beside its video, and what it may leave out of it."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cogvid.media.download import shown
from cogvid.weights.files import write_whole


@dataclass(frozen=True)
class SideFiles:
    """The files of a run beside its video; None is none.

    embed: put the input image into the video. sidecar: JSON with the record, and with what must not be in the video
    because it differs from run to run: seconds and peak memory.
    """

    embed: bool = True
    sidecar: str | None = None

    def check(self, output: str) -> None:
        """Raise unless each file can be written, and no two are the same."""
        taken = {os.path.realpath(output): "output"}
        for name in ("sidecar",):
            path = getattr(self, name)
            if path is None:
                continue
            target = os.path.realpath(path)
            if target in taken:
                raise ValueError(f"{name}: got {shown(path)}, which is the {taken[target]} too, want another file")
            taken[target] = name
            check_new_file(name, path)


NO_FILES = SideFiles()


def check_new_file(name: str, path: str) -> None:
    """Raise unless a file can be written at this path."""
    directory = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path) or not os.path.isdir(directory) or not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: got {shown(path)}, want a file in a directory that exists and is writable")


@dataclass
class Measured:
    """Seconds of the stages of a run, by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - began, 3)


def write_sidecar(path: str, record: dict[str, Any], measured: Measured, device: torch.device) -> None:
    """Write a sidecar: `record`, `seconds`, and `peak_memory` in bytes, of the process and of its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    text = json.dumps({"record": record, "seconds": measured.seconds, "peak_memory": peak}, indent=1) + "\n"
    write_whole(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))
