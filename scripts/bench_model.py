"""Time cogvid against diffusers, side by side in one run, with the same random weights and inputs.

    python scripts/bench_model.py --device cpu                         # reduced sizes of real widths
    python scripts/bench_model.py --device cuda --model cogvideox-5b   # full size
    python scripts/bench_model.py --device cpu --size toy              # seconds; keeps this script from rotting

Parts: `import` and `load` (each in fresh processes), `text` (T5 encoder), `step` (one transformer evaluation; on a
GPU with the batch of two that guidance needs), `decode` (VAE). Providers take turns, so that a machine whose
speed drifts cannot favour one. A provider whose output is wrong is reported and not timed.

The floor of a step counts the multiply-adds of its linears and attention, that of a decode those of its
convolutions (2 FLOP each, counted by `torch.utils.flop_counter`). The percentage is of the rate that a large matrix
product reaches in the same run. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cogvid.config import CONFIGS, TransformerConfig, VAEConfig
from cogvid.ops import Ops
from cogvid.transformer import Transformer
from cogvid.vae import VAE
from cogvid.weights import map_transformer_state_dict, map_vae_state_dict

MIB = 2**20
# Relative RMS between two correct implementations stays far below these; a wrong one is orders above.
MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
PARTS = ("import", "load", "text", "step", "decode")


@dataclasses.dataclass(frozen=True)
class Size:
    """What is run. latents: T, h, w of one video. batch: videos per transformer call. text_len: tokens."""

    transformer: TransformerConfig
    vae: VAEConfig
    text: dict[str, int]
    latents: tuple[int, int, int]
    decode_latents: tuple[int, int, int]
    batch: int
    text_len: int
    step_dtypes: tuple[torch.dtype, ...]
    decode_dtypes: tuple[torch.dtype, ...]


T5_XXL = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24, "vocab_size": 32128}


def make_size(name: str, model: str) -> Size:
    config = CONFIGS[model]
    if name == "full":
        frames, height, width = config.num_frames, config.height, config.width
        latents = ((frames - 1) // 4 + 1, height // 8, width // 8)
        padded = latents[0] + latents[0] % (config.transformer.patch_size_t or 1)
        dtype = (torch.bfloat16,)
        text_len = config.transformer.max_text_seq_length
        return Size(config.transformer, config.vae, T5_XXL, (padded, *latents[1:]), latents, 2, text_len, dtype, dtype)
    if name == "reduced":
        transformer = dataclasses.replace(config.transformer, num_layers=6)
        both = (torch.float32, torch.bfloat16)
        text = T5_XXL | {"num_layers": 1, "vocab_size": 1000}
        return Size(transformer, config.vae, text, (3, 32, 32), (5, 12, 18), 1, 226, (torch.bfloat16,), both)
    transformer = dataclasses.replace(
        config.transformer,
        num_attention_heads=2,
        num_layers=2,
        text_embed_dim=32,
        time_embed_dim=32,
        ofs_embed_dim=32 if config.transformer.ofs_embed_dim else None,
        max_text_seq_length=16,
        sample_frames=9,
        sample_height=8,
        sample_width=8,
    )
    vae = dataclasses.replace(config.vae, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
    text = {"d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64, "num_layers": 2, "vocab_size": 100}
    latents = (4 if transformer.patch_size_t else 3, 8, 8)
    return Size(transformer, vae, text, latents, (3, 8, 8), 1, 16, (torch.float32,), (torch.float32,))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="cogvideox-2b", choices=[n for n, c in CONFIGS.items() if c.repo])
    parser.add_argument(
        "--size",
        choices=["full", "reduced", "toy"],
        help="default: full on cuda, reduced (6 layers, small video) on cpu",
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--runs", type=int, default=5, help="timed turns of each provider")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile(max-autotune) of diffusers")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    args = parser.parse_args(argv)
    size = make_size(args.size or ("full" if args.device == "cuda" else "reduced"), args.model)
    device = torch.device(args.device)

    result: dict[str, Any] = {"header": header(device, args), "rows": []}
    print("\n".join(f"{k}: {v}" for k, v in result["header"].items()))
    columns = ("median s", "p20", "p80", "peak MiB")
    print(f"\n{'part':<22}{'provider':<22}" + "".join(f"{c:>10}" for c in columns) + f"{'ratio':>8}{'floor %':>9}")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    rate = matmul_rate(device, torch.bfloat16) if {"step", "decode"} & set(args.parts) else 0.0
    result["header"]["matmul_tflops"] = rate / 1e12
    runners: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "import": lambda: bench_import(args.runs),
        "load": lambda: bench_load(size, args.runs),
        "text": lambda: bench_text(size, device, args),
        "step": lambda: [row for d in size.step_dtypes for row in bench_step(size, device, d, rate, args)],
        "decode": lambda: [row for d in size.decode_dtypes for row in bench_decode(size, device, d, rate, args)],
    }
    for part in args.parts:
        for row in runners[part]():
            result["rows"].append(row)
            print(format_row(row), flush=True)
    line = json.dumps(result)
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


def header(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Say what a reader needs to judge the figures: machine, versions, commit, command."""
    root = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    values = {
        "command": " ".join(["python scripts/bench_model.py", *(sys.argv[1:] if args is not None else [])]),
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "attention": "scaled_dot_product_attention, backend chosen by PyTorch",
    }
    if device.type == "cuda":
        query = "name,driver_version,clocks.sm,clocks.mem,power.limit"
        smi = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        values["gpu"] = subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip()
        values["triton"] = version("triton")
    return values


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def format_row(row: dict[str, Any]) -> str:
    if "wrong" in row:
        return f"{row['part']:<22}{row['provider']:<22}  wrong, not timed: relative RMS {row['wrong']:.2e}"
    floor = f"{row['floor_percent']:9.1f}" if "floor_percent" in row else ""
    peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
    return (
        f"{row['part']:<22}{row['provider']:<22}{row['median']:>10.4g}{row['p20']:>10.4g}{row['p80']:>10.4g}"
        f"{peak:>10}{row['ratio']:>8.2f}{floor}"
    )


