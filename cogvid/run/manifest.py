"""What became of each job of a batch: `manifest.jsonl`, `manifest.csv`, and who works on what.

Several processes may share a directory. A job is claimed by a lock that ends with its process.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cogvid.media.download import one_line
from cogvid.media.whole_file import try_lock, write_bytes
from cogvid.run.jobs import BatchJob

_CLAIMS = ".claims"
_KINDS = {"place": int, "status": str, "ended": (int, float), "job": dict, "job_sha256": str}
_FIRST = ("place", "output", "status", "seed", "batch_size", "seconds", "peak_memory", "error", "ended")


class Manifest:
    """The manifest of a directory, which is made if it is not there. Both files are replaced as a whole."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        (self.directory / _CLAIMS).mkdir(parents=True, exist_ok=True)
        self.path = self.directory / "manifest.jsonl"

    def entries(self) -> dict[int, dict[str, Any]]:
        """Return what is written of each job, by its place."""
        return read_manifest(self.path) if self.path.exists() else {}

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Write what became of jobs, in place of what was written of them before."""
        with self._locked("manifest"):
            everything = self.entries() | {entry["place"]: entry for entry in entries}
            ordered = [everything[place] for place in sorted(everything)]
            write_bytes(self.path, "".join(json.dumps(entry) + "\n" for entry in ordered).encode())
            write_bytes(self.directory / "manifest.csv", _as_csv(ordered).encode())

    def is_done(self, job: BatchJob) -> bool:
        """Say whether exactly this job was finished and its video is there."""
        return self._entry(job).get("status") == "done" and (self.directory / job.name).exists()

    def failed_since(self, job: BatchJob, moment: float) -> bool:
        """Say whether this job failed, in whichever process, at this time (seconds since 1970) or after it."""
        entry = self._entry(job)
        return entry.get("status") == "failed" and entry["ended"] >= moment

    def _entry(self, job: BatchJob) -> dict[str, Any]:
        """What is written of exactly this job; empty if that is nothing, or of another job in its place."""
        entry = self.entries().get(job.place, {})
        return entry if entry.get("job_sha256") == job.digest else {}

    def claim(self, job: BatchJob, *, wait: bool = False) -> IO[str] | None:
        """Lock a job until the file that is returned is closed; None where another process has it.

        wait: for the other process to finish it or to end.
        """
        file = open(self.directory / _CLAIMS / f"{job.place:04d}", "a")  # noqa: SIM115 - the caller closes it
        if try_lock(file.fileno(), wait=wait):
            return file
        file.close()
        return None

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self.directory / _CLAIMS / name, "a") as file:
            try_lock(file.fileno(), wait=True)
            yield


def read_manifest(path: Path) -> dict[int, dict[str, Any]]:
    """Return what a `manifest.jsonl` has of each job, by its place.

    Raises:
        ValueError: it is not as a batch writes it.
    """
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for entry in entries:
            for name, kind in _KINDS.items():
                if not isinstance(entry[name], kind):
                    raise TypeError(f"{name} is {type(entry[name]).__name__}")
        return {entry["place"]: entry for entry in entries}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = one_line(error)
        raise ValueError(f"{path}: got a broken file ({reason}), want one that a batch wrote") from None


def _as_csv(entries: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for entry in entries for name in entry["job"] if name not in _FIRST))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_FIRST, *names], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**entry["job"], **entry} for entry in entries)
    return text.getvalue()
