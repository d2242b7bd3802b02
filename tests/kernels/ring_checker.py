"""Runs `cogvid_kernels/_attention_ws.py` on a CPU, which Triton's interpreter cannot, and checks its barriers.

`run` executes the kernel's own Python functions, block by block and role by role, with stand-ins for the hardware's
operations. The stand-ins compute with PyTorch, so the results can be compared, and note what each role does in which
order: a role's steps do not depend on data. `explore` then tries every order in which the roles and the copy engine
can take these steps.

The stand-ins follow the PTX manual:

- mbarrier: a phase is complete when the expected arrivals have been counted and the announced bytes have arrived. A
  wait for parity p passes while the phase that is not complete yet has the other parity.
- copies finish at any later time, in any order.
- wgmma of one warpgroup finish in order; a wait for n finishes all but the last n; until then they read their operands.

What this cannot show: layouts (which thread holds which element), and anything about time.
"""

from __future__ import annotations

import functools
import operator
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction

from cogvid_kernels import _attention_ws, _softmax
from cogvid_kernels._tiles import Tile


class RingError(AssertionError):
    """The schedule is wrong."""


# A step of a role is a tuple that begins with its kind.
# "wait", barrier, parity.
# "arrive", barrier.
# "expect", barrier, bytes: one arrival, and so many bytes to come.
# "copy", slot, tile, barrier, bytes: begins to write the slot; the tile counts the copies into slots of this name.
# "read", slot, tile: a wgmma begins to read the slot, which must hold that tile.
# "done", slot: that wgmma has ended.
# A barrier and a slot are pairs of a name and a number: the first slot of keys is named k_ring and has number 0.
Step = tuple[Any, ...]


@dataclass
class Recording:
    """What one block does: the steps of each role, the producer last, and the arrivals that each barrier expects."""

    roles: list[list[Step]]
    arrivals: dict[tuple[str, int], int]
    num_tiles: int


class Wgmma:
    """One asynchronous product and the slots that it reads."""

    def __init__(self, slots: Sequence[tuple[str, int]]) -> None:
        self.slots, self.finished = slots, False


class Value:
    """A tensor or a number of the kernel, the tile whose logits it was made of, and the wgmma that writes it."""

    def __init__(self, data: Tensor, tile: int | None = None, wgmma: Wgmma | None = None) -> None:
        self.data, self.tile, self.wgmma = data, tile, wgmma

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def reshape(self, shape: Sequence[int]) -> Value:
        return apply(lambda x: x.reshape(shape), self)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return apply(lambda x: x.view(dtype) if bitcast else x.to(dtype), self)

    def __getitem__(self, index: Any) -> Value:
        return apply(lambda x: x[index], self)

    def __int__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        raise RingError("the schedule depends on data")

    __hash__ = None  # type: ignore[assignment]


def apply(function: Callable[..., Any], *values: Any) -> Value:
    """Compute with the values' tensors; what is left of a running wgmma is refused."""
    parents = [x for x in values if isinstance(x, Value)]
    if any(x.wgmma is not None and not x.wgmma.finished for x in parents):
        raise RingError("a register is used while a wgmma writes it")
    tiles = {x.tile for x in parents} - {None}
    result = function(*(x.data if isinstance(x, Value) else x for x in values))
    return Value(torch.as_tensor(result), tiles.pop() if len(tiles) == 1 else None)


for _name in ("add", "mul", "truediv", "floordiv", "sub", "mod", "and_", "lt", "le", "ge", "ne", "eq"):
    _method = getattr(operator, _name)
    setattr(Value, f"__{_name.rstrip('_')}__", lambda self, other, f=_method: apply(f, self, other))
    if _name in ("add", "mul", "sub"):
        setattr(Value, f"__r{_name}__", lambda self, other, f=_method: apply(lambda x, y: f(y, x), self, other))


