"""The stages of `gpu_session.py`: what is measured, in this order, and in about how many seconds of 540.

A stage is a function of its recorder, the device and whether to time torch.compile. On a CPU the sizes are toys.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import bench_model
import cogvid
import cogvid.models.vae
import measure
import references
from cogvid.models.transformer import Transformer
from cogvid.models.vae import VAE
from cogvid.ops import Ops
from cogvid_kernels import _tiles
from cogvid_kernels import attention as attention_op
from cogvid_kernels._tiles import Tile
from cogvid_kernels.attention import VARIANTS
from cogvid_kernels.bench import timing
from cogvid_kernels.bench.cases import Case
from cogvid_kernels.bench.providers import FixedOutput, public
from cogvid_kernels.bench.registry import Op, find_providers, make_registry
from cogvid_kernels.bench.timing import MAX_ERROR, Reference, graphed, time_in_turns
from gpu_session import ROOT, Recorder

BF16 = torch.bfloat16
ATTENTION_TILES = [  # BLOCK_M, BLOCK_N, warps, stages
    (128, 64, 8, 3),
    (128, 64, 4, 3),
    (128, 128, 8, 2),
    (128, 128, 8, 3),
    (128, 32, 8, 4),
    (64, 64, 4, 3),
    (64, 128, 4, 3),
]
SPECIALISED_TILES = [(192, 128, 4, 4), (192, 128, 4, 3), (192, 128, 4, 2)]  # of the variants whose warps have roles
PROBES = [("bf16", 193), ("bf16", 272), ("fp16", 640), ("bf16", 4000)]  # dtype, tokens
ROW_TILES = [(1, 4), (1, 8), (2, 4), (2, 8), (4, 4), (4, 8), (32, 4), (64, 4)]  # BLOCK_ROWS, warps
PEERS = ("SDPA FLASH", "SDPA CUDNN", "FlashAttention")  # timed beside our best attention where they are


@dataclasses.dataclass(frozen=True)
class Stage:
    seconds: float
    run: Callable[[Recorder, str, bool], None]


def size_of(device: str) -> str:
    return "full" if device == "cuda" else "toy"


def runs_of(device: str) -> int:
    return 10 if device == "cuda" else 1


def median_ms(call: Callable[[], Any], device: str, runs: int | None = None) -> float:
    times = time_in_turns({"call": call}, torch.device(device), runs or runs_of(device))["call"]
    return sorted(times)[len(times) // 2]


def exact_arithmetic() -> None:
    """TF32 off: fp32 on a GPU must be fp32 where results are compared."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_grad_enabled(False)


@contextlib.contextmanager
def tile_set(operation: str, shape_class: str, arch: int, tile: Tile) -> Iterator[None]:
    """Let the table of block sizes have another entry."""
    entries = _tiles.TILES[operation, shape_class]
    kept = entries[arch]
    entries[arch] = tile
    try:
        yield
    finally:
        entries[arch] = kept


def tile_record(operation: str, shape_class: str, arch: int, tile: Tile) -> dict[str, Any]:
    place = {"operation": operation, "shape_class": shape_class, "arch": arch}
    return {**place, "tile": [dict(tile.blocks), tile.num_warps, tile.num_stages]}


# Limits.


def limits(recorder: Recorder, device: str, compile: bool) -> None:  # noqa: ARG001
    """Versions, clocks, and what a large copy and a large matrix product reach."""
    target = torch.device(device)
    found = recorder.measure("limits", lambda: timing.measure_limits(target, size_of(device)))
    numbers = {name: value for name, value in found.items() if isinstance(value, float) and name != "seconds"}
    # The command is that of the session, which its own process has recorded.
    recorder.measure("header", lambda: {**timing.header(target, numbers, []), "command": None})


def limits_of(recorder: Recorder) -> dict[str, float]:
    """Return the measured limits; infinite where that failed, so that percentages are 0 and nothing else is lost."""
    return {"matmul_tflops": float("inf"), "copy_gbs": float("inf"), **recorder.value("limits", "limits")}


# Kernels that wait for barriers of their own, and so may wait for ever.


def specialised(device: str) -> list[str]:
    """List the attention variants with roles that this device takes."""
    hopper = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    return [name for name, variant in VARIANTS.items() if hopper and variant.schedule == "ws"]


