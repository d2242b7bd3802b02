"""The check of every provider against the reference, and the clock."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cogvid import ops
from cogvid.run import figures
from cogvid_kernels.bench.cases import Case, Inputs
from cogvid_kernels.bench.providers import Runner, public
from cogvid_kernels.bench.registry import Op, find_providers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Relative RMS against the reference. Several roundings in a row stay below; a wrong index or a lost row is far above.
MAX_ERROR = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-5}
MAX_ERROR_QUANTISED = 0.1  # of the providers that say that they round to 8 bits
# Dense bf16 TFLOP/s and TB/s of the data sheets (SXM where there is a choice).
DATA_SHEET = {"H200": (989.0, 4.8), "H100": (989.0, 3.35), "A100": (312.0, 2.04), "4090": (165.2, 1.008)}


def bench_case(
    op: Op,
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    limits: dict[str, float],
    *,
    runs: int,
    compiled: bool,
    only: str = "",
    own: Mapping[str, Callable[[Inputs], Runner]] | None = None,
    cuda_graph: bool = False,
) -> list[dict[str, Any]]:
    """Check every provider, then time the right ones in turns; return a row for each.

    runs: turns. compiled: torch.compile too. only: providers whose name contains this. own: further providers, which
    always run. cuda_graph: time each as a captured graph.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # or the shapes of earlier cases make the compiler give up on static ones
    inputs = case.inputs(device, dtype)
    short = {value: name for name, value in DTYPES.items()}[dtype]
    common = {"op": op.name, "case": case.label, "dtype": short, "cuda_graph": cuda_graph}
    reference = Reference(op, inputs)
    rows: dict[str, dict[str, Any]] = {}
    runners: dict[str, Callable[[], Any]] = {}
    listed = {name: build for name, build in find_providers(op, compiled).items() if only in name}
    for name, build in {**listed, **(own or {})}.items():
        row = rows[name] = {**common, "provider": name, "own": name in (own or {})}
        try:
            run, post = build(inputs)
            run = graphed(run) if cuda_graph else run
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
    for name, times in time_in_turns(runners, device, runs).items():
        rows[name] |= summarise(times, op.unit, case, limits)
    return list(rows.values())


class Reference:
    """What the op should return: `cogvid.ops` in fp32, or attention in fp64 on rows spread over the sequence."""

    def __init__(self, op: Op, inputs: Inputs) -> None:
        self.rows: Tensor | None = None
        if "attention" in op.name:
            q, k, v = (inputs[n] for n in "qkv")
            if op.name == "norm_rope_attention":
                q, k = ops.qk_norm_rope(**{name: value for name, value in public(inputs).items() if name != "v"})
            tokens = q.shape[1]
            count = min(tokens, max(tokens // 64, 48))  # one at least in each tile of a kernel
            self.rows = torch.linspace(0, tokens - 1, count, device=q.device).long()
            self.want: Any = [exact_attention(q[:, self.rows], k, v)]
        else:
            self.want = as_list(op.reference(**{name: widen(value) for name, value in public(inputs).items()}))

    def error(self, got: Any) -> float:
        """Return the largest relative RMS over the op's results."""
        got = as_list(got)
        if self.rows is not None:
            got = [tensor[:, self.rows] for tensor in got]
        if [g.shape for g in got] != [w.shape for w in self.want]:
            raise ValueError(
                f"result: got shapes {[list(g.shape) for g in got]}, want {[list(w.shape) for w in self.want]}"
            )
        return max(figures.rel_rms(g, w) for g, w in zip(got, self.want, strict=True))


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
    """Give freed GPU memory back, also what an exception's traceback still holds; on a CPU that is little."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """Capture a call in a CUDA graph; the result of the capture is written again by each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


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


def summarise(times: list[float], unit: str, case: Case, limits: dict[str, float]) -> dict[str, Any]:
    median, low, high = figures.spread(times)
    flops, moved = 1e-9 * case.flop / median, 1e-6 * case.bytes / median
    rate = flops if unit == "flop" else moved
    row = {
        "median_ms": median,
        "p20_ms": low,
        "p80_ms": high,
        "rate": rate,
        "unit": "TFLOP/s" if unit == "flop" else "GB/s",
        "tflops": flops,
        "flop_per_byte": case.flop / case.bytes,
        "percent_measured": 100 * rate / limits["matmul_tflops" if unit == "flop" else "copy_gbs"],
    }
    sheet = limits.get("sheet_tflops" if unit == "flop" else "sheet_gbs")
    return row | ({"percent_data_sheet": 100 * rate / sheet} if sheet else {})


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


def header(device: torch.device, limits: dict[str, float], arguments: list[str]) -> dict[str, Any]:
    """Say what a reader needs to judge the figures."""
    interpreted = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
    values = figures.header(device, f"{interpreted}python -m cogvid_kernels.bench {' '.join(arguments)}".strip())
    values["device"] = values["machine"]
    if device.type == "cuda":
        values |= {"device": torch.cuda.get_device_name(device)}  # without clocks, which change
        values |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return values | {name: round(value, 3) for name, value in limits.items()}
