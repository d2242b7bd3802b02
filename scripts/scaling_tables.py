"""The tables of SCALING.md: what is computed for H200s, and what was measured with gloo."""

from __future__ import annotations

import functools
from typing import Any

import measure
import scaling_model as paper
from cogvid.parallel import costs as traffic
from cogvid.run.costs import tokens
from cogvid.weights.parallel_option import Parallel, best_split
from measure import markdown_row

PAGE = measure.ROOT / "scripts" / "SCALING.md"
_BEGIN, _END = "<!-- {} -->", "<!-- end of {} -->"


def computed() -> list[str]:
    """Return what is computed, as lines of Markdown."""
    lines = ["Rates that are assumed for one H200; nothing of this was measured on a GPU:", "", "| | assumed | known |"]
    lines += ["|---|---|---|", *(markdown_row(list(each)) for each in paper.ASSUMPTIONS)]
    for name in paper.MODELS:
        config, size = paper.model_of(name)
        total = 226 + tokens(config, size)
        lines += ["", f"**{name}**, {total:,} tokens, two rows; milliseconds of a step, the fastest split", ""]
        lines += _table_of(name)
        lines += ["", "Every way to split, milliseconds of a step:", "", *_splits_of(name)]
    return [*lines, "", *_crossover()]


@functools.cache
def _best(name: str, devices: int) -> tuple[Parallel, paper.Step]:
    return paper.best(*paper.model_of(name), devices)


def _rule(name: str, devices: int) -> Parallel:
    config, _ = paper.model_of(name)
    return best_split(devices, config.num_attention_heads, guided=True, per_node=min(8, devices))


def _table_of(name: str) -> list[str]:
    head = ["GPUs", "split", "step", "linears", "attention", "elementwise", "Ulysses", "ring", "of it hidden", "gather",
            "GB sent", "speed-up", "the rule's split"]  # fmt: skip
    lines = [markdown_row(head), "|--:|---|" + "--:|" * 10 + "---|"]
    _, one = _best(name, 1)
    for devices in paper.counts():
        split, step = _best(name, devices)
        rule = _rule(name, devices)
        slower = paper.step_time(*paper.model_of(name), rule).total / step.total - 1
        same = "the same" if rule == split else f"{_short(rule)}, {100 * slower:.0f} % slower"
        parts = (step.total, step.linears, step.attention, step.elementwise + step.whole, step.ulysses, step.ring,
                 step.hidden, step.gather)  # fmt: skip
        cells = [str(devices), _short(split), *(f"{1e3 * part:.1f}" for part in parts)]
        lines.append(markdown_row([*cells, f"{step.sent / 1e9:.2f}", f"{one.total / step.total:.1f}", same]))
    return lines


def _short(split: Parallel) -> str:
    return f"{split.cfg} x {split.ulysses} x {split.ring}"


def _splits_of(name: str) -> list[str]:
    """Return a table with a row for each number of GPUs and a column for each size of the Ulysses group."""
    config, size = paper.model_of(name)
    sizes = [n for n in paper.counts() if n <= config.num_attention_heads]
    lines = []
    for cfg in (2, 1):
        lines += ["", markdown_row([f"cfg={cfg}", *(f"ulysses={n}" for n in sizes)]), "|--:|" + "--:|" * len(sizes)]
        for devices in paper.counts():
            if devices < cfg:
                continue
            found = {s.ulysses: s for s in paper.splits(devices, config.num_attention_heads) if s.cfg == cfg}
            cells = [f"{1e3 * paper.step_time(config, size, found[n]).total:.1f}" if n in found else "" for n in sizes]
            lines.append(markdown_row([f"{devices} GPUs", *cells]))
    return lines[1:]


def _crossover() -> list[str]:
    near, far = (paper.hidden_from(paper.H200, far=each) for each in (False, True))
    lines = [
        "**From Ulysses to ring.** Ulysses moves 4 (U - 1) / U^2 of `[B, N, D]` for each rank and block, and nothing "
        "hides it; a ring moves 2 (R - 1) / R, and attention hides it while a ring piece has at least "
        f"{near:,.0f} tokens on NVLink and {far:,.0f} between nodes. With fewer, the ring is bound by its messages. "
        "A ring also merges its parts in fp32. Tokens of a ring piece, if the ring were all of the group:",
        "",
        markdown_row(["", *(f"ring={n}" for n in paper.counts(32))]),
        "|---|" + "--:|" * len(paper.counts(32)),
    ]
    for name in ("cogvideox-5b", "cogvideox1.5-5b"):
        total = 226 + tokens(*paper.model_of(name))
        lines.append(markdown_row([name, *(f"{traffic.sizes(total, n)[0]:,}" for n in paper.counts(32))]))
    lines += ["", "**Which split to take**, cfg x ulysses x ring:", ""]
    lines += [markdown_row(["GPUs", *paper.MODELS]), "|--:|" + "---|" * len(paper.MODELS)]
    lines += [
        markdown_row([str(devices), *(_short(_best(name, devices)[0]) for name in paper.MODELS)])
        for devices in paper.counts()
    ]
    return lines


def measured_table(found: dict[str, Any]) -> list[str]:
    """Return what was measured, as lines of Markdown."""
    lines = [f"`{found['header']['command']}`, {measure.caption(found['header'])}, fp32."]
    for part in ("transformer", "vae"):
        for scaling in ("strong", "weak"):
            rows = [row for row in found["rows"] if (row["part"], row["scaling"]) == (part, scaling)]
            if rows:
                lines += ["", f"**{part}, {scaling} scaling**", "", *_rows(rows)]
    return lines


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    head = ["split", "processes", "wall s", "processor s", "balance", "MB sent", "by the formula"]
    one = next((row for row in rows if row["processes"] == 1), None)
    gained = "speed-up" if rows[0]["scaling"] == "strong" else "rate a process"
    last = ["GFLOP a process", f"{gained}, wall", f"{gained}, processor"]
    lines = [markdown_row([*head, *last]), "|---|" + "--:|" * 9]
    for row in rows:
        cells = [row["split"] if row["part"] == "transformer" else "rows", str(row["processes"])]
        cells += [f"{row['wall']:.2f}", f"{row['cpu']:.2f}", f"{row['balance']:.2f}", f"{row['sent'] / 1e6:.2f}"]
        cells.append("" if row["formula"] is None else f"{row['formula'] / 1e6:.2f}")
        cells.append("" if row["flops"] is None else f"{row['flops'] / 1e9:.1f}")
        work = row["flops"] / one["flops"] if gained != "speed-up" and one and row["flops"] else 1
        cells += [f"{work * one[name] / row[name]:.2f}" if one else "" for name in ("wall", "cpu")]
        lines.append(markdown_row(cells))
    return lines


def write(found: dict[str, Any] | None) -> None:
    """Put the tables between their marks in SCALING.md; what was measured stays if nothing new was."""
    text = put(PAGE.read_text(), "computed", computed())
    PAGE.write_text(text if found is None else put(text, "measured", measured_table(found)))


def put(text: str, name: str, lines: list[str]) -> str:
    """Replace what stands between the marks of a name."""
    begin, end = _BEGIN.format(name), _END.format(name)
    before, rest = text.split(begin, 1)
    _, after = rest.split(end, 1)
    return f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}"
