"""Noise schedule, the two samplers, and guidance.

Must equal diffusers' `CogVideoXDPMScheduler` (DPM-Solver++ SDE 2M, https://arxiv.org/abs/2211.01095) and
`CogVideoXDDIMScheduler` (https://arxiv.org/abs/2010.02502) as the CogVideoX pipelines drive them, draw for draw.

With abar the cumulated product of alphas: x_t = sqrt(abar) x0 + sqrt(1 - abar) noise, the network predicts the velocity
v = sqrt(abar) noise - sqrt(1 - abar) x0 (or, of other schedules, the noise or x0), and
lambda = log(abar / (1 - abar)) / 2 is half the log-SNR.
Coefficients are 0-dim tensors on the CPU, in fp64 for the official models: torch multiplies them into an fp32 tensor on
any device without a sync.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Generator, Tensor

from cogvid.config import SchedulerConfig

Denoise = Callable[[Tensor, int], Tensor]  # (x in the dtype given to the sampler, step index) -> guided prediction
OnStep = Callable[
    [int, int, Tensor], Tensor | None
]  # (step index, timestep, state) -> the state to go on with, or None
GuidanceMode = Literal["constant", "diffusers", "cosine"]


class Sampler(Protocol):
    """Take noise to latents.

    x: `[B, C, T, h, w]`, any float dtype; noise is drawn in it. The state between the steps, which `on_step` sees and
    may replace, is fp32 (fp64 for fp64); the result has the dtype of x.
    generator: one for the whole batch, or a list with one per batch item; None uses torch's global one.
    """

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        schedule: Schedule,
        *,
        generator: Generator | Sequence[Generator] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Schedule:
    """Hold the noise levels and the steps of one run, and what the network predicts.

    alphas_cumprod: see `alphas_cumprod`. timesteps: of each step, descending.
    prev_timesteps: where each step lands; negative means `final_alpha`. final_alpha: abar there, 1 for clean latents.
    prediction_type: "epsilon", "sample" or "v_prediction".
    """

    alphas_cumprod: Tensor
    timesteps: tuple[int, ...]
    prev_timesteps: tuple[int, ...]
    final_alpha: Tensor
    prediction_type: str

    def __len__(self) -> int:
        return len(self.timesteps)

    def alpha(self, timestep: int) -> Tensor:
        """Return abar at a timestep as a 0-dim tensor; `final_alpha` for a negative timestep."""
        return self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha

    def half_log_snr(self, timestep: int) -> Tensor:
        """Return lambda at a timestep as a 0-dim tensor; -inf at zero terminal SNR, +inf when clean."""
        alpha = self.alpha(timestep)
        return (alpha / (1 - alpha)).sqrt().log()

    def predicted_x0(self, prediction: Tensor, state: Tensor, timestep: int) -> Tensor:
        """Return the clean latents that the network's prediction for `state` at a timestep amounts to."""
        alpha, prediction = self.alpha(timestep), prediction.to(state.dtype)
        if self.prediction_type == "sample":
            return prediction
        if self.prediction_type == "epsilon":
            return (state - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
        return alpha.sqrt() * state - (1 - alpha).sqrt() * prediction

    def tail(self, strength: float) -> Schedule:
        """Keep the last `strength` (0-1] of the steps, as video-to-video does."""
        if not 0 < strength <= 1:
            raise ValueError(f"strength: got {strength}, wanted more than 0 and at most 1")
        count = min(int(len(self) * strength), len(self))
        if count == 0:
            raise ValueError(f"strength: {strength} of {len(self)} steps is none, wanted at least {1 / len(self):g}")
        return dataclasses.replace(self, timesteps=self.timesteps[-count:], prev_timesteps=self.prev_timesteps[-count:])


def make_schedule(
    config: SchedulerConfig, num_inference_steps: int, *, previous: Literal["diffusers", "next"] = "diffusers"
) -> Schedule:
    """Build the noise levels and the steps of a run.

    previous: where a step lands. "diffusers" is t - num_train_timesteps // num_inference_steps, which with most counts
    and spacings misses the next timestep (a warning says so); "next" is the next timestep itself, and clean at the end.
    """
    if previous not in ("diffusers", "next"):
        raise ValueError(f"previous: got {previous!r}, wanted 'diffusers' or 'next'")
    levels, steps = alphas_cumprod(config), timesteps(config, num_inference_steps)
    following = (*steps[1:], -1)
    landing = tuple(t - config.num_train_timesteps // num_inference_steps for t in steps)
    if previous == "diffusers":
        _warn_of_misses(config, landing, following)
    return Schedule(
        levels,
        steps,
        landing if previous == "diffusers" else following,
        final_alpha=torch.ones_like(levels[0]) if config.set_alpha_to_one else levels[0],
        prediction_type=config.prediction_type,
    )


def alphas_cumprod(config: SchedulerConfig) -> Tensor:
    """Return abar of every level, `[num_train_timesteps]` on the CPU, falling, to 0 if the terminal SNR is zero.

    fp64 for "scaled_linear"; fp32 for other betas, because diffusers has those and all that follows from them in fp32.

    Raises:
        ValueError: a level is not from 0 to 1.
    """
    count = config.num_train_timesteps
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float32)
    elif config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, count, dtype=torch.float32)
    elif config.beta_schedule == "scaled_linear":
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, count, dtype=torch.float64) ** 2
    else:  # "squaredcos_cap_v2": https://arxiv.org/abs/2102.09672, equation 17
        curve = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(curve)], dtype=torch.float32)
    alphas = (1 - betas).cumprod(0)
    alphas = alphas / (config.snr_shift_scale + (1 - config.snr_shift_scale) * alphas)
    if config.rescale_betas_zero_snr:
        # https://arxiv.org/abs/2305.08891, algorithm 1: shift the last level to zero, keep the first
        root = alphas.sqrt()
        alphas = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    if not ((alphas >= 0) & (alphas <= 1)).all():
        raise ValueError(
            "scheduler: got betas and a shift that make a noise level below 0 or above 1, want from 0 to 1"
        )
    return alphas