def probe(recorder: Recorder, device: str, compile: bool) -> None:  # noqa: ARG001
    """Run them on short sequences; later stages run only what was right here. This process is killed if it hangs."""
    exact_arithmetic()
    torch.manual_seed(0)

    def check(variant: str, dtype_name: str, tokens: int) -> dict[str, Any]:
        dtype = timing.DTYPES[dtype_name]
        q, k, v = torch.randn(2, tokens, 3, 3, 64, device=device, dtype=dtype).unbind(2)
        q, k = q.clone(), k.clone()
        k[1] = k[1, :1] + 0.1 * k[1]
        q[1, tokens // 2] = -20 * k[1, 0]  # leaves the range of the bound, so its tile is computed again
        with measure.poisoned_memory():
            out: Any = attention_op(q, k, v, variant=variant)
        return {"error": allowed(measure.rel_rms(out, timing.exact_attention(q, k, v)), 1.5e-2)}

    names = specialised(device)
    for name in names:
        for dtype_name, tokens in PROBES:
            recorder.measure(probe_key(name, dtype_name, tokens), functools.partial(check, name, dtype_name, tokens))
    if not names:
        recorder.measure("probe", lambda: {"note": "no kernel of this device has roles"})


def probe_key(variant: str, dtype_name: str, tokens: int) -> str:
    return f"{variant} {dtype_name} {tokens} tokens"


def not_probed(recorder: Recorder, device: str) -> list[str]:
    """List the variants that the probe did not find right, and record each as a failure of this stage."""

    def refuse() -> dict[str, Any]:
        raise RuntimeError("the probe stage did not find it right, so it is not run")

    def was_right(name: str) -> bool:
        return all(recorder.value("probe", probe_key(name, *what)) for what in PROBES)

    wrong = [name for name in specialised(device) if not was_right(name)]
    for name in wrong:
        recorder.measure(name, refuse)
    return wrong


# Compilation.


def attention_jobs(recorder: Recorder, device: str) -> list[tuple[str, tuple[int, int, int, int]]]:
    tiles = ATTENTION_TILES if device == "cuda" else [(32, 32, 4, 1), (16, 32, 4, 1)]
    capability = torch.cuda.get_device_capability()[0] if device == "cuda" else 9
    ordinary = [name for name, v in VARIANTS.items() if v.schedule != "ws" and (capability >= 9 or v.load == "pointer")]
    wrong = not_probed(recorder, device)
    right = [name for name in specialised(device) if name not in wrong]
    return [(n, tile) for n in right for tile in SPECIALISED_TILES] + [(n, tile) for n in ordinary for tile in tiles]


def as_tile(numbers: tuple[int, int, int, int]) -> Tile:
    return Tile({"BLOCK_M": numbers[0], "BLOCK_N": numbers[1]}, numbers[2], numbers[3])


def compile_attention(device: str, variant: str, numbers: tuple[int, int, int, int]) -> dict[str, Any]:
    """Launch once on a short sequence, whose arguments are specialised as those of the long ones are."""
    for tokens in (272, 258):  # a multiple of 16, as 17,776; and none, as 45,106
        q, k, v = torch.randn(2, tokens, 3, 48, 64, device=device, dtype=BF16).unbind(2)
        attention_op(q, k, v, variant=variant, tile=as_tile(numbers))
    if device == "cuda":
        torch.cuda.synchronize()
    return {}


def compilation(recorder: Recorder, device: str, compile: bool) -> None:  # noqa: ARG001
    """Compile what the attention stage times, on all cores at once; Triton keeps the results on disk."""
    if device != "cuda":
        recorder.measure("interpreter", lambda: {"note": "nothing to compile"})
        return
    jobs = attention_jobs(recorder, device)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        futures = {(v, t): pool.submit(compile_attention, device, v, t) for v, t in jobs}
        for (variant, tile), future in futures.items():
            recorder.measure(f"{variant} {tile}", future.result)


# Correctness.


def numerics(recorder: Recorder, device: str, compile: bool) -> None:  # noqa: ARG001
    """Every kernel and variant of ours against `cogvid.ops`, odd sizes in each dtype and official shapes in bf16."""
    exact_arithmetic()
    torch.manual_seed(0)
    target = torch.device(device)
    left_out = {f"ours/{name}" for name in not_probed(recorder, device)}
    sizes = [("toy", "fp32"), ("toy", "fp16"), ("toy", "bf16")] + ([("full", "bf16")] if device == "cuda" else [])
    for size, name in sizes:
        dtype = timing.DTYPES[name]
        for op in make_registry():
            for case in op.cases(size, False, dtype):
                check_case(recorder, op, case, name, target, left_out)
    recorder.measure("beyond 2**31 elements under compute-sanitizer", functools.partial(sanitize, device))


def check_case(
    recorder: Recorder, op: Op, case: Case, dtype_name: str, device: torch.device, left_out: set[str]
) -> None:
    dtype = timing.DTYPES[dtype_name]

    @functools.cache
    def prepared() -> tuple[Any, Reference]:
        inputs = case.inputs(device, dtype)
        return inputs, Reference(op, inputs)

    def check(build: Callable[..., Any]) -> dict[str, Any]:
        inputs, reference = prepared()
        run, post = build(inputs)
        try:
            with measure.poisoned_memory():
                result = run()
        except ValueError as refusal:  # what a variant cannot take, it says
            return {"note": f"refused: {refusal}"}
        error = reference.error(post(result))
        if not error <= MAX_ERROR[dtype]:
            raise ArithmeticError(f"error: got {error:.2e}, want at most {MAX_ERROR[dtype]:.1e}")
        return {"error": error}

    for name, build in find_providers(op, compiled=False).items():
        if name.startswith("ours") and name not in left_out:
            recorder.measure(f"{op.name} {case.label} {dtype_name} {name}", functools.partial(check, build))
    prepared.cache_clear()
    timing.free(device)


OVERFLOW = """
import sys, torch
from cogvid_kernels import spatial_norm_silu
device, channels, height, width = sys.argv[1], *map(int, sys.argv[2:])
x = torch.zeros(1, channels, 9, height, width, device=device, dtype=torch.bfloat16)
x = x.to(memory_format=torch.channels_last_3d)
latent = torch.zeros(1, channels, 3, height // 8, width // 8, device=device, dtype=torch.bfloat16)
affine = torch.ones(channels, device=device, dtype=torch.bfloat16)
y = spatial_norm_silu(x, affine, affine, latent + 1, latent, num_groups=4, eps=1e-6)
print(float(y.float().sub_(torch.nn.functional.silu(torch.ones(()))).abs().max()) < 0.01)
"""


def sanitize(device: str) -> dict[str, Any]:
    """Run the group norm of the largest stage of an 81-frame video under the memory checker."""
    sanitizer = shutil.which("compute-sanitizer") if device == "cuda" else None
    checker = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9"] if sanitizer else []
    shape = ("256", "768", "1360") if device == "cuda" else ("8", "16", "24")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*checker, sys.executable, "-c", OVERFLOW, device, *shape]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode or "True" not in done.stdout:
        raise RuntimeError(f"status {done.returncode}: {(done.stdout + done.stderr)[-250:]}")
    return {"note": "no error found" if sanitizer else "right; compute-sanitizer is not here"}


