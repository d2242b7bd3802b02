"""Time every kernel against every other implementation on this machine, once it is shown to be correct.

    python scripts/bench_kernels.py                                  # CUDA: real shapes, bf16
    python scripts/bench_kernels.py --ops attention --sweep          # attention over a range of lengths
    python scripts/bench_kernels.py --json kernels.json --plot kernels.png
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
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from cogvid import ops  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Relative RMS against the reference. Several roundings in a row stay below; a wrong index or a lost row is far above.
MAX_ERROR = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-5}
MAX_ERROR_QUANTISED = 0.1  # of the providers that say that they round to 8 bits
# Dense bf16 TFLOP/s and TB/s of the data sheets (SXM where there is a choice).
DATA_SHEET = {"H200": (989.0, 4.8), "H100": (989.0, 3.35), "A100": (312.0, 2.04), "4090": (165.2, 1.008)}
TEXT_LEN = 226
ZQ_CHANNELS = 16

# A call, and what turns its result into what the reference returns (not timed).
Runner = tuple[Callable[[], Any], Callable[[Any], Any]]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One shape of one op. `inputs` makes the arguments of `cogvid.ops`; `work` is FLOP or bytes, by the op's unit."""

    label: str
    work: float
    inputs: Callable[[torch.device, torch.dtype], Inputs]


@dataclass(frozen=True)
class Op:
    """An entry of the registry.

    Attributes:
        unit: "flop" or "byte": what `work` of its cases counts and which limit applies.
        formula: how `work` is counted, for --help.
        cases: from the size's name and whether to sweep.
        providers: besides those of every op: name -> from the inputs to a runner; it may raise, which is reported.
        variants: name -> further arguments of our kernel.
    """

    name: str
    unit: str
    formula: str
    cases: Callable[[str, bool, torch.dtype], list[Case]]
    reference: Callable[..., Any]
    ours: Callable[..., Any]
    providers: dict[str, Callable[[Inputs], Runner]] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)


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
    parser.add_argument("--compile", action="store_true", help="compiled providers on a CPU too (slow to start)")
    parser.add_argument("--runs", type=int, default=20, help="timed turns of each provider")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw bars against the limit")
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error(f"--runs: got {args.runs}, wanted at least 1")
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    size = args.size or ("full" if device.type == "cuda" else "toy")

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    limits = measure_limits(device, size)
    values = header(device, limits)
    print("\n".join(f"{name}: {value}" for name, value in values.items()))
    rows: list[dict[str, Any]] = []
    for name in args.ops:
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


def formulas(registry: dict[str, Op]) -> str:
    return "\n".join(f"  {op.name:<28}{op.formula} {op.unit}" for op in registry.values())


# --- one case -------------------------------------------------------------------------------------------------------


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
    for name, build in find_providers(op, device, args.compile).items():
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
            q, k, v = (inputs[n] for n in "qkv") if "q" in inputs else reference_qkv(inputs)
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
            raise ValueError(f"got shapes {[list(g.shape) for g in got]}, wanted {[list(w.shape) for w in self.want]}")
        return max(relative_rms(g, w) for g, w in zip(got, self.want, strict=True))


