"""Read a LoRA adapter: from the files of diffusers, peft, CogKit, kohya's trainer and SAT to one form.

An adapter changes the weight of a linear from `W` to `W + scale * factor * up @ down`. What each format names, and what
its factor is (r is the rank, the number of rows of `down`):

- diffusers (`CogVideoXLoraLoaderMixin` in loaders/lora_pipeline.py, `save_lora_adapter` in loaders/peft.py):
  `transformer.MODULE.lora_A.weight` and `lora_B`, with or without `transformer.`. The factor is 1, or alpha / r if the
  metadata of the file has `lora_adapter_metadata` with the `LoraConfig` of peft.
- peft (`PeftModel.save_pretrained`): `base_model.model.MODULE.lora_A.weight` in `adapter_model.safetensors`, and
  `adapter_config.json`. The factor is alpha / r, or alpha / sqrt(r) with `use_rslora`; `rank_pattern` and
  `alpha_pattern` are of modules (`get_pattern_key` in utils/other.py).
- CogKit (`save_lora` and `_get_lora_config` in src/cogkit/utils/lora.py of THUDM/CogKit): `MODULE.lora_A.weight` in an
  `adapter_model.safetensors` without a config. There r is 128 and alpha 64.
- kohya (`merge_lora` in videox_fun/utils/lora_utils.py of aigc-apps/VideoX-Fun and in lora_utils.py of
  kijai/ComfyUI-CogVideoXWrapper): `lora_unet__MODULE.lora_down.weight`, `lora_up` and `alpha`, where MODULE has `_` for
  `.`; also `diffusion_model.MODULE.lora_A.weight`. The factor is alpha / r, or 1 without `alpha`.
- SAT (tools/export_sat_lora_weight.py of THUDM/CogVideo, `LoraMixin` in sat/model/finetune/lora2.py of
  THUDM/SwissArmyTransformer): `model.diffusion_model.transformer.layers.N.attention.query_key_value.matrix_A.0` to `.2`
  for Q, K and V, and `dense`, in a `.pt`. alpha is 1 and not in the file: the factor is 1 / r. Weights of the model in
  the same file are not read, as in the exporter.

MODULE is diffusers' name of a linear, or `to_qkv` for its merged projection of Q, K and V.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogvid.config import TransformerConfig
from cogvid.media.download import shown
from cogvid.weights.files import DTYPES, listing, read_json
from cogvid.weights.hub import fetch_file
from cogvid.weights.lora_option import Lora, hub_source
from cogvid.weights.names import nearest, upstream_linears

_DIFFUSERS, _PEFT, _PEFT_CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"
_KINDS = {
    "lora_A.weight": "down", "lora_A.default.weight": "down", "lora_down.weight": "down",
    "lora_B.weight": "up", "lora_B.default.weight": "up", "lora_up.weight": "up",
    "alpha": "alpha",
}  # fmt: skip
_PREFIXES = ("transformer.", "base_model.model.", "diffusion_model.", "lora_unet__", "lora_unet_", "")
_SAT = re.compile(
    r"model\.diffusion_model\.transformer\.layers\.(\d+)\.attention\.(query_key_value|dense)\.matrix_([AB])\.([012])"
)
_SAT_MODULES = {"query_key_value": ("to_q", "to_k", "to_v"), "dense": ("to_out.0",)}
_COGKIT_RANK, _COGKIT_ALPHA = 128, 64.0


@dataclass(frozen=True, eq=False)
class Update:
    """What an adapter adds to one linear: `factor * up @ down`. down: `[r, in]`. up: `[out, r]`."""

    down: Tensor
    up: Tensor
    factor: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that was read. updates: by our name of the linear; dtypes are those of the file."""

    lora: Lora
    updates: Mapping[str, Update]

    def digest(self) -> str:
        """Return SHA-256 over each linear's name, factor, dtype, shapes and the bytes of both matrices, sorted."""
        digest = hashlib.sha256()
        for name, update in sorted(self.updates.items()):
            matrices = [tensor.contiguous() for tensor in (update.down, update.up)]
            head = [name, update.factor, *([str(each.dtype), list(each.shape)] for each in matrices)]
            digest.update(json.dumps(head).encode())
            for each in matrices:
                digest.update(each.view(torch.uint8).numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class _Config:
    """What of peft's `LoraConfig` decides the factor."""

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False

    def of(self, module: str) -> tuple[int, float]:
        """Return rank and alpha of a module."""
        return _match(self.rank_pattern, module, self.r), _match(self.alpha_pattern, module, self.lora_alpha)


def read_lora(lora: Lora, config: TransformerConfig, *, local_files_only: bool = False, hashed: bool = True) -> Adapter:
    """Find or fetch an adapter, and check all of it against a transformer.

    hashed: put its SHA-256 into the adapter, which reads the file whole, and compare it with that of a record.

    Raises:
        ValueError: there is no such file, or it is broken, empty, or not of this model; the line lists what is wrong.
        OSError: the hub cannot be reached.
    """
    path, kind = _find(lora.source, local_files_only)
    tensors, metadata = _read(path)
    format, matrices, unknown = _sort(tensors, config)
    said = f"lora: got {shown(os.fspath(path))}"
    peft = _peft_config(path, metadata, format)
    if format == "diffusers" and path.name == _PEFT:
        format = "peft" if peft else "cogkit"
    if not matrices and not unknown:
        raise ValueError(f"{said}, which is empty, want the matrices of an adapter")
    faults = [
        listing("unknown keys", sorted(unknown), lambda key: f"{key}{nearest(key, tensors.keys() - set(unknown))}")
    ]
    updates, alphas, wrong = _updates(matrices, config, format, peft)
    faults += [listing("modules that do not fit", wrong, str)]
    if any(faults):
        raise ValueError(f"{said} with {'; '.join(filter(None, faults))}, want those of an adapter of this model")
    ranks = tuple(sorted({len(each.down) for each in updates.values()}))
    known = {"source_kind": kind, "format": format, "ranks": ranks, "alphas": tuple(sorted(alphas))}
    adapter = Adapter(dataclasses.replace(lora, **known), updates)
    if not hashed:
        return adapter
    found = adapter.digest()
    if lora.sha256 not in (None, found):
        raise ValueError(f"{said}, which has other matrices than the record's {lora.name!r}, want the same adapter")
    return dataclasses.replace(adapter, lora=dataclasses.replace(adapter.lora, sha256=found))


def check_loras(loras: Iterable[Lora], config: TransformerConfig) -> None:
    """Raise as `read_lora` for adapters that lie here, before the work; nothing is fetched or read whole."""
    for lora in loras:
        if os.path.exists(os.path.expanduser(lora.source)):
            read_lora(lora, config, hashed=False)


def _find(source: str, local_files_only: bool) -> tuple[Path, str]:
    """Return the file of an adapter, and whether it is a "file" or from the "hub"."""
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return path / _choose([each.name for each in path.iterdir() if each.is_file()], source)[0], "file"
    if path.exists():
        return path, "file"
    hub = hub_source(source)
    if hub is None:
        raise ValueError(f"lora: got {shown(source)}, which is not there, want a file, a directory or a hub id")
    repo, name = hub
    patterns = ["*.safetensors", "*.pt", _PEFT_CONFIG]
    if name is not None:
        folder = name.rpartition("/")[0]
        patterns = [name, f"{folder}/{_PEFT_CONFIG}".lstrip("/")]

    def choose(names: list[str]) -> list[str]:
        if name is None:
            return _choose([each for each in names if "/" not in each], source)
        if name not in names:
            raise ValueError(f"lora: got {source}, a file that {repo} does not have, want one of it")
        return [name, *(each for each in names if each != name)]

    return fetch_file(repo, patterns, choose, local_files_only, f"lora: got {repo!r}"), "hub"


def _choose(names: list[str], source: str) -> list[str]:
    """Return the file of an adapter among those of a folder, and after it the config that belongs to it."""
    there = sorted(name for name in names if name.endswith((".safetensors", ".pt")))
    found = [name for name in (_DIFFUSERS, _PEFT) if name in there][:1] or there
    if len(found) != 1:
        several = f"{len(found)} files ({', '.join(found[:5])})" if found else "no .safetensors or .pt"
        raise ValueError(f"lora: got {shown(source)} with {several}, want the name of the file, or a folder with one")
    return [*found, *(name for name in names if name == _PEFT_CONFIG and found[0] == _PEFT)]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map the tensors of a file; return them and the metadata of its header."""
    where = shown(os.fspath(path))
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        if path.suffix != ".pt":
            raise ValueError(f"lora: got {where}, want a .safetensors, or a .pt of SAT")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"lora: got {where}, a broken file ({reason:.100}), want a whole one of tensors") from error
    for outer in ("model", "module", "state_dict"):
        state = state[outer] if isinstance(state, dict) and isinstance(state.get(outer), dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"lora: got {where} with {type(state).__name__}, want names and tensors")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}, {}


def _sort(
    tensors: Mapping[str, Tensor], config: TransformerConfig
) -> tuple[str, dict[str, dict[str, Tensor]], list[str]]:
    """Return the format, for each of upstream's modules its "down", "up" and "alpha", and the keys not understood."""
    matrices: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    if any(".matrix_" in key for key in tensors):
        for key in (key for key in tensors if ".matrix_" in key):
            match = _SAT.fullmatch(key)
            modules = _SAT_MODULES[match[2]] if match else ()
            if match is None or int(match[4]) >= len(modules) or int(match[1]) >= config.num_layers:
                unknown.append(key)
                continue
            module = f"transformer_blocks.{int(match[1])}.attn1.{modules[int(match[4])]}"
            matrices.setdefault(module, {})["down" if match[3] == "A" else "up"] = tensors[key]
        return "sat", matrices, unknown
    modules = _modules(config)
    aliases = {name.replace(".", "_"): name for name in modules} | {name: name for name in modules}
    for key, tensor in tensors.items():
        kind = next((kind for kind in _KINDS if key.endswith(f".{kind}")), None)
        stem = key.removesuffix(f".{kind}")
        names = [stem.removeprefix(prefix) for prefix in _PREFIXES if stem.startswith(prefix)]
        module = next((aliases[name] for name in names if name in aliases), None)
        if kind is None or module is None or _KINDS[kind] in matrices.get(module, {}):
            unknown.append(key)
            continue
        matrices.setdefault(module, {})[_KINDS[kind]] = tensor
    kohya = any(key.endswith((".lora_down.weight", ".lora_up.weight", ".alpha")) for key in tensors)
    return "kohya" if kohya else "diffusers", matrices, unknown


def _modules(config: TransformerConfig) -> dict[str, tuple[tuple[str, ...], tuple[int, int]]]:
    """For each module that an adapter may name: our linears, whose rows it has one after the other, and its shape."""
    linears: dict[str, tuple[tuple[str, ...], tuple[int, int]]] = {
        theirs: ((ours,), shape) for theirs, (ours, shape) in upstream_linears(config).items()
    }
    for layer in range(config.num_layers):
        names = [f"blocks.{layer}.{part}_proj" for part in "qkv"]
        shape = 3 * config.hidden_size, config.hidden_size
        linears[f"transformer_blocks.{layer}.attn1.to_qkv"] = tuple(names), shape
    return linears


def _updates(
    matrices: Mapping[str, Mapping[str, Tensor]], config: TransformerConfig, format: str, peft: _Config | None
) -> tuple[dict[str, Update], set[float], list[str]]:
    """Return the update of each of our linears, all alphas, and a line for each module that does not fit."""
    updates: dict[str, Update] = {}
    alphas: set[float] = set()
    wrong: list[str] = []
    modules = _modules(config)
    for module, parts in matrices.items():
        linears, shape = modules[module]
        fault = _fault(parts, shape)
        rank = 0 if fault else len(parts["down"])
        wanted, alpha = peft.of(module) if peft else (rank, float(rank))
        if format == "cogkit":
            wanted, alpha = _COGKIT_RANK, _COGKIT_ALPHA
        elif format == "sat":
            alpha = 1.0
        if not fault and rank != wanted:
            whose = f"CogKit's, or {_PEFT_CONFIG} beside the file" if format == "cogkit" else "that of its config"
            fault = f"has rank {rank}, want {wanted}, {whose}"
        if not fault and any(name in updates for name in linears):
            fault = "is there merged and unmerged, want one of them"
        if fault:
            wrong.append(f"{module} {fault}")
            continue
        if "alpha" in parts:
            alpha = float(parts["alpha"])
        alphas.add(alpha)
        factor = alpha / (math.sqrt(rank) if peft and peft.use_rslora else rank)
        down, up = (parts[name].flatten(1) for name in ("down", "up"))
        updates |= {n: Update(down, rows, factor) for n, rows in zip(linears, up.chunk(len(linears)), strict=True)}
    return updates, alphas, wrong


def _fault(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> str | None:
    """Say what is wrong with the matrices of a module whose weight has this shape."""
    if missing := [name for name in ("down", "up") if name not in parts]:
        return f"lacks the matrix {missing[0]}"
    down, up = parts["down"], parts["up"]
    if foreign := [each.dtype for each in (down, up) if each.dtype not in DTYPES.values()]:
        return f"is {str(foreign[0]).removeprefix('torch.')}, want one of {', '.join(DTYPES)}"
    if "alpha" in parts and (parts["alpha"].numel() != 1 or not math.isfinite(float(parts["alpha"]))):
        return "has an alpha that is no number"
    rows, columns = shape
    whole = min(down.ndim, up.ndim) >= 2 and len(down) > 0
    if not whole or down[0].numel() != columns or len(up) != rows or up[0].numel() != len(down):
        return f"is {list(up.shape)} x {list(down.shape)}, want [{rows}, r] x [r, {columns}]"
    return None


def _peft_config(path: Path, metadata: Mapping[str, str], format: str) -> _Config | None:
    """Return what says the factors beside the matrices: the config of peft, or in the metadata of diffusers' file."""
    beside, where = path.with_name(_PEFT_CONFIG), shown(os.fspath(path))
    values: Any = None
    if path.name == _PEFT and beside.is_file():
        values, where = read_json(beside), shown(os.fspath(beside))
    elif format == "diffusers" and "lora_adapter_metadata" in metadata:
        try:
            values = json.loads(metadata["lora_adapter_metadata"])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"lora: got {where} with metadata of {error}, want JSON") from None
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"lora: got {where} with a config of {type(values).__name__}, want an object")
    values = {key.removeprefix("transformer."): value for key, value in values.items()}
    names = {field.name for field in dataclasses.fields(_Config)}
    given = {name: value for name, value in values.items() if name in names and value is not None}
    config = _Config(**{"r": 0, "lora_alpha": math.nan, **given})
    patterns = [config.rank_pattern, config.alpha_pattern]
    numbers = [config.r, config.lora_alpha, *(n for each in patterns if isinstance(each, dict) for n in each.values())]
    right = all(isinstance(each, dict) for each in patterns) and all(type(n) in (int, float) for n in numbers)
    if not right or not all(math.isfinite(n) for n in numbers) or values.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"lora: got {where} with {values!s:.100}, want peft's LoraConfig with r and lora_alpha")
    if variant := [name for name in ("use_dora", "lora_bias", "modules_to_save") if values.get(name)]:
        raise ValueError(f"lora: got {where} with {variant[0]}, which is not supported, want plain LoRA")
    return config


def _match(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that is the module's name or, after a dot, its end."""
    try:
        found = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
    except re.error as error:
        raise ValueError(f"lora: got a pattern that is no regular expression ({error}), want one") from None
    return found[0] if found else otherwise
