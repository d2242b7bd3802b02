"""A batch as a section of a report: its jobs, their records, and how far their videos are apart."""

from __future__ import annotations

import base64
import datetime
import itertools
import json
import math
import os
import urllib.parse
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cogvid.media.download import one_line, shown
from cogvid.media.video import read_video
from cogvid.run.compare import compare
from cogvid.run.manifest import read_manifest
from cogvid.run.record import read_record, record_rows
from cogvid.run.signals import stop_if_asked

MANIFEST = "manifest.jsonl"
MOST_BYTES = 500 * 10**6  # of embedded videos; a browser reads a third more, and all of it at once
MOST_PAIRS = 400  # to compare unless a baseline is named; at 49 frames of 480x720 each takes 17 s of a core
_MOST_COLUMNS = 5  # of the first grid, if its other setting has fewer values
_ABSENT = "not given"
_MEASURES = ("psnr", "ssim", "max_abs")

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Setting:
    """What varies in a batch. values: as texts, in the order of the page."""

    name: str
    values: list[str]


@dataclass
class Card:
    """One job. at: the place of its value in each setting. twin: how many jobs before it have the same values.

    path: of its video, None if there is nothing to play, and `absent` says why.
    """

    place: int
    status: str
    seed: int | None
    seconds: float | None
    memory: float | None
    error: str
    at: list[int]
    twin: int
    path: Path | None
    absent: str
    fps: float = 0.0
    size: tuple[int, int] = (0, 0)  # height, width
    details: list[tuple[str, Rows]] = field(default_factory=list)
    source: str = ""  # a link to the video; empty where it is embedded

    def url(self) -> str:
        """The URL of the video: a link, or all of its bytes, which are read now."""
        if self.source or self.path is None:
            return self.source
        return "data:video/mp4;base64," + base64.b64encode(self.path.read_bytes()).decode()


@dataclass
class Sweep:
    """The section of a batch.

    rows, columns: the settings that the page shows first, by their place in `settings`; -1 for none. only: the setting
    and the value that all is compared with; None for any. pairs: two places in `cards`, and psnr, ssim and max_abs, or
    the reason why they cannot be compared.
    """

    kind = "sweep"
    title: str
    settings: list[Setting]
    common: Rows
    cards: list[Card]
    rows: int
    columns: int
    only: tuple[int, int] | None
    pairs: list[list[Any]]

    @property
    def data(self) -> dict[str, Any]:
        """What the script needs, for JSON."""
        return {
            "settings": [vars(each) for each in self.settings],
            "jobs": [{"place": card.place, "at": card.at, "twin": card.twin} for card in self.cards],
            "rows": self.rows,
            "columns": self.columns,
            "only": self.only,
            "pairs": self.pairs,
            "frame": 1 / max((card.fps for card in self.cards), default=0) if self.playable else None,
        }

    @property
    def playable(self) -> int:
        return sum(card.path is not None for card in self.cards)

    @property
    def failed(self) -> int:
        return sum(card.status != "done" for card in self.cards)


