"""The steps and noise levels of the authors' own code (SAT): its `ZeroSNRDDPMDiscretization` and `DiscreteDenoiser`."""

from __future__ import annotations

import dataclasses

import numpy as np

from cogvid.config import ScheduleConfig
from cogvid.sampling.schedule import Schedule, alphas_cumprod, make_schedule


def make_sat_schedule(config: ScheduleConfig, num_inference_steps: int, *, previous: str = "next") -> Schedule:
    """Build the schedule of a run as SAT does; the arguments are those of `make_schedule`.

    Only the levels of the steps are rescaled to end at zero SNR, and the cleanest of them keeps its value. Levels
    between the steps follow the same line. The denoiser takes the nearest of the levels of a rescale over all of them.

    Raises:
        ValueError: the config has no such rescale; fewer than two steps; a step that ends where SAT has no level.
    """
    if not config.rescale_betas_zero_snr:
        raise ValueError("zero_snr: got 'sat' for a schedule without a rescale to zero SNR, want 'diffusers'")
    plain = make_schedule(config, num_inference_steps, previous="next")
    if num_inference_steps == 1:
        raise ValueError("num_inference_steps: got 1, want 2 or more with zero_snr='sat'")
    last = config.num_train_timesteps - 1
    steps = tuple(int(t) for t in np.linspace(last, 0, num_inference_steps, endpoint=False))
    following = (*steps[1:], -1)
    landing = (max(t - config.num_train_timesteps // num_inference_steps, -1) for t in steps)
    if previous == "diffusers" and tuple(landing) != following:
        raise ValueError(
            f"previous_timestep: got 'diffusers', which with {num_inference_steps} steps ends beside the levels of "
            "zero_snr='sat', want 'next'"
        )
    root = alphas_cumprod(dataclasses.replace(config, rescale_betas_zero_snr=False)).sqrt()
    clean, noisy = root[steps[-1]], root[steps[0]]
    root = ((root - noisy) * (clean / (clean - noisy))).clamp(max=1)  # below the last step the line leaves [0, 1]
    nearest = (root[:, None] - plain.alphas_cumprod.sqrt()).abs().argmin(1)
    return dataclasses.replace(
        plain,
        alphas_cumprod=root**2,
        timesteps=steps,
        prev_timesteps=following,
        x0_levels=plain.alphas_cumprod[nearest],
    )
