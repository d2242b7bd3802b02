"""The record of a run: everything that decided its result, and nothing else, ready for JSON.

Two runs of one command on one machine have the same record. Times, memory, dates and paths are not in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import cogvid
from cogvid.media.download import shown
from cogvid.media.image import load_image
from cogvid.media.video import read_covers, read_metadata
from cogvid.run.given import IMAGES, VIDEOS
from cogvid.run.machine import cpu_name
from cogvid.run.settings import Settings
from cogvid.sampling.schedule import Schedule
from cogvid.weights.checkpoint import Checkpoint
from cogvid.weights.load_options import LOAD_OPTIONS
from cogvid.weights.placement import Placement

if TYPE_CHECKING:
    from PIL.Image import Image

_DECIDING = ("numpy", "pillow", "av", "transformers", "sentencepiece")  # packages that make pixels, tokens or bytes
ENVIRONMENT = ("model", "weights", *LOAD_OPTIONS, "machine", "versions")


def make_record(
    checkpoint: Checkpoint,
    placement: Placement,
    settings: Settings,
    schedule: Schedule,
    *,
    pictures: Mapping[str, Sequence[Any]],
    **inputs: Any,
) -> dict[str, Any]:
    """Return the record of a run.

    The arguments have the call's names. pictures: as `given.resized` returns them; the record has SHA-256 of their
    pixels, `[H, W, 3]` and `[F, H, W, 3]` uint8 in C order: a list for images, and one for a video, or a list if there
    are several.
    inputs: the rest of what the call was given.
    """
    return {
        **inputs,
        **{name: _hashes(name, pictures.get(name)) for name in (*IMAGES, *VIDEOS)},
        "source": checkpoint.directory.name if checkpoint.source_kind == "directory" else checkpoint.source,
        "source_kind": checkpoint.source_kind,
        "revision": checkpoint.revision,
        "variant": checkpoint.variant,
        "defaults": checkpoint.defaults,
        "max_sequence_length": checkpoint.model.text_length,
        **settings.to_dict(),
        "timesteps": list(schedule.timesteps),
        "guidance_schedule": settings.guidance(schedule) if settings.guided else None,
        "fps": checkpoint.model.fps,
        "noise": None,
        **environment(checkpoint, placement),
    }


def environment(checkpoint: Checkpoint, placement: Placement) -> dict[str, Any]:
    """Return the part of a record that a replay may find different: weights, placement, machine and versions.

    Its names are `ENVIRONMENT`.
    """
    return {
        "model": checkpoint.model.name,
        "weights": checkpoint.weights,
        **placement.to_dict(),
        "machine": _machine(placement.device),
        "versions": {
            "cogvid": cogvid.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in (*_DECIDING, *(["triton"] if placement.ops_name == "triton" else []))},
        },
    }


def differences(
    recorded: dict[str, Any],
    here: dict[str, Any],
    where: tuple[str, str] = ("the record", "this run"),
    prefix: str = "",
) -> Iterator[str]:
    """Yield a line for each value that is not the same in two records. where: what to call the two."""
    for name in sorted({*recorded, *here}):
        before, now = recorded.get(name), here.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from differences(before, now, where, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name}: {_short(before)} in {where[0]}, {_short(now)} in {where[1]}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the record that a video carries.

    Raises:
        ValueError: the file is no video, or has no record of cogvid.
    """
    record = read_metadata(path)
    if missing := [name for name in ("prompt", "seeds", "versions", "weights", "timesteps") if name not in record]:
        reason = f"whose record lacks {', '.join(missing)}"
        raise ValueError(f"video: got {shown(os.fspath(path))}, {reason}, want a file made by cogvid")
    return record


def record_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a record as rows of a table: what is nested is flat, what is long is cut."""
    rows: list[tuple[str, str]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            rows += [(f"{name}.{inner}", text) for inner, text in record_rows(value)]
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((name, text if len(text) <= 100 else f"{text[:97]}..."))
    return rows


def read_embedded_image(path: str | os.PathLike[str]) -> Image | None:
    """Return the input image that a video carries, as the run had it, or None."""
    return next(iter(read_embedded_images(path)), None)


def read_embedded_images(path: str | os.PathLike[str]) -> list[Image]:
    """Return the input images that a video carries: its own one, then those of the videos it was sampled with."""
    return [load_image(cover) for cover in read_covers(path)]


def embedded(image: Image) -> bytes:
    """Encode an input image for the video: a PNG, which keeps each pixel."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _hashes(name: str, pictures: Sequence[Any] | None) -> list[str] | str | None:
    hashes = [pixel_hash(np.asarray(each)) for each in pictures or ()]
    return None if pictures is None else hashes[0] if name in VIDEOS and len(hashes) == 1 else hashes


def pixel_hash(pixels: np.ndarray) -> str:
    """Return SHA-256 of uint8 pixels in C order."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _machine(device: torch.device) -> dict[str, Any]:
    """Return what of the hardware decides the last bits: the processor, its instructions, the number of threads."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "name": properties.name,
            "instructions": f"compute capability {properties.major}.{properties.minor}",
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }
    return {
        "name": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
