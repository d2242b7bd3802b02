"""The pictures that visitors give: kept in memory, a few of them, each under a name that nobody can guess."""

from __future__ import annotations

import io
import secrets
import threading
from collections import OrderedDict

from cogvid.media.download import download
from cogvid.media.image import load_image

TYPES = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_BYTES = 16 * 2**20
MAX_PIXELS = 2**24
_KEPT = 32


class Pictures:
    """At most 32 pictures of at most 16 MiB; the one that was not used for longest goes first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, data: bytes) -> str:
        """Check a file and keep it; return its name.

        Raises:
            ValueError: it is too large, or no picture of `TYPES`.
        """
        if len(data) > MAX_BYTES:
            raise ValueError(f"image: got {len(data)} bytes, want at most {MAX_BYTES}")
        if media_type(data) is None:
            raise ValueError(f"image: got a file of another type, want one of {', '.join(TYPES)}")
        load_image(data, max_pixels=MAX_PIXELS)
        name = secrets.token_urlsafe(16)
        with self._lock:
            self._kept[name] = data
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return name

    def fetch(self, url: str) -> str:
        """Download a picture from a public address, and keep it; return its name."""
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"image: got {url!r:.60}, want an http or https URL")
        return self.add(download(url, timeout=30, max_bytes=MAX_BYTES, max_redirects=5, allow_private=False))

    def get(self, name: str) -> bytes:
        """Return a picture's file.

        Raises:
            ValueError: it is not kept any more.
        """
        with self._lock:
            if name not in self._kept:
                raise ValueError("image: got one that is not kept any more, want it given again")
            self._kept.move_to_end(name)
            return self._kept[name]


def media_type(data: bytes) -> str | None:
    """Return the media type of a picture of `TYPES`, by its first bytes; None for anything else."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=TYPES) as image:
            return Image.MIME[str(image.format)]
    except Exception:  # decoders raise many kinds on bad data
        return None
