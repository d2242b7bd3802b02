"""Time cogvid against diffusers, side by side in one run, with the same random weights and inputs.

    python scripts/bench_model.py --device cpu --model all --runs 3    # the table of SPEED.md: all five models
    python scripts/bench_model.py --device cuda --model cogvideox-5b   # full size
    python scripts/bench_model.py --device cpu --size toy              # seconds; keeps this script from rotting

Parts: `import` and `load` (each in fresh processes), `text` (T5 encoder), `step` (one transformer evaluation; on a
GPU with the batch of two that guidance needs), `decode` (VAE). Providers take turns, so that a drift of the
machine's speed affects all alike. A provider with a wrong output is reported and not timed. Without diffusers, ours
is timed alone.

diffusers runs at its best: from_pretrained with its defaults (with accelerate installed it makes no weights before it
maps the file's), PyTorch's own choice of attention, position tables of the video's size; a step also with its fused
Q, K and V, a decode also with convolutions in channels-last layout. Ratios are to the fastest of these.

The floor of a step counts the multiply-adds of its linears and attention, that of a decode those of its
convolutions (2 FLOP each, counted by `torch.utils.flop_counter`). The percentage is of the rate that a large matrix
product reaches in the same run. Memory is what a call adds at its peak; of a load, the anonymous memory that it leaves.
A Markdown table comes at the end, and the last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import measure
import references
from cogvid.config import CONFIGS, TransformerConfig, VAEConfig
from cogvid.models.transformer import Transformer
from cogvid.models.vae import VAE
from cogvid.ops import Ops
from cogvid.weights.load import save_transformer, save_vae
from cogvid.weights.names import map_transformer_state_dict, map_vae_state_dict

# Relative RMS between two correct implementations stays far below these; a wrong one is orders above.
MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
PARTS = ("import", "load", "text", "step", "decode")
ALONE = "import alone"  # the part of rows without a diffusers counterpart
OFFICIAL = {name.removeprefix("cogvideox").lstrip("-"): name for name, model in CONFIGS.items() if model.repo}
CPU, BF16 = torch.device("cpu"), torch.bfloat16

Row = dict[str, Any]
Call = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Step:
    """One transformer evaluation. latents: T, h, w of one video. batch: videos. text_len: tokens."""

    config: TransformerConfig
    latents: tuple[int, int, int]
    batch: int
    text_len: int


@dataclasses.dataclass(frozen=True)
class Size:
    """What is run. steps, loads: by their names in the table. decodes: T, h, w of the latents."""

    steps: dict[str, Step]
    loads: dict[str, TransformerConfig]
    vae: VAEConfig
    decodes: tuple[tuple[int, int, int], ...]
    text: dict[str, int]
    text_load: dict[str, int]
    text_len: int
    step_dtypes: tuple[torch.dtype, ...]
    decode_dtypes: tuple[torch.dtype, ...]


T5_XXL = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24, "vocab_size": 32128}
T5_NARROW = T5_XXL | {"d_model": 256, "num_heads": 4, "d_ff": 640}
T5_TOY = {"d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64, "num_layers": 2, "vocab_size": 300}


def make_size(name: str, models: list[str]) -> Size:
    """Return what a size runs. models: keys of `OFFICIAL`."""
    configs = {model: CONFIGS[OFFICIAL[model]] for model in models}
    vae = configs[models[0]].vae
    both = (torch.float32, BF16)
    if name == "full":
        latents = {model: ((c.num_frames - 1) // 4 + 1, c.height // 8, c.width // 8) for model, c in configs.items()}
        steps = {
            model: Step(c.transformer, _padded(c.transformer, latents[model]), 2, c.transformer.max_text_seq_length)
            for model, c in configs.items()
        }
        loads = {model: c.transformer for model, c in configs.items()}
        sizes = tuple(dict.fromkeys(latents.values()))
        return Size(steps, loads, vae, sizes, T5_XXL, T5_XXL, 226, (BF16,), (BF16,))
    if name == "reduced":
        video = (3, 24, 24)
        steps = {model: _step(c.transformer, video, 226, num_layers=2) for model, c in configs.items()}
        # All layers but narrow; and one model at its full width but with few layers.
        narrow: dict[str, Any] = {"num_attention_heads": 4, "text_embed_dim": 256}
        loads = {model: dataclasses.replace(c.transformer, **narrow) for model, c in configs.items()}
        if "5b" in configs:
            loads["5b at its width"] = dataclasses.replace(configs["5b"].transformer, num_layers=6)
        text = T5_XXL | {"num_layers": 1, "vocab_size": 1000}
        return Size(steps, loads, vae, ((5, 8, 12),), text, T5_NARROW, 226, both, both)
    tiny: dict[str, Any] = {"num_attention_heads": 2, "num_layers": 2, "text_embed_dim": 32, "time_embed_dim": 32}
    tiny["max_text_seq_length"] = 16
    steps = {model: _step(c.transformer, (3, 8, 8), 16, **tiny) for model, c in configs.items()}
    loads = {model: step.config for model, step in steps.items()}
    vae = dataclasses.replace(vae, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
    return Size(steps, loads, vae, ((3, 8, 8),), T5_TOY, T5_TOY, 16, (torch.float32,), (torch.float32,))


def _step(config: TransformerConfig, latents: tuple[int, int, int], text_len: int, **changes: Any) -> Step:
    """Reduce a model; its position table gets the size of the video, else diffusers would make one in every step."""
    frames, height, width = latents
    if config.ofs_embed_dim and "time_embed_dim" in changes:
        changes["ofs_embed_dim"] = changes["time_embed_dim"]
    sample = {"sample_frames": 4 * frames - 3, "sample_height": height, "sample_width": width}
    config = dataclasses.replace(config, **changes, **(sample if config.patch_size_t is None else {}))
    return Step(config, _padded(config, latents), 1, text_len)


def _padded(config: TransformerConfig, latents: tuple[int, int, int]) -> tuple[int, int, int]:
    return latents[0] + latents[0] % (config.patch_size_t or 1), *latents[1:]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="cogvideox-5b", choices=[*OFFICIAL.values(), "all"])
    parser.add_argument(
        "--size",
        choices=["full", "reduced", "toy"],
        help="default: full on cuda, reduced (2 layers, small video) on cpu",
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--runs", type=int, default=5, help="timed turns of each provider")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile(max-autotune) of diffusers")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error(f"runs: got {args.runs}, want at least 1")
    names = [short for short, name in OFFICIAL.items() if args.model in (name, "all")]
    size = make_size(args.size or ("full" if args.device == "cuda" else "reduced"), names)
    device = torch.device(args.device)

    if measure.installed("accelerate") == "absent":
        print(
            "accelerate is absent: diffusers fills each model with random weights before it loads it", file=sys.stderr
        )
    command = " ".join(["python scripts/bench_model.py", *(sys.argv[1:] if argv is None else argv)])
    result: Row = {"header": measure.header(device, command), "rows": []}
    print("\n".join(f"{k}: {v}" for k, v in result["header"].items()))
    columns = ("median s", "p20", "p80", "peak MiB")
    print(f"\n{'part':<52}{'provider':<24}" + "".join(f"{c:>10}" for c in columns) + f"{'ratio':>8}{'floor %':>9}")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    rate = matmul_rate(device) if {"step", "decode"} & set(args.parts) else 0.0
    result["header"]["matmul_tflops"] = rate / 1e12
    runners: dict[str, Callable[[], Iterator[Row]]] = {
        "import": lambda: bench_import(args.runs),
        "load": lambda: bench_load(size, args.runs),
        "text": lambda: bench_text(size, device, args.runs),
        "step": lambda: bench_steps(size, device, rate, args),
        "decode": lambda: bench_decodes(size, device, rate, args),
    }
    start = time.perf_counter()
    for part in args.parts:
        for row in runners[part]():
            result["rows"].append(row)
            print(format_row(row), flush=True)
    result["header"]["minutes"] = round((time.perf_counter() - start) / 60, 1)
    print("\n" + "\n".join(table(result["rows"])) + f"\n\n{caption(result)}\n")
    line = json.dumps(result)
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


def caption(result: Row) -> str:
    values = result["header"]
    alone = [f"`{r['provider']}` {r['median']:.2g} s" for r in result["rows"] if r["part"] == ALONE]
    return f"`{values['command']}` ({values['minutes']} minutes), {measure.caption(values)}." + (
        f" Processes by themselves: {', '.join(alone)}." if alone else ""
    )


def table(rows: list[Row]) -> list[str]:
    """Return the table of SPEED.md: the fastest of diffusers' settings beside each provider of ours."""
    lines = [
        measure.markdown_row(["part", "diffusers s", "cogvid s", "ratio", "diffusers MiB", "cogvid MiB"]),
        "|---|" + "--:|" * 5,
    ]
    timed = [row for row in rows if "median" in row]
    for row in timed:
        if row["part"] == ALONE or not is_ours(row["provider"]):
            continue
        others = [other for other in timed if other["part"] == row["part"] and not is_ours(other["provider"])]
        best = min(others, key=lambda other: other["median"], default=None)
        label = row["part"] + ("" if row["provider"] == "cogvid" else f": {row['provider']}")
        cells = [label, seconds(best), seconds(row), "" if best is None else f"{row['ratio']:.2f}"]
        lines.append(measure.markdown_row([*cells, mebibytes(best), mebibytes(row)]))
    return lines


