"""What the scripts share that set cogvid beside diffusers: the machine, errors, and diffusers' modules and calls.

Importing this module makes the checkout importable, so that the scripts run where cogvid is not installed. diffusers
is imported only by the functions that need it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
PATHS = [str(ROOT), str(ROOT / "kernels")]
sys.path[:0] = PATHS

if TYPE_CHECKING:
    from cogvid.config import SchedulerConfig, TransformerConfig, VAEConfig

SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def installed(name: str) -> str:
    """Return the version of a package, or "absent"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def versions(*names: str) -> str:
    return ", ".join(f"{name} {installed(name)}" for name in names)


def commit() -> str:
    """Return the checkout's commit, with "-dirty" where files were changed; "unknown" without git."""
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown"


def machine(device: torch.device) -> str:
    """Say what the figures were taken on: the GPU with its driver, clocks and power limit, or the CPU."""
    if device.type == "cuda":
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit"
        return _output("nvidia-smi", query, "--format=csv,noheader") or torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no such program
        return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def status_mib(field: str) -> float | None:
    """Return a field of /proc/self/status in MiB: VmRSS, VmHWM, RssAnon; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":")), None)


def reset_peak() -> bool:
    """Let VmHWM, the peak of resident memory, begin anew; return whether that can be done here (Linux).

    What was freed goes back to the system first: kept by the allocator, it would hide what the next call takes.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # another C library
        return False
    return True


def spread(values: list[float]) -> tuple[float, float, float]:
    """Return the median and the 20th and 80th percentiles."""
    ordered = sorted(values)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    return statistics.median(ordered), low, high


def rel_rms(actual: Tensor, expected: Tensor) -> float:
    """Return `rms(actual - expected) / rms(expected)`, computed in fp64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        raise ValueError(f"actual: got shape {tuple(actual.shape)}, want {tuple(expected.shape)}")
    return float((actual - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let fresh tensors hold NaN (or the largest integer): an element left unwritten cannot pass by luck."""

    def poison(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **options: Any) -> Tensor:
            tensor = function(*args, **options)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

        return poisoned

    owners: list[tuple[Any, str]] = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
    owners += [(Tensor, "new_empty"), (Tensor, "new_empty_strided")]
    kept = [getattr(owner, name) for owner, name in owners]
    try:
        for (owner, name), function in zip(owners, kept, strict=True):
            setattr(owner, name, poison(function))
        yield
    finally:
        for (owner, name), function in zip(owners, kept, strict=True):
            setattr(owner, name, function)


def markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Give every parameter random values that keep activations near unit size."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.02)
    return module


def build(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """Make a module in its dtype on its device, with random weights."""
    torch.set_default_dtype(dtype)
    try:
        with device:
            module = make().eval()
    finally:
        torch.set_default_dtype(torch.float32)
    return randomise(module)


def diffusers_transformer(config: TransformerConfig) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    values = config.to_dict()
    values.pop("qk_norm_eps")  # a constant there
    return CogVideoXTransformer3DModel(**values)


def diffusers_vae(config: VAEConfig) -> nn.Module:
    from diffusers import AutoencoderKLCogVideoX

    count = len(config.block_out_channels)
    blocks: dict[str, Any] = {
        f"{way}_block_types": (f"CogVideoX{way.title()}Block3D",) * count for way in ("down", "up")
    }
    return AutoencoderKLCogVideoX(**config.to_dict(), **blocks)


def call_diffusers(
    model: Any, latents: Tensor, text: Tensor, timestep: Tensor, rotary: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Call diffusers' transformer as its pipelines do; latents in and out are ours, `[B, C, T, h, w]`."""
    ofs = latents.new_full((1,), 2.0) if model.config.ofs_embed_dim else None
    (out,) = model(latents.transpose(1, 2), text, timestep, ofs=ofs, image_rotary_emb=rotary, return_dict=False)
    return out.transpose(1, 2)


def rotary_table(model: Any, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """The table that diffusers' pipelines hand to their transformer for `[B, C, T, h, w]`; ours makes it inside."""
    if not model.config.use_rotary_positional_embeddings:
        return None
    from diffusers import CogVideoXPipeline

    pipe: Any = SimpleNamespace(vae_scale_factor_spatial=8, transformer=model)  # all that the method reads
    frames, height, width = latents.shape[2:]
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, height * 8, width * 8, frames, latents.device)


def run_samplers(name: str, config: SchedulerConfig, scheduler: Any, steps: int = 20) -> tuple[Tensor, Tensor]:
    """Run our sampler and diffusers' scheduler on a made-up velocity, a smooth function of the state, from one seed.

    Returns the two final states, `[1, 4, 3, 6, 8]` fp32.
    """
    from cogvid.samplers import sample
    from cogvid.schedule import make_schedule

    x = torch.randn(1, 4, 3, 6, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64).float()
    schedule = make_schedule(config, steps)
    ours = sample(lambda x, *_: x.sin(), x, schedule, sampler=name, generator=torch.Generator().manual_seed(6))

    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(6)
    state, previous = x.transpose(1, 2), None
    for i, t in enumerate(scheduler.timesteps):
        velocity = state.sin()
        if name == "dpm":
            last = scheduler.timesteps[i - 1] if i else None
            state, previous = scheduler.step(velocity, previous, t, last, state, generator=generator, return_dict=False)
        else:
            state = scheduler.step(velocity, t, state, return_dict=False)[0]
    return ours, state.transpose(1, 2)
