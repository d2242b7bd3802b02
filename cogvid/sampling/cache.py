"""Step caches: skip work of a step that can be predicted from the steps before. They change the video.

`STEP_CACHES` holds them by name; add your own to it. As an option, a cache is `NAME=VALUE[:PARAMETER=VALUE]...`, such
as `first-block=0.08` or `pyramid=2:range=100-800`. The value is a number. A parameter is text, and a keyword-only
parameter of whatever makes the cache. `ops.StepCache` says what a cache does.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cogvid.config import ModelConfig
from cogvid.ops import BlockContext, StepCache
from cogvid.sampling.schedule import Schedule

# Highest power first: TeaCache4CogVideoX1.5/teacache_sample_video.py of https://github.com/ali-vilab/TeaCache, 7c10efc.
_OF_5B = (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02)
COEFFICIENTS: dict[str, tuple[float, ...]] = {
    "cogvideox-2b": (-3.10658903e01, 2.54732368e01, -5.92380459e00, 1.75769064e00, -3.61568434e-03),
    "cogvideox-5b": _OF_5B,
    "cogvideox-5b-i2v": _OF_5B,
    "cogvideox1.5-5b": (2.50210439e02, -1.65061612e02, 3.57804877e01, -7.81551492e-01, 3.58559703e-02),
    "cogvideox1.5-5b-i2v": (1.22842302e02, -1.04088754e02, 2.62981677e01, -3.06009921e-01, 3.71213220e-02),
}


class _Cache:
    """What the caches share. state: the skipped steps, and what is kept for each branch.

    Without its unconditional rows a batch has another shape, so what is kept is of one branch. It is dropped if the
    branch did not run in the step before, and then the step is computed.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.timesteps = schedule.timesteps
        self.state: dict[str, Any] = {"skipped": [], "branches": {}}

    @property
    def skipped(self) -> list[int]:
        """The steps, from 0, in which something was skipped."""
        return self.state["skipped"]

    def _begin(self, context: BlockContext) -> tuple[int, dict[str, Any]]:
        """Return the step, and what is kept for this branch."""
        step, branches = context.step, self.state["branches"]
        if step is None:
            raise ValueError("step: got None, want the index of the step, which a step cache needs")
        for branch in [name for name, kept in branches.items() if kept["step"] < step - 1]:
            del branches[branch]
        kept = branches.setdefault(context.branch, {})
        kept["step"] = step
        return step, kept

    def _skip(self, step: int) -> None:
        if step not in self.skipped:
            self.skipped.append(step)


class FirstBlock(_Cache):
    """Run the first block alone, and the others only where its change of the video has moved enough.

    "Enough" is a relative L1 distance above `threshold` to the change at the last step that was computed. A skipped
    step gets what the other blocks added then. One decision is made for the whole batch. Must equal diffusers'
    `apply_first_block_cache`; the method is that of ParaAttention.
    """

    def __init__(self, model: ModelConfig, schedule: Schedule, threshold: float) -> None:  # noqa: ARG002
        super().__init__(schedule)
        self.threshold = _positive("first-block", threshold)

    def run(self, x: Tensor, context: BlockContext, blocks: Callable[..., Tensor]) -> Tensor:
        step, kept = self._begin(context)
        first = blocks(x, 0, 1)
        change = first[:, context.text_len :] - x[:, context.text_len :]
        if "rest" in kept and not _distance(change, kept["change"]) > self.threshold:
            self._skip(step)
            return first + kept["rest"]
        kept.pop("rest", None)  # before the blocks run, which need the memory
        kept["change"] = change
        x = blocks(first, 1)
        kept["rest"] = x - first
        return x


class TeaCache(_Cache):
    """Run the blocks only where the timestep embedding has moved enough since they last ran.

    At each step, the relative L1 distance of the embedding (before its SiLU) to that of the step before goes through a
    polynomial that was fitted for each model, and is added up. The blocks run when the sum is `threshold` or more, and
    at the first and the last step. A skipped step gets what all blocks added when they last ran. Must equal the
    authors' TeaCache4CogVideoX1.5 (https://arxiv.org/abs/2411.19108).

    coefficients: of the polynomial, highest power first, with "/" between them; None takes the published ones.
    """

    def __init__(
        self, model: ModelConfig, schedule: Schedule, threshold: float, *, coefficients: str | None = None
    ) -> None:
        super().__init__(schedule)
        self.threshold = _positive("teacache", threshold)
        if coefficients is None and model.name not in COEFFICIENTS:
            raise ValueError(
                f"step_cache: got teacache for {model.name}, which has no published coefficients, want them too, such "
                f"as teacache={threshold:g}:coefficients=1/0, or one of {', '.join(COEFFICIENTS)}"
            )
        self.coefficients = COEFFICIENTS[model.name] if coefficients is None else _numbers(coefficients)

    def run(self, x: Tensor, context: BlockContext, blocks: Callable[..., Tensor]) -> Tensor:
        step, kept = self._begin(context)
        assert context.emb is not None
        moved = math.inf
        if "change" in kept and step < len(self.timesteps) - 1:
            distance, moved = _distance(context.emb, kept["emb"]), 0.0
            for coefficient in self.coefficients:
                moved = moved * distance + coefficient
            moved += kept["moved"]
        kept["emb"] = context.emb
        if moved < self.threshold:
            self._skip(step)
            kept["moved"] = moved
            return x + kept["change"]
        kept.pop("change", None)
        out = blocks(x)
        kept |= {"change": out - x, "moved": 0.0}
        return out


