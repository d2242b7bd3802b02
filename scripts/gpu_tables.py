"""Tables, proposed block sizes and the proposed default of attention from the results of `gpu_session.py`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_session import ROOT, read_results

Line = dict[str, Any]
CHECKS = ("probe", "numerics")


def write_tables(out: Path) -> list[Path]:
    """Write `RESULTS.md` and `_tiles.py` into the directory and return their paths."""
    lines = read_results(out)
    paths = out / "RESULTS.md", out / "_tiles.py"
    paths[0].write_text(markdown(lines))
    paths[1].write_text(tiles_source(lines))
    return list(paths)


def markdown(lines: dict[tuple[str, str], Line]) -> str:
    """Return what was run, what is wrong or missing, and a table a stage."""
    header = lines.get(("limits", "header"), {})
    kept = {k: v for k, v in header.items() if v is not None and k not in ("stage", "key", "state", "seconds")}
    sessions = [line for (stage, _), line in lines.items() if stage == "session"]
    parts = [f"### {header.get('machine', 'unknown machine')}\n"]
    parts.append("\n".join(f"- {line['key']}: `{line['note']}`" for line in sessions))
    parts.append("\n".join(f"- {name}: {value}" for name, value in kept.items()) + "\n")
    amiss = [f"- {line['stage']}: {line['key']}: {line['reason']}" for line in lines.values() if "reason" in line]
    parts.append("\n".join(["#### Failed or cut off\n", *(amiss or ["- nothing"])]) + "\n")
    for stage in dict.fromkeys(stage for stage, _ in lines if stage != "session"):
        rows = [line for (of, key), line in lines.items() if of == stage and key != "header" and "reason" not in line]
        parts += [f"#### {stage}\n", table(rows)]
    return "\n".join(parts)


def table(rows: Iterable[Line]) -> str:
    """One row a result; its columns are the numbers that any of them has."""
    rows = [flat for row in rows for flat in (row.get("rows") or [row])]
    names = list(dict.fromkeys(n for row in rows for n, v in row.items() if isinstance(v, float) and n != "seconds"))
    out = [f"| result | {' | '.join([*names, 'note'])} |", f"|---|{'--:|' * len(names)}---|"]
    for row in rows:
        label = row.get("key") or f"{row['op']} {row['case']}, {row['provider']}"
        cells = [f"{row[name]:.4g}" if isinstance(row.get(name), float) else "" for name in names]
        note = row.get("reason", row.get("note", ""))  # a row of several providers has a reason of its own
        out.append(f"| {label} | {' | '.join([*cells, str(note).replace('|', '/')])} |")
    return "\n".join(out) + "\n"


def best_tiles(lines: dict[tuple[str, str], Line]) -> dict[tuple[str, str, int], Line]:
    """Return the fastest correct tile measured for each (operation, shape class, architecture)."""
    best: dict[tuple[str, str, int], Line] = {}
    for line in lines.values():
        if line["state"] == "done" and "tile" in line and "median_ms" in line:
            place = line["operation"], line["shape_class"], line["arch"]
            if place not in best or line["median_ms"] < best[place]["median_ms"]:
                best[place] = line
    return best


def attention_orders(lines: dict[tuple[str, str], Line]) -> dict[int, dict[str, float]]:
    """Return for each GPU architecture the variants of attention, fastest first, and their milliseconds.

    A variant that was wrong or cut off in the stages that check is left out. "pointer", which takes any tensors, is the
    last one; what is slower is not needed.
    """
    found: dict[int, dict[str, float]] = {}
    for line in lines.values():
        if line["stage"] == "attention" and line["state"] == "done" and "variant" in line and line["arch"]:
            times = found.setdefault(line["arch"], {})
            times[line["variant"]] = min(line["median_ms"], times.get(line["variant"], line["median_ms"]))
    wrong = [line["key"] for line in lines.values() if line["stage"] in CHECKS and line["state"] != "done"]
    orders = {}
    for arch, times in found.items():
        right = {n: ms for n, ms in times.items() if not any(re.search(rf"(^|[ /]){n}( |$)", key) for key in wrong)}
        if "pointer" in right:
            orders[arch] = dict(sorted((x for x in right.items() if x[1] <= right["pointer"]), key=lambda x: x[1]))
    return orders


def tiles_source(lines: dict[tuple[str, str], Line]) -> str:
    """Return `cogvid_kernels/_tiles.py` with an assignment for each measured tile and order at its end."""
    source = (ROOT / "kernels" / "cogvid_kernels" / "_tiles.py").read_text()
    added = []
    for (operation, shape_class, arch), line in sorted(best_tiles(lines).items()):
        blocks, warps, stages = line["tile"]
        added.append(
            f'TILES["{operation}", "{shape_class}"][{arch}] = Tile({blocks}, {warps}, {stages})'
            f"  # {line['median_ms']:.4g} ms"
        )
    for arch, times in sorted(attention_orders(lines).items()):
        note = ", ".join(f"{ms:.4g}" for ms in times.values())
        added.append(f"ATTENTION_ORDER[{arch}] = {(*times,)!r}  # {note} ms".replace("'", '"'))
    if not added:
        return source
    return f"{source}\n# Fastest of those measured.\n" + "\n".join(added) + "\n"
