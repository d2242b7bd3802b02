"""What a run writes beside its video, and what it may leave out of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvid.media.download import shown
from cogvid.run.stages import Stage
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


def write_sidecar(path: str, record: dict[str, Any], stages: Iterable[Stage]) -> None:
    """Write a sidecar: `record`, `seconds` of each stage, and `peak_memory`, the largest of them in bytes."""
    stages = list(stages)
    seconds = {stage.name: round(stage.seconds, 3) for stage in stages}
    values = {"record": record, "seconds": seconds, "peak_memory": max(stage.peak for stage in stages)}
    write_whole(Path(path), lambda partial: partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8"))
