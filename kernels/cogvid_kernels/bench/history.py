"""Results over time: a file with one line a run, and what became slower or faster since another run.

A line is what `--json` writes: `header` with date, commit, machine and versions, and `rows`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from cogvid.media.download import shown

Row = dict[str, Any]
Run = dict[str, Any]
Place = tuple[Any, ...]


def append(path: str | os.PathLike[str], run: Run) -> None:
    """Add a line to a history, in one write."""
    line = json.dumps(run).encode() + b"\n"
    with open(path, "ab+", buffering=0) as file:
        if file.tell():  # a process that was killed while it wrote may have left half a line
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else b"\n" + line
        file.write(line)
        os.fsync(file.fileno())


def read(name: str, path: str | os.PathLike[str]) -> list[Run]:
    """Read a history, or the file of `--json`; name: of the option, for errors.

    Raises:
        ValueError: the file has no results. One half line, of a process that was killed, is left out.
    """
    wanted = "want a file of --json or --history"
    if not os.path.isfile(path):
        raise ValueError(f"{name}: got {shown(os.fspath(path))}, which is no file, {wanted}")
    runs = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                run = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if is_run(run):
                runs.append(run)
    if not runs:
        raise ValueError(f"{name}: got {shown(os.fspath(path))}, which has no results, {wanted}")
    return runs


def is_run(run: Any) -> bool:
    if not isinstance(run, dict) or not isinstance(run.get("header"), dict) or not isinstance(run.get("rows"), list):
        return False
    texts = all(isinstance(run["header"].get(name), str) for name in ("device", "commit", "date"))
    return texts and all(is_row(row) for row in run["rows"])


def is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("op", "case", "provider")):
        return False
    times = [row.get(name) for name in ("median_ms", "p20_ms", "p80_ms")]
    return times == [None] * 3 or all(isinstance(each, float) and 0 < each < float("inf") for each in times)


def place(row: Row) -> Place:
    """Return what two rows must share to be compared."""
    return tuple(row.get(name) for name in ("op", "case", "dtype", "cuda_graph", "provider"))


def baseline(runs: Iterable[Run], device: str) -> dict[Place, Row]:
    """Return the last timed row of each place on this device."""
    on_device = [run for run in runs if run["header"]["device"] == device]
    return {place(row): row for run in on_device for row in run["rows"] if "median_ms" in row}


def compare(rows: Iterable[Row], before: dict[Place, Row], factor: float) -> list[Row]:
    """Compare rows with those of a baseline.

    A row is slower if its 20th percentile is above the 80th of the baseline, and faster the other way round; otherwise
    the spreads overlap and nothing is said of it. It is a regression if it is slower and its median more than `factor`
    times as long, or if it was timed and is not any more.
    """
    found = []
    for row in rows:
        old = before.get(place(row))
        if old is None:
            continue
        change = {"op": row["op"], "case": row["case"], "provider": row["provider"], "before_ms": old["median_ms"]}
        if "median_ms" not in row:
            found.append({**change, "verdict": "not timed", "regression": True})
            continue
        ratio = row["median_ms"] / old["median_ms"]
        slower, faster = row["p20_ms"] > old["p80_ms"], row["p80_ms"] < old["p20_ms"]
        verdict = "slower" if slower else "faster" if faster else "within the spread"
        regression = slower and ratio > factor
        found.append({**change, "ratio": ratio, "verdict": verdict, "regression": regression})
    return found


def format_change(change: Row) -> str:
    label = f"{change['op']}  {change['case']}  {change['provider']}"
    verdict = f"{change['verdict']}, a regression" if change["regression"] else change["verdict"]
    return f"  {label:<70}  {format_ratio(change)}: {verdict}"


def format_ratio(change: Row) -> str:
    return f"{change['ratio']:.3f} times {change['before_ms']:.4g} ms" if "ratio" in change else "not timed"
