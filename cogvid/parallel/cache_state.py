"""The state of a step cache on several processes: put together for a saved run, and taken apart when it goes on.

A cache has whole tensors, the same on all processes, but for what it keeps inside `around_attention`: there it sees the
tokens and rows of its process. Such tensors must be under a key "held", at any depth (`ops.StepCache`). What is put
together is the state of one process, and any number of processes can go on from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cogvid.parallel import costs
from cogvid.parallel.mesh import Mesh, gather

HELD = "held"
_Path = tuple[Any, ...]


def gather_state(state: Mapping[str, Any], mesh: Mesh) -> dict[str, Any] | None:
    """Return the state that a cache would have on one process. Every process calls it; rank 0 gets it, others None.

    state: of this process; it stays as it is. What comes out shares its tensors, but for those that are put together.
    They are on the device, one at a time on all ranks but 0.

    Raises:
        ValueError: what is not under "held" differs between processes, or what is under it is not of tokens and rows.
    """
    held = {path: value for path, value in _leaves(state) if HELD in path}
    others = {path: _digest(value) for path, value in _leaves(state) if HELD not in path}
    found: list[Any] = [None] * mesh.size
    dist.all_gather_object(found, ({path: _about(value) for path, value in held.items()}, others), group=mesh.world)
    for each in found:
        for path in [*each[1], *others]:
            if each[1].get(path) != others.get(path):
                raise ValueError(
                    f"step_cache: got a state{_written(path)} that differs between processes, want the same on all, or "
                    f"a key {HELD!r} for what around_attention keeps"
                )
    whole = _copy(state)
    for path in found[0][0]:  # rank 0 has rows if any process has
        about = [each[0].get(path) for each in found]
        if not _fit(about, mesh):
            raise ValueError(f"step_cache: got a state{_written(path)} of {about}, want tensors [rows, tokens, ...]")
        joined = _join(held.get(path), about, mesh)
        if mesh.rank == 0:
            _at(whole, path[:-1])[path[-1]] = joined
    return whole if mesh.rank == 0 else None


def scatter_state(state: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Return this process's part of the state of one process; no messages are sent."""
    part = _copy(state)
    for path, value in [*_leaves(state)]:
        if HELD not in path:
            continue
        first, last = costs.pieces(value.shape[0], mesh.split.cfg)[mesh.index("cfg")]
        start, stop = costs.pieces(value.shape[1], mesh.split.ulysses * mesh.split.ring)[mesh.piece]
        at = _at(part, path[:-1])
        if first < last:
            at[path[-1]] = value[first:last, start:stop].clone(memory_format=torch.contiguous_format)
        else:
            del at[path[-1]]
    return part


def _leaves(value: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """Yield everything in nested dicts, with its keys; a list is one thing."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value


def _copy(value: Any) -> Any:
    return {key: _copy(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def _at(value: Any, path: _Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _written(path: _Path) -> str:
    return "".join(f"[{key!r}]" for key in path)


def _digest(value: Any) -> Any:
    """Return what tells whether two processes have the same: a checksum of tensors, and other values written out."""
    if isinstance(value, Tensor):
        return *_about(value), float(value.double().sum()).hex()
    return [_digest(each) for each in value] if isinstance(value, (list, tuple)) else repr(value)


def _about(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _fit(found: list[Any], mesh: Mesh) -> bool:
    """Say whether what the ranks hold are parts of one tensor; a group without rows has None."""
    count = mesh.split.ulysses * mesh.split.ring
    groups = [found[first : first + count] for first in range(0, len(found), count)]
    groups = [group for group in groups if any(each is not None for each in group)]
    if any(not isinstance(each, tuple) or len(each[0]) < 2 for group in groups for each in group):
        return False
    return len({(shape[2:], dtype) for group in groups for shape, dtype in group}) == 1 and all(
        len({shape[0] for shape, _ in group}) == 1 for group in groups
    )


def _join(x: Tensor | None, found: list[Any], mesh: Mesh) -> Tensor:
    """Gather the parts of one tensor, of which each rank tells shape and dtype; x is None where there are no rows."""
    split = mesh.split
    count = split.ulysses * split.ring
    tokens = [shape[1] for shape, _ in found[:count]]
    if x is None:
        (_, _, *rest), dtype = found[0]
        x = torch.empty(0, sum(tokens), *rest, dtype=dtype, device=mesh.device_mesh.device_type)
    else:
        groups = [tokens[first : first + split.ulysses] for first in range(0, count, split.ulysses)]
        x = gather(x, 1, groups[mesh.index("ring")], mesh.group("ulysses"))
        x = gather(x, 1, [sum(group) for group in groups], mesh.group("ring"))
    rows = [0 if each is None else each[0][0] for each in found[::count]]
    return gather(x, 0, rows, mesh.group("cfg"))
