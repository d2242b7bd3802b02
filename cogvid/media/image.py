"""Load images from files, URLs and memory; resize and normalise them for the VAE.

`prepare_image` and `prepare_video` must equal `diffusers.video_processor.VideoProcessor` (`preprocess`,
`preprocess_video`) as the CogVideoX pipelines call it. Images may be hostile. So limits are checked before data is
read or decoded, and every failure is a `ValueError` of one line.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cogvid.media.download import Refused, download, one_line, shown

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageSource: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image

RESIZE_MODES = ("stretch", "crop", "pad")
MAX_PIXELS = 64 * 2**20  # 8192 x 8192; decoded to RGB that is 192 MiB
MAX_DOWNLOAD = 64 * 2**20  # bytes
MAX_FILE = 2**30  # bytes; twice what MAX_PIXELS of the widest format take
HAS_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:|file:")


def load_image(
    source: ImageSource,
    *,
    max_pixels: int = MAX_PIXELS,
    timeout: float = 30.0,
    max_bytes: int = MAX_DOWNLOAD,
    max_redirects: int = 5,
    allow_private: bool = True,
) -> Image:
    """Load a picture of any mode as a new PIL RGB image, turned upright by its EXIF orientation.

    As in diffusers, alpha is dropped (not blended with a background) and colour profiles are not applied. Greys of
    more than 8 bits are scaled, not clipped: see `_grey_to_8_bits`. From an animation the first frame is used, from a
    PIL image its current frame. Warnings of Pillow, such as of a broken EXIF block, reach the caller.

    Args:
        source: path, http(s) URL, encoded bytes, binary file object (read to its end) or PIL image.
        max_pixels: largest width x height to decode.
        timeout, max_bytes, max_redirects: limits of a download, see `download.download`; seconds, bytes, a count.
        allow_private: False refuses URLs that lead to private addresses, such as those of the own network. A server
            that loads what its users name should say so, and take no paths from them.
    Raises:
        ValueError: the source is not a picture within the limits.
    """
    from PIL import Image as pil

    if isinstance(source, pil.Image):
        return _decode(source, "a PIL image", max_pixels)
    if isinstance(source, str) and HAS_SCHEME.match(source):
        limits = {"max_bytes": max_bytes, "max_redirects": max_redirects, "allow_private": allow_private}
        data = download(source, timeout=timeout, **limits)
        return _decode(io.BytesIO(data), shown(source), max_pixels)
    if isinstance(source, (str, os.PathLike)):
        with _open_file(source) as file:
            return _decode(file, shown(os.fspath(source)), max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, data = f"a {type(source).__name__} object", bytes(source)
    elif hasattr(source, "read"):
        name, data = "a file object", source.read()
        if not isinstance(data, bytes):
            given = type(data).__name__
            raise ValueError(f"image: got a file object that gives {given}, want one that gives bytes (mode 'rb')")
    else:
        raise ValueError(f"image: got {type(source).__name__}, want a path, URL, bytes, file object or PIL image")
    if not data:
        raise ValueError(f"image: got {name}, which is empty, want a picture")
    return _decode(io.BytesIO(data), name, max_pixels)


def prepare_image(source: ImageSource, height: int, width: int, resize: str = "stretch") -> Tensor:
    """Resize a picture (Lanczos) and scale it to [-1, 1]; equals `VideoProcessor.preprocess` of diffusers.

    Args:
        source: anything that `load_image` takes.
        height, width: size of the result in pixels.
        resize: "stretch" ignores the aspect ratio, as diffusers does; "crop" keeps it and cuts off what does not fit,
            equally on both sides; "pad" keeps it and centres the picture on black.
    Returns:
        `[1, 3, height, width]` float32 on the CPU, RGB in [-1, 1].
    """
    return _normalize(np.asarray(resize_image(source, height, width, resize))[None])


def prepare_video(
    frames: Sequence[Image] | np.ndarray | Tensor, height: int, width: int, resize: str = "stretch"
) -> Tensor:
    """Resize and scale each frame as `prepare_image` does; equals `VideoProcessor.preprocess_video` of diffusers.

    Args:
        frames: PIL images, or `[F, H, W, 3]` uint8 RGB as `read_video` returns it.
    Returns:
        `[1, 3, F, height, width]` float32 on the CPU, RGB in [-1, 1].
    """
    return _normalize(resize_video(frames, height, width, resize)).transpose(0, 1)[None]


def resize_video(
    frames: Sequence[Image] | np.ndarray | Tensor, height: int, width: int, resize: str = "stretch"
) -> np.ndarray:
    """Resize the frames of `prepare_video` as it does, to `[F, height, width, 3]` uint8 RGB."""
    from PIL import Image as pil

    if isinstance(frames, (np.ndarray, Tensor)):
        array = np.asarray(frames.cpu() if isinstance(frames, Tensor) else frames)
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8:
            raise ValueError(f"frames: got {list(array.shape)} {array.dtype}, want [F, H, W, 3] uint8")
        frames = [pil.fromarray(frame) for frame in array]
    if len(frames) == 0:
        raise ValueError("frames: got none, want at least one frame")
    return np.stack([np.asarray(resize_image(frame, height, width, resize)) for frame in frames])


def _normalize(frames: np.ndarray) -> Tensor:
    """Map `[F, H, W, 3]` uint8 to `[F, 3, H, W]` float32 in [-1, 1], with diffusers' operations in their order."""
    pixels = frames.astype(np.float32) / 255.0
    return torch.from_numpy(2.0 * pixels - 1.0).permute(0, 3, 1, 2).contiguous()


