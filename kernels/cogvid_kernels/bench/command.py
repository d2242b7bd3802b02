"""Time every kernel against every other implementation on this machine, once it is shown to be correct.

    python -m cogvid_kernels.bench                                  # CUDA: real shapes, bf16
    python -m cogvid_kernels.bench --ops attention --sweep          # attention over a range of lengths
    python -m cogvid_kernels.bench --ops attention --provider mine:attention --shape tokens=4096 text=226
    python -m cogvid_kernels.bench --ops attention --inputs DIR     # also q, k and v of cogvid generate --capture DIR
    python -m cogvid_kernels.bench --history times.jsonl --baseline times.jsonl --plot-history times.png
    python -m cogvid_kernels.bench --json kernels.json --plot kernels.png --roofline roofline.png
    python -m cogvid_kernels.bench --overhead                       # of a registered operator over its function
    TRITON_INTERPRET=1 python -m cogvid_kernels.bench --device cpu  # toy sizes in Triton's interpreter; proves nothing

A provider is checked against `cogvid.ops` in fp32 (attention: fp64 on some rows); a wrong one is reported and not
timed, one that cannot run is listed with its reason. The others take turns, each with a cold L2 cache.

Percentages are of the limit measured in the same run (a large copy, a large bf16 matrix product) and of the chip's
data sheet. The last line on stdout is one JSON object.

A function of --provider is called as a model calls it: with the arguments of cogvid.ops, and attention with
(q, k, v, context), the context being a cogvid.BlockContext.

Exit status: 0; 1 if a --provider is wrong or cannot run, if something became slower than --baseline allows, or if the
inputs of a shape do not fit, with a line on stderr that says what; 2 for a mistake of the user, with such a line.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import timeit
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from cogvid.run.side_files import check_new_file
from cogvid.weights.files import write_whole
from cogvid_kernels.bench import history, plots
from cogvid_kernels.bench.cases import Case, captured_cases
from cogvid_kernels.bench.own import own_provider
from cogvid_kernels.bench.registry import Op, make_registry, without_untried
from cogvid_kernels.bench.timing import DTYPES, bench_case, header, measure_limits

WRITTEN = ("json", "plot", "roofline", "history", "plot_history")
PLOTS = ("plot", "roofline", "plot_history")


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    registry = {op.name: op for op in make_registry()}
    try:
        args = make_parser(registry).parse_args(arguments)
        check(args)
        if args.overhead:
            print(json.dumps(operator_overhead()))
            return 0
        return run(args, registry, arguments)
    except (ValueError, OSError) as error:
        print(f"bench: error: {' '.join(str(error).split())}"[:1000], file=sys.stderr)
        return 2


def make_parser(registry: dict[str, Op]) -> argparse.ArgumentParser:
    parser = Parser(
        prog="bench",
        description=f"{__doc__}\n{formulas(registry)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--ops", nargs="+", default=list(registry), choices=list(registry), metavar="OP")
    add("--size", choices=["full", "toy"], help="default: full on cuda, toy on cpu")
    add("--dtype", default="bf16", choices=list(DTYPES))
    shape = "a shape instead of those of the models, such as batch=1 tokens=17776 heads=48; may be repeated"
    add("--shape", nargs="+", action="append", metavar="NAME=NUMBER", help=shape)
    add("--inputs", type=Path, metavar="DIR", help="attention also on q, k and v of cogvid generate --capture DIR")
    own = "time a function of yours too, from the working directory or installed; one --ops; may be repeated"
    add("--provider", action="append", default=[], metavar="MODULE:FUNCTION", help=own)
    add("--providers", default="", metavar="TEXT", help="of the others, only those whose name contains this")
    add("--sweep", action="store_true", help="also a range of sequence lengths")
    compile = "torch.compile too (about ten minutes more); on unless given on cuda, off on cpu"
    add("--compile", action=argparse.BooleanOptionalAction, help=compile)
    add("--cuda-graph", action="store_true", help="time each provider as a captured CUDA graph")
    add("--runs", type=int, default=20, help="timed turns of each provider")
    add("--overhead", action="store_true", help="only what calling through an operator costs the host")
    add("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    add("--history", type=Path, metavar="FILE", help="add the figures to this file, as one line")
    baseline = "say what is slower or faster than in this file of --json or --history, on the same device"
    add("--baseline", type=Path, metavar="FILE", help=baseline)
    slowdown = "times as long as in --baseline from which slower is a failure (default: 1.1)"
    add("--max-slowdown", type=float, default=1.1, metavar="X", help=slowdown)
    add("--plot", type=Path, metavar="FILE.png", help="draw bars against the limit")
    add("--roofline", type=Path, metavar="FILE.png", help="draw speed over arithmetic intensity, and the limits")
    add("--plot-history", type=Path, metavar="FILE.png", help="draw the times of --history")
    return parser


def formulas(registry: dict[str, Op]) -> str:
    """Say what is counted as work, and what `--shape` may name."""
    rows = [f"  {op.name:<28}{op.formula}" for op in registry.values()]
    shapes: dict[str, list[str]] = {}
    for op in registry.values():
        numbers = " ".join(f"{name}={number}" for name, number in op.shapes.defaults.items())
        shapes.setdefault(numbers, []).append(op.name)
    given = [f"  {numbers}\n      {', '.join(names)}" for numbers, names in shapes.items()]
    return "\n".join(
        [
            "What is counted as work (of attention and linear_gelu the matrix products alone; elsewhere a FLOP is an",
            "addition, a product, a quotient, a root or an exponential):",
            *rows,
            "What --shape may name, with what is taken for a name that is not given (D is heads x head_dim):",
            *given,
        ]
    )


def check(args: argparse.Namespace) -> None:
    """Raise unless the options go together and the files can be written."""
    if args.runs < 1:
        raise ValueError(f"--runs: got {args.runs}, want at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda where torch finds no GPU, want cpu")
    if args.cuda_graph and args.device != "cuda":
        raise ValueError(f"--cuda-graph: got --device {args.device}, want cuda")
    if args.inputs is not None and args.ops != ["attention"]:
        raise ValueError(f"--inputs: got --ops {' '.join(args.ops)}, want attention alone")
    if args.provider and len(args.ops) != 1:
        raise ValueError(f"--provider: got {len(args.ops)} operations, want one --ops")
    if args.shape and args.sweep:
        raise ValueError("--shape, --sweep: got both, want one of them")
    if not 1 <= args.max_slowdown < float("inf"):
        raise ValueError(f"--max-slowdown: got {args.max_slowdown:g}, want a finite number, 1 or more")
    if args.plot_history is not None and args.history is None:
        raise ValueError("--plot-history: got no --history, want one")
    taken: dict[Path, str] = {}
    for name in WRITTEN:
        path, option = getattr(args, name), "--" + name.replace("_", "-")
        if path is None:
            continue
        check_new_file(option, str(path))
        if path.resolve() in taken:
            raise ValueError(f"{option}: got {path}, which is that of {taken[path.resolve()]}, want another file")
        taken[path.resolve()] = option
        if name in PLOTS:
            plots.check_matplotlib(option)


def run(args: argparse.Namespace, registry: dict[str, Op], arguments: list[str]) -> int:
    """Check and time what was asked for, print and write it; return the exit status."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    compiled = device.type == "cuda" if args.compile is None else args.compile
    size = args.size or ("full" if device.type == "cuda" else "toy")
    before = None if args.baseline is None else history.read("--baseline", args.baseline)
    own = {name: own_provider(registry[args.ops[0]], name) for name in args.provider}
    todo = [(registry[name], case) for name in args.ops for case in cases_of(registry[name], args, size, dtype)]

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    limits = measure_limits(device, size)
    values = header(device, limits, arguments)
    old = None if before is None else history.baseline(before, values["device"])
    if old is not None and not {(op.name, case.label) for op, case in todo} & {each[:2] for each in old}:
        wanted = f"want one of these cases on {values['device']}"
        raise ValueError(f"--baseline: got {args.baseline}, in which nothing of this run was timed, {wanted}")
    print("\n".join(f"{name}: {value}" for name, value in values.items()))
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    options = {"compiled": compiled, "only": args.providers, "runs": args.runs, "cuda_graph": args.cuda_graph}
    tried = {name: without_untried(registry[name], args.providers) for name in args.ops}
    for op, case in todo:
        print(f"\n{op.name}  {case.label}  {args.dtype}\n{table_head(op.unit)}", flush=True)
        try:
            found = bench_case(tried[op.name], case, device, dtype, limits, own=own, **options)
        except (MemoryError, RuntimeError) as error:  # of the inputs or the reference: they do not fit
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            failures.append(f"shape: got {op.name} {case.label} and {reason}, want one whose inputs can be made")
            print(f"  not timed: {reason}", flush=True)
            continue
        rows += found
        print("\n".join(format_row(row) for row in found), flush=True)
    result: dict[str, Any] = {"header": values, "rows": rows}
    failures += [
        f"provider: got {row['provider']} with {row['reason']} ({row['case']}), want a right result"
        for row in rows
        if row["own"] and "reason" in row
    ]
    if old is not None:
        changes = result["changes"] = history.compare(rows, old, args.max_slowdown)
        failures += report_changes(changes, args)
    write(args, result)
    print(json.dumps(result))
    if failures:
        more = f"; {len(failures) - 1} more like it" if len(failures) > 1 else ""
        print(f"bench: error: {failures[0]}{more}", file=sys.stderr)
    return 1 if failures else 0


