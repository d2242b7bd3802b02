"""Lists of jobs: from a JSONL file or from prompts, times a sweep over values of options. It imports no torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cogvid.media.download import without_secrets
from cogvid.run.settings import OPTIONS
from cogvid.weights.load_options import LOAD_OPTIONS

# What a job may name beside the options of a run: its inputs, and what decides how its model is loaded.
INPUTS = {
    "prompt": str, "negative_prompt": str, "image": str, "last_image": str, "video": str, "mask": str,
    "control_video": str, "video_start": float, "video_fps": float, "seed": int, "fps": int,
}  # fmt: skip
LOADING = {
    "model": str, "revision": str, "variant": str, "local_files_only": bool, "defaults": str,
    **{name: option.metadata["kind"] for name, option in LOAD_OPTIONS.items()},
}  # fmt: skip
KINDS = {**INPUTS, **{name: option.metadata["kind"] for name, option in OPTIONS.items()}, **LOADING}

_MAX_BYTES = 2**26  # of a list of jobs or prompts


@dataclass(frozen=True)
class BatchJob:
    """One video of a batch. place: from 0. values: what it names, by the names of `KINDS`."""

    place: int
    values: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """The seed that the job names, or else one that follows from its place and values: the same in each run."""
        if self.values.get("seed") is not None:
            return self.values["seed"]
        text = json.dumps([self.place, self.values], sort_keys=True)
        return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)

    @property
    def digest(self) -> str:
        """A hash that tells these values from all others."""
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()

    @property
    def shown(self) -> dict[str, Any]:
        """The values for a manifest: without the secrets of URLs."""
        pictures = {name: without_secrets(self.values[name]) for name in ("image", "video") if self.values.get(name)}
        return {**self.values, **pictures}

    @property
    def name(self) -> str:
        """The name of its MP4."""
        return f"{self.place:04d}-seed{self.seed}.mp4"

    @property
    def loading(self) -> dict[str, Any]:
        """What decides how its model is loaded; the arguments of `load`, but `model` may be absent."""
        return {name: self.values[name] for name in LOADING if name in self.values}

    @property
    def shape(self) -> dict[str, Any]:
        """What jobs that run together have in common: all but prompts, seeds and which image."""
        own = ("prompt", "negative_prompt", "seed", "image")
        common = {name: value for name, value in self.values.items() if name not in own}
        return {**common, "image": self.values.get("image") is not None}


def make_jobs(listed: Sequence[Mapping[str, Any]], sweep: Iterable[str], given: Mapping[str, Any]) -> list[BatchJob]:
    """Multiply jobs by a sweep; the last name of the sweep changes fastest.

    listed: the values of each job. sweep: `NAME=VALUES`, see `read_sweep`. given: values of all jobs, unless they name
    others.

    Raises:
        ValueError: a name that is swept is given elsewhere too; there are no jobs.
    """
    swept = [read_sweep(each) for each in sweep]
    names = [name for name, _ in swept]
    if not listed:
        raise ValueError("jobs: got none, want at least one")
    for values in listed:
        if twice := [name for name in names if name in {**given, **values} or names.count(name) > 1]:
            raise ValueError(f"sweep: got {twice[0]!r}, which is given elsewhere too, want it once")
    return [
        BatchJob(place, {**given, **values, **dict(zip(names, chosen, strict=True))})
        for place, (values, chosen) in enumerate(itertools.product(listed, itertools.product(*(v for _, v in swept))))
    ]


def read_sweep(text: str) -> tuple[str, list[Any]]:
    """Read `NAME=VALUES`: values with commas between them, or whole numbers `FIRST..LAST`."""
    name, equals, values = text.partition("=")
    name = name.replace("-", "_")
    if not equals or name not in KINDS:
        raise ValueError(f"sweep: got {text!r}, want NAME=VALUES with a NAME of {', '.join(KINDS)}")
    kind = KINDS[name]
    found: list[Any] = []
    for value in values.split(","):
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", value)
        if bounds and kind in (int, float):
            first, last = int(bounds[1]), int(bounds[2])
            if not first <= last < first + 100_000:
                raise ValueError(f"sweep: got {value!r}, want FIRST..LAST with at most 100000 values")
            found += [kind(each) for each in range(first, last + 1)]
            continue
        try:
            found.append({"true": True, "false": False}[value] if kind is bool else _value(kind, value))
        except (ValueError, KeyError):
            wanted = f"a value of type {kind.__name__}"
            raise ValueError(f"sweep: got {value!r} for {name}, want {wanted}") from None
    return name, found


def _value(kind: type, text: str) -> Any:
    return [text] if kind is list else kind(text)  # a list of one, such as an adapter


def read_jobs(path: str) -> list[dict[str, Any]]:
    """Read a JSONL file: a job a line, an object of the names of `KINDS`; empty lines are left out.

    Raises:
        ValueError: a line that is no such object, or has no prompt; the line's number is named.
    """
    jobs: list[dict[str, Any]] = []
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: got {error}, want a JSON object") from None
        if not isinstance(values, dict):
            raise ValueError(f"{where}: got {type(values).__name__}, want a JSON object")
        for name, value in values.items():
            if name not in KINDS:
                raise ValueError(f"{where}: {name}: got an unknown option, want one of {', '.join(KINDS)}")
            kinds = (int, float) if KINDS[name] is float else (KINDS[name],)
            if value is not None and type(value) not in kinds and name != "use_dynamic_cfg":
                raise ValueError(f"{where}: {name}: got {value!r:.60}, want a value of type {kinds[-1].__name__}")
        if values.get("prompt") is None:
            raise ValueError(f"{where}: prompt: got none, want one")
        values = {name: value for name, value in values.items() if value is not None}
        try:  # a whole number for a float becomes one, as on the command line: the record shows the difference
            values |= {name: float(value) for name, value in values.items() if KINDS[name] is float}
        except OverflowError as error:
            raise ValueError(f"{where}: got {error}, want numbers that are smaller") from None
        jobs.append(values)
    return jobs


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Read a file with a prompt a line; empty lines are left out."""
    return [{"prompt": line} for _, line in _lines(path)]


def _lines(path: str) -> list[tuple[int, str]]:
    with open(path, "rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{path}: got more than {_MAX_BYTES} bytes, want fewer")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got {error}, want text in UTF-8") from None
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
