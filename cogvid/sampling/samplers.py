"""The samplers, each one step as a function, and `sample`, which runs them.

Must equal diffusers' `CogVideoXDPMScheduler` (DPM-Solver++ SDE 2M, https://arxiv.org/abs/2211.01095) and
`CogVideoXDDIMScheduler` (https://arxiv.org/abs/2010.02502) in the CogVideoX pipelines, with the same random draws.
`SAMPLERS` holds the samplers by name; add your own to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Generator, Tensor

from cogvid.ops import Branch
from cogvid.sampling.guidance import guide
from cogvid.sampling.schedule import Schedule

Generators = Generator | Sequence[Generator]
State = dict[str, Any]


class Network(Protocol):
    def __call__(self, x: Tensor, index: int, timestep: int, branch: Branch, /) -> Tensor:
        """Return what the network predicts for `x` `[B, C, T, h, w]`, which is in the network's dtype.

        index: of the step. branch: "cond" wants `[B, C, T, h, w]`; "both" wants `[2B, C, T, h, w]`, the unconditional
        half first.
        """
        ...


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a run, as a sampler sees it.

    index: from 0. predict: (x, timestep) -> the network's guided prediction, in the dtype of x.
    noise: draw normal noise of x's shape, rounded as the network's dtype rounds it.
    predicted: what `x0` returned in this step, in order.
    """

    index: int
    schedule: Schedule
    predict: Callable[[Tensor, int], Tensor]
    noise: Callable[[], Tensor]
    predicted: list[Tensor] = field(default_factory=list)

    @property
    def timestep(self) -> int:
        """Where the step begins."""
        return self.schedule.timesteps[self.index]

    @property
    def prev_timestep(self) -> int:
        """Where the step ends; negative for clean latents."""
        return self.schedule.prev_timesteps[self.index]

    @property
    def alpha(self) -> Tensor:
        """abar where the step begins, a 0-dim tensor on the CPU."""
        return self.schedule.alpha(self.timestep)

    @property
    def alpha_prev(self) -> Tensor:
        """abar where the step ends."""
        return self.schedule.alpha(self.prev_timestep)

    def x0(self, x: Tensor, timestep: int | None = None) -> Tensor:
        """Run the network on `x`; return the clean latents that it predicts.

        timestep: of `x`; None is the step's own. Samplers of higher order may use others too.
        """
        timestep = self.timestep if timestep is None else timestep
        self.predicted.append(self.schedule.predicted_x0(self.predict(x, timestep), x, timestep))
        return self.predicted[-1]


class Sampler(Protocol):
    def __call__(self, x: Tensor, step: Step, state: State, /) -> tuple[Tensor, State]:
        """Take latents from `step.timestep` to `step.prev_timestep`.

        x: fp32 `[B, C, T, h, w]` (fp64 if the run is). state: what the step before returned, empty at first; tensors
        and plain values only, so that it can be saved and put back. Returns the new x and the new state.
        """
        ...


OnStep = Callable[[Step, Tensor, State], Tensor | None]  # (the finished step, its x, its state) -> None, or a new x


def sample(
    network: Network,
    x: Tensor,
    schedule: Schedule,
    *,
    sampler: str | Sampler = "dpm",
    scales: Sequence[float | None] | None = None,
    generator: Generators | None = None,
    dtype: torch.dtype | None = None,
    on_step: OnStep | None = None,
    start: int = 0,
    state: State | None = None,
) -> Tensor:
    """Take noise to latents: run a sampler over the steps of a schedule.

    All that samplers share is done here: fp32, the casts to and from the network's dtype, noise, guidance, callbacks.

    Args:
        x: `[B, C, T, h, w]`, any float dtype.
        sampler: a name in `SAMPLERS`, or a function.
        scales: guidance scale of each step, see `guidance.guidance_schedule`; None is without guidance.
        generator: one for the whole batch, or a list with one per batch item; None uses torch's global one.
        dtype: of the network and of the noise; None is that of x.
        on_step: called after each step; x that it returns replaces the step's.
        start, state: continue a run at this step with the state, x and generators that it had there.

    Returns:
        `[B, C, T, h, w]` in `dtype`.

    Raises:
        ValueError: a sampler or `on_step` returns another shape; an unknown sampler.
    """
    if isinstance(sampler, str) and sampler not in SAMPLERS:
        raise ValueError(f"scheduler: got {sampler!r}, want one of {', '.join(SAMPLERS)}")
    take = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
    dtype = dtype or x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    x, state = x.to(wide), state or {}

    def noise() -> Tensor:
        b, c, t, h, w = x.shape
        drawn = draw_noise((b, t, c, h, w), generator, x.device, dtype)
        return rearrange(drawn, "b t c h w -> b c t h w").to(wide)

    for index in range(start, len(schedule)):
        scale = None if scales is None else scales[index]

        def predict(x: Tensor, timestep: int, index: int = index, scale: float | None = scale) -> Tensor:
            if scale is None:
                return network(x.to(dtype), index, timestep, "cond").to(wide)
            uncond, cond = network(x.to(dtype), index, timestep, "both").chunk(2)
            return guide(uncond, cond, scale).to(wide)

        step = Step(index, schedule, predict, noise)
        after, state = take(x, step, state)
        x = as_latents("sampler", after, x)
        replaced = None if on_step is None else on_step(step, x, state)
        if replaced is not None:
            x = as_latents("latents", replaced, x)
    return x.to(dtype)


