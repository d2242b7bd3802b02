"""Where and how a model runs: the options of a load, each resolved once, when a model is loaded."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cogvid.config import ModelConfig
from cogvid.models.quantize import check_torchao
from cogvid.ops import Ops
from cogvid.options import check, fill, upstream_defaults
from cogvid.weights.files import DTYPES
from cogvid.weights.load_options import LOAD_OPTIONS
from cogvid.weights.lora_option import Lora
from cogvid.weights.parallel_option import (
    Parallel,
    best_split,
    check_devices,
    check_one_process,
    local_rank,
    world_size,
)


@dataclass(frozen=True)
class Placement:
    """Where and how a model runs, resolved once: the fields of `LoadOptions`, none of them open.

    ops_name: "torch", "triton" or "custom", for the record. lora: the adapters, which a pipeline keeps as they are now.
    parallel: the split over several processes, see `with_split`; None in one process.
    """

    device: torch.device
    dtype: torch.dtype
    ops: Ops
    ops_name: str
    qk_norm: str = "layer"
    compile: bool = False
    lora: tuple[Lora, ...] = ()
    last_norm_eps: str = "diffusers"
    position_tables: str = "diffusers"
    offload: str | None = None
    vae_tiling: bool = False
    quantize: str | None = None
    parallel: Parallel | None = None
    shard_weights: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the options by name, ready for JSON."""
        plain: dict[str, Any] = {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}
        plain |= {"ops": self.ops_name, "lora": [each.to_dict() for each in self.lora]}
        if self.parallel is not None:  # each process has a device of its own
            plain |= {"device": self.device.type, "parallel": str(self.parallel)}
        return {name: plain.get(name, getattr(self, name)) for name in LOAD_OPTIONS}


def resolve_placement(**options: Any) -> Callable[..., Placement]:
    """Check the options of a load, before anything is read or fetched. options: the fields of `LoadOptions`.

    Returns what makes the placement of a model once the name of its recommended dtype is known, and whose code its
    defaults follow: the arguments are `dtype` and `follows` of `ModelConfig`.

    Raises:
        TypeError: an unknown option.
        ValueError, ImportError: an illegal value; what it asks for is not here.
    """
    values = check(LOAD_OPTIONS, fill(LOAD_OPTIONS, options, upstream_defaults(LOAD_OPTIONS, "diffusers")))
    dtype = values.pop("dtype")
    values["device"] = device = resolve_device(values["device"])
    values["ops"], values["ops_name"] = resolve_ops(values["ops"], device)
    if values["shard_weights"]:
        _check_shards(values["quantize"], values["offload"])
    _check_memory(values["quantize"], values["offload"], device)
    values["parallel"] = check_devices(values["parallel"], world_size())
    if values["compile"]:
        check_one_process("compile", True)

    def place(recommended: str, follows: str = "diffusers") -> Placement:
        followed = upstream_defaults(LOAD_OPTIONS, follows)
        followed = {name: value for name, value in followed.items() if options.get(name) is None}
        return Placement(dtype=resolve_dtype(dtype, device, stored=DTYPES[recommended]), **{**values, **followed})

    return place


def with_split(placement: Placement, model: ModelConfig) -> Placement:
    """Return a placement with the split of the processes that are here: that of the option, or else the best one."""
    count, here = world_size(), os.environ.get("LOCAL_WORLD_SIZE", "")
    if placement.parallel is not None or count == 1:
        return placement
    guided, per_node = model.guidance_scale > 1, int(here) if here.isdigit() else None
    split = best_split(count, model.transformer.num_attention_heads, guided=guided, per_node=per_node)
    return dataclasses.replace(placement, parallel=split)


def _check_memory(quantize: str | None, offload: str | None, device: torch.device) -> None:
    """Raise unless the options that save memory can be had, here and together."""
    if quantize is None:
        return
    # torchao's tensors cannot go through a buffer of bytes; and quantised weights have no file to be dropped to.
    if offload == "block" and (device.type == "cpu" or quantize != "fp8-storage"):
        raise ValueError(
            f"quantize: got {quantize!r} with offload='block' on {device.type}, want one of the two, "
            "offload='model', or on CUDA 'fp8-storage'"
        )
    check_torchao(quantize)


