"""Tables and proposed block sizes from the results of `gpu_session.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_session import ROOT, read_results

Line = dict[str, Any]


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


def tiles_source(lines: dict[tuple[str, str], Line]) -> str:
    """Return `cogvid_kernels/_tiles.py` with an assignment for each measured tile at its end."""
    source = (ROOT / "kernels" / "cogvid_kernels" / "_tiles.py").read_text()
    added = []
    for (operation, shape_class, arch), line in sorted(best_tiles(lines).items()):
        blocks, warps, stages = line["tile"]
        added.append(
            f'TILES["{operation}", "{shape_class}"][{arch}] = Tile({blocks}, {warps}, {stages})'
            f"  # {line['median_ms']:.4g} ms"
        )
    if not added:
        return source
    return f"{source}\n# Fastest of those measured.\n" + "\n".join(added) + "\n"