class Pointer:
    """The address of elements of a contiguous tensor."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor.view(-1), offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + offset)

    def load(self) -> Value:
        return apply(lambda i: self.tensor[i], self.offset)

    def store(self, value: Value, mask: Value) -> None:
        def write(offsets: Tensor, values: Tensor, mask: Tensor) -> Tensor:
            offsets, values, mask = torch.broadcast_tensors(offsets, values, mask)
            assert not (offsets[mask] < 0).any()
            self.tensor[offsets[mask]] = values[mask].to(self.tensor.dtype)
            return mask

        apply(write, self.offset, value, mask)


class Slot:
    """One buffer of shared memory, or a view of it."""

    def __init__(self, place: tuple[str, int], dtype: Any) -> None:
        self.place, self.dtype = place, dtype
        self.data: Tensor | None = None

    def reshape(self, _: Any) -> Slot:
        return self

    permute = reshape

    def load(self, _: Any) -> Value:
        assert self.data is not None
        return Value(self.data)


class Buffers:
    """Several slots or barriers of one name."""

    def __init__(self, name: str, dtype: Any, shape: Sequence[int]) -> None:
        self.name, self.dtype = name, dtype
        self.type = types.SimpleNamespace(shape=list(shape))
        self.slots = [Slot((name, i), dtype) for i in range(shape[0])]
        self.place = (name, 0)  # of a barrier that is not one of several

    def index(self, i: int) -> Slot:
        return self.slots[i]


BUFFERS = ("q_tiles", "k_ring", "v_ring", "q_full", "full", "empty")  # in the order of their allocation


class Hardware:
    """The stand-ins of one block; they append to the steps of the role that runs."""

    def __init__(self, block: int) -> None:
        self.steps: list[Step] = []
        self.flying: list[Wgmma] = []
        self.buffers: list[Buffers] = []
        self.copies: dict[str, list[Tensor]] = {name: [] for name in BUFFERS[:3]}
        self.arrivals: dict[tuple[str, int], int] = {}
        self.partitions: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        common = {
            "sum": lambda x, axis: apply(lambda x: x.sum(axis), x),
            "where": lambda c, x, y: apply(lambda c, x: torch.where(c, x, y), c, x),
            **{f.__name__: functools.partial(apply, f) for f in (torch.exp2, torch.log2, torch.sqrt)},
            **{name: getattr(torch, name) for name in DTYPES},
        }
        self.tl = types.SimpleNamespace(**common)
        self.gl = types.SimpleNamespace(
            **common,
            allocate_shared_memory=self.allocate,
            static_range=range,
            cdiv=lambda a, b: -(-a // b),
            program_id=lambda _: Value(torch.tensor(block)),
            warp_specialize=lambda partitions, *_: self.partitions.extend(partitions),
            inline_asm_elementwise=assembly,
            split=lambda x: (x[..., 0], x[..., 1]),
            join=lambda a, b: apply(lambda a, b: torch.stack((a, b), -1), a, b),
            convert_layout=lambda x, _: x,
            arange=lambda first, end, layout: Value(torch.arange(first, end)),  # noqa: ARG005
            zeros=lambda shape, dtype, _: Value(torch.zeros(shape, dtype=dtype)),
            full=lambda shape, value, dtype, _: Value(torch.full(shape, value, dtype=dtype)),
            load=Pointer.load,
            store=Pointer.store,
            **{name: lambda *_, **__: None for name in LAYOUTS},
        )
        self.mbarrier = types.SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda barrier, count: self.arrivals.update({barrier.place: count}),
            wait=lambda barrier, parity: self.steps.append(("wait", barrier.place, parity)),
            arrive=lambda barrier, count: self.steps.extend([("arrive", barrier.place)] * count),
            expect=lambda barrier, size: self.steps.append(("expect", barrier.place, size)),
        )

    def allocate(self, dtype: Any, shape: Sequence[int], _: Any) -> Buffers:
        self.buffers.append(Buffers(BUFFERS[len(self.buffers)], dtype, shape))
        return self.buffers[-1]

    def copy(self, source: Any, coordinates: Sequence[Any], barrier: Any, target: Slot) -> None:
        """Copy a block of a descriptor; what lies outside is zero."""
        b, h, start, channel = (int(x) for x in coordinates)
        rows = source.block_shape[2]
        assert channel == 0
        assert source.block_shape == [1, 1, rows, source.shape[3]]
        tokens = source.base.as_strided(source.shape, source.strides, source.base.storage_offset())[b, h]
        data = torch.zeros(rows, source.shape[3], dtype=source.dtype)
        inside = tokens[start : start + rows]
        data[: len(inside)] = inside
        copies = self.copies[target.place[0]]
        self.steps.append(("copy", target.place, len(copies), barrier.place, data.numel() * data.element_size()))
        copies.append(data)
        target.data = data

    def product(self, a: Any, b: Slot, acc: Value, use_acc: bool = True, is_async: bool = False) -> Value:
        """warpgroup_mma: queries of shared memory by keys, or weights by the values of their tile."""
        assert is_async
        if isinstance(a, Slot):
            tile = len([step for step in self.steps if step[0] == "read" and step[1][0] == b.place[0]])
            self.steps.append(("read", a.place, a.place[1]))
            slots = (a.place, b.place)
            left, right = a.load(None), Value(self.copies[b.place[0]][tile].T)
        else:
            tile, slots = a.tile, (b.place,)
            left, right = a, Value(self.copies[b.place[0]][tile])
        self.steps.append(("read", b.place, tile))
        result = apply(lambda x, y: x.float() @ y.float(), left, right).data
        if use_acc:
            # Products of one warpgroup finish in order, so the sum may still be running.
            result = result + acc.data
        self.flying.append(Wgmma(slots))
        return Value(result, tile if isinstance(a, Slot) else None, self.flying[-1])

    def wait(self, left: int, results: Sequence[Value]) -> Value:
        """warpgroup_mma_wait."""
        while len(self.flying) > left:
            ended = self.flying.pop(0)
            ended.finished = True
            self.steps.extend(("done", slot) for slot in ended.slots)
        return apply(lambda x: x, results[0])


LAYOUTS = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout")
DTYPES = ("int16", "int32", "int64", "float16", "bfloat16", "float32")


def assembly(text: str, _: str, values: Sequence[Value], dtype: Any, **__: Any) -> Any:
    """The two instructions of the kernel: pack two rounded numbers (the first one high), and take them apart."""
    if found := re.fullmatch(r"cvt\.rn\.(b?f16)x2\.f32 \$0, \$(\d), \$(\d);", text):
        half = {"f16": torch.float16, "bf16": torch.bfloat16}[found[1]]
        high, low = (values[int(i) - 1] for i in found.groups()[1:])
        assert dtype == torch.int32
        return apply(lambda x, y: torch.stack((x, y), -1).to(half).view(torch.int32)[..., 0], low, high)
    assert text == "mov.b32 {$0, $1}, $2;"
    assert dtype == (torch.int16, torch.int16)
    halves = apply(lambda x: x.contiguous()[..., None].view(torch.int16), *values)
    return halves[..., 0], halves[..., 1]


Change = Callable[[dict[str, Any], Hardware], None]


def run(arguments: dict[str, Any], blocks: int, change: Change | None = None) -> Recording:
    """Run the kernel on CPU tensors, block after block; return what the last one does.

    arguments: of `_attention_ws.arguments`.
    change: puts a fault in; gets the names that the kernel's functions see, and the stand-ins.
    """
    recording = None
    for block in range(blocks):
        hardware = Hardware(block)
        arithmetic = namespace(_softmax, hardware)
        names = namespace(_attention_ws, hardware)
        names.update(
            {name: arithmetic[name] for name in names if name in arithmetic and not name.startswith("_")},
            gl=hardware.gl,
            mbarrier=hardware.mbarrier,
            fence_async_shared=lambda: None,
            _load=hardware.copy,
            warpgroup_mma=hardware.product,
            warpgroup_mma_wait=hardware.wait,
            warpgroup_mma_init=lambda x: x,
        )
        if change is not None:
            change(names, hardware)
        values = {name: device_side(value) for name, value in arguments.items() if name in KERNEL_ARGUMENTS}
        names["_attention_ws_kernel"](**values)
        roles = []
        producer_first = [hardware.partitions[-1], *hardware.partitions[:-1]]
        for function, operands in producer_first:
            hardware.steps, hardware.flying = [], []
            function(*operands)
            if hardware.flying:
                raise RingError("a role ends while its wgmma runs")
            roles.append(hardware.steps)
        recording = Recording([*roles[1:], roles[0]], hardware.arrivals, len(hardware.copies["k_ring"]))
    assert recording is not None
    return recording


KERNEL_ARGUMENTS = tuple(_attention_ws._attention_ws_kernel.arg_names)


def namespace(module: Any, hardware: Hardware) -> dict[str, Any]:
    """Return the module's globals with its kernels as plain functions and its constants as numbers."""
    names = {name: getattr(value, "value", value) for name, value in vars(module).items()}
    names["tl"] = hardware.tl
    for name, value in vars(module).items():
        if isinstance(value, GluonJITFunction) or (hasattr(value, "fn") and value.fn.__module__ == module.__name__):
            names[name] = types.FunctionType(value.fn.__code__, names, name)
    return names