def summarise(part: str, times: dict[str, list[float]], peaks: dict[str, float | None]) -> list[dict[str, Any]]:
    """Turn seconds per provider into rows; `ratio` above 1 is faster than the first provider."""
    base = statistics.median(next(iter(times.values())))
    rows = []
    for name, values in times.items():
        ordered = sorted(values)
        pick = [ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8)]
        median = statistics.median(values)
        rows.append(
            {
                "part": part,
                "provider": name,
                "median": median,
                "p20": pick[0],
                "p80": pick[1],
                "peak_mib": peaks[name],
                "ratio": base / median,
            }
        )
    return rows


def bench_calls(
    part: str, calls: dict[str, Callable[[], Tensor]], device: torch.device, dtype: torch.dtype, runs: int
) -> list[dict[str, Any]]:
    """Check every provider against the first, then time them in turns and note the memory that a call adds."""
    wrong: list[dict[str, Any]] = []
    peaks: dict[str, float | None] = {}
    reference = None
    for name in list(calls):
        value, peaks[name] = with_peak_memory(calls[name], device)
        if reference is None:
            reference = value.float()
            continue
        difference = ((value.float() - reference).square().mean() / reference.square().mean()).sqrt().item()
        if not difference <= MAX_DIFFERENCE[dtype]:
            wrong.append({"part": part, "provider": name, "wrong": difference})
            del calls[name]
    del reference
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return wrong + summarise(part, times, peaks)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_peak_memory(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float | None]:
    """Warm `call` up, then return its value and the MiB that it added at its peak; None where nothing tells."""
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        value = call()
        torch.cuda.synchronize(device)
        return value, (torch.cuda.max_memory_allocated(device) - before) / MIB
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return call(), None
    clear.write_text("5")  # resets the peak resident size, VmHWM (Linux)
    before = status_mib("VmRSS")
    value = call()
    return value, status_mib("VmHWM") - before


