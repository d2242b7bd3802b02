"""The state of a run on disk, so that a run that was cut off goes on where it was and ends in the same bytes.

A directory holds one run: `state.safetensors` after the steps that are done (latents, sampler, generators, step cache,
and what the run began with), `inputs.safetensors` with what the command line was given, and `lock`. Each file is
replaced as a whole, so the last whole state is there at any time.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Generator, Tensor

from cogvid.media.whole_file import sweep, try_lock, write_bytes
from cogvid.options import check_int
from cogvid.parallel.cache_state import gather_state, scatter_state
from cogvid.parallel.mesh import Mesh
from cogvid.parallel.share import share
from cogvid.sampling.samplers import Generators, State, Step

_STATE, _INPUTS, _LOCK = "state.safetensors", "inputs.safetensors", "lock"
_MAY_DIFFER = ("versions", "machine", "device", "ops", "parallel")  # the run can go on, but not to the same bytes
_SAME_TENSORS = 0.05  # relative RMS: rounding in bfloat16 is below 0.01, and other inputs are above 0.1


class HasState(Protocol):
    state: dict[str, Any]


class SavedRun:
    """Save a run as it goes, and go on from what is saved; given to `Pipeline.__call__`.

    Of several processes that make one video, all make one of this, and the first of them alone reads and writes.

    Args:
        directory: made if it is not there. One run at a time may use it.
        every: steps between two saves; the last step is saved in any case. None is what the directory says, or 1.

    Raises:
        ValueError: another run uses the directory; `every` is below 1; what is saved cannot be read.
    """

    mesh: Mesh | None = None  # of the processes that make the video; the pipeline sets it

    def __init__(self, directory: str | os.PathLike[str], every: int | None = None) -> None:
        if every is not None:
            check_int("every", every, 1)
        self._every, self.every = every, every or 1
        self.directory = Path(directory)
        self._lock: IO[str] | None = None
        share(self._open)
        self._first: dict[str, Tensor | None] = {}
        self._record: dict[str, Any] = {}
        self._generators: list[Generator] = []
        self._step_cache: HasState | None = None

    def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / _LOCK
        self._lock = open(path, "a")  # noqa: SIM115 - until `close`, or the end of the process
        if not (try_lock(self._lock.fileno()) and path.exists()):  # a run that saved nothing removes the file
            self._lock.close()
            name = self.directory
            raise ValueError(f"checkpoint: got {name}, which another process uses, want a directory of its own")
        sweep(str(self.directory))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes use the directory; remove it if it holds nothing."""
        if self._lock is None or self._lock.closed:
            return
        if not any((self.directory / name).exists() for name in (_STATE, _INPUTS)):
            with contextlib.suppress(OSError):  # it holds files of others
                (self.directory / _LOCK).unlink()
                self.directory.rmdir()
        self._lock.close()

    @property
    def is_empty(self) -> bool:
        """True when nothing of a run is saved."""
        return share(lambda: not any((self.directory / name).exists() for name in (_STATE, _INPUTS)))

    @property
    def has_state(self) -> bool:
        """True when a step is saved."""
        return share(lambda: (self.directory / _STATE).exists())

    def begin(
        self,
        record: Mapping[str, Any],
        generator: Generators,
        step_cache: HasState | None,
        first: Mapping[str, Tensor | None],
    ) -> tuple[int, Tensor, State, dict[str, Any]]:
        """Begin a run, or put back the one that is saved: its generators' and its step cache's states too.

        record: of the run; it must be that of the saved run. first: what the run begins with, "latents" and others.

        Returns:
            The number of steps done, the latents, the sampler's state, and the values of `first`, all as they were.

        Raises:
            ValueError: the saved run is another.
        """
        self._record = json.loads(json.dumps(record))
        self._generators = [generator] if isinstance(generator, Generator) else list(generator)
        self._step_cache, self._first = step_cache, dict(first)
        latents = first["latents"]
        assert latents is not None
        if not self.has_state:
            return 0, latents, {}, dict(first)
        saved = share(lambda: _read(self.directory / _STATE, latents.device), latents.device)
        self._check(saved)
        self._first = saved["first"]
        for each, state in zip(self._generators, saved["generators"], strict=True):
            each.set_state(state)
        if step_cache is not None:
            state = saved["step_cache"]
            step_cache.state = state if self.mesh is None else scatter_state(state, self.mesh)
        return saved["steps"], saved["latents"], saved["sampler"], dict(self._first)

    def on_step(self, step: Step, x: Tensor, state: State) -> None:
        """Save what `sample` has after a step, if it is the turn of this one."""
        done = step.index + 1
        if done % self.every and done < len(step.schedule):
            return
        cache = None if self._step_cache is None else self._step_cache.state
        if self.mesh is not None and cache is not None:
            cache = gather_state(cache, self.mesh)
        values = {
            "steps": done,
            "latents": x,
            "sampler": state,
            "generators": [each.get_state() for each in self._generators],
            "step_cache": cache,
            "first": self._first,
            "record": self._record,
        }
        share(lambda: _write(self.directory / _STATE, values))

    def save_inputs(self, values: Mapping[str, Any]) -> None:
        """Keep what a program needs to begin the run again: JSON's values and tensors."""
        share(lambda: _write(self.directory / _INPUTS, {**values, "every": self.every}))

    def inputs(self) -> dict[str, Any] | None:
        """Return what `save_inputs` kept, or None; `every` is taken from it unless it was given."""
        path = self.directory / _INPUTS
        values = share(lambda: _read(path, torch.device("cpu")) if path.exists() else None)
        if values is None:
            return None
        every = values.pop("every")
        self.every = self._every or every
        return values

    def _check(self, saved: dict[str, Any]) -> None:
        """Raise unless the saved run is the one that begins now."""
        was, now = saved["record"], self._record
        place, same = f"the run saved in {self.directory}", True
        for name in [*was, *(name for name in now if name not in was)]:
            if was.get(name) == now.get(name):
                continue
            line = f"{name}: got {now.get(name)!r}, want {was.get(name)!r} as in {place}"
            if name not in _MAY_DIFFER:
                raise ValueError(line)
            same = False
            warnings.warn(f"{line}; the result will differ in the last bits", stacklevel=4)
        if len(self._generators) != len(saved["generators"]):
            raise ValueError(f"generator: got {len(self._generators)}, want {len(saved['generators'])} as in {place}")
        for name, tensor in self._first.items():
            if same and not _alike(tensor, saved["first"].get(name)):
                raise ValueError(f"{name}: got others than those of {place}, want the same")


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    return bool((a - b).norm() <= _SAME_TENSORS * b.norm())


