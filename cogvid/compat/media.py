"""diffusers' functions for pictures and videos: `load_image`, `load_video`, `export_to_video`."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cogvid.media import image as pictures
from cogvid.media import video as videos
from cogvid.media.download import download

if TYPE_CHECKING:
    from PIL.Image import Image

_SECONDS, _REDIRECTS = 30.0, 5  # of a download


def load_image(image: str | Image, convert_method: Any = None) -> Image:
    """Load a picture as PIL RGB; see `cogvid.load_image`, which takes more sources.

    Raises:
        ValueError: the source is not a picture; a `convert_method`.
    """
    _refuse("convert_method", convert_method, "a call of it on the picture that is returned")
    return pictures.load_image(image)


def load_video(video: str, convert_method: Any = None, return_fps: bool = False) -> Any:
    """Load a video from a path or an http(s) URL as a list of PIL RGB images; see `cogvid.read_video`.

    Args:
        convert_method: called with the list; what it returns is returned.
        return_fps: return the list and the frames per second.
    """
    from PIL import Image as pil

    if video.startswith(("http://", "https://")):
        data = download(video, timeout=_SECONDS, max_bytes=videos.MAX_BYTES, max_redirects=_REDIRECTS)
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            frames, fps = videos.read_video(file.name)
    else:
        frames, fps = videos.read_video(video)
    listed: Any = [pil.fromarray(frame) for frame in frames.numpy()]
    if convert_method is not None:
        listed = convert_method(listed)
    return (listed, fps) if return_fps else listed


def export_to_video(
    video_frames: Any,
    output_video_path: str | os.PathLike[str] | None = None,
    fps: float = 10,
    quality: float | None = 5.0,
    bitrate: Any = None,
    macro_block_size: int | None = 16,
) -> str:
    """Write the frames of one video to an MP4 and return its path; see `cogvid.export_to_video`.

    Args:
        output_video_path: a file of the system's temporary directory if not given.
        quality: 0 to 10, x264's crf as imageio sets it for diffusers: int(51 (1 - quality / 10)), so 25 for 5. None
            is cogvid's own, 18.
        macro_block_size: height and width must be multiples of it. Nothing is resized here.
    """
    _refuse("bitrate", bitrate, "a quality, 0 to 10")
    if quality is not None and not 0 <= quality <= 10:
        raise ValueError(f"quality: got {quality}, want 0 to 10")
    height, width = next(videos.frames_to_uint8(video_frames[:1])).shape[:2]
    if macro_block_size is not None and (height % macro_block_size or width % macro_block_size):
        size = f"{height}x{width} pixels"
        raise ValueError(f"macro_block_size: got {macro_block_size} for {size}, want None or a divisor of both")
    if output_video_path is None:
        descriptor, output_video_path = tempfile.mkstemp(suffix=".mp4")
        os.close(descriptor)
    crf = 18 if quality is None else int((1 - quality / 10) * 51)
    return videos.export_to_video(video_frames, output_video_path, fps, crf)


def levels(name: str, value: Tensor | np.ndarray, height: int, width: int) -> Tensor:
    """Turn floating-point pixels in [0, 1] into the uint8 levels that they are: `[..., height, width, 3]`.

    value: a tensor `[..., 3, height, width]` or an array `[..., height, width, 3]`, as diffusers takes them.

    Raises:
        ValueError: another size, which diffusers would resize by the nearest pixel; pixels between two levels.
    """
    pixels = torch.from_numpy(value) if isinstance(value, np.ndarray) else value.movedim(-3, -1).cpu()
    if pixels.shape[-3:] != (height, width, 3) or not pixels.is_floating_point():
        got, want = f"{list(pixels.shape[-3:])} {pixels.dtype}", f"[{height}, {width}, 3] in floating point"
        raise ValueError(f"{name}: got pixels of {got}, want {want}, or PIL images")
    exact = pixels.double() * 255
    if not ((exact - exact.round()).abs() < 0.01).all() or exact.min() < 0 or exact.max() > 255:
        raise ValueError(f"{name}: got pixels that are no multiples of 1/255 in [0, 1], want such or PIL images")
    return exact.round().to(torch.uint8)


def _refuse(name: str, value: object, instead: str) -> None:
    if value is not None:
        raise ValueError(f"{name}: got {value!r:.60}, want {instead}")
