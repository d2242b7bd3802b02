"""Image loading from anywhere, and the resize and normalisation in front of the VAE.

`prepare_image` and `prepare_video` must equal `diffusers.video_processor.VideoProcessor` (`preprocess`,
`preprocess_video`) as the CogVideoX pipelines call it. A picture comes from outside and may be hostile, so every
limit is checked on what was announced before it is believed, and every failure is one `ValueError` of one line.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import re
import socket
import stat
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageSource: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image

RESIZE_MODES = ("stretch", "crop", "pad")
MAX_PIXELS = 64 * 2**20  # 8192 x 8192; decoded to RGB that is 192 MiB
MAX_DOWNLOAD = 64 * 2**20  # bytes
_REDIRECTS = (301, 302, 303, 307, 308)
_HAS_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:|file:")


def load_image(
    source: ImageSource,
    *,
    max_pixels: int = MAX_PIXELS,
    timeout: float = 30.0,
    max_bytes: int = MAX_DOWNLOAD,
    max_redirects: int = 5,
) -> Image:
    """Load a picture of any mode as a new PIL RGB image, upright by its EXIF orientation.

    As in diffusers, alpha is dropped (not blended with a background) and colour profiles are not applied. Greys of
    more than 8 bits are scaled, not clipped: see `_grey_to_8_bits`. Of an animation the first frame is taken; of a
    PIL image, the frame that it stands at. What Pillow warns of, such as a broken EXIF block, it warns the caller of.

    Args:
        source: path, http(s) URL, encoded bytes, binary file object (read to its end) or PIL image.
        max_pixels: width x height above which nothing is decoded.
        timeout: seconds for a whole download: look-up, connection, redirects and body together.
        max_bytes: largest body to download.
        max_redirects: redirects to follow; each target must be http(s) too.
    Raises:
        ValueError: anything that is not a picture within the limits.
    """
    from PIL import Image as pil

    if isinstance(source, pil.Image):
        return _decode(source, f"of {source.width}x{source.height} pixels", max_pixels)
    if isinstance(source, str) and _HAS_SCHEME.match(source):
        data = _download(source, timeout, max_bytes, max_redirects)
        return _decode(io.BytesIO(data), _shown(source), max_pixels)
    if isinstance(source, (str, os.PathLike)):
        with _open_file(source) as file:
            return _decode(file, _shown(os.fspath(source)), max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, data = "in bytes", bytes(source)
    elif hasattr(source, "read"):
        name, data = "in a file object", source.read()
        if not isinstance(data, bytes):
            raise ValueError(f"image file object gives {type(data).__name__}, wanted bytes: open it with mode 'rb'")
    else:
        raise ValueError(f"image is {type(source).__name__}, wanted a path, URL, bytes, file object or PIL image")
    if not data:
        raise ValueError(f"image {name} is empty, wanted a picture")
    return _decode(io.BytesIO(data), name, max_pixels)


def prepare_image(source: ImageSource, height: int, width: int, resize: str = "stretch") -> Tensor:
    """Resize a picture (Lanczos) and scale it to [-1, 1]; equals `VideoProcessor.preprocess` of diffusers.

    Args:
        source: PIL image or whatever else `load_image` takes.
        height, width: pixels of the result.
        resize: "stretch" ignores the aspect ratio, as diffusers does; "crop" keeps it and cuts the overhang off both
            sides; "pad" keeps it and centres the picture on black.
    Returns:
        `[1, 3, height, width]` float32 on the CPU, RGB in [-1, 1].
    """
    return _normalize([_resized(load_image(source), height, width, resize)])


def prepare_video(
    frames: Sequence[Image] | np.ndarray | Tensor, height: int, width: int, resize: str = "stretch"
) -> Tensor:
    """Resize and scale each frame as `prepare_image` does; equals `VideoProcessor.preprocess_video` of diffusers.

    Args:
        frames: PIL images, or `[F, H, W, 3]` uint8 RGB as `read_video` returns it.
    Returns:
        `[1, 3, F, height, width]` float32 on the CPU, RGB in [-1, 1].
    """
    from PIL import Image as pil

    if isinstance(frames, (np.ndarray, Tensor)):
        array = np.asarray(frames.cpu() if isinstance(frames, Tensor) else frames)
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8:
            raise ValueError(f"frames is {list(array.shape)} {array.dtype}, wanted [F, H, W, 3] uint8")
        frames = [pil.fromarray(frame) for frame in array]
    if len(frames) == 0:
        raise ValueError("frames is empty, wanted at least one frame")
    resized = [_resized(load_image(frame), height, width, resize) for frame in frames]
    return _normalize(resized).transpose(0, 1)[None]


def _normalize(images: list[Image]) -> Tensor:
    """Stack RGB images to `[F, 3, H, W]` float32 in [-1, 1], in the order of operations that diffusers uses."""
    pixels = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255.0
    return torch.from_numpy(2.0 * pixels - 1.0).permute(0, 3, 1, 2).contiguous()


def _resized(image: Image, height: int, width: int, resize: str) -> Image:
    from PIL import Image as pil

    for argument, size in (("height", height), ("width", width)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{argument} is {size!r}, wanted a positive number of pixels")
    lanczos = pil.Resampling.LANCZOS
    if resize == "stretch":
        return image.resize((width, height), lanczos)
    if resize == "crop":
        # The part of the source that has the wanted aspect ratio is resized: no picture larger than needed is made.
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
    raise ValueError(f"resize is {resize!r}, wanted one of {', '.join(RESIZE_MODES)}")


def _decode(source: IO[bytes] | Image, name: str, max_pixels: int) -> Image:
    from PIL import Image as pil

    # Pillow's warnings go to the caller's filters: to silence them here would silence the whole process for a moment,
    # and where threads meet, for good.
    try:
        image = source if isinstance(source, pil.Image) else pil.open(source)
        # EPS and WMF are programs for another renderer (Ghostscript, Windows); a picture must not start any.
        if image.format in ("EPS", "WMF"):
            raise ValueError(f"it is {image.format}, wanted a raster format such as PNG or JPEG")
        if image.width * image.height > max_pixels:
            raise ValueError(f"it claims {image.width}x{image.height} pixels, wanted at most {max_pixels}")
        image.load()
        return _to_rgb(_upright(image))
    except pil.UnidentifiedImageError:
        raise ValueError(f"image {name} is not a picture in a format that Pillow {pil.__version__} reads") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders of hostile data raise anything: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot load image {name}: {_one_line(error)}") from error


def _to_rgb(image: Image) -> Image:
    from PIL import Image as pil

    if image.mode.startswith(("I", "F")):
        return pil.fromarray(_grey_to_8_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode in ("RGBa", "La"):  # premultiplied; Pillow converts these to RGB only by way of straight alpha
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if image.mode == "LAB":
        from PIL import ImageCms

        to_srgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        converted = ImageCms.applyTransform(image, to_srgb)
        assert converted is not None
        return converted
    image.info.pop("transparency", None)  # dropped anyway, and Pillow would warn that RGB has no place for it
    return image.convert("RGB")


def _grey_to_8_bits(grey: np.ndarray, mode: str) -> np.ndarray:
    """Round a grey `[H, W]` image of a wide mode to 8 bits.

    White is 65535 in the 16-bit modes. Modes "I" (32-bit integers) and "F" (floats) do not say what white is, so it
    is the smallest of 1 ("F" only), 255 and 65535 that holds every value; values beyond these, or negative ones, are
    stretched from their least to black and from their greatest to white.
    """
    values = grey.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values, wanted finite ones")
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
    except Exception:  # the EXIF block is broken, which says nothing about the pixels
        return image.copy()


def _open_file(path: str | os.PathLike[str]) -> IO[bytes]:
    shown = _shown(os.fspath(path))
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ValueError(f"image {shown} is a directory, wanted a picture file")
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise ValueError(f"image {shown} is not a regular file, wanted a picture file")
        if status.st_size == 0:
            raise ValueError(f"image {shown} is empty, wanted a picture")
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"cannot read image {shown}: {error.strerror}") from error


def _download(url: str, timeout: float, max_bytes: int, max_redirects: int) -> bytes:
    """Fetch a URL within `timeout` seconds whatever the server does.

    A socket's own time-out starts anew with each byte, and a name look-up has none. So the work is done in a thread
    that the caller stops waiting for at the deadline; closing its sockets then ends it.
    """
    shown = _shown(url)
    deadline = time.monotonic() + timeout
    sockets: list[socket.socket] = []
    result: list[bytes | BaseException] = []

    def work() -> None:
        try:
            result.append(_fetch(url, deadline, sockets, max_bytes, max_redirects))
        except BaseException as error:  # handed to the caller, who raises it
            result.append(error)

    thread = threading.Thread(target=work, daemon=True, name="cogvid-download")
    thread.start()
    try:
        thread.join(timeout)
    finally:
        finished = bool(result)
        for sock in list(sockets):
            with contextlib.suppress(OSError):  # it was closed already
                sock.shutdown(socket.SHUT_RDWR)
    outcome = result[0] if finished else TimeoutError()
    reason = outcome.reason if isinstance(outcome, urllib.error.URLError) else outcome
    if isinstance(reason, bytes):
        return reason
    if isinstance(reason, TimeoutError):
        raise ValueError(f"image {shown} was not received within {timeout:g} seconds")
    if isinstance(reason, _Refused):
        raise ValueError(f"image {shown} {reason}")
    if isinstance(reason, (OSError, http.client.HTTPException, ValueError, str)):
        raise ValueError(f"cannot fetch image {shown}: {_one_line(reason)}")
    raise reason


class _Refused(Exception):
    """The server answered, but not with something that we accept. The message continues "image URL"."""


def _fetch(url: str, deadline: float, sockets: list[socket.socket], max_bytes: int, max_redirects: int) -> bytes:
    opener = _opener(deadline, sockets)
    for _ in range(max_redirects + 1):
        request = urllib.request.Request(_escaped(url), headers={"User-Agent": "cogvid", "Accept": "image/*"})
        with opener.open(request, timeout=max(deadline - time.monotonic(), 0.001)) as response:
            location = response.headers.get("Location")
            if response.status in _REDIRECTS and location:
                url = urllib.parse.urljoin(url, location)
                continue
            return _read_body(response, max_bytes)
    raise _Refused(f"redirects more than {max_redirects} times")


def _read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if response.status != 200:
        raise _Refused(f"was answered with status {response.status} {response.reason}, wanted 200".replace(" ,", ","))
    if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise _Refused("is an HTML page, wanted the address of the picture itself")
    announced = response.length  # None where the server does not say
    if announced is not None and announced > max_bytes:
        raise _Refused(f"has {announced} bytes, wanted at most {max_bytes}")
    body = bytearray()
    while chunk := response.read1(65536):
        body += chunk
        if len(body) > max_bytes:
            raise _Refused(f"has more than {max_bytes} bytes, wanted at most that many")
    if announced is not None and len(body) < announced:
        raise _Refused(f"broke off after {len(body)} of {announced} bytes")
    if not body:
        raise _Refused("is empty, wanted a picture")
    return bytes(body)


def _opener(deadline: float, sockets: list[socket.socket]) -> urllib.request.OpenerDirector:
    """Make an opener of http and https alone (proxies of the environment apply) that lists its sockets."""

    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            _register(self.sock)

    class Secure(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            _register(self.sock)

    def _register(sock: socket.socket) -> None:
        sockets.append(sock)
        if time.monotonic() > deadline:  # nobody waits any more
            raise TimeoutError

    class HTTP(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(Plain, req)

    class HTTPS(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(Secure, req)

    opener = urllib.request.OpenerDirector()
    # Neither a redirect handler nor an error processor: `_fetch` sees every answer and checks every address itself.
    for handler in (urllib.request.ProxyHandler(), HTTP(), HTTPS()):
        opener.add_handler(handler)
    return opener


def _escaped(url: str) -> str:
    """Check the scheme, drop the fragment and encode what may not stand in a request line."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise _Refused(f"leads to the scheme {parts.scheme!r}, wanted http or https")
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode("ascii")
    path, query = (urllib.parse.quote(part, safe=string.punctuation) for part in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))


def _shown(name: str | bytes) -> str:
    """Quote a name for a message: on one line, and not longer than one."""
    text = repr(name)
    return text if len(text) <= 200 else text[:197] + "..."


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
