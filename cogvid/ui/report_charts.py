"""Benchmarks of kernels, parity with diffusers, and quality against speed as sections of a report.

Each chart is drawn here as numbers of an SVG, or as classes of a table's cells; the templates have no arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SERIES = 8  # looks of lines and points in report.css, after which they begin again
_HEAT = 8  # shades of a heat map
_WIDTH, _HEIGHT = 560.0, 300.0  # of a chart, in its own units, which are pixels where there is room
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 64.0, 12.0, 44.0  # what is left free around its axes
_LINE = 14.0  # from one label to the next
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    text: str  # what a pointer shows
    label: str = ""
    label_y: float = 0.0


@dataclass(frozen=True)
class Line:
    """One series. look: its colour and marker, 0 to SERIES - 1. path: through its points; empty for points alone."""

    name: str
    look: int
    points: list[Point]
    path: str


@dataclass(frozen=True)
class Chart:
    """An SVG with a legend above it. ticks: (place, text) on each axis."""

    title: str
    x_name: str
    y_name: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    width: float = _WIDTH
    height: float = _HEIGHT
    left: float = _LEFT
    right: float = _WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = _HEIGHT - _BOTTOM


def is_number(value: object) -> bool:
    """Say whether this is a finite number of ordinary size."""
    return isinstance(value, (int, float)) and abs(value) < 1e15 and math.isfinite(value)


def _axis(values: Iterable[float], low: float, high: float, steps: int = 5) -> tuple[Any, list[tuple[float, str]]]:
    """Return a function from values to places between `low` and `high`, and ticks at round values."""
    values = list(values)
    least, most = min(values), max(values)
    span = most - least if most - least > 1e-6 * max(1.0, abs(most)) else max(abs(most), 1e-6)
    step = 10 ** math.floor(math.log10(span / steps))
    step = next(step * each for each in (1, 2, 5, 10) if span / (step * each) <= steps)
    first, last = math.floor(least / step), math.ceil(most / step)
    last = max(last, first + 1)

    def place(value: float) -> float:
        return round(low + (high - low) * (value / step - first) / (last - first), 2)

    return place, [(place(i * step), f"{i * step:.6g}") for i in range(first, last + 1)]


def _log_axis(values: Iterable[float], low: float, high: float) -> tuple[Any, list[tuple[float, str]]]:
    """The same on a logarithmic scale, with ticks at 1, 2 and 5 times powers of ten."""
    values = list(values)
    around = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 1)
    marks = [m * 10.0**e for e in around for m in (1, 2, 5)]
    least = max(m for m in marks if m <= min(values))
    most = min(m for m in [*marks, marks[-1] * 10] if m >= max(values) and m > least)

    def place(value: float) -> float:
        return round(low + (high - low) * math.log(value / least) / math.log(most / least), 2)

    ticks = [m for m in marks if least <= m <= most]
    if len(ticks) > 7:
        ticks = [m for m in ticks if f"{m:e}"[0] == "1"]
    return place, [(place(m), f"{m:.6g}") for m in ticks]


def _path(points: Sequence[Point]) -> str:
    return "M" + " L".join(f"{point.x:g} {point.y:g}" for point in points) if len(points) > 1 else ""


# Benchmarks of the kernels


@dataclass(frozen=True)
class Bar:
    """A row of a case. length, sheet: percent of the drawn width, of the bar and of where the data sheet's limit is."""

    row: Row
    own: str
    length: float
    limit: float
    sheet: float | None


@dataclass(frozen=True)
class Case:
    title: str
    bars: list[Bar]
    history: Chart | None
    history_rows: list[tuple[str, list[str]]]  # provider, a time for each run


@dataclass
class Kernels:
    """The section of a benchmark. runs: (date, commit) of each run of its history on the device of the last one."""

    kind = "kernels"
    title: str
    header: list[tuple[str, str]]
    cases: list[Case]
    runs: list[tuple[str, str]]


_TIMES = ("median_ms", "p20_ms", "p80_ms", "rate", "percent_measured", "error")


def is_run(value: Any) -> bool:
    """Say whether this is what the benchmark of the kernels writes of a run."""
    header, rows = (value.get(name) for name in ("header", "rows")) if isinstance(value, dict) else (None, None)
    if not isinstance(header, dict) or not isinstance(rows, list):
        return False
    names = all(isinstance(header.get(name), str) for name in ("device", "commit", "date"))
    return names and all(isinstance(row, dict) and _is_row(row) for row in rows)


def _is_row(row: Row) -> bool:
    if not all(isinstance(row.get(name), str) for name in ("op", "case", "provider", "dtype")):
        return False
    if row.get("median_ms") is None:
        return True
    numbers = all(is_number(row.get(name)) and row[name] >= 0 for name in _TIMES)
    return numbers and row["median_ms"] > 1e-9 and isinstance(row.get("unit"), str)


