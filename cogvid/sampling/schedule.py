"""The noise schedule: the levels, the steps of a run, and the arithmetic between noise and clean latents.

Must equal what diffusers' `CogVideoXDPMScheduler` and `CogVideoXDDIMScheduler` have in common.

With abar the cumulated product of alphas, x_t = sqrt(abar) x0 + sqrt(1 - abar) noise. The network predicts the
velocity v = sqrt(abar) noise - sqrt(1 - abar) x0 or, with other schedules, the noise or x0. Half the log-SNR is
lambda = log(abar / (1 - abar)) / 2. Coefficients are 0-dim tensors on the CPU, in fp64 for the official models: torch
multiplies them into an fp32 tensor on any device without a sync.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogvid.config import PREVIOUS_TIMESTEPS, ScheduleConfig


@dataclass(frozen=True, eq=False)
class Schedule:
    """Hold the noise levels and the steps of one run, and what the network predicts.

    alphas_cumprod: see `alphas_cumprod`. timesteps: where each step begins, descending.
    prev_timesteps: where each step ends; negative means `final_alpha`. final_alpha: abar there, 1 for clean latents.
    prediction_type: "epsilon", "sample" or "v_prediction". x0_levels: abar of `predicted_x0`, where it is not the same.
    """

    alphas_cumprod: Tensor
    timesteps: tuple[int, ...]
    prev_timesteps: tuple[int, ...]
    final_alpha: Tensor
    prediction_type: str
    x0_levels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    def alpha(self, timestep: int) -> Tensor:
        """Return abar at a timestep as a 0-dim tensor; `final_alpha` for a negative timestep."""
        return self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha

    def half_log_snr(self, timestep: int) -> Tensor:
        """Return lambda at a timestep as a 0-dim tensor; -inf at zero terminal SNR, +inf when clean."""
        alpha = self.alpha(timestep)
        return (alpha / (1 - alpha)).sqrt().log()

    def predicted_x0(self, prediction: Tensor, x: Tensor, timestep: int) -> Tensor:
        """Return the clean latents that follow from the network's prediction for `x` at a timestep."""
        alpha = self.alpha(timestep) if self.x0_levels is None else self.x0_levels[timestep]
        prediction = prediction.to(x.dtype)
        if self.prediction_type == "sample":
            return prediction
        if self.prediction_type == "epsilon":
            return (x - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
        return alpha.sqrt() * x - (1 - alpha).sqrt() * prediction

    def tail(self, strength: float) -> Schedule:
        """Keep the last `strength` (0-1] of the steps, as video-to-video does."""
        if not 0 < strength <= 1:
            raise ValueError(f"strength: got {strength}, want more than 0 and at most 1")
        count = min(int(len(self) * strength), len(self))
        if count == 0:
            raise ValueError(
                f"strength: got {strength}, which is none of {len(self)} steps, want at least {1 / len(self):g}"
            )
        return dataclasses.replace(self, timesteps=self.timesteps[-count:], prev_timesteps=self.prev_timesteps[-count:])


def make_schedule(config: ScheduleConfig, num_inference_steps: int, *, previous: str = "diffusers") -> Schedule:
    """Build the noise levels and the steps of a run.

    previous: where a step ends. "diffusers" is t - num_train_timesteps // num_inference_steps, which with most counts
    and spacings misses the next timestep (a warning says so). "next" is the next timestep itself, and clean at the end.
    """
    if previous not in PREVIOUS_TIMESTEPS:
        raise ValueError(f"previous: got {previous!r}, want one of {', '.join(PREVIOUS_TIMESTEPS)}")
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


def alphas_cumprod(config: ScheduleConfig) -> Tensor:
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


def timesteps(config: ScheduleConfig, num_inference_steps: int) -> tuple[int, ...]:
    """Return the timestep of each step, descending.

    For 62 counts (61, 103, ...) rounding makes the range of "trailing" one too long. diffusers then takes one more
    step, at t = -1, with the level of the noisiest timestep. It is left out here.
    """
    train_steps, count = config.num_train_timesteps, num_inference_steps
    if not 1 <= count <= train_steps:
        raise ValueError(f"num_inference_steps: got {count}, want 1 to {train_steps}")
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


def _warn_of_misses(config: ScheduleConfig, landing: tuple[int, ...], following: tuple[int, ...]) -> None:
    """Warn if steps do not end where the next one begins."""
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


def add_noise(x0: Tensor, noise: Tensor, t: Tensor | int, schedule: Schedule) -> Tensor:
    """Take clean latents to timestep t: sqrt(abar) x0 + sqrt(1 - abar) noise. Must equal the schedulers' `add_noise`.

    x0, noise: `[B, ...]`. t: int, or int64 `[B]`. Arithmetic in fp32 (fp64 for fp64), result in the dtype of x0.
    """
    signal, sigma = _levels(x0, t, schedule)
    return (signal * x0 + sigma * noise).to(x0.dtype)


def velocity(x0: Tensor, noise: Tensor, t: Tensor | int, schedule: Schedule) -> Tensor:
    """Return the training target sqrt(abar) noise - sqrt(1 - abar) x0, as `add_noise`; equals their `get_velocity`."""
    signal, sigma = _levels(x0, t, schedule)
    return (signal * noise - sigma * x0).to(x0.dtype)


def _levels(x0: Tensor, t: Tensor | int, schedule: Schedule) -> tuple[Tensor, Tensor]:
    alpha = schedule.alphas_cumprod[torch.as_tensor(t, device="cpu").reshape(-1)]
    levels = torch.stack([alpha.sqrt(), (1 - alpha).sqrt()]).to(x0.device, _math_dtype(x0))
    signal, sigma = levels.reshape(2, -1, *[1] * (x0.ndim - 1))
    return signal, sigma


def _math_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