def cases_of(op: Op, args: argparse.Namespace, size: str, dtype: torch.dtype) -> list[Case]:
    if args.shape:
        cases = [op.shapes.given(words, size, dtype) for words in args.shape]
    else:
        cases = op.cases(size, args.sweep, dtype)
    return cases + (captured_cases(args.inputs, dtype) if args.inputs is not None else [])


def report_changes(changes: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """Print what changed since the baseline, and return what is wrong with that."""
    if not changes:
        return [f"--baseline: got {args.baseline} with other providers or options, want one with those of this run"]
    print(f"\nAgainst {args.baseline}:")
    for change in changes:
        print(history.format_change(change))
    most = f"want at most {args.max_slowdown:g} times as long"
    return [
        f"--baseline: got {each['provider']} {history.format_ratio(each)} ({each['op']} {each['case']}), {most}"
        for each in changes
        if each["regression"]
    ]


def write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the files that were asked for, each whole or not at all."""
    rows, values = result["rows"], result["header"]
    if args.json is not None:
        write_whole(args.json, lambda partial: partial.write_text(json.dumps(result) + "\n"))
    if args.history is not None:
        history.append(args.history, result)
    if args.plot is not None:
        plots.bars(rows, values, args.plot)
    if args.roofline is not None:
        plots.roofline(rows, values, args.roofline)
    if args.plot_history is not None and args.history is not None:
        runs = history.read("--history", args.history)
        plots.over_time(runs, rows, values["device"], args.plot_history)


def operator_overhead(repeats: int = 41, calls: int = 1000) -> dict[str, Any]:
    """Return the median microseconds of a function that allocates one output, called plainly and as an operator."""
    from cogvid_kernels._operators import register

    def _nothing(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ARG001 - the arguments of a small op
        return torch.empty_like(x)

    operator, weight = register(_nothing, _nothing), torch.zeros(8)
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    for label, function, needs_grad in (
        ("function", _nothing, False),
        ("operator", operator, False),
        ("operator with a gradient", operator, True),
    ):
        x = torch.zeros(1, 8, requires_grad=needs_grad)
        times = timeit.repeat(functools.partial(function, x, weight, 1e-6), repeat=repeats, number=calls)
        found[f"{label}, us"] = round(1e6 * statistics.median(times) / calls, 2)
    return found


def table_head(unit: str) -> str:
    rate = "TFLOP/s" if unit == "flop" else "GB/s"
    columns = ("median ms", "p20", "p80", rate, "% measured", "% sheet", "error")
    return f"  {'provider':<34}" + "".join(f"{column:>12}" for column in columns)


def format_row(row: dict[str, Any]) -> str:
    if "reason" in row:
        return f"  {row['provider']:<34}  not timed: {row['reason']}"
    sheet = f"{row['percent_data_sheet']:.1f}" if "percent_data_sheet" in row else "-"
    numbers = [f"{row[key]:.4g}" for key in ("median_ms", "p20_ms", "p80_ms", "rate")]
    numbers += [f"{row['percent_measured']:.1f}", sheet, f"{row['error']:.1e}"]
    return f"  {row['provider']:<34}" + "".join(f"{number:>12}" for number in numbers)