def resize_image(source: ImageSource, height: int, width: int, resize: str = "stretch") -> Image:
    """Load a picture and resize it as `prepare_image` does, to an RGB image of 8 bits.

    A picture that has the size already comes back with the same pixels, by each way of resizing.
    """
    from PIL import Image as pil

    image = load_image(source)
    for argument, size in (("height", height), ("width", width)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{argument}: got {size!r}, want a positive number of pixels")
    lanczos = pil.Resampling.LANCZOS
    if resize == "stretch":
        return image.resize((width, height), lanczos)
    if resize == "crop":
        # Crop and resize in one step, so that no picture larger than the result is made.
        scale = max(width / image.width, height / image.height)
        left = max(0.0, (image.width - width / scale) / 2)
        top = max(0.0, (image.height - height / scale) / 2)
        return image.resize((width, height), lanczos, box=(left, top, image.width - left, image.height - top))
    if resize == "pad":
        scale = min(width / image.width, height / image.height)
        inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        canvas = pil.new("RGB", (width, height))
        canvas.paste(image.resize(inner, lanczos), ((width - inner[0]) // 2, (height - inner[1]) // 2))
        return canvas
    raise ValueError(f"resize: got {resize!r}, want one of {', '.join(RESIZE_MODES)}")


def _decode(source: IO[bytes] | Image, name: str, max_pixels: int) -> Image:
    from PIL import Image as pil

    # Pillow's warnings are not silenced here. Warning filters belong to the whole process, so silencing would affect
    # other threads, and two threads that restore the filters at the same time could leave them changed.
    try:
        image = source if isinstance(source, pil.Image) else pil.open(source)
        # Decoding EPS or WMF starts another program (Ghostscript, Windows). A picture must not start programs.
        if image.format in ("EPS", "WMF"):
            raise Refused(f"is {image.format}, want a raster format such as PNG or JPEG")
        if image.width * image.height > max_pixels:
            raise Refused(f"has {image.width}x{image.height} pixels, want at most {max_pixels}")
        image.load()
        return _to_rgb(_upright(image))
    except pil.UnidentifiedImageError:
        wanted = f"a format that Pillow {pil.__version__} reads"
        raise ValueError(f"image: got {name}, which is not a picture, want {wanted}") from None
    except Refused as error:
        raise ValueError(f"image: got {name}, which {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many kinds on bad data: OSError, SyntaxError, struct.error, ...
        raise ValueError(
            f"image: got {name}, which cannot be decoded ({one_line(error)}), want a whole picture"
        ) from error


def _to_rgb(image: Image) -> Image:
    from PIL import Image as pil

    if image.mode.startswith(("I", "F")):
        return pil.fromarray(_grey_to_8_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode in ("RGBa", "La"):  # premultiplied alpha, which Pillow cannot convert to RGB directly
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if image.mode == "LAB":
        from PIL import ImageCms

        to_srgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        converted = ImageCms.applyTransform(image, to_srgb)
        assert converted is not None
        return converted
    image.info.pop("transparency", None)  # alpha is dropped, and Pillow would warn that RGB cannot hold it
    return image.convert("RGB")


def _grey_to_8_bits(grey: np.ndarray, mode: str) -> np.ndarray:
    """Round a grey `[H, W]` image of a wide mode to 8 bits.

    White is 65535 in the 16-bit modes. Modes "I" (32-bit integers) and "F" (floats) do not define white. There it is
    the smallest of 1 ("F" only), 255 and 65535 that is not below any value. If a value is negative or above 65535,
    the least value becomes black and the greatest white.
    """
    values = grey.astype(np.float64)
    if not np.isfinite(values).all():
        raise Refused("holds NaN or infinite values, want finite ones")
    low, high = float(values.min()), float(values.max())
    if mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 65535:
        whites = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
        low, high = 0.0, next(white for white in whites if high <= white)
    return np.rint((values - low) * (255.0 / max(high - low, 1e-300))).astype(np.uint8)


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the EXIF block is broken, but the pixels may be whole
        return image.copy()


class _Bounded(io.BufferedReader):
    """A file that takes memory only for what it holds, and not for what a damaged picture says that it holds."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size >= 0:
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


def _open_file(path: str | os.PathLike[str]) -> IO[bytes]:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise Refused("is a directory, want a picture file")
        if not stat.S_ISREG(status.st_mode):  # a read from a pipe or a device may never end
            raise Refused("is not a regular file, want a picture file")
        if status.st_size == 0:
            raise Refused("is empty, want a picture")
        if status.st_size > MAX_FILE:
            raise Refused(f"has {status.st_size} bytes, want at most {MAX_FILE}")
        return _Bounded(io.FileIO(path))
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"image: got {shown(os.fspath(path))}, which cannot be read ({reason}), want a picture file"
        ) from error
    except Refused as error:
        raise ValueError(f"image: got {shown(os.fspath(path))}, which {error}") from None