def status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product: the practical limit that percentages refer to."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def add_floor(rows: list[dict[str, Any]], call: Callable[[], Tensor], rate: float) -> list[dict[str, Any]]:
    with FlopCounterMode(display=False) as counter:
        call()
    for row in rows:
        if "median" in row:
            row["tflop"] = counter.get_total_flops() / 1e12
            row["floor_percent"] = 100 * counter.get_total_flops() / rate / row["median"]
    return rows


def our_ops(device: torch.device) -> dict[str, Ops]:
    """The providers of ours: Triton on a GPU, or in its interpreter where TRITON_INTERPRET=1 asked for that."""
    ops = {"cogvid torch": Ops.torch()}
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        ops["cogvid triton"] = Ops.triton()
    return ops


def build(make: Callable[[], torch.nn.Module], device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Make a module in its dtype on its device, with random weights that keep activations near unit size."""
    torch.set_default_dtype(dtype)
    try:
        with device:
            module = make().eval()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.02)
    return module


def assign(module_type: Any, config: Any, ops: Ops, state: dict[str, Tensor]) -> Any:
    with torch.device("meta"):
        ours = module_type(config, ops)
    ours.load_state_dict(state, strict=True, assign=True)
    return ours.eval()


def diffusers_transformer(config: TransformerConfig) -> torch.nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    values = config.to_dict()
    values.pop("qk_norm_eps")  # a constant there
    return CogVideoXTransformer3DModel(**values)


def diffusers_vae(config: VAEConfig) -> torch.nn.Module:
    from diffusers import AutoencoderKLCogVideoX

    count = len(config.block_out_channels)
    blocks: dict[str, Any] = {
        f"{way}_block_types": (f"CogVideoX{way.title()}Block3D",) * count for way in ("down", "up")
    }
    return AutoencoderKLCogVideoX(**config.to_dict(), **blocks)


def rotary_table(config: TransformerConfig, latents: tuple[int, int, int], device: torch.device) -> Any:
    """The table that diffusers' pipelines hand to their transformer, which ours makes inside."""
    if not config.use_rotary_positional_embeddings:
        return None
    from diffusers import CogVideoXPipeline

    transformer = type("Transformer", (), {"config": type("Config", (), config.to_dict())})
    pipe: Any = type("Pipeline", (), {"vae_scale_factor_spatial": 8, "transformer": transformer})
    frames, height, width = latents
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, height * 8, width * 8, frames, device)