def kernels(title: str, runs: Sequence[Row]) -> Kernels:
    """Make the section of the last run, with the times of all runs on its device."""
    last = runs[-1]
    same = [run for run in runs if run["header"]["device"] == last["header"]["device"]]
    labels = [(run["header"]["date"], run["header"]["commit"]) for run in same]
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in last["rows"]:
        cases.setdefault(_case(row), []).append(row)
    found = []
    for case, rows in cases.items():
        op, shape, dtype, graph = case
        name = f"{op}, {shape}, {dtype}{', CUDA graph' if graph else ''}"
        chart, table = _history(name, case, same, labels) if len(same) > 1 else (None, [])
        found.append(Case(name, _bars(rows), chart, table))
    header = [(name, str(value)) for name, value in last["header"].items()]
    return Kernels(title, header, found, labels)


def _case(row: Row) -> tuple[Any, ...]:
    return row["op"], row["case"], row["dtype"], bool(row.get("cuda_graph"))


def _is_timed(row: Row) -> bool:
    return row.get("median_ms") is not None


def _bars(rows: Sequence[Row]) -> list[Bar]:
    percents = [row["percent_measured"] for row in rows if _is_timed(row)]
    sheets = {id(row): _sheet(row) for row in rows if _is_timed(row)}
    full = max([100.0, *percents, *(sheet for sheet in sheets.values() if sheet is not None)]) * 1.02
    bars = []
    for row in rows:
        own = "own" if row.get("own") else "ours" if row["provider"].startswith("ours") else "other"
        sheet = sheets.get(id(row))
        length = 100 * row["percent_measured"] / full if _is_timed(row) else 0.0
        bars.append(Bar(row, own, round(length, 2), round(1e4 / full, 2), sheet and round(100 * sheet / full, 2)))
    return bars


def _sheet(row: Row) -> float | None:
    """Where the data sheet's limit is, in percent of the measured one."""
    percent = row.get("percent_data_sheet")
    if not isinstance(percent, (int, float)) or not percent > 0:
        return None
    place = 100 * row["percent_measured"] / percent
    return place if place < 1000 else None


def _history(
    name: str, case: tuple[Any, ...], runs: Sequence[Row], labels: Sequence[tuple[str, str]]
) -> tuple[Chart | None, list[tuple[str, list[str]]]]:
    times: dict[str, dict[int, float]] = {}
    for at, run in enumerate(runs):
        for row in run["rows"]:
            if _case(row) == case and _is_timed(row):
                times.setdefault(row["provider"], {})[at] = row["median_ms"]
    if not times:
        return None, []
    step = (_WIDTH - _RIGHT - _LEFT - 20) / max(len(runs) - 1, 1)
    xs = [round(_LEFT + 10 + step * at, 2) for at in range(len(runs))]
    place, ticks = _log_axis([ms for each in times.values() for ms in each.values()], _HEIGHT - _BOTTOM, _TOP)
    lines, table = [], []
    for number, (provider, by_run) in enumerate(times.items()):
        said = {at: f"{provider}, {' '.join(labels[at])}: {ms:.4g} ms" for at, ms in by_run.items()}
        points = [Point(xs[at], place(ms), said[at]) for at, ms in by_run.items()]
        lines.append(Line(provider, number % SERIES, points, _path(points)))
        table.append((provider, [f"{by_run[at]:.4g}" if at in by_run else "" for at in range(len(runs))]))
    every = math.ceil(len(runs) / 6)  # there is room for six commits
    x_ticks = [(xs[at], commit[:9]) for at, (_, commit) in enumerate(labels) if at % every == 0]
    return Chart(f"{name}: milliseconds of each commit", "commit", "ms", x_ticks, ticks, lines), table


# Parity with diffusers


@dataclass(frozen=True)
class Cell:
    """An error. share: of its tolerance. heat: its shade, 0 to 7; 8 where the error is above the tolerance."""

    error: str
    tolerance: str
    share: str
    heat: int


@dataclass
class Parity:
    """The section of `scripts/parity_report.py --json`. rows: module, variant, and a cell for each dtype or None."""

    kind = "parity"
    title: str
    header: list[tuple[str, str]]
    dtypes: list[str]
    rows: list[tuple[str, str, list[Cell | None]]]
    above: int


def is_parity(value: Any) -> bool:
    """Say whether this is what `scripts/parity_report.py --json` writes."""
    if not isinstance(value, dict) or value.get("kind") != "parity" or not isinstance(value.get("rows"), list):
        return False
    texts, numbers = ("module", "variant", "dtype"), ("error", "tolerance")
    return isinstance(value.get("header"), dict) and all(
        isinstance(row, dict)
        and all(isinstance(row.get(name), str) for name in texts)
        and all(is_number(row.get(name)) and row[name] >= 0 for name in numbers)
        and row["tolerance"] > 0
        for row in value["rows"]
    )