def read_sweep(directory: Path, output: Path, link: bool, baseline: str | None) -> Sweep:
    """Read a batch and compare its videos.

    output: the page, to which links are relative. baseline: NAME=VALUE, what videos are compared with, "none" to
    compare none; if None, any two that differ in one setting are compared.

    Raises:
        ValueError: there is no manifest, or a broken one; the videos are too large; there are too many to compare; the
            baseline is not of this batch.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"source: got {shown(str(directory))}, which has no {MANIFEST}, want a directory of a batch")
    entries = list(read_manifest(path).values())
    if not entries:
        raise ValueError(f"source: got {shown(str(path))}, which has no jobs, want one of a batch that began")
    varying, common = _settings([entry["job"] for entry in entries])
    cards = list(_cards(directory, entries, varying))
    only = _named(baseline, varying) if baseline not in (None, "none") else None
    rows, columns = _axes(varying, only)
    if link:
        for card in cards:
            if card.path is not None:
                card.source = urllib.parse.quote(os.path.relpath(card.path.resolve(), output.resolve().parent))
    else:
        _check_size(directory, cards)
    pairs = [] if baseline == "none" else list(_compared(cards, only))
    return Sweep(directory.resolve().name, varying, common, cards, rows, columns, only, pairs)


def _settings(jobs: Sequence[Mapping[str, Any]]) -> tuple[list[Setting], Rows]:
    """Sort the settings of jobs into those that vary and those that do not."""
    varying, common = [], []
    for name in dict.fromkeys(name for job in jobs for name in job):
        found: dict[str, Any] = {_key(job, name): job.get(name) for job in jobs}
        if len(found) == 1:
            common.append((name, _text(next(iter(found.values())))))
            continue
        values = list(found)
        if all(isinstance(value, (int, float)) for value in found.values()):
            values.sort(key=lambda key: found[key])
        varying.append(Setting(name, [_text(found[key]) for key in values]))
    return varying, common


def _axes(varying: Sequence[Setting], only: tuple[int, int] | None) -> tuple[int, int]:
    """Choose the first rows and columns: the two settings with the most values, seeds last.

    The one with more values has the columns, if they fit beside each other. A baseline's setting has the columns.
    """
    order = sorted(range(len(varying)), key=lambda i: (varying[i].name == "seed", -len(varying[i].values)))
    if only is not None:
        order = [only[0], *(i for i in order if i != only[0])]
    columns, rows = [*order, -1, -1][:2]
    if only is None and rows != -1 and len(varying[columns].values) > _MOST_COLUMNS:
        columns, rows = rows, columns
    return rows, columns


def _key(job: Mapping[str, Any], name: str) -> str:
    return _text(job.get(name))


def _text(value: object) -> str:
    if value is None:
        return _ABSENT
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _cards(directory: Path, entries: Sequence[Mapping[str, Any]], varying: Sequence[Setting]) -> Iterator[Card]:
    seen: defaultdict[tuple[int, ...], int] = defaultdict(int)
    for entry in entries:
        stop_if_asked()
        at = [setting.values.index(_key(entry["job"], setting.name)) for setting in varying]
        error = "" if entry.get("error") is None else _text(entry["error"])
        seed, seconds, memory = (_number(entry.get(name)) for name in ("seed", "seconds", "peak_memory"))
        card = Card(
            place=entry["place"],
            status=entry["status"],
            seed=None if seed is None else int(seed),
            seconds=seconds,
            memory=memory,
            error=error,
            at=at,
            twin=seen[tuple(at)],
            path=None,
            absent=f"{entry['status']}: {error}" if error else entry["status"],
        )
        seen[tuple(at)] += 1
        job = [(name, _text(value)) for name, value in entry["job"].items()]
        card.details = [("Job", job), ("Measured", _measured(entry, card))]
        if entry["status"] == "done":
            _find_video(directory, entry.get("output"), card)
        yield card


def _find_video(directory: Path, name: object, card: Card) -> None:
    """Look for the video of a job, and fill in what is known of it."""
    # A manifest may be of anywhere, and a report is sent around: nothing beside the batch's videos gets into it.
    if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".mp4") or "\0" in name:
        got = f"{shown(str(directory / MANIFEST))} with the output {shown(_text(name))}"
        raise ValueError(f"source: got {got}, want names of MP4s in the directory")
    path = directory / name
    if not path.is_file() or path.resolve().parent != directory.resolve():
        card.absent = f"missing: {name} is not in the directory"
        return
    try:
        frames, fps = read_video(path, max_frames=1)
    except (ValueError, OSError) as error:
        card.absent = f"not a video: {one_line(error)}"
        return
    card.path, card.fps, card.size = path, float(fps), (frames.shape[1], frames.shape[2])
    try:
        rows = record_rows(read_record(path))
    except ValueError as error:
        rows = [("none", one_line(error))]
    card.details.append(("Record", rows))


def _measured(entry: Mapping[str, Any], card: Card) -> Rows:
    rows = [("output", _text(entry.get("output"))), ("status", card.status)]
    if card.error:
        rows.append(("error", card.error))
    if card.seconds is not None:
        rows.append(("seconds", f"{card.seconds:.3g}"))
    stages = entry.get("stages")
    for name, value in stages.items() if isinstance(stages, dict) else ():
        rows.append((f"seconds of {name}", _text(value)))
    if card.memory is not None:
        rows.append(("peak memory", megabytes(card.memory)))
    if entry.get("batch_size") is not None:
        rows.append(("sampled together", _text(entry["batch_size"])))
    try:
        ended = datetime.datetime.fromtimestamp(entry["ended"], datetime.UTC)
        rows.append(("ended", ended.strftime("%Y-%m-%d %H:%M:%S UTC")))
    except (ValueError, OverflowError, OSError):  # of a year that no calendar has
        rows.append(("ended", _text(entry["ended"])))
    return rows


def _number(value: object) -> float | None:
    return value if isinstance(value, (int, float)) and abs(value) < 1e15 and math.isfinite(value) else None


def megabytes(number: float) -> str:
    """Return bytes as text, in MB (10^6)."""
    return f"{number / 1e6:,.0f} MB"


def _named(baseline: str | None, varying: Sequence[Setting]) -> tuple[int, int]:
    name, _, value = (baseline or "").partition("=")
    for i, setting in enumerate(varying):
        if setting.name == name.replace("-", "_") and value in setting.values:
            return i, setting.values.index(value)
    known = ", ".join(f"{each.name}={'|'.join(each.values)}" for each in varying)
    wanted = f"want none, or NAME=VALUE of {one_line(known)}" if known else "want none, as nothing varies"
    raise ValueError(f"baseline: got {shown(baseline or '')}, {wanted}")


def _check_size(directory: Path, cards: Sequence[Card]) -> None:
    size = sum(card.path.stat().st_size for card in cards if card.path is not None)
    if size > MOST_BYTES:
        wanted = f"at most {megabytes(MOST_BYTES)}, or --link to link them"
        raise ValueError(f"videos: got {megabytes(size)} in {shown(str(directory))}, want {wanted}")


def _compared(cards: Sequence[Card], only: tuple[int, int] | None) -> Iterator[list[Any]]:
    """Compare any two videos that differ in one setting, or in the one of the baseline."""
    groups: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, card in enumerate(cards):
        for k in range(len(card.at)) if card.path is not None else ():
            groups[k, card.twin, *card.at[:k], *card.at[k + 1 :]].append(i)
    pairs = [
        (k, a, b)
        for (k, *_), members in groups.items()
        for a, b in itertools.combinations(members, 2)
        if only is None or (k == only[0] and only[1] in (cards[a].at[k], cards[b].at[k]))
    ]
    if only is None and len(pairs) > MOST_PAIRS:
        wanted = f"at most {MOST_PAIRS}, or --baseline NAME=VALUE to compare with that value alone, or --baseline none"
        raise ValueError(f"baseline: got none and {len(pairs)} pairs of videos to compare, want {wanted}")
    for _, a, b in tqdm(pairs, "compare", unit="pair", leave=False, disable=not pairs):
        stop_if_asked()
        first, second = (cards[i].path for i in (a, b))
        try:
            found = compare(first, second).whole()  # pyright: ignore[reportArgumentType] - those without are left out
            yield [a, b, *(found[name] for name in _MEASURES)]
        except (ValueError, OSError) as error:  # such as two of other sizes
            yield [a, b, one_line(error)]
