"""Pictures of the results, with matplotlib: bars against the limits, a roofline, times over a history."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogvid.weights.files import write_whole
from cogvid_kernels.bench.history import Place, Row, Run, place

COLOURS = {"own": "tab:orange", "ours": "tab:green", "other": "tab:grey"}
LABELS = {"own": "--provider", "ours": "cogvid_kernels", "other": "others"}
MARKERS = "osD^v<>PX*"


def check_matplotlib(option: str) -> None:
    """Raise unless matplotlib is installed."""
    try:
        import matplotlib
    except ImportError as error:
        wanted = "want matplotlib, such as by pip install 'cogvid[bench]'"
        raise ValueError(f"{option}: got an environment without it ({error}), {wanted}") from error
    matplotlib.use("Agg")


def kind_of(row: Row) -> str:
    return "own" if row["own"] else "ours" if row["provider"].startswith("ours") else "other"


def caption(values: dict[str, Any]) -> str:
    return f"{values['machine']}, torch {values['torch']}, triton {values['triton']}, commit {values['commit']}"


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    from matplotlib import pyplot

    write_whole(Path(path), lambda partial: figure.savefig(partial, dpi=150, format="png"))
    pyplot.close(figure)


def legend(figure: Any, rows: list[Row], *more: Any) -> None:
    """Say below the axes what the colours are, and name further artists."""
    from matplotlib.patches import Patch

    kinds = {kind_of(row) for row in rows}
    patches = [Patch(color=COLOURS[kind], label=LABELS[kind]) for kind in LABELS if kind in kinds]
    figure.legend(handles=[*more, *patches], fontsize=7, loc="outside lower center", ncols=3)


def bars(rows: list[Row], values: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw one bar a provider: percent of the limit measured in this run."""
    from matplotlib import pyplot

    timed = [row for row in rows if "median_ms" in row]
    figure, axes = pyplot.subplots(figsize=(11, 1.5 + 0.22 * len(timed)), layout="constrained")
    labels = [f"{row['op']} {row['case']}  {row['provider']}" for row in timed]
    places = range(len(timed))
    axes.barh(places, [row["percent_measured"] for row in timed], color=[COLOURS[kind_of(row)] for row in timed])
    for at, row in zip(places, timed, strict=True):
        axes.text(row["percent_measured"], at, f" {row['rate']:.4g} {row['unit']}", va="center", fontsize=6)
    axes.set_yticks(places, labels, fontsize=6)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlabel("percent of the limit measured in the same run (copy, or bf16 matrix product)")
    axes.set_title(caption(values), fontsize=8)
    legend(figure, timed)
    save(figure, path)


def roofline(rows: list[Row], values: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw each provider at its arithmetic intensity and speed, under the limits measured in this run."""
    from matplotlib import pyplot

    timed = [row for row in rows if "median_ms" in row]
    figure, axes = pyplot.subplots(figsize=(10, 6.5), layout="constrained")
    roofs = [("measured here", values["matmul_tflops"], values["copy_gbs"], "-")]
    if "sheet_tflops" in values:
        roofs.append(("data sheet", values["sheet_tflops"], values["sheet_gbs"], "--"))
    ridges = [1e3 * tflops / gbs for _, tflops, gbs, _ in roofs]
    reach = [row["flop_per_byte"] for row in timed] + ridges
    low, high = min(reach) / 3, max(reach) * 3
    for (label, tflops, gbs, style), ridge in zip(roofs, ridges, strict=True):
        xs = [low, ridge, max(high, ridge * 3)]
        ys = [1e-3 * gbs * low, tflops, tflops]
        text = f"{label}: copy {gbs:.4g} GB/s, bf16 matrix product {tflops:.4g} TFLOP/s"
        axes.plot(xs, ys, style, color="black", linewidth=1, label=text)
    names = list(dict.fromkeys(row["op"] for row in timed))
    for number, name in enumerate(names):
        marker = MARKERS[number % len(MARKERS)]
        for kind in ("other", "ours", "own"):
            points = [row for row in timed if row["op"] == name and kind_of(row) == kind]
            xs, ys = [row["flop_per_byte"] for row in points], [row["tflops"] for row in points]
            axes.scatter(xs, ys, marker=marker, color=COLOURS[kind], s=28, alpha=0.7, linewidths=0)
        axes.scatter([], [], marker=marker, color="black", s=28, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte of the least traffic (--help has the formulas)")
    axes.set_ylabel("TFLOP/s achieved")
    axes.set_title(caption(values), fontsize=8)
    axes.grid(which="major", alpha=0.3)
    legend(figure, timed, *axes.get_legend_handles_labels()[0])
    save(figure, path)


def over_time(runs: Sequence[Run], rows: list[Row], device: str, path: str | os.PathLike[str]) -> None:
    """Draw the times of this run's cases over the runs of a history on this device, with their spread."""
    from matplotlib import pyplot

    runs = [run for run in runs if run["header"]["device"] == device]
    panels = list(dict.fromkeys(place(row)[:-1] for row in rows if "median_ms" in row))
    columns = min(2, max(len(panels), 1))
    lines = math.ceil(max(len(panels), 1) / columns)
    size = (7 * columns, 1 + 3.2 * lines)
    figure, grid = pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    labels = [f"{run['header']['date']}\n{run['header']['commit']}" for run in runs]
    for axes, panel in zip(grid.flat, panels, strict=False):
        series: dict[Place, list[tuple[int, Row]]] = {}
        for at, run in enumerate(runs):
            for row in run["rows"]:
                if place(row)[:-1] == panel and "median_ms" in row:
                    series.setdefault(place(row), []).append((at, row))
        for number, points in enumerate(series.values()):
            xs, kept = zip(*points, strict=True)
            middle = [row["median_ms"] for row in kept]
            below = [row["median_ms"] - row["p20_ms"] for row in kept]
            above = [row["p80_ms"] - row["median_ms"] for row in kept]
            look = {"color": f"C{number % 10}", "marker": MARKERS[number // 10 % len(MARKERS)], "markersize": 4}
            look |= {"linewidth": 1, "linestyle": "--" if number >= 10 else "-", "capsize": 2}
            axes.errorbar(xs, middle, yerr=[below, above], label=kept[0]["provider"], **look)
        op, case, dtype, graph = panel
        axes.set_title(f"{op}  {case}  {dtype}{', CUDA graph' if graph else ''}", fontsize=8)
        axes.set_xticks(range(len(runs)), labels, fontsize=6, rotation=30, ha="right")
        axes.set_ylabel("ms, median and 20th to 80th percentile", fontsize=6)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_yscale("log")
        axes.margins(x=0.1)
        axes.grid(axis="y", which="both", alpha=0.3)
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(device, fontsize=9)
    save(figure, path)
