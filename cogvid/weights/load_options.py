"""The options of a load: where and how a model runs. Each is written once, as a field of `LoadOptions`.

`load`, the command line, batches, records and replays derive from the fields. This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cogvid.config import UPSTREAMS
from cogvid.options import check_choice, option, options_of
from cogvid.weights.lora_option import parse_loras
from cogvid.weights.parallel_option import Parallel, parse_parallel

QK_NORMS = ("layer", "rms")
OFFLOADS = ("model", "block")
QUANTIZATIONS = ("int8", "int8-dynamic", "fp8", "fp8-storage")


def _none_or(name: str, choices: tuple[str, ...]) -> Callable[[str | None], str | None]:
    """Return the check of an option that is one of the choices, or None for none of them."""

    def check(value: str | None) -> str | None:
        if value is not None:
            check_choice(name, value, choices)
        return value

    return check


@dataclass(frozen=True)
class LoadOptions:
    """Every choice of where and how a model runs; `placement.resolve_placement` makes a `Placement` of it.

    In Python, device and dtype may be torch's objects, and ops an `Ops`.
    """

    device: str | None = option(None, str, "cpu, cuda or cuda:N; cuda where there is a GPU if not given")
    dtype: str | None = option(
        None, str, "float32, bfloat16 or float16; what the model's authors recommend if not given"
    )
    ops: str = option("auto", str, "auto (triton on CUDA, torch elsewhere), torch or triton; in Python also an Ops")
    qk_norm: str = option(
        "layer",
        str,
        "norm of Q and K: layer, which is exact, or rms (RMSNorm of centred projections)",
        choices=QK_NORMS,
    )
    compile: bool = option(False, bool, "run the transformer's blocks and the VAE's decoder through torch.compile")
    lora: tuple[Any, ...] | None = option(
        None,
        list,
        "an adapter: a file, a directory or a hub id, and its scale, 1 if not given; may be repeated",
        parse=parse_loras,
        many="PATH[:SCALE]",
    )
    last_norm_eps: str = option(
        None,
        str,
        "eps of the transformer's last norm: diffusers (the config's, 1e-5) or sat (1e-6); diffusers if not given",
        choices=UPSTREAMS,
        upstream={"diffusers": "diffusers", "sat": "sat"},
    )
    position_tables: str = option(
        None,
        str,
        "positions of 1.0 models at other sizes than the trained one: diffusers (made for the size) or sat (cut from "
        "the trained size's); diffusers if not given",
        choices=UPSTREAMS,
        upstream={"diffusers": "diffusers", "sat": "sat"},
    )
    offload: str | None = option(
        None,
        str,
        "weights leave the device: model (each part after its use) or block (each block); all stay if not given",
        parse=_none_or("offload", OFFLOADS),
    )
    vae_tiling: bool = option(False, bool, "encode and decode tiles of 240x360 pixels: less memory, other pixels")
    quantize: str | None = option(
        None,
        str,
        "8-bit weights: int8, int8-dynamic, fp8 (with torchao) or fp8-storage; the dtype's own if not given",
        parse=_none_or("quantize", QUANTIZATIONS),
    )
    parallel: Parallel | None = option(  # noqa: RUF009 - a field, as the others
        None,
        str,
        "how the processes of torchrun share one video, such as cfg=2,ulysses=2,ring=2, in Python also a "
        "cogvid.Parallel; the best split if not given",
        parse=parse_parallel,
    )
    shard_weights: bool = option(
        False, bool, "with several processes, each keeps a part of the transformer's and T5's weights (FSDP2)"
    )


LOAD_OPTIONS = options_of(LoadOptions)
