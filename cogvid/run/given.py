"""The pictures and videos that a call is given, by the names of its arguments: sorted, counted, resized.

Each argument is one for all prompts, or a list with one for each. A list of pictures is a video where a video is meant.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from cogvid.media.image import load_image, resize_image, resize_video
from cogvid.media.video import count_frames, read_video
from cogvid.run.inputs import frames_to_use
from cogvid.run.settings import Settings

IMAGES = ("image", "last_image")
VIDEOS = ("video", "mask", "control_video")  # a mask may be one picture too
Given = dict[str, list[Any]]


def as_lists(inputs: Mapping[str, Any]) -> Given:
    """Return what is given as lists, without what is None."""
    split = {name: _images if name in IMAGES else _videos for name in (*IMAGES, *VIDEOS)}
    return {name: split[name](name, value) for name, value in inputs.items() if value is not None}


def frames_of(given: Mapping[str, list[Any]], num_frames: int | None) -> int | None:
    """Return how many frames of the videos are used: those asked for, which each must have, or all if none asks."""
    videos = [video for name in VIDEOS for video in given.get(name, ()) if not is_picture(video)]
    counts = [frames_to_use(video, num_frames) for video in videos]
    if len(set(counts)) > 1:
        raise ValueError(f"num_frames: got none, and videos of {min(counts)} and {max(counts)} frames, want it")
    return counts[0] if counts else num_frames


def count_given(given: Mapping[str, Any], chosen: Mapping[str, Any], num_frames: int | None) -> int | None:
    """Return how many frames are used of the videos that are given as paths or frames, without decoding them.

    chosen: `start` and `fps` of `read_video`, for those that are paths.
    """
    counts = {}
    for name in VIDEOS:
        value = given[name]
        if isinstance(value, Tensor):
            counts[name] = [range(len(value))]
        elif value is not None and not (name == "mask" and _is_picture_file(value)):
            counts[name] = [range(count_frames(value, **chosen))]
    for name, value in chosen.items():
        if not counts and value is not None:
            raise ValueError(f"video_{name}: got {value} without a video, want it with one")
    return frames_of(counts, num_frames)


def read_given(given: Mapping[str, Any], chosen: Mapping[str, Any], num_frames: int) -> dict[str, Any]:
    """Load pictures to PIL images, and videos to their first `num_frames` frames, which must be there."""
    read = dict(given)
    for name, value in given.items():
        if value is None or isinstance(value, Tensor):
            continue
        if name in IMAGES or (name == "mask" and _is_picture_file(value)):
            read[name] = load_image(value)
        else:
            read[name] = read_video(value, num_frames, **chosen)[0]
            frames_to_use(read[name], num_frames)  # there may be fewer than were counted
    return read


def _is_picture_file(value: Any) -> bool:
    """True unless FFmpeg knows the file as a video."""
    try:
        count_frames(value)
    except (TypeError, ValueError):
        return True
    return False


def resized(given: Mapping[str, list[Any]], settings: Settings) -> Given:
    """Load and resize what is given, once: the encoders and the record then see the same pixels.

    Images become RGB images of the run's size; videos `[F, H, W, 3]` uint8 with the frames that are used; a mask that
    is one picture `[1, H, W, 3]`.
    """
    size = settings.height, settings.width, settings.resize
    return {
        name: [
            resize_image(each, *size)
            if name in IMAGES
            else np.asarray(resize_image(each, *size))[None]
            if is_picture(each)
            else resize_video(each[: settings.num_frames], *size)
            for each in values
        ]
        for name, values in given.items()
    }


def is_picture(value: Any) -> bool:
    """True for what `load_image` takes, and false for the frames of a video."""
    return isinstance(value, (str, bytes, os.PathLike)) or hasattr(value, "convert") or hasattr(value, "read")


def _images(name: str, value: Any) -> list[Any]:
    images = list(value) if isinstance(value, (list, tuple)) else [value]
    if not images:
        raise ValueError(f"{name}: got a list of 0, want one, or one per prompt")
    return images


def _videos(name: str, value: Any) -> list[Any]:
    if is_picture(value):
        if name != "mask":
            raise ValueError(f"{name}: got {type(value).__name__}, want the frames of a video")
        return [value]
    if isinstance(value, (np.ndarray, Tensor)):
        return list(value) if value.ndim == 5 else [value]
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{name}: got {type(value).__name__} of none, want the frames of a video, or a list of videos")
    first = value[0]
    several = isinstance(first, (list, tuple)) or (isinstance(first, (np.ndarray, Tensor)) and first.ndim == 4)
    return list(value) if several else [value]
