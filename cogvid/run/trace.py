"""Find the first module whose output departs when a run is repeated with other operations, dtype or device.

The whole run of the first record is made again: text encoder, VAE encoder, the transformer at every step, decoder. Each
module without modules inside, and each operation of `Ops`, is computed a second time as the second record says, from
the inputs that it has in the first run. So errors do not add up from one module or step to the next, and what is found
is where a difference arises, not where it has grown. Both outputs are compared at once and dropped; three numbers stay.
Not compared is the arithmetic between modules, such as T5's softmax, and that of guidance and samplers.

What rounding alone can do is measured: the same module gets inputs in which each number is changed by as much as one
rounding in the narrower of the two dtypes. A module departs beyond rounding when its difference is more than
`TOLERANCE` times that change and one rounding of the output together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cogvid.models.vae import ConvCache
from cogvid.ops import Ops
from cogvid.run.given import VIDEOS
from cogvid.run.load import load_checkpoint
from cogvid.run.pipeline import Pipeline
from cogvid.run.record import ENVIRONMENT, read_embedded_image, read_record
from cogvid.run.replay import check_replayable, find_checkpoint
from cogvid.run.settings import OPTIONS
from cogvid.weights.load_options import LOAD_OPTIONS
from cogvid.weights.parallel_option import check_one_process
from cogvid.weights.placement import resolve_placement

TOLERANCE = 4
_SAME = {"model", "weights", "qk_norm", "quantize", "vae_tiling", "lora", "last_norm_eps", "position_tables"}
_MAY_DIFFER = {*ENVIRONMENT, "guidance_schedule", "enhanced"} - _SAME
_FUSED = ("norm1", "norm2", "norm_out", "q_norm", "k_norm", "mlp_in")  # a hook on these would change what runs


@dataclass(frozen=True)
class Call:
    """A module or an operation that was computed twice.

    step: of the sampler, from 0; None outside the transformer. error: relative RMS difference. rounding: what explains
    it.
    """

    step: int | None
    name: str
    error: float
    rounding: float

    @property
    def departs(self) -> bool:
        return not self.error <= TOLERANCE * self.rounding  # NaN departs


@dataclass
class Trace:
    """All calls of a trace, in order."""

    calls: list[Call] = field(default_factory=list)

    @property
    def first(self) -> Call | None:
        """The first call that departs beyond rounding."""
        return next((call for call in self.calls if call.departs), None)

    def to_dict(self) -> dict[str, Any]:
        """Return it ready for JSON, with None for a number that is not finite."""
        first = None if self.first is None else _fields(self.first)
        return {"first": first, "tolerance": TOLERANCE, "calls": [_fields(call) for call in self.calls]}

    def lines(self) -> list[str]:
        """Return the trace as lines: what departs, or else the largest error in terms of rounding."""
        steps = len({call.step for call in self.calls} - {None})
        what = f"{len(self.calls)} calls of modules and operations, in {steps} steps and outside of them,"
        found = [f"{what} were computed twice from the same inputs"]
        if self.first is None:
            worst = max(self.calls, key=lambda call: call.error / call.rounding)
            found.append(f"none departs beyond rounding; the largest: {_said(worst)}")
        else:
            count = sum(call.departs for call in self.calls)
            found.append(f"{count} depart beyond rounding; the first: {_said(self.first)}")
        return found


def trace(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    model: str | None = None,
    local_files_only: bool = False,
) -> Trace:
    """Trace two videos, whose records differ in device, dtype or operations alone. model: as for `replay`.

    Raises:
        ValueError: the records differ in something else, or do not hold all that the run was given.
    """
    check_one_process("trace", os.fspath(first))
    records = [read_record(path) for path in (first, second)]
    for record, path in zip(records, (first, second), strict=True):
        check_replayable(record, path)
    names = [n for n in sorted({*records[0], *records[1]} - _MAY_DIFFER) if records[0].get(n) != records[1].get(n)]
    if names:
        raise ValueError(f"trace: got records that differ in {names[0]}, want device, dtype or ops alone")
    record = records[0]
    for name in (*VIDEOS, "last_image", "noise"):
        if record.get(name) is not None:
            raise ValueError(f"trace: got a run with a {name} of its own, want one from words or an embedded image")
    image = read_embedded_image(first) if record["image"] else None
    if record["image"] and image is None:
        raise ValueError("trace: got a record with the hash of an image alone, want an embedded image")
    checkpoint = find_checkpoint(record, model, local_files_only)
    pipes = []
    for each in records:
        options = {name: each[name] for name in LOAD_OPTIONS}
        # They change no result but by rounding, and move weights that are read here.
        options |= {"offload": None, "parallel": None, "shard_weights": False}
        place = resolve_placement(**options)
        pipes.append(load_checkpoint(checkpoint, place(checkpoint.model.dtype)))
    call = {"image": image, "negative_prompt": (record["negative_prompt"] or [""])[0], "seed": record["seed"]}
    options = call | {name: record[name] for name in OPTIONS}
    return trace_pipelines(pipes[0], pipes[1], record["prompt"][0], progress=True, **options)


@torch.no_grad()
def trace_pipelines(a: Pipeline, b: Pipeline, prompt: str, *, progress: bool = False, **options: Any) -> Trace:
    """Run `a`, each call repeated with `b`. progress, options: of the call, for one video."""
    lockstep = _Lockstep(a, b)
    try:
        with lockstep:
            [frames] = a(prompt, output_type="stream", progress=progress, **options).frames
            for _ in frames:  # decoded as they are asked for
                pass
    except FloatingPointError:  # the run stops at a step that is not finite; the trace says where that began
        if lockstep.trace.first is None:
            raise
    return lockstep.trace


class _Lockstep:
    """Hooks on modules of a pipeline, and operations around its own, that repeat each call with another pipeline."""

    def __init__(self, a: Pipeline, b: Pipeline) -> None:
        self.trace = Trace()
        self._a, self._b = a, b
        self._own = a.placement.ops, a.placement.ops_name
        self._unit = max(torch.finfo(pipe.dtype).eps for pipe in (a, b)) / 2
        self._generator = torch.Generator().manual_seed(0)
        self._where: list[str] = []
        self._step: int | None = None
        self._busy = False
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        operations = {
            name: self._twice(name, operation, getattr(self._b.placement.ops, name))
            for name, operation in vars(self._own[0]).items()
        }
        self._a.set_ops(Ops(**operations))  # first: it replaces modules of T5 that are hooked below
        transformer = self._a.transformer
        self._handles.append(transformer.register_forward_pre_hook(self._begin_step, with_kwargs=True))
        self._handles.append(transformer.register_forward_hook(self._end_step))
        parts = {"text_encoder": "t5", "transformer": None, "vae": None}
        for part, inner in parts.items():
            mine, other = (
                (getattr(p, part) if inner is None else getattr(getattr(p, part), inner)) for p in self._pair
            )
            others = dict(other.named_modules())
            for name, module in mine.named_modules():
                if name.rpartition(".")[2] in _FUSED:
                    continue
                self._hook(f"{part}.{name}".rstrip("."), module, others[name])

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._a.set_ops(self._own[0])
        self._a.placement = dataclasses.replace(self._a.placement, ops_name=self._own[1])

    @property
    def _pair(self) -> tuple[Pipeline, Pipeline]:
        return self._a, self._b

    def _begin_step(self, _module: nn.Module, _args: Any, kwargs: Any) -> None:
        self._step = kwargs["step"]

    def _end_step(self, *_: object) -> None:
        self._step = None

    def _hook(self, name: str, module: nn.Module, other: nn.Module) -> None:
        """Name the module for the operations in it; repeat it if it has no modules inside."""
        leaf = not list(module.children()) and type(module).forward is not nn.Module.forward
        kept: list[Any] = []

        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._busy:
                self._where.append(name)
                if leaf:  # now, because a call may change a cache that it is given
                    kept.append(
                        [(self._cast(args, module, to), self._cast(kwargs, module, to)) for to in (False, True)]
                    )

        def after(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            if not self._busy:
                self._where.pop()
                if leaf:
                    (same, same_kw), (args, kwargs) = kept.pop()
                    _rekey((*args, *kwargs.values()), module, other)
                    self._compare(
                        name,
                        output,
                        lambda: other(*args, **kwargs),
                        lambda change: module(*change(same), **change(same_kw)),
                    )

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _twice(self, name: str, mine: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(mine)
        def call(*args: Any, **kwargs: Any) -> Any:
            output = mine(*args, **kwargs)
            if not self._busy:
                where = f"{self._where[-1]}: {name}" if self._where else name
                theirs, more = ([self._moved(each) for each in args], {k: self._moved(v) for k, v in kwargs.items()})
                self._compare(
                    where, output, lambda: other(*theirs, **more), lambda change: mine(*change(args), **kwargs)
                )
            return output

        return call

    def _compare(
        self, name: str, output: Any, other: Callable[[], Any], again: Callable[[Callable[[Any], Any]], Any]
    ) -> None:
        """Keep how far the other output is, and how far one rounding of the inputs moves this one."""
        self._busy = True
        try:
            error, moved = distance(output, other()), distance(output, again(self._rounded))
        finally:
            self._busy = False
        self.trace.calls.append(Call(self._step, name, error, moved + self._unit))

    def _rounded(self, values: Any) -> Any:
        """Change each floating-point number by up to one rounding."""
        if isinstance(values, (tuple, list)):
            return type(values)(self._rounded(each) for each in values)
        if isinstance(values, dict):
            return {name: self._rounded(each) for name, each in values.items()}
        if not isinstance(values, Tensor) or not values.is_floating_point():
            return values
        change = 2 * torch.rand(values.shape, generator=self._generator).to(values.device) - 1
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return (wide * (1 + 2 * self._unit * change)).to(values.dtype)

    def _moved(self, value: Any) -> Any:
        """Bring an operation's argument to the other pipeline. Rotary tables, which are tuples, stay fp32."""
        if isinstance(value, tuple):
            return tuple(each.to(self._b.device) for each in value)
        return self._cast(value, None, True)

    def _cast(self, value: Any, module: nn.Module | None, to_other: bool) -> Any:
        """Copy what a module is given, for the other pipeline or for this one."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._cast(each, module, to_other) for each in value)
        if isinstance(value, dict):
            return {name: self._cast(each, module, to_other) for name, each in value.items()}
        if isinstance(value, ConvCache):
            copy = ConvCache()
            if module in value.frames:
                copy.frames[module] = self._cast(value.frames[module], module, to_other)
            return copy
        if isinstance(value, torch.dtype) and value == self._a.dtype:
            return self._b.dtype if to_other else value
        if not isinstance(value, Tensor) or not to_other:
            return value
        same = value.dtype == self._a.dtype and value.is_floating_point()
        return value.to(self._b.device, self._b.dtype if same else value.dtype)


def _rekey(values: tuple[Any, ...], module: nn.Module, other: nn.Module) -> None:
    """Put the frames of a convolution's cache under the module that will look for them."""
    for value in values:
        if isinstance(value, ConvCache) and module in value.frames:
            value.frames[other] = value.frames.pop(module)


def distance(output: Any, other: Any) -> float:
    """Return the relative RMS difference of two outputs: tensors, or tuples of them."""
    outputs, others = ([each] if isinstance(each, Tensor) else list(each) for each in (output, other))
    errors = [0.0]
    for x, y in zip(outputs, others, strict=True):
        wide, norm = x.double(), x.double().norm().item()
        difference = (y.to(x.device).double() - wide).norm().item()
        errors.append(difference / norm if norm else difference)
    return max(errors, key=lambda error: (error != error, error))  # NaN above all


def _fields(call: Call) -> dict[str, Any]:
    values = dataclasses.asdict(call)
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}


def _said(call: Call) -> str:
    where = call.name if call.step is None else f"step {call.step}, {call.name}"
    return f"{where}, error {call.error:.2g}, of which rounding explains {TOLERANCE * call.rounding:.2g}"
