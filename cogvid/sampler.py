"""Noise schedule, the two samplers, and guidance.

Must equal diffusers' `CogVideoXDPMScheduler` (DPM-Solver++ SDE 2M, https://arxiv.org/abs/2211.01095) and
`CogVideoXDDIMScheduler` (https://arxiv.org/abs/2010.02502) as the CogVideoX pipelines drive them, draw for draw.

With abar the cumulated product of alphas: x_t = sqrt(abar) x0 + sqrt(1 - abar) noise, the network predicts the velocity
v = sqrt(abar) noise - sqrt(1 - abar) x0, and lambda = log(abar / (1 - abar)) / 2 is half the log-SNR.
Coefficients are 0-dim fp64 tensors on the CPU: torch multiplies them into an fp32 tensor on any device without a sync.
"""

from __future__ import annotations

import dataclasses
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

Denoise = Callable[[Tensor, int], Tensor]  # (x in the dtype given to the sampler, step index) -> guided velocity
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
    """Hold the noise levels and the steps of one run.

    alphas_cumprod: `[num_train_timesteps]` fp64 on the CPU, falling, 0 at the end if the terminal SNR is zero.
    timesteps: of each step, descending. prev_timesteps: where each step lands; negative means clean.
    """

    alphas_cumprod: Tensor
    timesteps: tuple[int, ...]
    prev_timesteps: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    def alpha(self, timestep: int) -> Tensor:
        """Return abar at a timestep as a 0-dim fp64 tensor; 1 for a negative timestep."""
        return self.alphas_cumprod[timestep] if timestep >= 0 else self.alphas_cumprod.new_ones(())

    def half_log_snr(self, timestep: int) -> Tensor:
        """Return lambda at a timestep as a 0-dim fp64 tensor; -inf at zero terminal SNR, +inf when clean."""
        alpha = self.alpha(timestep)
        return (alpha / (1 - alpha)).log() / 2

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
    """Build the noise levels (scaled-linear, SNR shift, zero terminal SNR) and trailing timesteps.

    previous: where a step lands. "diffusers" is t - num_train_timesteps // num_inference_steps, which misses the next
    timestep unless the division is exact (a warning says so); "next" is the next timestep itself, and clean at the end.
    """
    train_steps = config.num_train_timesteps
    if config.timestep_spacing != "trailing":
        raise ValueError(f"timestep_spacing: got {config.timestep_spacing!r}, wanted 'trailing'")
    if config.prediction_type != "v_prediction":
        raise ValueError(f"prediction_type: got {config.prediction_type!r}, wanted 'v_prediction'")
    if not 1 <= num_inference_steps <= train_steps:
        raise ValueError(f"num_inference_steps: got {num_inference_steps}, wanted 1 to {train_steps}")
    if previous not in ("diffusers", "next"):
        raise ValueError(f"previous: got {previous!r}, wanted 'diffusers' or 'next'")

    # For some counts (61, 103, ...) the float range is one too long, and diffusers takes a step at t = -1 there.
    grid = np.arange(train_steps, 0, -train_steps / num_inference_steps)[:num_inference_steps]
    timesteps = tuple(int(t) - 1 for t in grid.round())
    following = (*timesteps[1:], -1)
    if previous == "next":
        return Schedule(_alphas_cumprod(config), timesteps, following)
    landing = tuple(t - train_steps // num_inference_steps for t in timesteps)
    wrong = sum(a != b for a, b in zip(landing[:-1], following[:-1], strict=True))
    if train_steps % num_inference_steps:
        warnings.warn(
            f"num_inference_steps={num_inference_steps} does not divide {train_steps}: {wrong} steps land beside the "
            f"next timestep{', and the last one does not reach clean' if landing[-1] >= 0 else ''}, as in diffusers; "
            'previous="next" avoids it',
            stacklevel=2,
        )
    return Schedule(_alphas_cumprod(config), timesteps, landing)


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
        x0 = _predict_x0(denoise(state.to(x.dtype), i), state, alpha)
        target, noise = x0, _draw_like(x, generator)
        if last_x0 is not None and prev >= 0:
            r = (schedule.half_log_snr(t) - schedule.half_log_snr(schedule.timesteps[i - 1])) / h
            target = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last_x0
            # diffusers draws once before it looks at the order and again here: dropping one changes every seed
            noise = _draw_like(x, generator)
        keep = ((1 - alpha_prev) / (1 - alpha)).sqrt() * (-h).exp()
        renoise = ((1 - alpha_prev) * (1 - (-2 * h).exp())).sqrt()
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
        x0 = _predict_x0(denoise(state.to(x.dtype), i), state, alpha)
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


def _alphas_cumprod(config: SchedulerConfig) -> Tensor:
    first, last = config.beta_start**0.5, config.beta_end**0.5
    betas = torch.linspace(first, last, config.num_train_timesteps, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    alphas = alphas / (config.snr_shift_scale + (1 - config.snr_shift_scale) * alphas)
    if not config.rescale_betas_zero_snr:
        return alphas
    # https://arxiv.org/abs/2305.08891, algorithm 1: shift the last level to zero, keep the first
    root = alphas.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def _predict_x0(v: Tensor, state: Tensor, alpha: Tensor) -> Tensor:
    return alpha.sqrt() * state - (1 - alpha).sqrt() * v.to(state.dtype)


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