def parity(recorder: Recorder, device: str, compile: bool) -> None:  # noqa: ARG001
    """Whole runs on the kernels against the plain operations, in fp32."""
    exact_arithmetic()
    shape = {} if device == "cuda" else {"height": 32, "width": 32, "num_frames": 9}

    def pack(name: str) -> dict[str, Any]:
        options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", **shape}
        if name == "tiny-i2v":
            options["image"] = cogvid.load_image(ROOT / "scripts" / "demo.png")
        frames = {}
        for ops in ("torch", "triton"):
            pipe = cogvid.load(name, device=device, dtype="float32", ops=ops)
            out = pipe("the red circle moves right", seed=1, progress=False, **options)
            frames[ops] = torch.from_numpy(out.frames)
        return {"error": allowed(measure.rel_rms(frames["triton"], frames["torch"]), 1e-5)}

    def transformer(name: str) -> dict[str, Any]:
        toy = bench_model.make_size("toy", [name]).steps[name]
        torch.manual_seed(0)
        model = Transformer(toy.config).to(device)
        other = Transformer(toy.config, Ops.triton()).to(device)
        other.load_state_dict(model.state_dict())
        x, text, t = step_inputs(toy, device, torch.float32)
        return {"error": allowed(measure.rel_rms(other(x, text, t), model(x, text, t)), 1e-5)}

    def offloaded(mode: str) -> dict[str, Any]:
        frames = []
        for offload in (None, mode):
            pipe = cogvid.load("tiny-t2v", device=device, dtype="float32", ops="torch", offload=offload)
            options = {"num_inference_steps": 2, "output_type": "pt", "progress": False, **shape}
            frames.append(pipe("the red circle moves right", seed=1, **options).frames)
        return {"error": allowed(measure.rel_rms(frames[1], frames[0]), 1e-6)}

    for name in ("tiny-i2v", "tiny-t2v"):
        recorder.measure(f"{name}, 2 steps", functools.partial(pack, name))
    for mode in ("model", "block"):
        recorder.measure(f"tiny-t2v, offload {mode}", functools.partial(offloaded, mode))
    for name in bench_model.OFFICIAL:
        recorder.measure(f"{name}, reduced, one step", functools.partial(transformer, name))


