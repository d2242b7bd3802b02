"""A LoRA adapter as an option: what `--lora PATH[:SCALE]`, a job and a record name. This file imports no torch."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cogvid.media.download import shown

# OWNER/NAME of the hub, with or without the file of it.
_HUB_SOURCE = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?")
# Names that say nothing of an adapter: those that diffusers, peft and SAT give the file. The folder is named instead.
_COMMON = ("pytorch_lora_weights", "adapter_model", "mp_rank_00_model_states")


@dataclass(frozen=True)
class Lora:
    """An adapter that a pipeline has or is to load.

    source: a file, a directory, or a repository of the hub, with or without the name of a file in it. scale: what the
    adapter's own scale is multiplied by. fused: it is part of the weights.
    The others are known once it was read. source_kind: "file" or "hub". format: "diffusers", "peft", "cogkit", "kohya"
    or "sat". ranks, alphas: the different ones, sorted. sha256: of its matrices and scales; see `Adapter`.
    """

    source: str
    scale: float = 1.0
    name: str = ""
    fused: bool = False
    source_kind: str | None = None
    format: str | None = None
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it ready for JSON; of a file or a directory, only the last part of the path."""
        source = self.source if self.source_kind == "hub" else os.path.basename(os.path.abspath(self.source))
        values = dataclasses.asdict(self) | {"source": source}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def parse_loras(value: Any) -> tuple[Lora, ...]:
    """Return the adapters that an option names: None, or one or a list of `PATH[:SCALE]`, `Lora` or what a record has.

    Raises:
        ValueError: it is none of these, there is no such file, or two have one name.
    """
    listed = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    loras = tuple(_parse(each) for each in listed)
    check_names([lora.name for lora in loras])
    return loras


def make_lora(source: Any, scale: Any = 1.0, name: Any = None) -> Lora:
    """Check what an adapter is loaded with. The name, if not given, is that of the file, directory or repository."""
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        raise ValueError(f"lora: got {source!r:.60}, want a file, a directory or a hub id")
    source = os.fspath(source)
    check_scale(scale)
    if name is None:
        parts = [part for part in os.path.abspath(source).split(os.sep) if part]
        stems = [re.sub(r"\.(safetensors|pt)$", "", part) for part in parts[-2:]]
        name = next((stem for stem in reversed(stems) if stem not in _COMMON), "lora")
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: got {name!r:.60}, want a name for the adapter")
    if not os.path.exists(os.path.expanduser(source)) and hub_source(source) is None:
        raise ValueError(f"lora: got {shown(source)}, which is not there, want a file, a directory or a hub id")
    return Lora(source, float(scale), name)


def hub_source(source: str) -> tuple[str, str | None] | None:
    """Split the name of an adapter on the hub into repository and file; None if it cannot be one.

    What has two parts of which the second ends like a file is a path that is not there.
    """
    match = _HUB_SOURCE.fullmatch(source)
    if match is None or (match[2] is None and source.endswith((".safetensors", ".pt"))):
        return None
    return match[1], match[2]


def check_scale(scale: Any) -> None:
    """Raise unless the scale of an adapter is a finite number."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < math.inf:
        raise ValueError(f"scale: got {scale!r:.60} for an adapter, want a finite number")


def check_names(names: Sequence[str]) -> None:
    """Raise if two adapters have one name."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"name: got {twice[0]!r} for two adapters, want another name for one of them")


def find_loras(recorded: Sequence[Mapping[str, Any]], paths: Sequence[str] | None) -> tuple[Lora, ...]:
    """Return the adapters of a record, where they are here. What they hold is compared when they are loaded.

    paths: one for each, in order. If they are not given, a file must be in the working directory.
    """
    loras = parse_loras(list(recorded))
    if paths is None:
        missing = [each.source for each in loras if each.source_kind == "file" and not os.path.exists(each.source)]
        if missing:
            raise ValueError(f"lora: got a run with {missing[0]!r}, which is not here, want its path (--lora)")
        return loras
    if len(paths) != len(loras):
        raise ValueError(f"lora: got {len(paths)} for a run with {len(loras)}, want one for each, in order")
    found = [make_lora(path) for path in paths]
    kinds = ["file" if os.path.exists(os.path.expanduser(path)) else "hub" for path in paths]
    return tuple(
        dataclasses.replace(lora, source=each.source, source_kind=kind)
        for lora, each, kind in zip(loras, found, kinds, strict=True)
    )


def _parse(value: Any) -> Lora:
    if isinstance(value, Lora):
        return value
    if isinstance(value, Mapping):
        return _from_record(value)
    if isinstance(value, str) and not os.path.exists(value):
        source, _, scale = value.rpartition(":")
        try:
            return make_lora(source, float(scale))
        except ValueError:
            if source and _is_number(scale):
                raise
    return make_lora(value)


def _from_record(value: Mapping[str, Any]) -> Lora:
    """Return what `to_dict` made a dictionary of; whether it is there is seen when it is loaded."""
    names = {field.name for field in dataclasses.fields(Lora)}
    lists = {name: tuple(value[name]) for name in ("ranks", "alphas") if isinstance(value.get(name), list)}
    right = set(value) <= names and all(isinstance(value.get(name), str) for name in ("source", "name"))
    if not right or not isinstance(value.get("fused", False), bool) or not value["source"]:
        raise ValueError(f"lora: got {value!s:.100}, want what a record has: {', '.join(sorted(names))}")
    check_scale(value.get("scale", 1.0))
    return Lora(**{**value, **lists})


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
