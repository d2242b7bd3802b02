"""Offloading: weights come to where they run when they are used, and leave afterwards.

Hooks on modules do it: on each part (T5, the VAE's encoder and decoder, the transformer) and, with offload="block", on
each block of the transformer and of T5. One part is there at a time; it leaves when the next one is used. Hooks on a
block do not change what runs inside it, and take whatever modules it has at that moment, adapters too. Only matrices
move. Vectors, less than a thousandth of the weights, are where they run from the beginning.

Where weights rest, and how they come:

- for CUDA, in the mapped file or in memory; a part is copied. Blocks are copied through pinned memory, and the next one
  while a block runs: two buffers there and two on the GPU, on a stream of its own. This was not run on a GPU yet.
- for a CPU, in the mapped file. They are used there, or as a cast copy where they are stored in another dtype. The
  system is told to read the next block, and pages are dropped after a block.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cogvid.models.quantize import quantized_linears
from cogvid.models.tiling import TiledVAE
from cogvid.run.pipeline import Pipeline
from cogvid.weights.pages import drop_pages, will_need
from cogvid.weights.placement import run_dtype

_ALIGNMENT = 256  # bytes
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # those that are cast; float8 is not

Table = dict[str, Any]  # of a module: `_parameters` or `_buffers`


@dataclass
class _Moved:
    """A weight that was moved. table, key: where its module has it. version: of the tensor that came."""

    table: Table
    key: str
    rest: Tensor
    came: Tensor
    version: int


class Unit:
    """Matrices that come and leave together: those of a module, but not of the `inner` modules in it."""

    def __init__(self, module: nn.Module, inner: Sequence[nn.Module] = ()) -> None:
        self.module = module
        self.inner = {id(each) for each in inner}
        self.moved: list[_Moved] = []

    def matrices(self) -> Iterator[tuple[Table, str, str, Tensor]]:
        """Yield (table of the module, key, whole name, tensor) of what is there now."""
        left: list[tuple[str, nn.Module]] = [("", self.module)]
        seen = set(self.inner)
        while left:
            name, module = left.pop()
            if id(module) in seen:  # T5's embedding has two names
                continue
            seen.add(id(module))
            for table in (module._parameters, module._buffers):
                for key, tensor in table.items():
                    if tensor is not None and tensor.ndim > 1:
                        yield table, key, f"{name}.{key}", tensor
            left += [(f"{name}.{key}", child) for key, child in module.named_children()]

    def put(self, came: Sequence[Tensor]) -> None:
        """Take these tensors in place of `matrices()`."""
        for (table, key, _, rest), tensor in zip(list(self.matrices()), came, strict=True):
            new = table[key] = rest if tensor is rest else _like(rest, tensor)
            self.moved.append(_Moved(table, key, rest, new, new._version))

    def leave(self) -> None:
        """Put back what was there before. What was changed meanwhile stays changed."""
        for each in self.moved:
            now = each.table[each.key]
            if now is each.came and now._version == each.version:
                each.table[each.key] = each.rest
            elif now is not None:
                each.table[each.key] = _like(now, now.to(each.rest.device))
        drop_pages(each.rest for each in self.moved)
        self.moved = []


def _like(parameter: Tensor, tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if isinstance(parameter, nn.Parameter) else tensor


class Staging:
    """Bring units through two pinned buffers to two on the device, in turns, while the device computes.

    On a device without streams the same buffers are filled at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begun: Unit | None = None
        self._turn = 0
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._pinned, self._there = [torch.empty(0, dtype=torch.uint8)] * 2, [torch.empty(0, dtype=torch.uint8)] * 2
        self._copied = [torch.cuda.Event() for _ in range(2)] if self._cuda else []
        self._used = [torch.cuda.Event() for _ in range(2)] if self._cuda else []

    def begin(self, unit: Unit, dtype: torch.dtype) -> None:
        """Begin to bring a unit into the buffers of the next turn."""
        self._turn = turn = 1 - self._turn
        self.begun, self._views = unit, []
        size, spans = 0, []
        for _, _, name, tensor in unit.matrices():
            kind = _kind(name, tensor, dtype)
            spans.append((tensor, kind, slice(size, size + tensor.numel() * kind.itemsize)))
            size = -(-spans[-1][2].stop // _ALIGNMENT) * _ALIGNMENT
        if self._cuda:
            self._copied[turn].synchronize()  # until then the pinned buffer is being read
        if len(self._pinned[turn]) < size:
            if self._cuda:
                torch.cuda.synchronize(self.device)  # the old buffer may be in use
            self._pinned[turn] = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
            self._there[turn] = torch.empty(size, dtype=torch.uint8, device=self.device)
        pinned, there = self._pinned[turn], self._there[turn]
        for tensor, kind, span in spans:
            pinned[span].view(kind).view(tensor.shape).copy_(tensor)
            self._views.append(there[span].view(kind).view(tensor.shape))
        drop_pages(tensor for tensor, _, _ in spans)
        if self._stream is None:
            there[:size].copy_(pinned[:size])
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[turn])  # until then the block before the last one may be running
            there[:size].copy_(pinned[:size], non_blocking=True)
            self._copied[turn].record(self._stream)

    def bring(self, unit: Unit, dtype: torch.dtype) -> list[Tensor]:
        """Return the tensors of a unit where they run; they are valid until the turn after the next one."""
        if self.begun is not unit:
            self.begin(unit, dtype)
        self.begun = None
        if self._cuda:
            torch.cuda.current_stream(self.device).wait_event(self._copied[self._turn])
        return self._views

    def used(self) -> None:
        """Say that what was brought last is not used by anything that is launched from now on."""
        if self._cuda:
            self._used[self._turn].record(torch.cuda.current_stream(self.device))