def timesteps(config: SchedulerConfig, num_inference_steps: int) -> tuple[int, ...]:
    """Return the timestep of each step, descending.

    For 62 counts (61, 103, ...) the float range of "trailing" is one too long, and diffusers takes a step more, at -1,
    whose level is the noisiest; it is left out here.
    """
    train_steps, count = config.num_train_timesteps, num_inference_steps
    if not 1 <= count <= train_steps:
        raise ValueError(f"num_inference_steps: got {count}, wanted 1 to {train_steps}")
    if config.timestep_spacing == "leading":
        steps = [i * (train_steps // count) + config.steps_offset for i in reversed(range(count))]
    elif config.timestep_spacing == "linspace":
        steps = [int(t) for t in np.linspace(0, train_steps - 1, count).round()[::-1]]
    else:
        steps = [int(t) - 1 for t in _trailing(train_steps, count)[:count]]
    if steps[0] >= train_steps:
        raise ValueError(
            f"steps_offset: got {config.steps_offset}, which with {count} steps begins at timestep {steps[0]}, want "
            f"{train_steps - 1} at most"
        )
    return tuple(steps)


def _trailing(train_steps: int, count: int) -> np.ndarray:
    return np.arange(train_steps, 0, -train_steps / count).round()


def _warn_of_misses(config: SchedulerConfig, landing: tuple[int, ...], following: tuple[int, ...]) -> None:
    """Warn if steps do not land where the next one begins."""
    count, train_steps = len(landing), config.num_train_timesteps
    faults = []
    if wrong := sum(a != b for a, b in zip(landing[:-1], following[:-1], strict=True)):
        faults.append(f"{wrong} steps land beside the next timestep")
    if landing[-1] >= 0:
        faults.append("the last one does not reach clean")
    if not faults:
        return
    longer = config.timestep_spacing == "trailing" and len(_trailing(train_steps, count)) > count
    theirs = "diffusers does the same and then takes a step more, at t = -1" if longer else "as in diffusers"
    reason = f"does not divide {train_steps}" if train_steps % count else f"with spacing {config.timestep_spacing!r}"
    warnings.warn(
        f'num_inference_steps={count} {reason}: {", and ".join(faults)}, {theirs}; previous="next" avoids it',
        stacklevel=3,
    )


def dpm(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    *,
    generator: Generator | Sequence[Generator] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample with DPM-Solver++ SDE 2M. Must equal `CogVideoXDPMScheduler`."""
    state, last_x0 = x.to(_math_dtype(x)), None
    for i, (t, prev) in enumerate(zip(schedule.timesteps, schedule.prev_timesteps, strict=True)):
        alpha, alpha_prev = schedule.alpha(t), schedule.alpha(prev)
        h = schedule.half_log_snr(prev) - schedule.half_log_snr(t)
        x0 = schedule.predicted_x0(denoise(state.to(x.dtype), i), state, t)
        target, noise = x0, _draw_like(x, generator)
        if last_x0 is not None and prev >= 0:
            r = (schedule.half_log_snr(t) - schedule.half_log_snr(schedule.timesteps[i - 1])) / h
            target = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last_x0
            # diffusers draws once before it looks at the order and again here: dropping one changes every seed
            noise = _draw_like(x, generator)
        keep = ((1 - alpha_prev) / (1 - alpha)).sqrt() * (-h).exp()
        renoise = (1 - alpha_prev).sqrt() * (1 - (-2 * h).exp()).sqrt()
        state = keep * state - (-2 * h).expm1() * alpha_prev.sqrt() * target + renoise * noise
        state, last_x0 = _report(on_step, i, t, state), x0
    return state.to(x.dtype)


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    *,
    generator: Generator | Sequence[Generator] | None = None,  # noqa: ARG001 - the seam's signature; DDIM draws nothing
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample with deterministic DDIM. Must equal `CogVideoXDDIMScheduler`, which draws no noise either."""
    state = x.to(_math_dtype(x))
    for i, (t, prev) in enumerate(zip(schedule.timesteps, schedule.prev_timesteps, strict=True)):
        alpha, alpha_prev = schedule.alpha(t), schedule.alpha(prev)
        x0 = schedule.predicted_x0(denoise(state.to(x.dtype), i), state, t)
        keep = ((1 - alpha_prev) / (1 - alpha)).sqrt()
        state = keep * state + (alpha_prev.sqrt() - alpha.sqrt() * keep) * x0
        state = _report(on_step, i, t, state)
    return state.to(x.dtype)


SAMPLERS: dict[str, Sampler] = {"dpm": dpm, "ddim": ddim}


def guide(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Apply classifier-free guidance, uncond + scale (cond - uncond), in fp32 (fp64 for fp64)."""
    uncond, cond = uncond.to(_math_dtype(uncond)), cond.to(_math_dtype(cond))
    return uncond + scale * (cond - uncond)


def guidance_schedule(guidance_scale: float, schedule: Schedule, mode: GuidanceMode = "constant") -> list[float]:
    """Return the guidance scale of each step.

    mode: "constant"; "diffusers", the dynamic guidance of the official pipelines, 1 + scale (1 - cos(pi p^5)) / 2 with
    p = (steps - t) / steps for the training timestep t (999 ... 0), which swings pseudo-randomly over 1 to 1 + scale;
    "cosine", the same curve over progress, p = step index / steps, which rises smoothly from 1.
    """
    count = len(schedule)
    if mode == "constant":
        return [guidance_scale] * count
    if mode == "diffusers":
        progress = [(count - t) / count for t in schedule.timesteps]
    elif mode == "cosine":
        progress = [i / count for i in range(count)]
    else:
        raise ValueError(f"mode: got {mode!r}, wanted 'constant', 'diffusers' or 'cosine'")
    return [1 + guidance_scale * ((1 - math.cos(math.pi * p**5.0)) / 2) for p in progress]


def add_noise(x0: Tensor, noise: Tensor, t: Tensor | int, schedule: Schedule) -> Tensor:
    """Take clean latents to timestep t: sqrt(abar) x0 + sqrt(1 - abar) noise. Must equal the schedulers' `add_noise`.

    x0, noise: `[B, ...]`. t: int, or int64 `[B]`. Arithmetic in fp32 (fp64 for fp64), result in the dtype of x0.
    """
    signal, sigma = _levels(x0, t, schedule)
    return (signal * x0 + sigma * noise).to(x0.dtype)


def velocity(x0: Tensor, noise: Tensor, t: Tensor | int, schedule: Schedule) -> Tensor:
    """Return the training target sqrt(abar) noise - sqrt(1 - abar) x0. Must equal the schedulers' `get_velocity`.

    x0, noise: `[B, ...]`. t: int, or int64 `[B]`. Arithmetic in fp32 (fp64 for fp64), result in the dtype of x0.
    """
    signal, sigma = _levels(x0, t, schedule)
    return (signal * noise - sigma * x0).to(x0.dtype)


def draw_noise(
    shape_btchw: Sequence[int],
    generator: Generator | Sequence[Generator] | None,
    device: torch.device | str,
    dtype: torch.dtype,
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
        raise ValueError(f"generator: got a list of {len(each)}, wanted one per batch item, {batch}")
    for g in each:
        if g.device.type not in ("cpu", device.type):
            raise ValueError(f"generator: got one on {g.device}, wanted cpu or {device.type}")
    rows = batch // len(each)
    source = "cpu" if each[0].device.type == "cpu" else device
    return torch.cat([torch.randn(rows, *shape_btchw[1:], generator=g, device=source, dtype=dtype) for g in each]).to(
        device
    )


def _draw_like(x: Tensor, generator: Generator | Sequence[Generator] | None) -> Tensor:
    b, c, t, h, w = x.shape
    noise = draw_noise((b, t, c, h, w), generator, x.device, x.dtype)
    return rearrange(noise, "b t c h w -> b c t h w").to(_math_dtype(x))


def _report(on_step: OnStep | None, i: int, t: int, state: Tensor) -> Tensor:
    replaced = on_step(i, t, state) if on_step is not None else None
    return state if replaced is None else replaced.to(state)


def _levels(x0: Tensor, t: Tensor | int, schedule: Schedule) -> tuple[Tensor, Tensor]:
    alpha = schedule.alphas_cumprod[torch.as_tensor(t, device="cpu").reshape(-1)]
    levels = torch.stack([alpha.sqrt(), (1 - alpha).sqrt()]).to(x0.device, _math_dtype(x0))
    signal, sigma = levels.reshape(2, -1, *[1] * (x0.ndim - 1))
    return signal, sigma


def _math_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
