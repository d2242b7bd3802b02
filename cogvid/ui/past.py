"""The videos of a directory that cogvid made, and how far two of them are apart."""

from __future__ import annotations

import hashlib
import io
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvid.media.video import read_video
from cogvid.run.compare import Comparison, compare, write_side_by_side
from cogvid.run.record import read_record

_PICTURES = ".compared"  # the folder of the difference pictures
_KEPT = 20  # of them
_POSTER = 480  # pixels


@dataclass(frozen=True)
class Past:
    """A video that was made before. name: of its file. record: that it carries."""

    name: str
    record: dict[str, Any]

    @property
    def prompt(self) -> str:
        return " ".join(map(str, self.record["prompt"] or []))

    @property
    def model(self) -> str:
        return str(self.record.get("source") or self.record.get("model"))

    @property
    def seed(self) -> int | None:
        return self.record.get("seed")


class Gallery:
    """The videos of a directory; a record is read once, until its file changes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._read: dict[tuple[str, int, int], Past | None] = {}
        self._lock, self._comparing = threading.Lock(), threading.Lock()

    def runs(self, prompt: str = "", model: str = "", seed: int | None = None) -> list[Past]:
        """Return the videos whose record has these words in the prompt, this model and this seed; newest first."""
        found = []
        for path, key in self._files():
            past = self._past(path, key)
            if past is None or prompt.lower() not in past.prompt.lower():
                continue
            if (not model or past.model == model) and (seed is None or past.seed == seed):
                found.append(past)
        return found

    def models(self) -> list[str]:
        """Return the models that there are videos of."""
        return sorted({past.model for past in self.runs()})

    def compare(self, first: Path, second: Path) -> tuple[Comparison, str]:
        """Return how far two videos are apart, and the name of a picture that `picture` finds.

        The picture has frames of the first, of the second, and 8 times their difference.

        Raises:
            ValueError: they have other sizes.
        """
        with self._comparing:  # the frames of one pair are in memory
            return self._compare(first, second)

    def _compare(self, first: Path, second: Path) -> tuple[Comparison, str]:
        found = compare(first, second)
        marks = [f"{path.name} {path.stat().st_mtime_ns}" for path in (first, second)]
        target = self.directory / _PICTURES / f"{hashlib.sha256(repr(marks).encode()).hexdigest()[:16]}.png"
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            kept = sorted(target.parent.glob("*.png"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
            for path in kept[_KEPT - 1 :]:
                path.unlink(missing_ok=True)
            write_side_by_side(first, second, target)
        return found, target.name

    def picture(self, name: str) -> Path:
        """Return the path of a picture of `compare`.

        Raises:
            ValueError: there is none of this name.
        """
        path = self.directory / _PICTURES / name
        if Path(name).name != name or path.suffix != ".png" or not path.is_file():
            raise ValueError(f"picture: got {name!r:.60}, want one that was made by a comparison")
        return path

    def poster(self, path: Path) -> bytes:
        """Return the first frame of a video as a JPEG."""
        from PIL import Image

        frames, _ = read_video(path, max_frames=1)
        file = io.BytesIO()
        image = Image.fromarray(frames[0].numpy())
        image.thumbnail((_POSTER, _POSTER))
        image.save(file, "JPEG", quality=85)
        return file.getvalue()

    def _files(self) -> list[tuple[Path, tuple[str, int, int]]]:
        found = []
        for path in self.directory.glob("*.mp4"):
            if path.name.startswith(".") or not path.is_file():
                continue
            status = path.stat()
            found.append((status.st_mtime_ns, path, (path.name, status.st_mtime_ns, status.st_size)))
        return [(path, key) for _, path, key in sorted(found, key=lambda each: each[0], reverse=True)]

    def _past(self, path: Path, key: tuple[str, int, int]) -> Past | None:
        with self._lock:
            if key not in self._read:
                try:
                    self._read[key] = Past(path.name, read_record(path))
                except (ValueError, OSError):  # a video of another program, or one that was just removed
                    self._read[key] = None
            return self._read[key]