def _write(path: Path, values: Mapping[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    layout = json.dumps(_pack(values, tensors, path.stem))
    write_bytes(path, save(tensors, metadata={"values": layout}))


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return _unpack(json.loads(file.metadata()["values"]), tensors, device)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: got a broken file ({error}), want one that a run saved") from error


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Turn tensors, plain values, and dicts, lists and tuples of them into JSON. The tensors go to `tensors`."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        # Strides are kept, because a kernel may round by them. An expanded tensor cannot be filled and is copied.
        strides = list(value.stride()) if 0 not in value.stride() else None
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key, "strides": strides, "on_cpu": value.device.type == "cpu"}
    if isinstance(value, Mapping):
        pairs = [[_pack(k, tensors, name), _pack(v, tensors, f"{name}[{k!r}]")] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, (list, tuple)):
        items = [_pack(v, tensors, f"{name}[{i}]") for i, v in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise ValueError(f"{name}: got {type(value).__name__}, want tensors and plain values, which can be saved")


def _unpack(packed: dict[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    if "tensor" in packed:
        kept, strides = tensors[packed["tensor"]], packed["strides"]
        where = torch.device("cpu") if packed["on_cpu"] else device
        if strides is None:
            return kept.to(where, copy=True)
        return torch.empty_strided(kept.shape, strides, dtype=kept.dtype, device=where).copy_(kept)
    if "dict" in packed:
        return {_unpack(k, tensors, device): _unpack(v, tensors, device) for k, v in packed["dict"]}
    if "list" in packed:
        return [_unpack(v, tensors, device) for v in packed["list"]]
    if "tuple" in packed:
        return tuple(_unpack(v, tensors, device) for v in packed["tuple"])
    return packed["value"]
