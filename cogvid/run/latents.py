"""The latents that a run starts from: noise, or a video that is taken to the first timestep."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Generator, Tensor

from cogvid.media.image import prepare_video
from cogvid.models.vae import VAE
from cogvid.run.conditioning import padded, posterior_samples
from cogvid.run.inputs import Inputs
from cogvid.run.settings import Settings
from cogvid.run.stages import stage
from cogvid.sampling.samplers import Generators, draw_noise
from cogvid.sampling.schedule import Schedule, add_noise
from cogvid.weights.placement import Placement


@stage("video")
def encoded_video(
    vae: VAE, videos: list[Any], settings: Settings, inputs: Inputs, padding: int, placement: Placement
) -> Tensor:
    """Encode videos to scaled latents `[B, C, padding + T, h, w]`; arguments and draws as for `noised_video`."""
    if inputs.batch % len(videos):
        raise ValueError(f"video: got a list of {len(videos)}, want one, or one per prompt")
    size = settings.height, settings.width, settings.resize
    pixels = [prepare_video(video[: settings.num_frames], *size) for video in videos]
    draws = 1 if isinstance(inputs.generator, Generator) and len(videos) == 1 else inputs.batch
    whole = settings.vae_encode == "whole"
    z = vae.config.scaling_factor * posterior_samples(vae, pixels, inputs.generator, draws, placement, whole=whole)
    return padded(z, padding + z.shape[2]).expand(inputs.batch, -1, -1, -1, -1)


def noised_video(
    vae: VAE,
    videos: list[Any],
    settings: Settings,
    inputs: Inputs,
    schedule: Schedule,
    padding: int,
    placement: Placement,
) -> Tensor:
    """Encode videos and take them to the first timestep of the schedule: `[B, C, padding + T, h, w]`.

    videos: each what `prepare_video` takes, with `settings.num_frames` frames or more; their number divides that of
    the videos that are made. padding: latent frames repeated in front.
    Of one video, a single generator draws one posterior sample for all, as in diffusers. Of several, or with a list of
    generators, one is drawn for each video that is made.
    """
    z = encoded_video(vae, videos, settings, inputs, padding, placement)
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