class PyramidAttention(_Cache):
    """Compute attention in every n-th step, and take its output again in the steps between (pyramid attention
    broadcast, https://arxiv.org/abs/2408.12588).

    Only where the timestep is inside `range`; outside it attention always runs. What is kept is the output of each
    block's attention, projections included, so all layers together are much larger than the activations of a step. Must
    equal diffusers' `apply_pyramid_attention_broadcast` with its spatial range: CogVideoX has attention over all tokens
    alone.
    """

    def __init__(self, model: ModelConfig, schedule: Schedule, every: float, *, range: str = "100-800") -> None:  # noqa: ARG002
        super().__init__(schedule)
        if every < 2 or every != int(every):
            raise ValueError(f"step_cache: got pyramid={every:g}, want an integer, 2 or more")
        bounds = re.fullmatch(r"(\d{1,9})-(\d{1,9})", range)
        if bounds is None or int(bounds[1]) >= int(bounds[2]):
            raise ValueError(f"step_cache: got range={range:.60}, want LOW-HIGH, two timesteps such as 100-800")
        self.every, self.low, self.high = int(every), int(bounds[1]), int(bounds[2])

    def run(self, x: Tensor, context: BlockContext, blocks: Callable[..., Tensor]) -> Tensor:
        step, kept = self._begin(context)
        calls, outputs = kept.get("calls", 0), kept.setdefault("held", {})
        kept["calls"] = calls + 1
        again = calls % self.every != 0 and self.low < self.timesteps[step] < self.high
        if again:
            self._skip(step)

        def around_attention(x: Tensor, context: BlockContext, attention: Callable[..., Tensor]) -> Tensor:
            if not again:
                outputs[context.layer] = attention(x, context)
            return outputs[context.layer]

        return blocks(x, around_attention=around_attention)


# name -> (model, schedule of the run, value, **parameters) -> the cache of one generation
STEP_CACHES: dict[str, Callable[..., StepCache]] = {
    "first-block": FirstBlock,
    "teacache": TeaCache,
    "pyramid": PyramidAttention,
}


def make_step_cache(given: str | StepCache | None, model: ModelConfig, schedule: Schedule) -> StepCache | None:
    """Make the cache that an option names, for one generation; a cache is returned as it is.

    Raises:
        ValueError: no such cache, or it cannot be of this model.
    """
    if not isinstance(given, str):
        return given
    name, value, parameters = _read(given)
    return STEP_CACHES[name](model, schedule, value, **parameters)


def step_cache_name(given: object) -> str | None:
    """Return what a record says of a cache: the option as it is, if it is one, or the class of an object.

    Raises:
        ValueError: it is neither.
    """
    if given is None:
        return None
    if isinstance(given, str):
        _read(given)
        return given
    if not callable(getattr(given, "run", None)):
        raise ValueError(f"step_cache: got {given!r:.60}, want NAME=VALUE, or an object with `run`")
    return f"{type(given).__module__}.{type(given).__qualname__}"


def kept_units(given: str | None, layers: int) -> int:
    """Return how many `[rows, N, D]` a named cache holds while the blocks run; 0 for one that is not known."""
    name = (given or "").partition("=")[0]
    return {"first-block": 2, "pyramid": layers}.get(name, 0)  # teacache: none, as long as the blocks run


def _read(text: str) -> tuple[str, float, dict[str, str]]:
    first, *rest = text.split(":")
    name, equals, value = first.partition("=")
    if name not in STEP_CACHES or not equals:
        raise ValueError(f"step_cache: got {text!r:.60}, want NAME=VALUE with a NAME of {', '.join(STEP_CACHES)}")
    takes = inspect.signature(STEP_CACHES[name]).parameters.values()
    known = [each.name for each in takes if each.kind is each.KEYWORD_ONLY]
    parameters: dict[str, str] = {}
    for each in rest:
        parameter, equals, said = each.partition("=")
        if parameter not in known or not equals or parameter in parameters:
            wanted = " and ".join(f"{each}=..." for each in known) or "nothing"
            raise ValueError(f"step_cache: got {each!r:.60} for {name}, want {wanted} after the first colon, once")
        parameters[parameter] = said
    return name, _number(value), parameters


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"step_cache: got {text!r:.60}, want a finite number")
    return number


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(each) for each in text.split("/"))


def _positive(name: str, threshold: float) -> float:
    if threshold <= 0:
        raise ValueError(f"step_cache: got {name}={threshold:g}, want more than 0")
    return threshold


def _distance(now: Tensor, before: Tensor) -> float:
    """Return the relative L1 distance, with the arithmetic of the dtype."""
    return ((now - before).abs().mean() / before.abs().mean()).item()