def dpm(x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
    """Take one step of DPM-Solver++ SDE 2M. Must equal `CogVideoXDPMScheduler`. state: the x0 of the step before."""
    half_log_snr, alpha, alpha_prev = step.schedule.half_log_snr, step.alpha, step.alpha_prev
    h = half_log_snr(step.prev_timestep) - half_log_snr(step.timestep)
    x0 = step.x0(x)
    target, noise = x0, step.noise()
    if "x0" in state and step.prev_timestep >= 0:
        before = step.schedule.timesteps[step.index - 1]
        r = (half_log_snr(step.timestep) - half_log_snr(before)) / h
        target = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * state["x0"]
        # diffusers draws once before it looks at the order and again here. Dropping a draw would change every seed.
        noise = step.noise()
    keep = ((1 - alpha_prev) / (1 - alpha)).sqrt() * (-h).exp()
    renoise = (1 - alpha_prev).sqrt() * (1 - (-2 * h).exp()).sqrt()
    return keep * x - (-2 * h).expm1() * alpha_prev.sqrt() * target + renoise * noise, {"x0": x0}


def ddim(x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
    """Take one step of deterministic DDIM. Must equal `CogVideoXDDIMScheduler`. It draws no noise."""
    alpha, alpha_prev = step.alpha, step.alpha_prev
    x0 = step.x0(x)
    keep = ((1 - alpha_prev) / (1 - alpha)).sqrt()
    return keep * x + (alpha_prev.sqrt() - alpha.sqrt() * keep) * x0, state


SAMPLERS: dict[str, Sampler] = {"dpm": dpm, "ddim": ddim}


def draw_noise(
    shape_btchw: Sequence[int], generator: Generators | None, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Draw normal noise as diffusers' `randn_tensor` does: on the generator's device, then moved to `device`.

    shape_btchw: `[B, T, C, h, w]`, diffusers' order; the result has it too (rearrange to `[B, C, T, h, w]` after).
    generator: one, or a list with one per batch item, or None for torch's global generator of `device`.
    """
    device, batch = torch.device(device), shape_btchw[0]
    if generator is None:
        return torch.randn(*shape_btchw, device=device, dtype=dtype)
    each = [generator] if isinstance(generator, Generator) else list(generator)
    if not isinstance(generator, Generator) and len(each) != batch:
        raise ValueError(f"generator: got a list of {len(each)}, want one per batch item, {batch}")
    for g in each:
        if g.device.type not in ("cpu", device.type):
            raise ValueError(f"generator: got one on {g.device}, want cpu or {device.type}")
    rows = batch // len(each)
    source = "cpu" if each[0].device.type == "cpu" else device
    return torch.cat([torch.randn(rows, *shape_btchw[1:], generator=g, device=source, dtype=dtype) for g in each]).to(
        device
    )


def as_latents(name: str, got: Tensor, x: Tensor) -> Tensor:
    """Bring what a sampler or a callback returned to the dtype and device of x."""
    if got.shape != x.shape:
        raise ValueError(f"{name}: got latents of shape {list(got.shape)}, want {list(x.shape)}")
    return got.to(x)