def is_ours(provider: str) -> bool:
    return provider.startswith("cogvid")


def seconds(row: Row | None) -> str:
    return "" if row is None else f"{row['median']:.3g}"


def mebibytes(row: Row | None) -> str:
    return "" if row is None or row["peak_mib"] is None else f"{row['peak_mib']:.3g}"


def format_row(row: Row) -> str:
    start = f"{row['part']:<52}{row['provider']:<24}"
    if "wrong" in row:
        return f"{start}  wrong, not timed: relative RMS {row['wrong']:.2e}"
    floor = f"{row['floor_percent']:9.1f}" if "floor_percent" in row else ""
    peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    return f"{start}{row['median']:>10.4g}{row['p20']:>10.4g}{row['p80']:>10.4g}{peak:>10}{ratio:>8}{floor}"


def summarise(part: str, times: dict[str, list[float]], peaks: dict[str, float | None]) -> list[Row]:
    """Turn seconds per provider into rows; `ratio` above 1 is faster than the fastest that is not ours."""
    spreads = {name: measure.spread(values) for name, values in times.items()}
    base = min((spreads[name][0] for name in times if not is_ours(name)), default=None)
    return [
        {
            "part": part,
            "provider": name,
            "median": median,
            "p20": low,
            "p80": high,
            "peak_mib": peaks[name],
            "ratio": base and base / median,
        }
        for name, (median, low, high) in spreads.items()
    ]


