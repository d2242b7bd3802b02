"""Time every kernel against every other implementation on this machine, once it is shown to be correct.

    python scripts/bench_kernels.py                                  # CUDA: real shapes, bf16
    python scripts/bench_kernels.py --ops attention --sweep          # attention over a range of lengths
    python scripts/bench_kernels.py --json kernels.json --plot kernels.png
    python scripts/bench_kernels.py --overhead                       # of a registered operator over its function
    TRITON_INTERPRET=1 python scripts/bench_kernels.py --device cpu  # toy sizes in Triton's interpreter; proves nothing

A provider is checked against `cogvid.ops` in fp32 (attention: fp64 on some rows); a wrong one is reported and not
timed, one that cannot run is listed with its reason. The others take turns, each with a cold L2 cache.

Percentages are of the limit measured in the same run (a large copy, a large bf16 matrix product) and of the chip's
data sheet. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import measure
from cogvid import ops
from kernel_registry import Case, Inputs, Op, find_providers, make_registry, without_untried

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Relative RMS against the reference. Several roundings in a row stay below; a wrong index or a lost row is far above.
MAX_ERROR = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-5}
MAX_ERROR_QUANTISED = 0.1  # of the providers that say that they round to 8 bits
# Dense bf16 TFLOP/s and TB/s of the data sheets (SXM where there is a choice).
DATA_SHEET = {"H200": (989.0, 4.8), "H100": (989.0, 3.35), "A100": (312.0, 2.04), "4090": (165.2, 1.008)}


def main(argv: list[str] | None = None) -> None:
    registry = {op.name: op for op in make_registry()}
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nWhat is counted as work:\n{formulas(registry)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ops", nargs="+", default=list(registry), choices=list(registry), metavar="OP")
    parser.add_argument("--size", choices=["full", "toy"], help="default: full on cuda, toy on cpu")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--providers", default="", metavar="TEXT", help="only providers whose name contains this")
    parser.add_argument("--sweep", action="store_true", help="also a range of sequence lengths")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile too (about ten minutes more); on unless given on cuda, off on cpu",
    )
    parser.add_argument("--runs", type=int, default=20, help="timed turns of each provider")
    parser.add_argument("--overhead", action="store_true", help="only what calling through an operator costs the host")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw bars against the limit")
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error(f"--runs: got {args.runs}, want at least 1")
    if args.overhead:
        print(json.dumps(operator_overhead()))
        return
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    if args.compile is None:
        args.compile = device.type == "cuda"
    size = args.size or ("full" if device.type == "cuda" else "toy")

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    limits = measure_limits(device, size)
    values = header(device, limits)
    print("\n".join(f"{name}: {value}" for name, value in values.items()))
    rows: list[dict[str, Any]] = []
    for name in args.ops:
        registry[name] = without_untried(registry[name], args.providers)
        for case in registry[name].cases(size, args.sweep, dtype):
            print(f"\n{name}  {case.label}  {args.dtype}\n{table_head(registry[name].unit)}", flush=True)
            for row in bench_case(registry[name], case, device, dtype, limits, args):
                rows.append(row)
                print(format_row(row), flush=True)
    result = {"header": values, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")
    if args.plot:
        plot(rows, values, args.plot)
    print(json.dumps(result))


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


def formulas(registry: dict[str, Op]) -> str:
    return "\n".join(f"  {op.name:<28}{op.formula} {op.unit}" for op in registry.values())


def bench_case(
    op: Op, case: Case, device: torch.device, dtype: torch.dtype, limits: dict[str, float], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Check every provider, then time the right ones in turns."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # or the shapes of earlier cases make the compiler give up on static ones
    inputs = case.inputs(device, dtype)
    common = {"op": op.name, "case": case.label, "dtype": args.dtype}
    reference = Reference(op, inputs)
    rows: dict[str, dict[str, Any]] = {}
    runners: dict[str, Callable[[], Any]] = {}
    for name, build in find_providers(op, args.compile).items():
        if args.providers not in name:
            continue
        row = rows[name] = {**common, "provider": name}
        try:
            run, post = build(inputs)
            row["error"] = reference.error(post(run()))
        # A provider may fail in any way of its own, which is what a reader wants to see, and must not end the others.
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            row["reason"] = f"{type(error).__name__}: {lines[0]}"[:200]
            free(device)
            continue
        allowed = MAX_ERROR_QUANTISED if "8-bit" in name else MAX_ERROR[dtype]
        if not row["error"] <= allowed:  # NaN is wrong too
            row["reason"] = f"wrong: relative RMS {row['error']:.2e}, allowed {allowed:.1e}"
        else:
            runners[name] = run
        free(device)
    del reference
    for name, times in time_in_turns(runners, device, args.runs).items():
        rows[name] |= summarise(times, op.unit, case.work, limits)
    return list(rows.values())


class Reference:
    """What the op should return: `cogvid.ops` in fp32, or attention in fp64 on rows spread over the sequence."""

    def __init__(self, op: Op, inputs: Inputs) -> None:
        self.rows: Tensor | None = None
        if "attention" in op.name:
            q, k, v = (inputs[n] for n in "qkv")
            if op.name == "norm_rope_attention":
                q, k = ops.qk_norm_rope(**{name: value for name, value in inputs.items() if name != "v"})
            tokens = q.shape[1]
            self.rows = torch.linspace(0, tokens - 1, min(tokens, 48), device=q.device).long()
            self.want: Any = [exact_attention(q[:, self.rows], k, v)]
        else:
            wide = {name: widen(value) for name, value in inputs.items() if not name.startswith("_")}
            self.want = as_list(op.reference(**wide))

    def error(self, got: Any) -> float:
        """Return the largest relative RMS over the op's results."""
        got = as_list(got)
        if self.rows is not None:
            got = [tensor[:, self.rows] for tensor in got]
        if [g.shape for g in got] != [w.shape for w in self.want]:
            raise ValueError(
                f"result: got shapes {[list(g.shape) for g in got]}, want {[list(w.shape) for w in self.want]}"
            )
        return max(measure.rel_rms(g, w) for g, w in zip(got, self.want, strict=True))


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend in fp64, one head at a time to keep the logits small."""
    out = []
    for b in range(q.shape[0]):
        heads = []
        for h in range(q.shape[2]):
            logits = q[b, :, h].double() @ k[b, :, h].double().T * q.shape[-1] ** -0.5
            heads.append(logits.softmax(-1) @ v[b, :, h].double())
        out.append(torch.cat(heads, dim=-1))
    return torch.stack(out)


def as_list(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def widen(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(widen(item) for item in value)
    return value.float() if isinstance(value, Tensor) else value


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def time_in_turns(runners: dict[str, Callable[[], Any]], device: torch.device, runs: int) -> dict[str, list[float]]:
    """Return milliseconds of each run; before each, the L2 cache is overwritten."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    if device.type != "cuda":
        for _ in range(runs):
            for name, run in runners.items():
                start = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - start))
        return times
    cold = torch.empty(2**28, dtype=torch.uint8, device=device)
    for run in runners.values():  # the check was the first run; this one finds everything compiled
        run()
    for _ in range(runs):
        events = {}
        for name, run in runners.items():
            cold.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            events[name] = begin, end
        torch.cuda.synchronize()
        for name, (begin, end) in events.items():
            times[name].append(begin.elapsed_time(end))
    return times