def _kind(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return run_dtype(name, dtype) if tensor.dtype in _FLOATS else tensor.dtype


@dataclass
class Part:
    """A part of a model that comes and leaves. blocks: those that do so by themselves.

    brought: how many blocks, or whole parts, came so far. most: that were there at a time. nbytes: that came.
    """

    name: str
    root: Unit
    blocks: list[Unit] = field(default_factory=list)
    staging: Staging | None = None
    brought: int = 0
    most: int = 0
    nbytes: int = 0


class Offload:
    """Let the weights of a pipeline leave its device; `load(..., offload=)` makes it.

    staged: bring blocks through pinned memory; on CUDA always.
    """

    def __init__(self, pipe: Pipeline, mode: str, *, staged: bool = False) -> None:
        self.device, self.dtype, self.mode = pipe.device, pipe.dtype, mode
        self.staged = staged or pipe.device.type == "cuda"
        self.parts = [
            self._part("text encoder", pipe.text_encoder.t5, pipe.text_encoder.t5.encoder.block),
            self._part("VAE encoder", pipe.vae.encoder),
            self._part("VAE decoder", pipe.vae.decoder),
            self._part("transformer", pipe.transformer, pipe.transformer.blocks),
        ]
        self._there: Part | None = None
        self._lock = threading.RLock()  # threads that share a pipeline take turns

    def _part(self, name: str, module: nn.Module, blocks: Sequence[nn.Module] | nn.ModuleList = ()) -> Part:
        inner = list(blocks) if self.mode == "block" else []
        part = Part(name, Unit(module, inner), [Unit(block) for block in inner])
        # Always called, so that a forward pass that fails leaves everything in its place.
        module.register_forward_pre_hook(lambda *_: self._enter(part))
        module.register_forward_hook(lambda *_: self._lock.release(), always_call=True)
        for index, unit in enumerate(part.blocks):
            following = part.blocks[index + 1] if index + 1 < len(part.blocks) else None
            unit.module.register_forward_pre_hook(lambda *_, unit=unit: self._bring(part, unit))
            unit.module.register_forward_hook(
                lambda *_, unit=unit, following=following: self._leave(part, unit, following), always_call=True
            )
        return part

    def _enter(self, part: Part) -> None:
        self._lock.acquire()
        if self._there is part:
            return
        self.leave()
        came = self._moved(part.root)
        part.root.put(came)
        self._there = part
        part.nbytes += sum(tensor.nbytes for tensor in came)
        if not part.blocks:
            part.brought, part.most = part.brought + 1, 1
        elif self.staged:
            part.staging = Staging(self.device)

    def leave(self) -> None:
        """Let the part that is there leave."""
        with self._lock:
            part, self._there = self._there, None
            if part is not None:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # its buffers may be in use
                part.staging = None
                part.root.leave()

    def _moved(self, unit: Unit) -> list[Tensor]:
        """Return the tensors of a unit where and as they run: those of the file, or copies."""
        came: list[Tensor] = []
        for _, _, name, tensor in unit.matrices():
            came.append(tensor.to(self.device, _kind(name, tensor, self.dtype)))
            if came[-1] is not tensor:
                drop_pages([tensor])
        return came

    def _bring(self, part: Part, unit: Unit) -> None:
        came = self._moved(unit) if part.staging is None else part.staging.bring(unit, self.dtype)
        unit.put(came)
        part.brought += 1
        part.nbytes += sum(tensor.nbytes for tensor in came)
        ahead = part.staging is not None and part.staging.begun is not None
        part.most = max(part.most, sum(bool(each.moved) for each in part.blocks) + ahead)

    def _leave(self, part: Part, unit: Unit, following: Unit | None) -> None:
        unit.leave()
        if part.staging is not None:
            part.staging.used()
            if following is not None:
                part.staging.begin(following, self.dtype)
        elif following is not None:
            will_need(tensor for _, _, _, tensor in following.matrices())

    def lines(self) -> list[str]:
        """Return what was done so far, a line for each part."""
        what = {part.name: f"{len(part.blocks)} blocks" if part.blocks else "the whole part" for part in self.parts}
        return [
            f"offload {self.mode}: {part.name}: {what[part.name]}, came {part.brought} times, at most {part.most} at a "
            f"time, {part.nbytes / 2**20:.1f} MiB in all"
            for part in self.parts
            if part.brought
        ]


def memory_lines(pipe: Pipeline) -> list[str]:
    """Return what the options that save memory did so far, as lines."""
    lines = pipe.offload.lines() if pipe.offload else []
    if isinstance(pipe.vae, TiledVAE):
        lines.append(f"vae_tiling: {pipe.vae.tiles} tiles")
    if pipe.placement.quantize is not None:
        for name, part in (("transformer", pipe.transformer), ("text encoder", pipe.text_encoder.t5)):
            found = quantized_linears(part)
            if not found:  # a process without T5
                continue
            narrow, wide = (sum(sizes) for sizes in zip(*found.values(), strict=True))
            lines.append(
                f"quantize {pipe.placement.quantize}: {name}: {len(found)} linears of "
                f"{narrow / 2**20:.1f} MiB, which were {wide / 2**20:.1f} MiB"
            )
    return lines