def reference_qkv(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    q, k = ops.qk_norm_rope(**{name: v for name, v in inputs.items() if not name.startswith("_")})
    return q, k, inputs["qkv"][:, :, 2]


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


def relative_rms(got: Tensor, want: Tensor) -> float:
    """Return rms(got - want) / rms(want), some rows of the first axes at a time."""
    difference = total = 0.0
    for g, w in zip(got.flatten(0, 1), want.flatten(0, 1), strict=True) if got.ndim == 5 else [(got, want)]:
        difference += (g.double() - w.double()).square().sum().item()
        total += w.double().square().sum().item()
    return (difference / total) ** 0.5


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
    ordered = sorted(times)
    median = statistics.median(times)
    rate = work / median * 1e3 / (1e12 if unit == "flop" else 1e9)
    row = {
        "median_ms": median,
        "p20_ms": ordered[round(0.2 * (len(ordered) - 1))],
        "p80_ms": ordered[round(0.8 * (len(ordered) - 1))],
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


# --- machine --------------------------------------------------------------------------------------------------------


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
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    interpreted = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
    values: dict[str, Any] = {
        "command": f"{interpreted}python scripts/bench_kernels.py {' '.join(sys.argv[1:])}".strip(),
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: installed(name) for name in ("triton", "diffusers", "transformers")},
    }
    if device.type == "cuda":
        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        smi = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        try:
            found = subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:
            found = "no nvidia-smi"
        values |= {"gpu": torch.cuda.get_device_name(device), query: found, "cuda": torch.version.cuda}
        values["cudnn"] = torch.backends.cudnn.version()
    else:
        values["cpu"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return values | {name: round(value, 3) for name, value in limits.items()}


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


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
    axes.set_title(f"{values.get('gpu', values.get('cpu'))}, torch {values['torch']}, commit {values['commit']}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# --- providers ------------------------------------------------------------------------------------------------------


def find_providers(op: Op, device: torch.device, compile_on_cpu: bool) -> dict[str, Callable[[Inputs], Runner]]:
    """List the op's providers: the plain op, the compiler, others' code, ours in every variant."""
    compiled = device.type == "cuda" or compile_on_cpu

    def plain(inputs: Inputs) -> Runner:
        return functools.partial(op.reference, **public(inputs)), same

    def through_compiler(inputs: Inputs) -> Runner:
        if not compiled:
            raise RuntimeError("needs --compile on a CPU")
        function = torch.compile(op.reference, dynamic=False, mode="max-autotune-no-cudagraphs")
        return functools.partial(function, **public(inputs)), same

    def ours(inputs: Inputs, **options: Any) -> Runner:
        return functools.partial(op.ours, **public(inputs), **options), same

    found: dict[str, Callable[[Inputs], Runner]] = {"torch": plain, "torch.compile": through_compiler}
    for name, build in op.providers.items():
        found[name] = build if compiled or "compiled" not in name else through_compiler  # which says why not
    found["ours"] = ours
    for name, options in op.variants.items():
        found[f"ours/{name}"] = functools.partial(ours, **options)
    return found


def public(inputs: Inputs) -> Inputs:
    """Return the inputs that are the op's arguments; the others serve providers that compute more themselves."""
    return {name: value for name, value in inputs.items() if not name.startswith("_")}


def same(value: Any) -> Any:
    return value


class Give(nn.Module):
    """Stands in for a linear whose output is prepared, so that a module is timed without it."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:  # noqa: ARG002
        return self.value


def sdpa(backend: str) -> Callable[[Inputs], Runner]:
    def build(inputs: Inputs) -> Runner:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")

        def run() -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v)

        return run, lambda out: out.transpose(1, 2).flatten(2)

    return build


def flex_attention(inputs: Inputs) -> Runner:
    from torch.nn.attention.flex_attention import flex_attention as flex

    function = torch.compile(flex, dynamic=False)
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    return lambda: function(q, k, v), lambda out: out.transpose(1, 2).flatten(2)


def foreign_attention(module: str, name: str, **options: Any) -> Callable[[Inputs], Runner]:
    """Call a package's function on [B, N, H, hd]; some return the log-sum-exp too."""

    def build(inputs: Inputs) -> Runner:
        function = getattr(importlib.import_module(module), name)
        run = functools.partial(function, inputs["q"], inputs["k"], inputs["v"], **options)
        return run, lambda out: (out[0] if isinstance(out, tuple) else out).flatten(2)

    return build


def diffusers_processor(inputs: Inputs) -> Runner:
    """Run diffusers' processor: norm, rotation and attention, its linears standing still."""
    module, qkv = diffusers_attention(inputs), inputs["qkv"]
    x = qkv.flatten(3)[:, :, 0]
    text, video = x[:, : inputs["text_len"]], x[:, inputs["text_len"] :]
    rope = diffusers_rope(inputs)
    return lambda: module(video, text, image_rotary_emb=rope), lambda out: torch.cat([out[1], out[0]], dim=1)


def diffusers_attention(inputs: Inputs) -> Any:
    from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0

    qkv = inputs["qkv"]
    heads, head_dim = qkv.shape[3:]
    processor: Any = CogVideoXAttnProcessor2_0()  # its own annotation names another class
    with torch.device("meta"):
        module: Any = Attention(
            query_dim=heads * head_dim,
            dim_head=head_dim,
            heads=heads,
            qk_norm="layer_norm",
            eps=inputs["eps"],
            processor=processor,
        )
    module.to_q, module.to_k, module.to_v = (Give(part.flatten(2).contiguous()) for part in qkv.unbind(2))
    module.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
    for norm, name in ((module.norm_q, "q"), (module.norm_k, "k")):
        set_affine(norm, inputs[f"{name}_weight"], inputs[f"{name}_bias"])
    return module


def diffusers_rope(inputs: Inputs) -> Any:
    """Return the table as diffusers has it: each angle twice."""
    if inputs["rope"] is None:
        return None
    cos, sin = (table.repeat_interleave(2, dim=1) for table in inputs["rope"])
    return cos, sin


def diffusers_qk_norm_rope(inputs: Inputs) -> Runner:
    """Run the lines of diffusers' processor between its linears and its attention, by its own modules."""
    from diffusers.models.embeddings import apply_rotary_emb

    module, rope, text_len = diffusers_attention(inputs), diffusers_rope(inputs), inputs["text_len"]
    heads = inputs["qkv"].shape[3]

    def run() -> list[Tensor]:
        out = []
        for linear, norm in ((module.to_q, module.norm_q), (module.to_k, module.norm_k)):
            x = norm(linear(None).unflatten(-1, (heads, -1)).transpose(1, 2))
            if rope is not None:
                x[:, :, text_len:] = apply_rotary_emb(x[:, :, text_len:], rope)
            out.append(x)
        return out

    return run, lambda out: [x.transpose(1, 2) for x in out]


def set_affine(norm: Any, weight: Tensor, bias: Tensor) -> None:
    norm.weight, norm.bias = (nn.Parameter(t.detach(), requires_grad=False) for t in (weight, bias))


def diffusers_layer_norm_zero(inputs: Inputs) -> tuple[Any, Tensor, Tensor]:
    """Return diffusers' adaLN with its linear standing still, and the two gates."""
    from diffusers.models.normalization import CogVideoXLayerNormZero

    with torch.device("meta"):
        module: Any = CogVideoXLayerNormZero(8, inputs["x"].shape[-1], eps=inputs["eps"])
    shift, scale = inputs["shift"], inputs["scale"]
    gate = inputs.get("gate", torch.zeros_like(shift))
    module.linear = Give(torch.cat([t[:, row] for row in (1, 0) for t in (shift, scale, gate)], dim=1))
    module.silu = nn.Identity()
    set_affine(module.norm, inputs["weight"], inputs["bias"])
    return module, gate[:, 1:], gate[:, :1]


def diffusers_layer_norm_modulate(inputs: Inputs) -> Runner:
    module, _, _ = diffusers_layer_norm_zero(inputs)
    text, video = split_streams(inputs["x"], inputs["text_len"])
    return lambda: module(video, text, video), lambda out: torch.cat([out[1], out[0]], dim=1)


def diffusers_gate_residual_norm_modulate(inputs: Inputs) -> Runner:
    module, gate, text_gate = diffusers_layer_norm_zero(inputs)
    (text, video), (text_y, video_y) = (split_streams(inputs[name], inputs["text_len"]) for name in "xy")

    def run() -> tuple[Tensor, ...]:
        new_video, new_text = video + gate * video_y, text + text_gate * text_y
        return new_text, new_video, *module(new_video, new_text, new_video)[:2]

    return run, lambda out: [torch.cat([out[0], out[1]], dim=1), torch.cat([out[3], out[2]], dim=1)]


def split_streams(x: Tensor, text_len: int) -> tuple[Tensor, Tensor]:
    """Return text and video each in its own memory, as diffusers keeps them."""
    return x[:, :text_len].contiguous(), x[:, text_len:].contiguous()


def diffusers_gelu(inputs: Inputs) -> Runner:
    from diffusers.models.activations import GELU

    with torch.device("meta"):
        module: Any = GELU(inputs["x"].shape[-1], inputs["weight"].shape[0], approximate="tanh")
    set_affine(module.proj, inputs["weight"], inputs["bias"])
    return lambda: module(inputs["x"]), same


def transformers_rms_norm(inputs: Inputs) -> Runner:
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    module: Any = T5LayerNorm(inputs["x"].shape[-1], eps=inputs["eps"])
    module.weight = nn.Parameter(inputs["weight"], requires_grad=False)
    return lambda: module(inputs["x"]), same


def native_group_norm(inputs: Inputs) -> Runner:
    """Run what diffusers runs in the encoder: PyTorch's GroupNorm, then SiLU."""
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    return lambda: F.silu(F.group_norm(x, inputs["num_groups"], weight, bias, inputs["eps"])), same


def diffusers_spatial_norm(inputs: Inputs) -> Runner:
    """Run diffusers' spatial norm, which upsamples the latents and convolves them at full size, and SiLU."""
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D

    with torch.device("meta"):
        module: Any = CogVideoXSpatialNorm3D(inputs["x"].shape[1], ZQ_CHANNELS, inputs["num_groups"])
    set_affine(module.norm_layer, inputs["weight"], inputs["bias"])
    for name in ("conv_y", "conv_b"):
        conv = getattr(module, name).conv
        set_affine(conv, inputs[f"_{name}_weight"], inputs[f"_{name}_bias"])
    return lambda: F.silu(module(inputs["x"], inputs["_z"])[0]), same


# --- the registry ---------------------------------------------------------------------------------------------------


def randn(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).mul_(scale)


def affine(width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = randn(width, device=device, dtype=dtype, scale=0.1).add_(1)
    return weight, randn(width, device=device, dtype=dtype, scale=0.1)


def transformer_shapes(size: str, sweep: bool) -> Iterator[tuple[str, int, int, int, int]]:
    """Yield name, batch, tokens, heads and text tokens."""
    if size == "toy":
        yield "toy", 1, 67, 2, 16
        if sweep:
            yield "sweep", 1, 35, 2, 16
        return
    yield "2B", 2, 17776, 30, TEXT_LEN
    yield "5B", 2, 17776, 48, TEXT_LEN
    yield "1.5", 2, 45106, 48, TEXT_LEN
    if sweep:
        for tokens in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
            yield "sweep", 2, tokens, 48, TEXT_LEN


def attention_cases(size: str, sweep: bool, dtype: torch.dtype) -> list[Case]:  # noqa: ARG001
    def inputs(batch: int, tokens: int, heads: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        # LayerNormed q and k with a gain, as a real spread of logits: zeros or tiny values change power and clocks.
        q, k, v = randn(batch, tokens, 3, heads, 64, device=device, dtype=dtype).unbind(2)
        q, k = (F.layer_norm(x, (64,)) * 1.3 for x in (q, k))
        return {"q": q, "k": k, "v": v}

    return [
        Case(
            f"{name} B{batch} H{heads} N{tokens} hd64",
            4.0 * batch * heads * tokens**2 * 64,
            functools.partial(inputs, batch, tokens, heads),
        )
        for name, batch, tokens, heads, _ in transformer_shapes(size, sweep)
    ]


def packed_inputs(
    batch: int, tokens: int, heads: int, text_len: int, rotate: bool, device: torch.device, dtype: torch.dtype
) -> Inputs:
    qkv = randn(batch, tokens, 3, heads, 64, device=device, dtype=dtype)
    # Centred, so that the form without the mean computes the same.
    qkv[:, :, :2] -= qkv[:, :, :2].mean(-1, keepdim=True)
    (q_weight, q_bias), (k_weight, k_bias) = affine(64, device, dtype), affine(64, device, dtype)
    angle = torch.rand(tokens - text_len, 32, device=device) * 6.28
    names = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    rope = (angle.cos(), angle.sin()) if rotate else None
    return {"qkv": qkv, **names, "rope": rope, "text_len": text_len, "eps": 1e-6}


def packed_cases(work: Callable[..., float]) -> Callable[[str, bool, torch.dtype], list[Case]]:
    def cases(size: str, sweep: bool, dtype: torch.dtype) -> list[Case]:
        return [
            Case(
                f"{name} B{batch} H{heads} N{tokens} hd64{' no rope' if name == '2B' else ''}",
                work(batch, tokens, heads, dtype.itemsize),
                functools.partial(packed_inputs, batch, tokens, heads, text_len, name != "2B"),
            )
            for name, batch, tokens, heads, text_len in transformer_shapes(size, sweep)
        ]

    return cases


def token_cases(passes: int, *names: str) -> Callable[[str, bool, torch.dtype], list[Case]]:
    """Build cases of the ops between the linears; `passes` tensors of all tokens are read or written."""

    def inputs(batch: int, tokens: int, width: int, text_len: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        weight, bias = affine(width, device, dtype)
        shift, scale, gate = randn(batch, 2, 3, width, device=device, dtype=dtype).unbind(2)
        made = {
            "x": randn(batch, tokens, width, device=device, dtype=dtype),
            "y": randn(batch, tokens, width, device=device, dtype=dtype),
            "gate": gate, "weight": weight, "bias": bias, "shift": shift, "scale": scale,
            "text_len": text_len, "eps": 1e-5,
        }  # fmt: skip
        return {name: made[name] for name in (*names, "text_len")}

    def cases(size: str, sweep: bool, dtype: torch.dtype) -> list[Case]:
        return [
            Case(
                f"{name} {batch * tokens}x{heads * 64}",
                float(passes) * batch * tokens * heads * 64 * dtype.itemsize,
                functools.partial(inputs, batch, tokens, heads * 64, text_len),
            )
            for name, batch, tokens, heads, text_len in transformer_shapes(size, sweep)
        ]

    return cases


def rms_norm_cases(size: str, sweep: bool, dtype: torch.dtype) -> list[Case]:  # noqa: ARG001
    shapes = [(7, 200), (12, 64)] if size == "toy" else [(226, 4096), (35552, 3072), (90212, 3072), (35552, 1920)]

    def inputs(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        x = randn(rows, width, device=device, dtype=dtype)
        return {"x": x, "weight": affine(width, device, dtype)[0], "eps": 1e-6}

    return [
        Case(f"{rows}x{width}", 2.0 * rows * width * dtype.itemsize, functools.partial(inputs, rows, width))
        for rows, width in shapes
    ]


def linear_gelu_cases(size: str, sweep: bool, dtype: torch.dtype) -> list[Case]:  # noqa: ARG001
    def inputs(batch: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        weight = randn(4 * width, width, device=device, dtype=dtype, scale=width**-0.5)
        bias = affine(4 * width, device, dtype)[1]
        return {"x": randn(batch, tokens, width, device=device, dtype=dtype), "weight": weight, "bias": bias}

    return [
        Case(
            f"{name} {batch * tokens}x{heads * 64}x{heads * 256}",
            2.0 * batch * tokens * heads * 64 * heads * 256,
            functools.partial(inputs, batch, tokens, heads * 64),
        )
        for name, batch, tokens, heads, _ in transformer_shapes(size, sweep)
    ]


def vae_cases(spatial: bool) -> Callable[[str, bool, torch.dtype], list[Case]]:
    """Build the decoder's activations of a first chunk (three latent frames): its widest stage, and its largest."""

    def inputs(
        shape: tuple[int, int, int, int], latent: tuple[int, int, int], device: torch.device, dtype: torch.dtype
    ) -> Inputs:
        channels = shape[0]
        x = torch.randn(1, *shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
        weight, bias = affine(channels, device, dtype)
        made: Inputs = {"x": x, "weight": weight, "bias": bias, "num_groups": min(32, channels // 4), "eps": 1e-6}
        if spatial:
            z = made["_z"] = torch.randn(1, ZQ_CHANNELS, *latent, device=device, dtype=dtype)
            for argument, name in (("scale", "conv_y"), ("shift", "conv_b")):
                kernel = randn(channels, ZQ_CHANNELS, device=device, dtype=dtype, scale=0.25)
                offset = affine(channels, device, dtype)[0]
                made |= {f"_{name}_weight": kernel[..., None, None, None], f"_{name}_bias": offset}
                made[argument] = F.linear(z.movedim(1, -1), kernel, offset).movedim(-1, 1)
        return made

    def cases(size: str, sweep: bool, dtype: torch.dtype) -> list[Case]:  # noqa: ARG001
        shapes = (
            [("toy", (8, 5, 8, 12), (2, 2, 3))]
            if size == "toy"
            else [
                ("49 frames", (512, 3, 60, 90), (3, 60, 90)),
                ("49 frames", (128, 9, 480, 720), (3, 60, 90)),
                ("81 frames", (512, 3, 96, 170), (3, 96, 170)),
                ("81 frames", (256, 9, 768, 1360), (3, 96, 170)),  # passes 2**31 elements
            ]
        )
        return [
            Case(
                f"{name} {'x'.join(map(str, shape))}",
                3.0 * torch.Size(shape).numel() * dtype.itemsize,
                functools.partial(inputs, shape, latent),
            )
            for name, shape, latent in shapes
        ]

    return cases


def make_registry() -> list[Op]:
    import cogvid_kernels
    from cogvid_kernels.attention import VARIANTS as ATTENTION_VARIANTS
    from cogvid_kernels.linear_gelu import VARIANTS as GELU_VARIANTS

    def torch_norm_rope_attention(**inputs: Any) -> Any:
        q, k = ops.qk_norm_rope(**inputs)
        return ops.attention(q, k, inputs["qkv"][:, :, 2])

    def our_norm_rope_attention(bounded: bool = False, **inputs: Any) -> Any:
        q, k, *norms = cogvid_kernels.qk_norm_rope(**inputs, return_key_norms=bounded)
        v = inputs["qkv"][:, :, 2]
        if not bounded:
            return cogvid_kernels.attention(q, k, v)
        loads = "tma" if q.device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 9 else "pointer"
        return cogvid_kernels.attention(q, k, v, variant=f"{loads}_bounded", key_norms=norms[0].amax(1))

    backends = {
        f"SDPA {name}": sdpa(f"{name}_ATTENTION" if name in ("FLASH", "CUDNN", "EFFICIENT") else name)
        for name in ("FLASH", "CUDNN", "EFFICIENT", "MATH")
    }
    norms = ("x", "weight", "bias", "shift", "scale", "eps")
    flops = "4 B H N^2 hd"
    return [
        Op(
            "attention", "flop", flops, attention_cases, ops.attention, cogvid_kernels.attention,
            {
                **backends,
                "FlexAttention compiled": flex_attention,
                "FlashAttention 4": foreign_attention("flash_attn.cute", "flash_attn_func"),
                "FlashAttention 3": foreign_attention("flash_attn_interface", "flash_attn_func"),
                "FlashAttention 2": foreign_attention("flash_attn", "flash_attn_func"),
                "SageAttention 8-bit": foreign_attention("sageattention", "sageattn", tensor_layout="NHD"),
            },
            {name: {"variant": name} for name in ATTENTION_VARIANTS},
        ),
        Op(
            "norm_rope_attention", "flop", flops,
            packed_cases(lambda batch, tokens, heads, _: 4.0 * batch * heads * tokens**2 * 64),
            torch_norm_rope_attention, our_norm_rope_attention, {"diffusers": diffusers_processor},
            {"bounded": {"bounded": True}},
        ),
        Op(
            "qk_norm_rope", "byte", "4 B N H hd elements (q and k read and written)",
            packed_cases(lambda batch, tokens, heads, size: 4.0 * batch * tokens * heads * 64 * size),
            ops.qk_norm_rope, cogvid_kernels.qk_norm_rope, {"diffusers": diffusers_qk_norm_rope},
            {"centred": {"centred": True}},
        ),
        Op(
            "layer_norm_modulate", "byte", "2 B N D elements", token_cases(2, *norms),
            ops.layer_norm_modulate, cogvid_kernels.layer_norm_modulate, {"diffusers": diffusers_layer_norm_modulate},
        ),
        Op(
            "gate_residual", "byte", "3 B N D elements", token_cases(3, "x", "y", "gate"),
            ops.gate_residual, cogvid_kernels.gate_residual,
        ),
        Op(
            "gate_residual_norm_modulate", "byte", "4 B N D elements", token_cases(4, "y", "gate", *norms),
            ops.gate_residual_norm_modulate, cogvid_kernels.gate_residual_norm_modulate,
            {"diffusers": diffusers_gate_residual_norm_modulate},
        ),
        Op(
            "rms_norm", "byte", "2 rows D elements", rms_norm_cases, ops.rms_norm, cogvid_kernels.rms_norm,
            {"transformers": transformers_rms_norm},
        ),
        Op(
            "group_norm_silu", "byte", "3 B C T H W elements (read twice)", vae_cases(spatial=False),
            ops.group_norm_silu, cogvid_kernels.group_norm_silu, {"native group_norm, silu": native_group_norm},
        ),
        Op(
            "spatial_norm_silu", "byte", "3 B C T H W elements (read twice)", vae_cases(spatial=True),
            ops.spatial_norm_silu, cogvid_kernels.spatial_norm_silu, {"diffusers": diffusers_spatial_norm},
        ),
        Op(
            "linear_gelu", "flop", "2 B N D 4D", linear_gelu_cases, ops.linear_gelu, cogvid_kernels.linear_gelu,
            {"diffusers": diffusers_gelu}, {name: {"variant": name} for name in GELU_VARIANTS},
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