def bench_calls(part: str, calls: dict[str, Call], device: torch.device, dtype: torch.dtype, runs: int) -> list[Row]:
    """Check every provider against the first, then time them in turns and note the memory that a call adds."""
    wrong: list[Row] = []
    peaks: dict[str, float | None] = {}
    reference = None
    for name in list(calls):
        value, peaks[name] = measure.peak_memory(calls[name], device)
        reference = value.float() if reference is None else reference
        difference = measure.rel_rms(value, reference)
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


def matmul_rate(device: torch.device) -> float:
    """Measure the FLOP/s of a large bf16 matrix product: the practical limit that percentages refer to."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=BF16) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def add_floor(rows: list[Row], call: Call, rate: float) -> list[Row]:
    with FlopCounterMode(display=False) as counter:
        call()
    for row in rows:
        if "median" in row:
            row["tflop"] = counter.get_total_flops() / 1e12
            row["floor_percent"] = 100 * counter.get_total_flops() / rate / row["median"]
    return rows


def our_ops(device: torch.device) -> dict[str, Ops]:
    """Return our providers: torch, and Triton on a GPU or, with TRITON_INTERPRET=1, in its interpreter."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return {"cogvid": Ops.torch()}
    return {"cogvid torch": Ops.torch(), "cogvid triton": Ops.triton()}


def assign(module_type: Any, config: Any, ops: Ops, state: dict[str, Tensor]) -> Any:
    with torch.device("meta"):
        ours = module_type(config, ops)
    ours.load_state_dict(state, strict=True, assign=True)
    return ours.eval()


def bench_steps(size: Size, device: torch.device, rate: float, args: argparse.Namespace) -> Iterator[Row]:
    for model, step in size.steps.items():
        for dtype in size.step_dtypes:
            layers, heads = step.config.num_layers, step.config.num_attention_heads
            label = f"step of {model}, {layers} layers of {heads} heads, {measure.SHORT[dtype]}"
            yield from bench_step(label, step, device, dtype, rate, args)