def allowed(error: float, most: float) -> float:
    if not error <= most:
        raise ArithmeticError(f"error: got {error:.2e}, want at most {most:.1e}")
    return error


# Speed.


def attention(recorder: Recorder, device: str, compile: bool) -> None:
    """Every variant and tile at 17,776 tokens; the best three, PyTorch's and others' there and at 45,106."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    target, bound = torch.device(device), limits_of(recorder)
    op = next(op for op in make_registry() if op.name == "attention")
    cases = [case for case in op.cases(size_of(device), False, BF16) if not case.label.startswith("2B")]

    @functools.cache
    def prepared(case: Case) -> tuple[Any, Reference]:
        inputs = case.inputs(target, BF16)
        return inputs, Reference(op, inputs)

    def candidate(case: Case, variant: str, numbers: tuple[int, int, int, int]) -> dict[str, Any]:
        inputs, reference = prepared(case)
        tile = as_tile(numbers)
        call = functools.partial(op.ours, **public(inputs), variant=variant, tile=tile)
        error = allowed(reference.error(call()), MAX_ERROR[BF16])
        milliseconds = median_ms(call, device, 5 if device == "cuda" else 1)
        arch = _tiles.architecture(inputs["q"])
        return {
            **tile_record("attention", f"{VARIANTS[variant].tile_class}/16x64", arch, tile),
            "variant": variant, "error": error, "median_ms": milliseconds, "tflops": 1e-9 * case.flop / milliseconds,
        }  # fmt: skip

    found = []
    for variant, numbers in attention_jobs(recorder, device):
        run = functools.partial(candidate, cases[0], variant, numbers)
        found.append(recorder.measure(f"{cases[0].label} {variant} {numbers}", run))
    best = sorted((line for line in found if line["state"] == "done"), key=lambda line: line["median_ms"])
    variants: dict[str, Any] = {}
    for line in best:  # the fastest tile of each of the three fastest variants
        if line["variant"] not in variants and len(variants) < 3:
            blocks, warps, stages = line["tile"]
            variants[line["variant"]] = {"variant": line["variant"], "tile": Tile(blocks, warps, stages)}
    providers = {name: build for name, build in op.providers.items() if name.startswith(PEERS)}
    finalists = dataclasses.replace(op, providers=providers, variants=variants)
    for case in cases:
        run = functools.partial(bench, finalists, case, target, bound, compile)
        recorder.measure(f"{case.label}, in turns", run)
    prepared.cache_clear()


def bench(op: Op, case: Case, device: torch.device, bound: dict[str, float], compile: bool) -> dict[str, Any]:
    """Time all providers of an op in turns; the plain op and torch.compile are among them."""
    rows = timing.bench_case(op, case, device, BF16, bound, runs=runs_of(device.type), compiled=compile)
    timing.free(device)
    return {"rows": rows}


def memory_bound(recorder: Recorder, device: str, compile: bool) -> None:
    """The other kernels at official shapes in turns with everybody's, then the tiles of the row kernels."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    target, bound = torch.device(device), limits_of(recorder)
    registry = {op.name: op for op in make_registry() if op.name not in ("attention", "norm_rope_attention")}
    for op in registry.values():
        for case in op.cases(size_of(device), False, BF16):
            recorder.measure(f"{op.name} {case.label}", functools.partial(bench, op, case, target, bound, compile))

    def candidate(op: Op, case: Case, shape_class: str, rows: int, warps: int) -> dict[str, Any]:
        inputs = case.inputs(target, BF16)
        reference = Reference(op, inputs)
        arch = _tiles.architecture(next(v for v in inputs.values() if isinstance(v, Tensor)))
        tile = Tile({"BLOCK_ROWS": rows}, warps)
        with tile_set("rows", shape_class, arch, tile):
            call = functools.partial(op.ours, **public(inputs))
            error = allowed(reference.error(call()), MAX_ERROR[BF16])
            milliseconds = median_ms(call, device)
        return {**tile_record("rows", shape_class, arch, tile), "error": error, "median_ms": milliseconds}

    for name, shape_class in (("gate_residual_norm_modulate", "4096"), ("qk_norm_rope", "128")):
        cases = registry[name].cases(size_of(device), False, BF16)
        case = next((case for case in cases if case.label.startswith("5B")), cases[0])
        for rows, warps in ROW_TILES if device == "cuda" else ROW_TILES[:1]:
            run = functools.partial(candidate, registry[name], case, shape_class, rows, warps)
            recorder.measure(f"{name} {case.label} rows {rows}, warps {warps}", run)