def _check_shards(quantize: str | None, offload: str | None) -> None:
    """Raise unless weights can be sharded here and with the other options that save memory."""
    if world_size() == 1:
        raise ValueError("shard_weights: got it for one process, want several, which torchrun starts")
    if offload is not None:
        raise ValueError(f"shard_weights: got it with offload={offload!r}, want one of the two")
    if quantize not in (None, "fp8-storage"):  # fully_shard takes none of torchao's tensors
        raise ValueError(f"shard_weights: got it with quantize={quantize!r}, want 'fp8-storage' or none")


def run_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return what a weight is used in: the run's dtype, but fp32 for T5's `wo` where that is fp16, which overflows."""
    return torch.float32 if dtype == torch.float16 and ".wo." in f".{name}." else dtype


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device, which must be a CPU or a CUDA GPU that is there; None is CUDA where there is a GPU.

    Of several processes each has a GPU of its own, the one with its number on the machine.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {str(device)!r}, want 'cpu', 'cuda' or 'cuda:N'")
    if resolved.type == "cuda" and world_size() > 1:
        if resolved.index not in (None, local_rank()):
            raise ValueError(f"device: got {str(device)!r} on {world_size()} processes, want 'cuda': each has its own")
        resolved = torch.device("cuda", local_rank())
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {str(resolved)!r}, want one of the {torch.cuda.device_count()} CUDA GPUs here")
    return resolved


def resolve_ops(ops: str | Ops, device: str | torch.device) -> tuple[Ops, str]:
    """Turn `ops` ("auto", "torch", "triton" or an `Ops`) into the bundle and the name to record for it.

    "auto" is triton on CUDA and torch elsewhere. An `Ops` that is neither of the two bundles is recorded as "custom".

    Raises:
        ValueError: an unknown name, or a device that the kernels do not run on.
        ImportError: Triton is missing or too old, or the kernels are missing.
    """
    if isinstance(ops, Ops):
        bundle, name = ops, "torch" if ops == Ops.torch() else "custom"
        # Only a process that has the kernels can hold their bundle.
        if "cogvid_kernels" in sys.modules and ops == Ops.triton():
            name = "triton"
    else:
        name = ("triton" if torch.device(device).type == "cuda" else "torch") if ops == "auto" else ops
        if name not in ("torch", "triton"):
            raise ValueError(f"ops: got {ops!r}, want 'auto', 'torch', 'triton' or an Ops")
        bundle = Ops.triton() if name == "triton" else Ops.torch()
    # Triton's own switch, which it reads when the kernels are imported.
    if name == "triton" and torch.device(device).type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("ops: got 'triton' on a CPU, want cuda, or Triton's interpreter (TRITON_INTERPRET=1)")
    return bundle, name


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Return the dtype to run in: `dtype`, or else the stored one, except for dtypes that are very slow on a CPU.

    On a CPU, float16 becomes bfloat16, or float32 if bfloat16 is slow too. If bfloat16 is slow, a model stored in it
    runs in float32; but if the caller asked for bfloat16, to save memory, it is kept. A warning says so each time.
    """
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else stored if dtype is None else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(f"dtype: got {dtype!r}, want one of {', '.join(DTYPES)}")
    if device.type != "cpu" or chosen == torch.float32:
        return chosen
    fast = cpu_has_bfloat16()
    if chosen == torch.float16:
        name = "bfloat16" if fast else "float32"
        warnings.warn(
            f"float16 arithmetic is not run on a CPU: running in {name} instead"
            + ("" if fast else ", which takes twice the memory"),
            stacklevel=2,
        )
        return DTYPES[name]
    if not fast and dtype is None:
        warnings.warn(
            "bfloat16 is slow on this CPU, which has no instructions for it: running in float32 instead, which takes "
            "twice the memory; dtype='bfloat16' runs it all the same",
            stacklevel=2,
        )
        return torch.float32
    if not fast:
        _warn_of_slow_bfloat16()
    return chosen


@functools.cache  # one warning, not one for each part of a model
def _warn_of_slow_bfloat16() -> None:
    warnings.warn("bfloat16 is slow on this CPU, which has no instructions for it; float32 is faster", stacklevel=3)


def cpu_has_bfloat16() -> bool:
    """Say whether PyTorch hands bfloat16 products and convolutions to oneDNN on this CPU; its own loops are slow.

    This is PyTorch's own check: for AVX-512 on x86, for BF16 on ARM. Limits of the environment
    (ONEDNN_MAX_CPU_ISA) count. The function is private; if it does not exist, the answer is no.
    """
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(ask is not None and ask())