def bench_step(
    label: str, step: Step, device: torch.device, dtype: torch.dtype, rate: float, args: argparse.Namespace
) -> list[Row]:
    config = step.config
    x = torch.randn(step.batch, config.in_channels, *step.latents, device=device, dtype=dtype)
    text = torch.randn(step.batch, step.text_len, config.text_embed_dim, device=device, dtype=dtype)
    timestep = torch.full((step.batch,), 500, device=device)
    calls: dict[str, Call] = {}
    if references.has_diffusers():
        reference = references.build(lambda: references.diffusers_transformer(config), device, dtype)
        rotary = references.rotary_table(reference, x)
        plain = dict(reference.attn_processors)
        reference.fuse_qkv_projections()
        fused = dict(reference.attn_processors)

        def theirs(processors: dict[str, Any], model: Any = reference) -> Tensor:
            reference.set_attn_processor(dict(processors))
            return references.call_diffusers(model, x, text, timestep, rotary)

        calls = {"diffusers": lambda: theirs(plain), "diffusers fused qkv": lambda: theirs(fused)}
        if args.compile:
            compiled = torch.compile(reference, mode="max-autotune-no-cudagraphs")
            calls["diffusers compiled"] = lambda: theirs(plain, compiled)
        stored = {k: v for k, v in reference.state_dict().items() if ".to_qkv." not in k}
        state = map_transformer_state_dict(stored, config)
    else:
        state = references.build(lambda: Transformer(config), device, dtype).state_dict()
    for name, ops in our_ops(device).items():
        ours = assign(Transformer, config, ops, state)
        calls[name] = lambda ours=ours: ours(x, text, timestep)
    first = next(iter(calls.values()))
    return add_floor(bench_calls(label, calls, device, dtype, args.runs), first, rate)


def bench_decodes(size: Size, device: torch.device, rate: float, args: argparse.Namespace) -> Iterator[Row]:
    for latents in size.decodes:
        for dtype in size.decode_dtypes:
            yield from bench_decode(size.vae, latents, device, dtype, rate, args.runs)


def bench_decode(
    config: VAEConfig, latents: tuple[int, int, int], device: torch.device, dtype: torch.dtype, rate: float, runs: int
) -> list[Row]:
    frames, height, width = latents
    label = f"decode, {4 * frames - 3 * (frames % 2)} frames {8 * height}x{8 * width}, {measure.SHORT[dtype]}"
    z = torch.randn(1, config.latent_channels, *latents, device=device, dtype=dtype)
    calls: dict[str, Call] = {}
    if references.has_diffusers():
        reference: Any = references.build(lambda: references.diffusers_vae(config), device, dtype)
        state = map_vae_state_dict(dict(reference.state_dict()), config)
        channels_last: Any = copy.deepcopy(reference)
        for module in channels_last.modules():
            if isinstance(module, nn.Conv3d):
                cast(Any, module).to(memory_format=torch.channels_last_3d)
        calls["diffusers"] = lambda: reference.decode(z, return_dict=False)[0]
        calls["diffusers channels-last"] = lambda: channels_last.decode(z, return_dict=False)[0]
    else:
        state = references.build(lambda: VAE(config), device, dtype).state_dict()
    for name, ops in our_ops(device).items():
        ours = assign(VAE, config, ops, state)
        calls[name] = lambda ours=ours: ours.decode(z)
    first = next(iter(calls.values()))
    return add_floor(bench_calls(label, calls, device, dtype, runs), first, rate)


def bench_text(size: Size, device: torch.device, runs: int) -> Iterator[Row]:
    from cogvid.models.text import use_ops

    reference = references.build(lambda: references.t5(size.text), device, BF16)
    ids = torch.randint(size.text["vocab_size"], (1, size.text_len), device=device)
    calls: dict[str, Call] = {"transformers": lambda: reference(ids)[0]}
    for name, ops in our_ops(device).items():
        with torch.device("meta"):
            ours: Any = references.t5(size.text)
        ours.load_state_dict(reference.state_dict(), assign=True)
        use_ops(ours.eval(), ops)
        calls[name] = lambda ours=ours: ours(ids)[0]
    label = f"text, {size.text['num_layers']} layers of T5, {size.text_len} tokens, bf16"
    yield from bench_calls(label, calls, device, BF16, runs)


def bench_import(runs: int) -> Iterator[Row]:
    programs = {
        "cogvid": "import cogvid.run.pipeline",
        "cogvid with T5": "import cogvid.run.pipeline; from transformers import T5EncoderModel",
    }
    if references.has_diffusers():  # its pipelines import T5 too
        programs = {"diffusers": "from diffusers import CogVideoXImageToVideoPipeline"} | programs
    alone = {
        "import cogvid": "import cogvid",
        "cogvid --help": "import sys; sys.argv = ['cogvid', '--help']; from cogvid.cli import main; sys.exit(main())",
        "import torch": "import torch",
    }
    times, peaks = run_processes(programs | alone, runs)
    yield from summarise("import of the pipeline", {name: times[name] for name in programs}, peaks)
    yield from ({**row, "ratio": None} for name in alone for row in summarise(ALONE, {name: times[name]}, peaks))


