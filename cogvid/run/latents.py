"""The latents that a run starts from: noise, or a video that is taken to the first timestep."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Generator, Tensor

from cogvid.media.image import prepare_video
from cogvid.models.vae import VAE
from cogvid.run.conditioning import posterior_samples
from cogvid.run.inputs import Inputs
from cogvid.run.settings import Settings
from cogvid.run.stages import stage
from cogvid.sampling.samplers import Generators, draw_noise
from cogvid.sampling.schedule import Schedule, add_noise
from cogvid.weights.placement import Placement


@stage("video")
def noised_video(
    vae: VAE, video: Any, settings: Settings, inputs: Inputs, schedule: Schedule, padding: int, placement: Placement
) -> Tensor:
    """Encode a video and take it to the first timestep of the schedule: `[B, C, padding + T, h, w]`.

    video: what `prepare_video` takes, `settings.num_frames` frames or more. padding: latent frames repeated in front.
    A single generator draws one posterior sample for all videos, as in diffusers; a list draws one for each video.
    """
    pixels = prepare_video(video[: settings.num_frames], settings.height, settings.width, settings.resize)
    draws = 1 if isinstance(inputs.generator, Generator) else inputs.batch
    whole = settings.vae_encode == "whole"
    z = vae.config.scaling_factor * posterior_samples(vae, [pixels], inputs.generator, draws, placement, whole=whole)
    z = torch.cat([*[z[:, :, :1]] * padding, z], dim=2).expand(inputs.batch, -1, -1, -1, -1)
    b, c, t, h, w = z.shape
    noise = initial_latents((b, t, c, h, w), inputs.generator, z.device, z.dtype)
    return add_noise(z, noise, schedule.timesteps[0], schedule)


def initial_latents(
    shape_btchw: tuple[int, int, int, int, int],
    generator: Generators,
    device: torch.device,
    dtype: torch.dtype,
    latents: Tensor | None = None,
) -> Tensor:
    """Draw the initial noise, or check latents that were given; `[B, T, C, h, w]` -> `[B, C, T, h, w]`."""
    if latents is None:
        latents = draw_noise(shape_btchw, generator, device, dtype)
    if tuple(latents.shape) != shape_btchw:
        raise ValueError(f"latents: got shape {tuple(latents.shape)}, want [B, T, C, h, w] = {shape_btchw}")
    return rearrange(latents.to(device, dtype), "b t c h w -> b c t h w")
