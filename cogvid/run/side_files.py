"""What a run writes beside its video, and what it may leave out of it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from cogvid.media.download import shown
from cogvid.run.noise import Noise, RecordedNoise, ReplayedNoise, save_noise
from cogvid.run.stages import Stage
from cogvid.run.trajectory import Trajectory
from cogvid.weights.files import write_whole
from cogvid.weights.parallel_option import check_one_process


@dataclass(frozen=True)
class SideFiles:
    """The files of a run beside its video; None is none.

    embed: put the input image into the video. sidecar: JSON with the record, and with what must not be in the video
    because it differs from run to run: seconds and peak memory. save_trajectory: see `trajectory`. save_noise, noise:
    see `noise`; the second is read. capture: a directory, see `capture`.
    """

    embed: bool = True
    sidecar: str | None = None
    save_trajectory: str | None = None
    save_noise: str | None = None
    noise: str | None = None
    capture: str | None = None

    def check(self, output: str) -> None:
        """Raise unless each file can be written, and no two are the same."""
        if self.capture is not None:
            check_one_process("capture", self.capture)
        taken = {os.path.realpath(output): "output"}
        for name in ("sidecar", "save_trajectory", "save_noise", "capture"):
            path = getattr(self, name)
            if path is None:
                continue
            target = os.path.realpath(path)
            if target in taken:
                raise ValueError(f"{name}: got {shown(path)}, which is the {taken[target]} too, want another")
            taken[target] = name
            (check_new_directory if name == "capture" else check_new_file)(name, path)


NO_FILES = SideFiles()


def check_new_file(name: str, path: str) -> None:
    """Raise unless a file can be written at this path."""
    directory = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path) or not os.path.isdir(directory) or not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: got {shown(path)}, want a file in a directory that exists and is writable")


def check_new_directory(name: str, path: str | os.PathLike[str]) -> None:
    """Raise unless a directory can be made at this path; an empty one may be there."""
    target = os.path.realpath(path)
    parent = os.path.dirname(target)
    empty = not os.path.lexists(target) or (os.path.isdir(target) and not os.listdir(target))
    if not empty or not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        said = "which is not empty" if not empty else "which cannot be made"
        raise ValueError(f"{name}: got {shown(os.fspath(path))}, {said}, want a new or empty directory")


class Watched:
    """What a run shows while it samples, for the side files. A context manager around the call of a pipeline.

    draws: names of what is drawn before the initial noise. noise: what the call must draw, if it is given.
    """

    def __init__(self, files: SideFiles, draws: Sequence[str], noise: Noise | None) -> None:
        self._files, self._modes = files, contextlib.ExitStack()
        self._trajectory = None if files.save_trajectory is None else Trajectory()
        self._recorded = None if files.save_noise is None else RecordedNoise(draws)
        self._replayed = None if noise is None else ReplayedNoise(noise)

    def __enter__(self) -> Self:
        for mode in (self._replayed, self._recorded):  # the one entered last is asked first and calls the other
            if mode is not None:
                self._modes.enter_context(mode)
        return self

    def __exit__(self, *error: Any) -> None:
        self._modes.__exit__(*error)

    @property
    def callback(self) -> Callable[..., None] | None:
        """The pipeline's `callback_on_step_end`; None if nothing is to be seen."""
        return self._look if self._trajectory is not None or self._recorded is not None else None

    def _look(self, _pipe: object, index: int, timestep: int, tensors: dict[str, Tensor]) -> None:
        if self._trajectory is not None:
            self._trajectory.add(timestep, tensors)
        if self._recorded is not None:
            self._recorded.step = index + 1

    def save(self, record: dict[str, Any]) -> None:
        """Write the trajectory and the noise."""
        if self._trajectory is not None and self._files.save_trajectory is not None:
            self._trajectory.record = record
            self._trajectory.save(self._files.save_trajectory)
        if self._recorded is not None and self._files.save_noise is not None:
            save_noise(self._files.save_noise, self._recorded.draws)


def write_sidecar(path: str, record: dict[str, Any], stages: Iterable[Stage]) -> None:
    """Write a sidecar: `record`, `seconds` of each stage, and `peak_memory`, the largest of them in bytes."""
    stages = list(stages)
    seconds = {stage.name: round(stage.seconds, 3) for stage in stages}
    values = {"record": record, "seconds": seconds, "peak_memory": max(stage.peak for stage in stages)}
    write_whole(Path(path), lambda partial: partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8"))