def bench_load(size: Size, runs: int) -> Iterator[Row]:
    """Load checkpoints of zeros in fresh processes; time and memory do not depend on the values."""
    for name, config in size.loads.items():
        label = f"load of {name}, {config.num_layers} layers of {config.num_attention_heads} heads, bf16"
        yield from load_rows(
            label, "transformer", lambda path, c=config: save_transformer(zeros(lambda: Transformer(c)), path), runs
        )
    # As a pipeline loads it: stored in fp32, run in bf16.
    yield from load_rows(
        "load of the VAE, fp32 to bf16",
        "vae",
        lambda path: save_vae(zeros(lambda: VAE(size.vae)), path, torch.float32),
        runs,
    )
    label = f"load of T5, {size.text_load['num_layers']} layers of {size.text_load['num_heads']} heads, bf16"
    yield from load_rows(label, "text_encoder", lambda path: save_t5(size.text_load, path), runs)


def zeros(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        module = make().to(BF16)
    module = module.to_empty(device="cpu")
    for tensor in module.state_dict().values():
        tensor.zero_()
    return module


def save_t5(values: dict[str, int], path: Path) -> None:
    encoder = zeros(lambda: references.t5(values))
    encoder.tie_weights()
    encoder.save_pretrained(path)
    shutil.copytree(measure.ROOT / "cogvid/packs/tiny-i2v/tokenizer", path.parent / "tokenizer")


LOADERS = {  # component -> provider -> what is imported before the clock runs, and what is timed
    "transformer": {
        "diffusers": (
            "import torch; from diffusers import CogVideoXTransformer3DModel as M",
            "M.from_pretrained({path!r}, torch_dtype=torch.bfloat16)",
        ),
        "cogvid": ("import cogvid.weights.load", "cogvid.weights.load.load_transformer({path!r}, dtype='bfloat16')"),
    },
    "vae": {
        "diffusers": (
            "import torch; from diffusers import AutoencoderKLCogVideoX as M",
            "M.from_pretrained({path!r}, torch_dtype=torch.bfloat16)",
        ),
        "cogvid": ("import cogvid.weights.load", "cogvid.weights.load.load_vae({path!r}, dtype='bfloat16')"),
    },
    "text_encoder": {
        "transformers": (
            "import torch; from transformers import T5EncoderModel as M, T5Tokenizer as T",
            "M.from_pretrained({path!r}, dtype=torch.bfloat16), T.from_pretrained({root!r} + '/tokenizer')",
        ),
        "cogvid": (
            "import cogvid.weights.load; from transformers import T5EncoderModel",
            "cogvid.weights.load.load_text_encoder({root!r}, dtype='bfloat16')",
        ),
    },
}
# Prints the seconds of the load alone and the anonymous MiB that it holds afterwards. The garbage of the imports is
# collected before: that takes 0.1 s, and by chance one library's load would trigger it and the other's not.
LOAD_PROGRAM = """
import gc, time
import measure
import references
{setup}
gc.collect()
before, start = measure.status_mib("RssAnon"), time.perf_counter()
model = {load}
seconds = time.perf_counter() - start
print(seconds, "nan" if before is None else measure.status_mib("RssAnon") - before)
"""


def load_rows(label: str, component: str, save: Callable[[Path], None], runs: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / component
        save(path)
        gc.collect()
        programs = {
            provider: LOAD_PROGRAM.format(setup=setup, load=load.format(path=str(path), root=root))
            for provider, (setup, load) in LOADERS[component].items()
            if provider != "diffusers" or references.has_diffusers()
        }
        rows = summarise(label, *run_processes(programs, runs, own_figures=True))
        weights = sum(file.stat().st_size for file in path.glob("*.safetensors")) / measure.MIB
    return [row | {"weights_mib": weights} for row in rows]


def run_processes(
    programs: dict[str, str], runs: int, own_figures: bool = False
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Time Python programs, each in fresh processes, in turns.

    own_figures: they print the seconds to be counted and the MiB; else a process is timed from outside.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    peaks: dict[str, float | None] = dict.fromkeys(programs)
    given = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*([given] if given else []), str(Path(__file__).parent), *measure.PATHS])
    for turn in range(runs if own_figures else runs + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", program],
                env=os.environ | {"PYTHONPATH": path},
                capture_output=True,
                text=True,
                check=False,
            )
            elapsed = time.perf_counter() - start
            if done.returncode:
                raise RuntimeError(f"{name}: exit status {done.returncode}\n{done.stderr[-3000:]}")
            if own_figures:
                elapsed, mib = map(float, done.stdout.split()[-2:])
                peaks[name] = None if math.isnan(mib) else mib
            if turn or own_figures:  # the first turn warms the page cache
                times[name].append(elapsed)
    return times, peaks


if __name__ == "__main__":
    main()