def bench_step(
    size: Size, device: torch.device, dtype: torch.dtype, rate: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    config = size.transformer
    reference = build(lambda: diffusers_transformer(config), device, dtype)
    x = torch.randn(size.batch, config.in_channels, *size.latents, device=device, dtype=dtype)
    text = torch.randn(size.batch, size.text_len, config.text_embed_dim, device=device, dtype=dtype)
    timestep = torch.full((size.batch,), 500, device=device)
    theirs: dict[str, Any] = {
        "hidden_states": x.transpose(1, 2),
        "encoder_hidden_states": text,
        "timestep": timestep,
        "image_rotary_emb": rotary_table(config, size.latents, device),
        "ofs": torch.full((1,), 2.0, device=device, dtype=dtype) if config.ofs_embed_dim else None,
        "return_dict": False,
    }
    calls: dict[str, Callable[[], Tensor]] = {"diffusers": lambda: reference(**theirs)[0].transpose(1, 2)}
    if args.compile:
        compiled = torch.compile(reference, mode="max-autotune-no-cudagraphs")
        calls["diffusers compiled"] = lambda: compiled(**theirs)[0].transpose(1, 2)
    state = map_transformer_state_dict(dict(reference.state_dict()), config)
    for name, ops in our_ops(device).items():
        ours = assign(Transformer, config, ops, state)
        calls[name] = lambda ours=ours: ours(x, text, timestep)
    first = calls["diffusers"]
    rows = bench_calls(f"step {short(dtype)}", calls, device, dtype, args.runs)
    return add_floor(rows, first, rate)


def bench_decode(
    size: Size, device: torch.device, dtype: torch.dtype, rate: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    reference: Any = build(lambda: diffusers_vae(size.vae), device, dtype)
    z = torch.randn(1, size.vae.latent_channels, *size.decode_latents, device=device, dtype=dtype)
    calls: dict[str, Callable[[], Tensor]] = {"diffusers": lambda: reference.decode(z, return_dict=False)[0]}
    state = map_vae_state_dict(dict(reference.state_dict()), size.vae)
    for name, ops in our_ops(device).items():
        ours = assign(VAE, size.vae, ops, state)
        calls[name] = lambda ours=ours: ours.decode(z)
    first = calls["diffusers"]
    rows = bench_calls(f"decode {short(dtype)}", calls, device, dtype, args.runs)
    return add_floor(rows, first, rate)


def bench_text(size: Size, device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    from transformers import T5Config, T5EncoderModel

    from cogvid.text import use_ops

    dtype = torch.bfloat16
    values: dict[str, Any] = {**size.text, "feed_forward_proj": "gated-gelu"}
    reference: Any = build(lambda: T5EncoderModel(T5Config(**values)), device, dtype)
    ids = torch.randint(size.text["vocab_size"], (1, size.text_len), device=device)
    calls: dict[str, Callable[[], Tensor]] = {"transformers": lambda: reference(ids)[0]}
    for name, ops in our_ops(device).items():
        with torch.device("meta"):
            ours: Any = T5EncoderModel(T5Config(**values))
        ours.load_state_dict(reference.state_dict(), assign=True)
        use_ops(ours.eval(), ops)
        calls[name] = lambda ours=ours: ours(ids)[0]
    return bench_calls(f"text {short(dtype)}", calls, device, dtype, args.runs)


def bench_import(runs: int) -> list[dict[str, Any]]:
    programs = {
        "diffusers pipeline": "from diffusers import CogVideoXImageToVideoPipeline",
        "torch": "import torch",
        "cogvid": "import cogvid",
        "cogvid pipeline": "import cogvid.pipeline",
        "cogvid and T5": "import cogvid.pipeline; from transformers import T5EncoderModel",
        "cogvid --help": "import sys; sys.argv = ['cogvid', '--help']; from cogvid.cli import main; sys.exit(main())",
    }
    return bench_processes("import", programs, runs)


def bench_load(size: Size, runs: int) -> list[dict[str, Any]]:
    """Load one bf16 transformer checkpoint; the peak is of anonymous memory, over what the imports took."""
    with tempfile.TemporaryDirectory() as directory:
        model: Any = build(lambda: diffusers_transformer(size.transformer), torch.device("cpu"), torch.bfloat16)
        model.save_pretrained(directory)
        size_mib = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
        del model
        programs = {
            "diffusers": "import torch; from diffusers import CogVideoXTransformer3DModel as M\n"
            f"load = lambda: M.from_pretrained({directory!r}, torch_dtype=torch.bfloat16)",
            "cogvid": f"import cogvid\nimport cogvid.weights\nload = lambda: cogvid.load_transformer({directory!r})",
        }
        rows = bench_processes(
            "load", {name: LOAD_PROGRAM.format(setup=setup) for name, setup in programs.items()}, runs
        )
    for row in rows:
        row["weights_mib"] = size_mib
    return rows


# Prints the seconds of the load alone and the anonymous MiB that it holds afterwards.
LOAD_PROGRAM = """
import time
{setup}
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
before, start = anonymous(), time.perf_counter()
model = load()
print(time.perf_counter() - start, anonymous() - before)
"""


def bench_processes(part: str, programs: dict[str, str], runs: int) -> list[dict[str, Any]]:
    """Time Python programs, each in fresh processes, in turns; a program may print its own seconds and MiB."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    peaks: dict[str, float | None] = dict.fromkeys(programs)
    for turn in range(runs + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - start
            if part == "load":
                seconds, peaks[name] = map(float, done.stdout.split()[-2:])
            if turn:  # the first warms the page cache
                times[name].append(seconds)
    return summarise(part, times, peaks)


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


if __name__ == "__main__":
    main()
