"""What happens after each step of a run: functions `(step, x, state) -> x or None`, and how they are put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm.auto import tqdm

from cogvid.run.saved_run import SavedRun
from cogvid.run.signals import stop_if_asked
from cogvid.sampling.samplers import OnStep, State, Step, as_latents

if TYPE_CHECKING:
    from cogvid.run.pipeline import Pipeline


def after_each_step(
    pipe: Pipeline,
    bar: tqdm,
    first: Mapping[str, Tensor | None],
    callback: Callable[..., Any] | None,
    saved_run: SavedRun | None,
) -> OnStep:
    """Return what a pipeline does after each step. first: the tensors that the run began with, by name.

    A step is saved last, so that what is saved is finite and has what the callback made of it.
    """

    def advance(step: Step, x: Tensor, state: State) -> None:  # noqa: ARG001 - the driver's signature
        stop_if_asked()
        bar.update()

    steps: list[OnStep] = [advance, check_finite(pipe, first)]
    if callback is not None:
        steps.append(call_back(pipe, callback))
    if saved_run is not None:
        steps.append(saved_run.on_step)
    return in_order(*steps)


def in_order(*each: OnStep) -> OnStep:
    """Return a function that calls these in turn; each gets the x that those before it made."""

    def on_step(step: Step, x: Tensor, state: State) -> Tensor:
        for one in each:
            replaced = one(step, x, state)
            x = x if replaced is None else as_latents("latents", replaced, x)
        return x

    return on_step


def call_back(pipe: Pipeline, callback: Callable[..., Any]) -> OnStep:
    """Return what calls a `callback_on_step_end` as the pipeline promises."""

    def on_step(step: Step, x: Tensor, state: State) -> Tensor | None:  # noqa: ARG001 - the driver's signature
        given = {"latents": x, **({"x0": step.predicted[-1]} if step.predicted else {})}
        tensors = {name: rearrange(value, "b c t h w -> b t c h w") for name, value in given.items()}
        returned = callback(pipe, step.index, step.timestep, tensors) or {}
        if "latents" not in returned:
            return None
        replaced = rearrange(returned["latents"], "b t c h w -> b c t h w")
        if _broken(replaced):
            raise _not_finite(step, pipe.dtype, "callback_on_step_end returned them")
        return replaced

    return on_step


def check_finite(pipe: Pipeline, first: Mapping[str, Tensor | None]) -> OnStep:
    """Return what raises `FloatingPointError` at the first step whose latents are not finite in the run's dtype."""

    def on_step(step: Step, x: Tensor, state: State) -> None:  # noqa: ARG001 - the driver's signature
        if not _broken(x.to(pipe.dtype)):
            return
        # Weights of 8 bits were checked when they were made.
        named = pipe.transformer.named_parameters()
        weights = {f"the weight {name}": w for name, w in named if type(w) is nn.Parameter and w.itemsize > 1}
        broken = next((name for name, tensor in {**first, **weights}.items() if _broken(tensor)), None)
        raise _not_finite(step, pipe.dtype, f"{broken} had such numbers before" if broken else _overflow(pipe))

    return on_step


def _not_finite(step: Step, dtype: torch.dtype, cause: str) -> FloatingPointError:
    where = f"step {step.index + 1} of {len(step.schedule)} (timestep {step.timestep})"
    return FloatingPointError(
        f"latents: got numbers that are not finite at {where} in {dtype}, want finite ones; likely cause: {cause}"
    )


def _overflow(pipe: Pipeline) -> str:
    """Say what makes numbers infinite in a run whose inputs and weights are finite."""
    if pipe.dtype == torch.float16:
        return "float16 overflows above 65504, which bfloat16 and float32 do not"
    without = "" if pipe.ops == "torch" else f", or one of the operations {pipe.ops!r}: try ops='torch'"
    return f"an adapter, a sampler or a guidance scale that makes numbers too large for {pipe.dtype}{without}"


def _broken(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
