"""Write the frames of a video as pictures: an animated GIF or WebP, a sheet of frames, or a file for each frame."""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from cogvid.media.video import check_output_path, export_to_video, frames_to_uint8
from cogvid.media.whole_file import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".mp4", ".gif", ".webp", ".png")
SHEET = 16  # the most frames of a sheet


def save_frames(
    frames: Any, path: str | os.PathLike[str], fps: float | Fraction, metadata: Mapping[str, Any] | None = None
) -> str:
    """Write one video as what the ending of the path says, whole or not at all, and return the path.

    `.mp4`: see `export_to_video`. `.gif`: 256 colours, each frame a multiple of 1/100 s. `.webp`: animated, lossless,
    each frame a multiple of 1/1000 s. Both repeat for ever, and frames take turns in length so that the whole is as
    long as at `fps`. `.png`: a sheet of at most 16 frames, from the first to the last; or, if the name has a field for
    the frame's number such as `%03d`, a file for each frame, counted from 0.

    Args:
        frames: as for `export_to_video`. fps: frames per second. metadata: for the MP4 alone.

    Raises:
        ValueError: another ending; a directory that is not there; frames that are none; a frame rate out of range.
    """
    name = os.fspath(path)
    suffix = os.path.splitext(name)[1].lower()
    check_output_path(path, SUFFIXES)
    if suffix == ".mp4":
        return export_to_video(frames, path, fps, metadata=metadata)
    if not 0 < fps <= 1000:  # NaN fails too
        raise ValueError(f"fps: got {fps}, want more than 0 and at most 1000")
    pixels = list(frames_to_uint8(frames))
    if not pixels:
        raise ValueError("frames: got none, want at least one frame")
    if suffix == ".png" and "%" in name:
        for index, frame in enumerate(pixels):
            write_bytes(_numbered(name, index), _encoded([frame], "PNG"))
    elif suffix == ".png":
        write_bytes(name, _encoded([_sheet(pixels)], "PNG"))
    elif suffix == ".gif":
        write_bytes(name, _encoded(pixels, "GIF", duration=durations(len(pixels), fps, 10), disposal=1))
    else:
        lengths = durations(len(pixels), fps, 1)
        write_bytes(name, _encoded(pixels, "WEBP", duration=lengths, lossless=True, exact=True))
    return name


def durations(count: int, fps: float | Fraction, unit: int) -> list[int]:
    """Return the milliseconds of each frame, multiples of `unit`, at least one; their sum follows `count / fps`."""
    ends = [round(1000 * index / fps / unit) for index in range(count + 1)]
    return [max(end - start, 1) * unit for start, end in itertools.pairwise(ends)]


def _numbered(name: str, index: int) -> str:
    try:
        numbered = name % index
    except (TypeError, ValueError):
        numbered = name
    if numbered == name or numbered == name % (index + 1):
        raise ValueError(f"output: got {name!r}, want one field for the frame's number, such as %03d")
    return numbered


def _sheet(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Put frames into rows, as square as the number allows; what is left over is black."""
    count = min(len(frames), SHEET)
    chosen = [frames[round(i * (len(frames) - 1) / max(count - 1, 1))] for i in range(count)]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    chosen += [np.zeros_like(chosen[0])] * (rows * columns - count)
    return np.concatenate([np.concatenate(chosen[i : i + columns], axis=1) for i in range(0, len(chosen), columns)])


def _encoded(frames: Sequence[np.ndarray], format: str, **options: Any) -> bytes:
    from PIL import Image as pil

    images: list[Image] = [pil.fromarray(frame) for frame in frames]
    if format == "GIF":
        images = [image.quantize(256, dither=pil.Dither.NONE) for image in images]
    if len(images) > 1:
        options |= {"save_all": True, "append_images": images[1:], "loop": 0}
    file = io.BytesIO()
    images[0].save(file, format, **options)
    return file.getvalue()