def summarise(times: list[float], unit: str, work: float, limits: dict[str, float]) -> dict[str, Any]:
    median, low, high = measure.spread(times)
    rate = work / median * 1e3 / (1e12 if unit == "flop" else 1e9)
    row = {
        "median_ms": median,
        "p20_ms": low,
        "p80_ms": high,
        "rate": rate,
        "unit": "TFLOP/s" if unit == "flop" else "GB/s",
        "percent_measured": 100 * rate / limits["matmul_tflops" if unit == "flop" else "copy_gbs"],
    }
    sheet = limits.get("sheet_tflops" if unit == "flop" else "sheet_gbs")
    return row | ({"percent_data_sheet": 100 * rate / sheet} if sheet else {})


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


def measure_limits(device: torch.device, size: str) -> dict[str, float]:
    """Measure what a large copy and a large matrix product reach here, and look the chip up."""
    n, elements = (8192, 2**30) if size == "full" else (512, 2**22)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(elements, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    for call in calls.values():
        call()
    times = {name: statistics.median(values) for name, values in time_in_turns(calls, device, 10).items()}
    limits = {"matmul_tflops": 2e-9 * n**3 / times["matmul"], "copy_gbs": 2e-6 * elements / times["copy"]}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for chip, (tflops, terabytes) in DATA_SHEET.items():
            if chip in name:
                limits |= {"sheet_tflops": tflops, "sheet_gbs": 1e3 * terabytes}
    return limits


def header(device: torch.device, limits: dict[str, float]) -> dict[str, Any]:
    """Say what a reader needs to judge the figures."""
    interpreted = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
    command = f"{interpreted}python scripts/bench_kernels.py {' '.join(sys.argv[1:])}".strip()
    values = measure.header(device, command)
    if device.type == "cuda":
        values |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return values | {name: round(value, 3) for name, value in limits.items()}


def plot(rows: list[dict[str, Any]], values: dict[str, Any], path: Path) -> None:
    """Draw one bar a provider: percent of the limit measured in this run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "median_ms" in row]
    figure, axes = pyplot.subplots(figsize=(11, 1.5 + 0.22 * len(timed)), layout="constrained")
    labels = [f"{row['op']} {row['case']}  {row['provider']}" for row in timed]
    colours = ["tab:green" if row["provider"].startswith("ours") else "tab:grey" for row in timed]
    places = range(len(timed))
    axes.barh(places, [row["percent_measured"] for row in timed], color=colours)
    for place, row in zip(places, timed, strict=True):
        axes.text(row["percent_measured"], place, f" {row['rate']:.4g} {row['unit']}", va="center", fontsize=6)
    axes.set_yticks(places, labels, fontsize=6)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlabel("percent of the limit measured in the same run (copy, or bf16 matrix product)")
    axes.set_title(f"{values['machine']}, torch {values['torch']}, commit {values['commit']}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
