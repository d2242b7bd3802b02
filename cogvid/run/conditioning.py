"""What a model takes beside noise and text, encoded to latents: for each `Condition` of a config, one function.

A function takes (VAE, the call's argument, settings, inputs, latent frames, placement) and returns
`[B, C, T, h, w]` with the channels of its `Condition`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator, Tensor

from cogvid.config import ModelConfig, VAEConfig
from cogvid.media.image import prepare_image, resize_image, resize_video
from cogvid.models.vae import VAE
from cogvid.run.inputs import Inputs
from cogvid.run.settings import Settings
from cogvid.run.stages import stage
from cogvid.sampling.samplers import Generators
from cogvid.weights.placement import Placement

if TYPE_CHECKING:
    from PIL.Image import Image


def resized(image: Any, video: Any, settings: Settings) -> tuple[list[Image] | None, np.ndarray | None]:
    """Load what a call was given and resize it, once: the encoders and the record then see the same pixels.

    Returns RGB images of the run's size, and the frames that are used, `[F, H, W, 3]` uint8; None for what was not
    given.
    """
    size = settings.height, settings.width, settings.resize
    if image is not None:
        image = [resize_image(each, *size) for each in (image if isinstance(image, (list, tuple)) else [image])]
    return image, None if video is None else resize_video(video[: settings.num_frames], *size)


def encode_conditions(
    vae: VAE,
    model: ModelConfig,
    given: Mapping[str, Any],
    settings: Settings,
    inputs: Inputs,
    frames: int,
    placement: Placement,
) -> Tensor | None:
    """Return what a model takes beside noise and text, `[B, C, frames, h, w]`, in the order of its config."""
    parts = [
        CONDITION_ENCODERS[each.name](vae, given[each.name], settings, inputs, frames, placement)
        for each in model.conditions
    ]
    return torch.cat(parts, dim=1) if parts else None


@stage("image")
def encode_image(vae: VAE, image: Any, settings: Settings, inputs: Inputs, frames: int, placement: Placement) -> Tensor:
    """Encode the first frame to scaled latents `[B, C, frames, h, w]`, zero after the first latent frame.

    One posterior sample is drawn per video.

    image: anything that `load_image` takes, or a list whose length divides the number of videos.
    """
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if not images or inputs.batch % len(images):
        raise ValueError(f"image: got a list of {len(images)}, want one, or one per prompt")
    pixels = [prepare_image(each, settings.height, settings.width, settings.resize)[:, :, None] for each in images]
    z = posterior_samples(vae, pixels, inputs.generator, inputs.batch, placement)
    z = image_latent_factor(vae.config, settings.image_latent_scale) * z
    b, c, t, h, w = z.shape
    return torch.cat([z, z.new_zeros(b, c, frames - t, h, w)], dim=2)


def posterior_samples(
    vae: VAE, pixels: list[Tensor], generator: Generators, count: int, placement: Placement, *, whole: bool = False
) -> Tensor:
    """Encode each `[1, 3, F, H, W]` once; draw `[count, C, T, h, w]`, in order, the same number from each."""
    posteriors = [vae.encode(each.to(placement.device, placement.dtype), whole=whole) for each in pixels]
    generators = [generator] * count if isinstance(generator, Generator) else generator
    return torch.cat([posteriors[i * len(pixels) // count].sample(generators[i]) for i in range(count)])


CONDITION_ENCODERS = {"image": encode_image}  # by the name of a `Condition`


def image_latent_factor(config: VAEConfig, choice: str) -> float:
    """Return what image latents are multiplied by; `choice` matters only for models with `invert_scale_latents`."""
    if not config.invert_scale_latents or choice == "multiply":
        return config.scaling_factor
    # These models were trained without a factor here; diffusers divides by the factor.
    return 1 / config.scaling_factor if choice == "diffusers" else 1.0
