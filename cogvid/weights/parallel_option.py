"""How one video is split over several devices, as an option: `cogvid.Parallel`. This file imports no torch."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from cogvid.options import check_int


@dataclass(frozen=True)
class Parallel:
    """How many devices share each part of the work; their product is the number of devices.

    cfg: 1 or 2 groups share the rows of the batch: with guidance, the unconditional half and the conditional half.
    ulysses: devices that share the heads in attention, after an all-to-all; at most the number of heads.
    ring: devices that share the keys and values in attention, which go around a ring.
    Outside of attention, `ulysses * ring` devices share the tokens.
    """

    cfg: int = 1
    ulysses: int = 1
    ring: int = 1

    def __post_init__(self) -> None:
        check_int("parallel: cfg", self.cfg, 1, 2)
        check_int("parallel: ulysses", self.ulysses, 1)
        check_int("parallel: ring", self.ring, 1)

    @property
    def devices(self) -> int:
        return self.cfg * self.ulysses * self.ring

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())


def parse_parallel(value: Any) -> Parallel | None:
    """Return the split that an option names: None, a `Parallel`, or `cfg=2,ulysses=2,ring=2`, of which each may lack.

    Raises:
        ValueError: it is none of these.
    """
    if value is None or isinstance(value, Parallel):
        return value
    names = [field.name for field in dataclasses.fields(Parallel)]
    found: dict[str, int] = {}
    for part in value.split(",") if isinstance(value, str) else [""]:
        match = re.fullmatch(r"(\w+)=(\d{1,6})", part)
        if match is None or match[1] not in names or match[1] in found:
            raise ValueError(
                f"parallel: got {value!r:.60}, want a Parallel or cfg=N,ulysses=N,ring=N, each at most once"
            )
        found[match[1]] = int(match[2])
    return Parallel(**found)


def world_size() -> int:
    """Return how many processes make a video together: as many as torchrun started; 1 without it."""
    begun = _begun()
    return begun.get_world_size() if begun else _number("WORLD_SIZE", 1)


def rank() -> int:
    """Return which of these processes this is, from 0."""
    begun = _begun()
    return begun.get_rank() if begun else _number("RANK", 0) if world_size() > 1 else 0


def local_rank() -> int:
    """Return which of the processes on this machine this is."""
    return _number("LOCAL_RANK", rank())


def _begun() -> Any:
    """Return torch.distributed if a program has begun its processes, in whatever way."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None


def _number(name: str, without: int) -> int:
    """Return what torchrun says in the environment."""
    text = os.environ.get(name, str(without))
    if not text.isdigit():
        raise ValueError(f"{name}: got {text!r:.60} in the environment, want a number, as torchrun sets it")
    return int(text)


def check_one_process(name: str, value: object) -> None:
    """Raise if several processes share a video: what the option or argument asks for needs one."""
    if (count := world_size()) > 1:
        raise ValueError(f"{name}: got {value!s:.60} on {count} processes, want it on one")


def check_devices(split: Parallel | None, processes: int) -> Parallel | None:
    """Return a split, which must be of so many processes; None for one process.

    Raises:
        ValueError: it is of others.
    """
    if split is not None and split.devices != processes:
        raise ValueError(
            f"parallel: got {split} on {processes} process{'es' if processes > 1 else ''}, want {split.devices}: "
            f"torchrun --nproc-per-node {split.devices} ..."
        )
    return split if processes > 1 else None


def best_split(devices: int, heads: int, *, guided: bool, per_node: int | None = None) -> Parallel:
    """Return the split of this many devices that is taken if none is named.

    The two branches of guidance go to two groups where the number is even: they exchange nothing within a step. Of the
    others, as many share the heads as can, because an all-to-all moves less than a ring, but not more than there are
    heads, nor more than are in one node. What is left is a ring, whose messages hide behind its computations.

    devices: 1 or more. heads: of the model. guided: guidance runs both branches. per_node: devices of a node; None is
    all of them.
    """
    cfg = 2 if guided and devices % 2 == 0 else 1
    share = devices // cfg
    most = min(heads, share if per_node is None else max(math.gcd(per_node, share), 1))
    ulysses = max(count for count in range(1, most + 1) if share % count == 0)
    return Parallel(cfg, ulysses, share // ulysses)
