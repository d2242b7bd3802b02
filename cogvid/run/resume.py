"""Keep what the command line was given with a saved run, and begin the run again with it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvid.media.image import load_image
from cogvid.media.video import read_video
from cogvid.run.generate import Job
from cogvid.run.given import IMAGES, VIDEOS
from cogvid.run.saved_run import SavedRun

# What says where a run is saved or what is shown of it, how many devices it is on, and what may be another when it goes
# on. A URL to enhance the
# prompt may have secrets; the run goes on with the prompt that it gave.
_PICTURES = (*IMAGES, *VIDEOS)
NOT_OF_THE_RUN = ("command", "checkpoint", "resume", "every", *_PICTURES, "verbose", "traceback", "sidecar", "enhance",
                  "parallel")  # fmt: skip
MAY_CHANGE = ("output", "device", "ops", "local_files_only")


def open_saved_run(checkpoint: str | None, resume: str | None, every: int | None) -> SavedRun | None:
    """Open the directory of `--checkpoint` or `--resume`; None for neither.

    Raises:
        ValueError: the two differ; `checkpoint` holds a run.
    """
    if checkpoint and resume and os.path.realpath(checkpoint) != os.path.realpath(resume):
        raise ValueError(f"checkpoint, resume: got {checkpoint} and {resume}, want one directory")
    directory = resume or checkpoint
    if not directory:
        if every is not None:
            raise ValueError(f"every: got {every} without a directory, want it with --checkpoint or --resume")
        return None
    saved = SavedRun(directory, every)
    if not resume and not saved.is_empty:
        saved.close()
        raise ValueError(
            f"checkpoint: got {directory}, which holds a run, want an empty directory, or --resume to go on"
        )
    return saved


def restore(saved: SavedRun, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that the saved run was begun with. given: those of now, which must be the same.

    Pictures come back as PIL images, videos as `[F, H, W, 3]` uint8. Without a saved run nothing comes back. A run of
    which no step is saved begins anew, with a warning.
    """
    if not saved.has_state:
        reason = "where no step is saved, so the run starts from the beginning"
        warnings.warn(f"resume: got {saved.directory}, {reason}", stacklevel=2)
    kept = saved.inputs() or {}
    for name, value in given.items():
        if name not in kept or name in MAY_CHANGE:
            continue
        if name in _PICTURES:
            if not _same_pictures(value, kept[name], kept.get("video_start"), kept.get("video_fps")):
                raise ValueError(f"{name}: got others than those of the run saved in {saved.directory}, want the same")
        elif value != kept[name]:
            raise ValueError(f"{name}: got {value!r}, want {kept[name]!r} as in the run saved in {saved.directory}")
    for name in _PICTURES:
        if kept.get(name) is not None and kept[name].ndim == 3:
            kept[name] = _picture(kept[name])
    return {name: value for name, value in kept.items() if name not in given or name not in MAY_CHANGE}


def keep(saved: SavedRun, arguments: Mapping[str, Any], job: Job) -> None:
    """Save a run's arguments, with the pictures that they name, unless they are saved already."""
    if not saved.is_empty:
        return
    plain: dict[str, Any] = {
        name: value
        for name, value in arguments.items()
        if name not in NOT_OF_THE_RUN and (value is None or isinstance(value, (bool, int, float, str, list)))
    }
    plain["output"] = os.path.abspath(job.output)
    if job.enhanced is not None:
        plain["enhanced"] = {**job.enhanced, "text": job.inputs["prompt"]}
    given = {name: job.inputs[name] for name in _PICTURES}
    pixels = {name: torch.from_numpy(np.array(value)) for name, value in given.items() if value is not None}
    saved.save_inputs({**plain, **dict.fromkeys(_PICTURES), **pixels})


def _same_pictures(path: str, kept: Tensor | None, start: float | None, fps: float | None) -> bool:
    if kept is None:
        return False
    if kept.ndim == 3:
        return torch.equal(torch.from_numpy(np.array(load_image(path))), kept)
    return torch.equal(read_video(path, len(kept), start=start, fps=fps)[0], kept)


def _picture(pixels: Tensor) -> Any:
    from PIL import Image as pil

    return pil.fromarray(pixels.numpy())
