"""Read and write the files of a checkpoint: safetensors in one file or in shards, and JSON.

Safetensors are mapped: only headers are read, and the pages of a tensor when it is used. What is written appears under
its name whole or not at all.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogvid.weights.hub import BASENAME, weight_files

MAX_JSON = 16 * 2**20  # bytes; the index of a model in shards has some hundred thousand
MAX_NESTING = 32  # lists and objects within each other in a JSON file
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_OF_THE_PATH = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_FLOAT64 = "patch_embed.pos_embedding"  # diffusers writes this table in float64, whatever it was loaded from


def load_state(directory: Path, basename: str = BASENAME, variant: str | None = None) -> dict[str, Tensor]:
    """Map the tensors of `basename.safetensors`, or of the shards that `basename.safetensors.index.json` names.

    `hub.weight_files` has the names of a variant.

    Raises:
        ValueError: a file is missing or broken, exists only in other variants, or holds something else than weights.
    """
    names = [path.name for path in directory.glob("*") if os.path.isfile(path)]
    first, *_ = weight_files(names, basename, variant, directory) or [f"{basename}.safetensors"]
    if not first.endswith(".json"):
        return _map_file(directory / first)
    index = directory / first
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(map(_is_file_name, shard_of.values())):
        raise ValueError(f"{index}: got {shard_of!s:.60}, want a 'weight_map' of tensor names to file names")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        # Leave out tensors that the index has in another shard. Keep those that it does not name: an error lists them.
        state |= {k: v for k, v in _map_file(directory / shard).items() if shard_of.get(k, shard) == shard}
    if absent := [name for name in shard_of if name not in state]:
        raise ValueError(f"{index}: got {listing('tensors not in the shard it names', absent, str)}, want none")
    return state


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and len(name) <= 255


def _map_file(path: Path) -> dict[str, Tensor]:
    if not os.path.isfile(path):
        there = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".safetensors", ".bin", ".pt"))
        beside = ", ".join(name for name in there[:3] if name != path.name)
        raise ValueError(f"{path}: got {beside or 'no such file'}, want a safetensors file of this name")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path}: got a file that may not be read, want a safetensors file that may")
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: got a broken file ({error}), want a whole safetensors file") from error
    foreign = [
        (name, tensor.dtype)
        for name, tensor in state.items()
        if tensor.dtype not in DTYPES.values() and (name, tensor.dtype) != (_FLOAT64, torch.float64)
    ]
    if foreign:
        listed = listing("tensors", foreign, lambda item: f"{item[0]} is {str(item[1]).removeprefix('torch.')}")
        raise ValueError(f"{path}: got {listed}, want weights in {', '.join(DTYPES)} alone")
    return state


def stored_dtype(state: Mapping[str, Tensor], source: str | Path) -> torch.dtype:
    """Return the dtype that most of the weights are stored in."""
    count: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.dtype in DTYPES.values():  # all but the one table that may be float64
            count[tensor.dtype] += tensor.numel()
    if not count:
        raise ValueError(f"{source}: got no weights, want some")
    return count.most_common(1)[0][0]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a regular file of at most `MAX_JSON` bytes and `MAX_NESTING` levels.

    Raises:
        ValueError: it is no such file, or cannot be read; the line names it.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("what is not a regular file")
            if len(data := file.read(MAX_JSON + 1)) > MAX_JSON:
                raise ValueError(f"more than {MAX_JSON} bytes")
        values = json.loads(data.decode("utf-8"))
        _check_nesting(values)
    except FileNotFoundError:
        raise ValueError(f"{path}: got no such file, want a JSON file") from None
    except OSError as error:
        if error.errno not in _OF_THE_PATH:
            raise
        raise ValueError(f"{path}: got {(error.strerror or '').lower()}, want a JSON file") from None
    except RecursionError:
        raise ValueError(f"{path}: got more than {MAX_NESTING} levels, want a JSON file of fewer") from None
    except ValueError as error:  # of JSON or of UTF-8 too
        raise ValueError(f"{path}: got {error}, want a JSON file") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {type(values).__name__}, want a JSON object")
    return values


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # the opening of a pipe would wait for its other end


def _check_nesting(values: Any) -> None:
    level = [values]
    for _ in range(MAX_NESTING):
        level = [
            child
            for each in level
            if isinstance(each, (dict, list))
            for child in (each.values() if isinstance(each, dict) else each)
        ]
    if level:
        raise RecursionError


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary file beside `path`, then rename it to `path`: it appears whole or not at all.

    Not `whole_file`, whose file may have no name: safetensors writes a file of its own beside the name it is given.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def listing(what: str, items: list[Any], describe: Callable[[Any], str], limit: int = 3) -> str:
    """Count and list items for a message; nothing for none."""
    if not items:
        return ""
    more = f", and {len(items) - limit} more" if len(items) > limit else ""
    return f"{len(items)} {what} ({', '.join(f'{describe(item):.200}' for item in items[:limit])}{more})"