def parity(title: str, value: Row) -> Parity:
    """Make a heat map: an error's shade says what share of its tolerance it is, each shade for twice the share."""
    rows = value["rows"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    cells: dict[tuple[str, str], dict[str, Cell]] = {}
    for row in rows:
        share = row["error"] / row["tolerance"]
        heat = _HEAT if share > 1 else max(0, _HEAT - 1 + math.ceil(math.log2(share))) if share else 0
        cell = Cell(f"{row['error']:.1e}", f"{row['tolerance']:.1e}", f"{share:.2g}", heat)
        cells.setdefault((row["module"], row["variant"]), {})[row["dtype"]] = cell
    table = [(module, variant, [each.get(dtype) for dtype in dtypes]) for (module, variant), each in cells.items()]
    above = sum(cell is not None and cell.heat == _HEAT for *_, each in table for cell in each)
    return Parity(title, [(name, str(each)) for name, each in value["header"].items()], dtypes, table, above)


# Quality against speed


@dataclass(frozen=True)
class Curve:
    """What was measured of one model. rows: of the table, with `columns`."""

    name: str
    charts: list[Chart]
    columns: list[str]
    rows: list[list[str]]


@dataclass
class Curves:
    """The section of `scripts/step_cache_curve.py --json`."""

    kind = "curves"
    title: str
    header: list[tuple[str, str]]
    curves: list[Curve]


_QUALITY = (("psnr", "PSNR to the run without, dB"), ("ssim", "SSIM to the run without"))


def is_curves(value: Any) -> bool:
    """Say whether this is what `scripts/step_cache_curve.py --json` writes."""
    if not isinstance(value, dict) or value.get("kind") != "curves" or not isinstance(value.get("packs"), dict):
        return False
    return isinstance(value.get("header"), dict) and all(
        isinstance(rows, list) and rows and all(isinstance(row, dict) and _is_point(row) for row in rows)
        for rows in value["packs"].values()
    )


def _is_point(row: Row) -> bool:
    named = all(isinstance(row.get(name), str) for name in ("kind", "name"))
    measured = all(is_number(row.get(name)) and row[name] >= 0 for name in ("time", "work"))
    likeness = all(row.get(name) is None or is_number(row[name]) for name, _ in _QUALITY)
    return named and measured and likeness


def curves(title: str, value: Row) -> Curves:
    """Draw each measure of quality against the time, a line for each kind of option."""
    found = []
    for pack, rows in value["packs"].items():
        charts = [_curve(pack, rows, name, label) for name, label in _QUALITY if any(_has(row, name) for row in rows)]
        columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("kind", "name")))
        table = [[row["name"], *(_shown(row.get(name)) for name in columns)] for row in rows]
        found.append(Curve(pack, charts, columns, table))
    return Curves(title, [(name, str(each)) for name, each in value["header"].items()], found)


def _has(row: Row, name: str) -> bool:
    return row.get(name) is not None


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if is_number(value) else str(value)


def _curve(pack: str, rows: Sequence[Row], name: str, label: str) -> Chart:
    measured = [row for row in rows if _has(row, name)]
    place_x, x_ticks = _axis([0, 1, *(row["time"] for row in measured)], _LEFT, _WIDTH - _RIGHT)
    place_y, y_ticks = _axis([row[name] for row in measured], _HEIGHT - _BOTTOM, _TOP)
    spots = [(place_x(row["time"]), place_y(row[name])) for row in measured]
    heights = dict(zip(map(id, measured), _apart(spots), strict=True))
    lines = []
    for number, kind in enumerate(dict.fromkeys(row["kind"] for row in measured)):
        points = [
            Point(
                place_x(row["time"]),
                place_y(row[name]),
                f"{row['name']}: time {row['time']:.3g}, {name} {row[name]:.4g}",
                row["name"].partition("=")[2] or row["name"],
                heights[id(row)],
            )
            for row in sorted(measured, key=lambda row: row["time"])
            if row["kind"] == kind
        ]
        lines.append(Line(kind, number % SERIES, points, _path(points)))
    return Chart(f"{pack}: {label}", "time, without = 1", label, x_ticks, y_ticks, lines)


def _apart(spots: Sequence[tuple[float, float]], near: float = 50.0) -> list[float]:
    """Return heights of labels at these spots, each the nearest one that overlaps none within `near`."""
    heights: list[float] = []
    for x, y in spots:
        taken = [height for height, (other, _) in zip(heights, spots, strict=False) if abs(other - x) < near]
        free = (y + _LINE * shift / 2 for step in itertools.count() for shift in (step, -step))
        free = (height for height in free if height >= _TOP)
        heights.append(next(height for height in free if all(abs(height - each) >= _LINE for each in taken)))
    return heights