def device_side(value: Any) -> Any:
    """Return a launch's argument as the kernel sees it."""
    if isinstance(value, Tensor):
        return Pointer(value)
    if hasattr(value, "block_shape"):
        return types.SimpleNamespace(dtype=value.base.dtype, **vars(value))
    return value


def record(num_keys: int, slots: int, change: Change | None = None) -> Recording:
    """Return what the block of one short sequence does."""
    q, k, v = torch.ones(1, 192, 1, 64), torch.ones(1, num_keys, 1, 64), torch.ones(1, num_keys, 1, 64)
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    out, norms = torch.empty(1, 192, 64, dtype=q.dtype), torch.full((1, 1), 8.0)
    redo = torch.zeros(1, 1, 2, dtype=torch.int32)
    tile = Tile({"BLOCK_M": 192, "BLOCK_N": 128}, 4, slots)
    return run(_attention_ws.arguments(q, k, v, out, None, norms, redo, 128, 0.2, tile), 1, change)


# In a state: a barrier is [phases completed, arrivals missing, bytes missing]. A slot is [the tile in it, or WRITING,
# the wgmma that read it now, the consumers that have read it].
WRITING = -1


def explore(recording: Recording) -> int:
    """Try every order; return how many states there are.

    Raises:
        RingError: an order in which a slot is read before it is full or written before it is empty, in which roles wait
            for ever, or in which the block ends while a copy runs.
    """
    barriers = sorted(recording.arrivals)
    slots = sorted({step[1] for role in recording.roles for step in role if step[0] in ("copy", "read")})
    consumers = len(recording.roles) - 1
    barrier_of, slot_of = ({x: i for i, x in enumerate(names)} for names in (barriers, slots))
    readers = [1 if name == "q_tiles" else consumers for name, _ in slots]
    reads_of = [recording.num_tiles if name == "q_tiles" else 1 for name, _ in slots]
    begin = (
        (0,) * len(recording.roles),
        tuple((0, recording.arrivals[name], 0) for name in barriers),
        tuple((None, 0, 0) for _ in slots),
        frozenset(),
    )

    def arrive(states: list[Any], i: int, arrivals: int, bytes: int) -> None:
        phase, missing, pending = states[i]
        missing, pending = missing - arrivals, pending + bytes
        if missing < 0:
            raise RingError(f"{barriers[i]}: more arrivals than the phase expects")
        if missing == 0 and pending == 0:
            phase, missing = phase + 1, recording.arrivals[barriers[i]]
        states[i] = phase, missing, pending

    def take(state: Any, role: int) -> Any | None:
        """Return the state after the role's next step; None while it must wait."""
        places, barrier_states, slot_states, copies = state
        kind, target, *rest = recording.roles[role][places[role]]
        if kind == "wait" and barrier_states[barrier_of[target]][0] & 1 == rest[0]:
            return None
        places = (*places[:role], places[role] + 1, *places[role + 1 :])
        if kind in ("arrive", "expect"):
            changed = list(barrier_states)
            arrive(changed, barrier_of[target], 1, rest[0] if kind == "expect" else 0)
            barrier_states = tuple(changed)
        elif kind != "wait":
            i = slot_of[target]
            held, reading, read = slot_states[i]
            if kind == "copy":
                tile, barrier, size = rest
                if reading or held == WRITING or (held is not None and read < readers[i] * reads_of[i]):
                    raise RingError(f"{target}: written before it is empty")
                after = (WRITING, 0, 0)
                copies = copies | {(i, tile, barrier_of[barrier], size)}
            elif kind == "read":
                if held != rest[0]:
                    raise RingError(f"{target}: holds {held}, read for {rest[0]}: before it is full, or the wrong tile")
                after = (held, reading + 1, read)
            else:
                after = (held, reading - 1, read + 1)
            slot_states = (*slot_states[:i], after, *slot_states[i + 1 :])
        return places, barrier_states, slot_states, copies

    def land(state: Any, copy: Any) -> Any:
        places, barrier_states, slot_states, copies = state
        i, tile, barrier, size = copy
        changed = list(barrier_states)
        arrive(changed, barrier, 0, -size)
        return places, tuple(changed), (*slot_states[:i], (tile, 0, 0), *slot_states[i + 1 :]), copies - {copy}

    ends = tuple(len(role) for role in recording.roles)
    seen, stack = {begin}, [begin]
    while stack:
        state = stack.pop()
        moves = [land(state, copy) for copy in state[3]]
        for role, place in enumerate(state[0]):
            if place < ends[role] and (after := take(state, role)) is not None:
                moves.append(after)
        if not moves and state[0] != ends:
            stuck = [recording.roles[i][p] for i, p in enumerate(state[0]) if p < ends[i]]
            raise RingError(f"deadlock: all wait, {stuck}")
        if state[0] == ends and state[3]:
            raise RingError("the block ends while a copy runs")
        new = [move for move in moves if move not in seen]
        seen.update(new)
        stack.extend(new)
    return len(seen)
