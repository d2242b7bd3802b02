"""What several processes do as one: one does it for all, all know if one fails, and all were asked for the same.

In one process each function does what it says without any exchange. Only exceptions of the kind `Exception` are told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Generator, Tensor

from cogvid.parallel.start import begin
from cogvid.weights.parallel_option import rank, world_size

T = TypeVar("T")
_ALONE = [False]  # whether rank 0 does something for all just now, within which it asks nobody
_TOLD = "cogvid_told"  # the attribute of an exception that every process raises


def together() -> bool:
    """Say whether there are other processes to talk with."""
    return world_size() > 1 and not _ALONE[0]


def is_common(error: Exception) -> bool:
    """Say whether every process raises this error, so that all can go on in step. In one process it is always so.

    It is so of an error that was told, and of those that follow from inputs and weights, which all processes have.
    """
    return not together() or hasattr(error, _TOLD) or isinstance(error, (ValueError, TypeError, FloatingPointError))


def share(function: Callable[[], T], device: torch.device | None = None) -> T:
    """Call a function in rank 0 alone and return in every process what it returned, or raise what it raised.

    The result is pickled; tensors in it are sent as they are, with their strides. Those that are on a GPU come to the
    GPU of each process, `device`. Within the function, the functions of this file ask nobody.
    """
    if not together():
        return function()
    _meet()
    result, error = None, None
    if rank() == 0:
        _ALONE[0] = True
        try:
            result = function()
        except Exception as raised:
            error = raised
        finally:
            _ALONE[0] = False
    told = _sent(None if error is None else _portable(error))
    if told is not None:
        raise _marked(error or told)
    return _sent(result, device)


def lead(function: Callable[[Iterable[T]], Any], items: Iterable[T]) -> Any:
    """Call a function in rank 0 alone, on an iterable that all processes must compute together, item by item.

    The other processes take the items when rank 0 does. Returns what the function returned, or raises what it raised,
    in every process.
    """
    if not together():
        return function(items)
    _meet()
    left, broken = iter(items), []
    if rank() != 0:
        kind, value = _sent(None)
        while kind == "more":
            next(left, None)
            kind, value = _sent(None)
        if kind == "raised":
            raise _marked(value)
        return value

    def asked() -> Iterator[T]:
        while True:
            _sent(("more", None))
            try:
                item = next(left)
            except StopIteration:
                return
            except BaseException:
                broken.append(True)  # the others may be in the middle of this item and can be told nothing
                raise
            yield item

    try:
        result = function(asked())
    except Exception as error:
        if broken:
            raise
        _sent(("raised", _portable(error)))
        raise _marked(error) from None
    _sent(("returned", result))
    return result


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Let what fails in this block in one process fail in all of them. Within it, processes only meet in this file."""
    try:
        yield
    except Exception as error:
        if together() and not hasattr(error, _TOLD):
            _meet(error)
        raise
    if together():
        _meet()


def agree(values: Mapping[str, Any]) -> None:
    """Raise in every process unless all have the same values, by name.

    Tensors, arrays, pictures and generators are compared by their content, other objects by their class.
    """
    if not together():
        return
    mine = {name: (fingerprint(value), _shown(value)) for name, value in values.items()}
    others = _meet(answer=mine)
    for other, theirs in enumerate(others):
        for name in [*others[0], *(name for name in theirs if name not in others[0])]:
            (first, shown), (now, got) = (each.get(name, ("", "none")) for each in (others[0], theirs))
            if first != now:
                wanted = f"{shown} as on rank 0" if got != shown else "that of rank 0"
                raise _marked(ValueError(f"{name}: got {got} on rank {other}, want {wanted}"))


def fingerprint(value: Any) -> str:
    """Return a hash of what decides a result in a value; of an object that is not known, of its class."""
    digest = hashlib.sha256()
    _feed(digest.update, value)
    return digest.hexdigest()


def _shown(value: Any) -> str:
    plain = value is None or isinstance(value, (bool, int, float, str))
    return f"{value!r:.60}" if plain else f"a {type(value).__name__}"


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    update(type(value).__name__.encode())
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        update(repr(value).encode())
    elif isinstance(value, os.PathLike):
        update(os.fsencode(value))
    elif isinstance(value, Generator):
        update(value.get_state().numpy().tobytes())
    elif isinstance(value, Tensor):
        update(f"{value.dtype}{list(value.shape)}".encode())
        update(_bytes(value).numpy().tobytes())
    elif isinstance(value, np.ndarray) or hasattr(value, "tobytes"):  # a picture of PIL
        update(str(np.shape(value)).encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for name in value:
            _feed(update, name)
            _feed(update, value[name])
    elif isinstance(value, (list, tuple)):
        for each in value:
            _feed(update, each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _feed(update, getattr(value, field.name))


def _meet(error: Exception | None = None, answer: Any = None) -> list[Any]:
    """Wait for all processes and return their answers, or raise the error of the first that has one."""
    begin()
    met: list[Any] = [None] * world_size()
    dist.all_gather_object(met, (error and _portable(error), answer))
    for raised, _ in met:
        if raised is not None:
            raise _marked(raised)
    return [given for _, given in met]


def _marked(error: Exception) -> Exception:
    setattr(error, _TOLD, True)
    return error


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent: this one, or its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _sent(value: Any, device: torch.device | None = None) -> Any:
    """Return what rank 0 gives to this function, in every process."""
    tensors: list[Tensor] = []
    packed: list[Any] = [None]
    if rank() == 0:
        packed = [_packed(value, tensors)]
    dist.broadcast_object_list(packed, src=0)
    data, layouts = packed[0]
    if rank() == 0:
        for tensor in tensors:
            if tensor.numel():
                dist.broadcast(_bytes(tensor), src=0)
        return value
    for dtype, shape, strides, on_cpu in layouts:
        plain = torch.empty(shape, dtype=dtype)
        if plain.numel():
            dist.broadcast(plain.view(-1).view(torch.uint8), src=0)
        where = torch.device("cpu") if on_cpu else device or torch.device("cpu")
        tensors.append(torch.empty_strided(shape, strides, dtype=dtype, device=where).copy_(plain))
    return _Unpickler(io.BytesIO(data), tensors).load()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.cpu()


def _packed(value: Any, tensors: list[Tensor]) -> tuple[bytes, list[Any]]:
    """Pickle a value without its tensors, which are added to the list; return the bytes and what the tensors are."""
    file = io.BytesIO()
    _Pickler(file, tensors).dump(value)
    return file.getvalue(), [(x.dtype, tuple(x.shape), _strides(x), x.device.type == "cpu") for x in tensors]


def _strides(x: Tensor) -> tuple[int, ...]:
    """An expanded tensor cannot be filled."""
    return x.stride() if 0 not in x.stride() else x.contiguous().stride()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) is not Tensor:
            return None
        self._tensors.append(obj)
        return len(self._tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]