def step_inputs(step: bench_model.Step, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Make random latents and text, and the timestep."""
    x = torch.randn(step.batch, step.config.in_channels, *step.latents, device=device, dtype=dtype)
    text = torch.randn(step.batch, step.text_len, step.config.text_embed_dim, device=device, dtype=dtype)
    return x, text, torch.full((step.batch,), 500, device=device)


def step(recorder: Recorder, device: str, compile: bool) -> None:
    """One evaluation of the 5B transformer with the batch of two of guidance, at 49 frames of 480x720."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    evaluation, target = bench_model.make_size(size_of(device), ["5b"]).steps["5b"], torch.device(device)
    dtype, config = BF16 if device == "cuda" else torch.float32, evaluation.config
    x, text, t = step_inputs(evaluation, device, dtype)

    @functools.cache
    def models() -> dict[str, Transformer]:
        plain: Any = references.build(lambda: Transformer(config), target, dtype)
        kernels = bench_model.assign(Transformer, config, Ops.triton(), plain.state_dict())
        return {"torch": plain, "triton": kernels}

    def adaln_outside() -> Transformer:
        """The timestep's part of every block computed once, as it could be for all steps before the loop."""
        model = bench_model.assign(Transformer, config, Ops.triton(), models()["torch"].state_dict())
        temb = torch.nn.functional.silu(model.time_embed(t, dtype))
        for block in model.blocks:
            block.modulation1 = FixedOutput(block.modulation1(temb))
            block.modulation2 = FixedOutput(block.modulation2(temb))
        return model

    def time_one(make: Callable[[], Callable[[], Tensor]]) -> dict[str, Any]:
        call = make()
        want = models()["torch"](x, text, t)
        error = allowed(measure.rel_rms(call(), want), bench_model.MAX_DIFFERENCE[dtype])
        milliseconds = median_ms(call, device, 5 if device == "cuda" else 1)
        return {"error": error, "median_ms": milliseconds, "tflops": 1e-9 * work() / milliseconds}

    @functools.cache
    def work() -> int:
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            Transformer(config)(*(tensor.to("meta").to(torch.float32) for tensor in (x, text)), t.to("meta"))
        return counter.get_total_flops()

    def compiled() -> Callable[[], Tensor]:
        if not compile:
            raise RuntimeError("needs --compile")
        function = torch.compile(models()["torch"], mode="max-autotune-no-cudagraphs")
        return lambda: function(x, text, t)

    def diffusers() -> Callable[[], Tensor]:
        model: Any = references.build(lambda: references.diffusers_transformer(config), target, dtype)
        state = bench_model.map_transformer_state_dict(dict(model.state_dict()), config)
        models()["torch"].load_state_dict(state)  # the same weights on both sides
        rope = references.rotary_table(model, x)
        return lambda: references.call_diffusers(model, x, text, t, rope)

    for name, make in {
        "cogvid triton": lambda: lambda: models()["triton"](x, text, t),
        "cogvid torch": lambda: lambda: models()["torch"](x, text, t),
        "cogvid triton, CUDA graph": lambda: graphed(lambda: models()["triton"](x, text, t)),
        "cogvid triton, adaLN computed before": lambda: functools.partial(adaln_outside(), x, text, t),
        "diffusers": diffusers,
        "torch.compile": compiled,
    }.items():
        recorder.measure(f"5B step, {name}", functools.partial(time_one, make))


def vae(recorder: Recorder, device: str, compile: bool) -> None:  # noqa: ARG001
    """Decode 49 frames of 480x720, with several sizes of the pieces that a convolution takes at a time."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    size, target = bench_model.make_size(size_of(device), ["5b"]), torch.device(device)
    dtype = BF16 if device == "cuda" else torch.float32
    z = torch.randn(1, size.vae.latent_channels, *size.decodes[0], device=device, dtype=dtype)

    @functools.cache
    def models() -> dict[str, VAE]:
        plain: Any = references.build(lambda: VAE(size.vae), target, dtype)
        return {"torch": plain, "triton": bench_model.assign(VAE, size.vae, Ops.triton(), plain.state_dict())}

    def decode(name: str, elements: int, graph: bool = False) -> dict[str, Any]:
        kept = cogvid.models.vae.CONV_ELEMENTS[device]
        cogvid.models.vae.CONV_ELEMENTS[device] = elements
        try:
            call: Callable[[], Tensor] = functools.partial(models()[name].decode, z)
            call = graphed(call) if graph else call
            want = models()["torch"].decode(z)
            error = allowed(measure.rel_rms(call(), want), bench_model.MAX_DIFFERENCE[dtype])
            timing.free(target)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            milliseconds = median_ms(call, device, 3 if device == "cuda" else 1)
            peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
            return {"error": error, "median_ms": milliseconds, "peak_gib": peak}
        finally:
            cogvid.models.vae.CONV_ELEMENTS[device] = kept

    def diffusers() -> dict[str, Any]:
        model: Any = references.build(lambda: references.diffusers_vae(size.vae), target, dtype)
        models()["torch"].load_state_dict(bench_model.map_vae_state_dict(dict(model.state_dict()), size.vae))
        want = models()["torch"].decode(z)
        error = allowed(measure.rel_rms(model.decode(z, return_dict=False)[0], want), bench_model.MAX_DIFFERENCE[dtype])
        return {"error": error, "median_ms": median_ms(lambda: model.decode(z, return_dict=False)[0], device, 3)}

    powers = (22, 24, 26, 28, 30) if device == "cuda" else (10, 22)
    for power in powers:
        recorder.measure(f"decode, triton, 2**{power} elements", functools.partial(decode, "triton", 2**power))
    recorder.measure("decode, torch, 2**26 elements", functools.partial(decode, "torch", 2**26))
    recorder.measure("decode, triton, 2**26 elements, CUDA graph", functools.partial(decode, "triton", 2**26, True))
    recorder.measure("decode, diffusers", diffusers)


PROFILED = {
    "attention": ("attention", "attention"),
    "norm": ("gate_residual_norm_modulate", "modulate"),
}  # name -> op of the registry, part of the kernel's name


def profile(recorder: Recorder, device: str, compile: bool) -> None:  # noqa: ARG001
    """Hardware counters of one attention and one norm, where ncu is; its reports stay in the output directory."""

    def counters(name: str) -> dict[str, Any]:
        ncu = shutil.which("ncu") if device == "cuda" else None
        if ncu is None:
            return {"note": "ncu is not here"}
        op, kernel = PROFILED[name]
        command = [ncu, "--clock-control", "none", "--set", "full", "--kernel-name", f"regex:{kernel}"]
        command += ["--launch-skip", "1", "--launch-count", "1", sys.executable, __file__, op]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        report = recorder.out / f"ncu-{name}.txt"
        report.write_text(done.stdout + done.stderr)
        if done.returncode:
            raise RuntimeError(f"status {done.returncode}, see {report.name}")
        return {"note": report.name}

    for name in PROFILED:
        recorder.measure(name, functools.partial(counters, name))


def run_op(name: str) -> None:
    """Run the kernel of an op three times at the 5B's shape, for the profiler."""
    op = next(op for op in make_registry() if op.name == name)
    case = next(case for case in op.cases("full", False, BF16) if case.label.startswith("5B"))
    inputs = case.inputs(torch.device("cuda"), BF16)
    for _ in range(3):
        op.ours(**public(inputs))
    torch.cuda.synchronize()


STAGES = {
    "limits": Stage(15, limits),
    "probe": Stage(30, probe),
    "compile": Stage(30, compilation),
    "numerics": Stage(80, numerics),
    "parity": Stage(30, parity),
    "attention": Stage(120, attention),
    "memory": Stage(75, memory_bound),
    "step": Stage(90, step),
    "vae": Stage(60, vae),
    "profile": Stage(40, profile),
}

if __name__ == "__main__":
    run_op(sys.argv[1])
