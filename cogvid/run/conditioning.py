"""What a model takes beside noise and text, encoded to latents: for each `Condition` of a config, one function.

A function takes (VAE, what the call was given, settings, inputs, latent frames, placement) and returns
`[B, C, T, h, w]` with the channels of its `Condition`. What was given is as `given.resized` returns it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cogvid.config import Condition, ModelConfig, VAEConfig
from cogvid.media.image import prepare_image, prepare_video
from cogvid.models.text import TextEncoder
from cogvid.models.vae import VAE
from cogvid.run.given import Given
from cogvid.run.inputs import Inputs
from cogvid.run.settings import Settings
from cogvid.run.stages import stage
from cogvid.sampling.samplers import Generators
from cogvid.weights.placement import Placement


@stage("text")
def encode_prompts(
    encoder: TextEncoder, prompts: list[str] | Tensor, negative: list[str] | Tensor | None, max_length: int
) -> Tensor:
    """Encode prompts, or take their embeddings as they are; the negative ones come first.

    prompts, negative: strings, or embeddings `[B, L, E]`; negative is None without guidance.
    max_length: tokens that strings are padded or cut to; given embeddings keep their length.
    Returns `[B, L, E]`, or `[2B, L, E]` with negative ones.
    """
    cond = prompts if isinstance(prompts, Tensor) else encoder(prompts, max_length)
    if negative is None:
        return cond
    uncond = negative if isinstance(negative, Tensor) else encoder(negative, cond.shape[1])
    return torch.cat([uncond.to(cond), cond])


@stage("image")
def encode_image(
    vae: VAE, given: Given, settings: Settings, inputs: Inputs, frames: int, placement: Placement
) -> Tensor:
    """Encode the first frame, and the last one if it is given, to scaled latents `[B, C, frames, h, w]`, zero between.

    One posterior sample is drawn per video, first those of all first frames. Must equal
    `CogVideoXImageToVideoPipeline`, and with a last frame the pipeline of the models that were trained for it,
    `cogvideox_interpolation/pipeline.py` of https://github.com/feizc/CogvideX-Interpolation (7ed3938).

    given: "image" and "last_image" are lists whose lengths divide the number of videos.
    """
    ends = []
    for name in ("image", "last_image"):
        if name in given:
            images = [_per_prompt(name, given, inputs, i) for i in range(len(given[name]))]
            size = settings.height, settings.width, settings.resize
            pixels = [prepare_image(each, *size)[:, :, None] for each in images]
            z = posterior_samples(vae, pixels, inputs.generator, inputs.batch, placement)
            ends.append(image_latent_factor(vae.config, settings.image_latent_scale) * z)
    if len(ends) > frames:
        raise ValueError(f"num_frames: got {settings.num_frames} with a last_image, want two latent frames or more")
    b, c, t, h, w = ends[0].shape
    return torch.cat([ends[0], ends[0].new_zeros(b, c, frames - t * len(ends), h, w), *ends[1:]], dim=2)


@stage("video")
def encode_control(
    vae: VAE, given: Given, settings: Settings, inputs: Inputs, frames: int, placement: Placement
) -> Tensor:
    """Encode a control video to scaled latents `[B, C, frames, h, w]`. Must equal `CogVideoXFunControlPipeline`.

    The mean of the posterior is taken, so nothing is drawn. Where 1.5 pads, the first latent is repeated in front, as
    for video-to-video; diffusers refuses such a frame count.
    """
    encoded = []
    for index in range(len(given["control_video"])):
        pixels = prepare_video(_per_prompt("control_video", given, inputs, index), settings.height, settings.width)
        encoded.append(vae.config.scaling_factor * _mean(vae, pixels, settings, placement))
    return padded(_for_batch(encoded, inputs), frames)


def encode_conditions(
    vae: VAE,
    model: ModelConfig,
    given: Given,
    settings: Settings,
    inputs: Inputs,
    frames: int,
    placement: Placement,
) -> Tensor | None:
    """Return what a model takes beside noise and text, `[B, C, frames, h, w]`, in the order of its config."""
    parts = [
        CONDITION_ENCODERS[each.name](vae, given, settings, inputs, frames, placement) for each in model.conditions
    ]
    return torch.cat(parts, dim=1) if parts else None


@stage("image")
def encode_masked(
    vae: VAE, given: Given, settings: Settings, inputs: Inputs, frames: int, placement: Placement
) -> Tensor:
    """Encode what of the pixels is known to `[B, 1 + C, frames, h, w]`: the mask, then the masked video.

    Both are scaled. The mask is 1 where pixels are known, which in the masked video keep their value; the others are
    black. Where nothing is known both are zero. Must equal `CogVideoXFunInpaintPipeline` of VideoX-Fun,
    https://github.com/aigc-apps/VideoX-Fun (804a425), `videox_fun/pipeline/pipeline_cogvideox_fun_inpaint.py`, and its
    `get_image_to_video_latent`: of an image the first frame is known, of a last image the last one.

    given: "video" and "mask", whose white (128 and more) is made anew; or "image" and "last_image"; or neither. Noise
    of `noise_aug_strength` is added to known pixels that are not black, drawn for each video.
    """
    size = (settings.height, settings.width)
    names = [name for name in ("video", "mask", "image", "last_image") if name in given]
    b, h, w = inputs.batch, *(each // vae.config.spatial_compression_ratio for each in size)
    if "mask" not in given and "image" not in given:
        channels = 1 + vae.config.latent_channels
        return torch.zeros(b, channels, frames, h, w, device=placement.device, dtype=placement.dtype)
    # With noise, each video has pixels of its own.
    count = b if settings.noise_aug_strength else max(len(given[name]) for name in names)
    encoded = []
    for index in range(count):
        mine = {name: _per_prompt(name, given, inputs, index * len(given[name]) // count) for name in names}
        pixels, anew = _known(mine, settings)
        masked = torch.where(anew, -1.0, pixels)
        if strength := settings.noise_aug_strength:
            g = inputs.generator if isinstance(inputs.generator, Generator) else inputs.generator[index]
            noise = torch.randn(masked.shape, generator=g, device=g.device).to(masked)
            masked = torch.where(masked == -1, masked, masked + strength * noise)
        z = _mean(vae, masked, settings, placement)
        z = torch.cat([mask_latents(1 - anew.float(), z), z], dim=1)
        encoded.append(z.new_zeros(z.shape) if anew.all() else vae.config.scaling_factor * z)
    return padded(_for_batch(encoded, inputs), frames)


def mask_latents(known: Tensor, z: Tensor) -> Tensor:
    """Resize a mask `[1, 1, F, H, W]` to the latents `z` `[1, C, T, h, w]`: its first frame alone, then the others."""
    size = z.shape[3:]
    first = F.interpolate(known[:, :, :1], (1, *size), mode="trilinear")
    if z.shape[2] == 1:
        return first.to(z)
    rest = F.interpolate(known[:, :, 1:], (z.shape[2] - 1, *size), mode="trilinear")
    return torch.cat([first, rest], dim=2).to(z)


def padded(z: Tensor, frames: int) -> Tensor:
    """Repeat the first latent frame in front until there are `frames`."""
    return torch.cat([*[z[:, :, :1]] * (frames - z.shape[2]), z], dim=2)


def posterior_samples(
    vae: VAE, pixels: list[Tensor], generator: Generators, count: int, placement: Placement, *, whole: bool = False
) -> Tensor:
    """Encode each `[1, 3, F, H, W]` once; draw `[count, C, T, h, w]`, in order, the same number from each."""
    posteriors = [vae.encode(each.to(placement.device, placement.dtype), whole=whole) for each in pixels]
    generators = [generator] * count if isinstance(generator, Generator) else generator
    return torch.cat([posteriors[i * len(pixels) // count].sample(generators[i]) for i in range(count)])


CONDITION_ENCODERS = {  # by the name of a `Condition`
    "image": encode_image,
    "control_video": encode_control,
    "mask": encode_masked,
}


def draws_before_noise(conditions: tuple[Condition, ...], settings: Settings) -> list[str]:
    """Name the draws of a run before its initial noise, for a single video; see `noise`."""
    pictures = settings.task in ("image-to-video", "first-and-last-frame")
    drawn = []
    for condition in conditions:
        if condition.name == "image":
            drawn += ["posterior", "posterior.1"] if settings.task == "first-and-last-frame" else ["posterior"]
        if condition.name == "mask" and settings.noise_aug_strength and (pictures or settings.task == "inpainting"):
            drawn.append("pixels")
    return [*drawn, "posterior"] if settings.starts_from_video else drawn


def image_latent_factor(config: VAEConfig, choice: str) -> float:
    """Return what image latents are multiplied by; `choice` matters only for models with `invert_scale_latents`."""
    if not config.invert_scale_latents or choice == "multiply":
        return config.scaling_factor
    # These models were trained without a factor here; diffusers divides by the factor.
    return 1 / config.scaling_factor if choice == "diffusers" else 1.0


def _known(given: dict[str, object], settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the pixels `[1, 3, F, H, W]` in [-1, 1], and where they are made anew, `[1, 1, F, H, W]`."""
    height, width, count = settings.height, settings.width, settings.num_frames
    if "mask" in given:
        white = np.asarray(given["mask"]).astype(np.float32).mean(-1) >= 128
        anew = torch.from_numpy(np.broadcast_to(white, (count, height, width)).copy())[None, None]
        return prepare_video(np.asarray(given["video"]), height, width), anew
    first = np.asarray(given["image"])
    frames, anew = np.broadcast_to(first, (count, *first.shape)).copy(), torch.ones(1, 1, count, height, width)
    anew[:, :, 0] = 0
    if "last_image" in given:
        frames[-1], anew[:, :, -1] = np.asarray(given["last_image"]), 0
    return prepare_video(frames, height, width), anew.bool()


def _mean(vae: VAE, pixels: Tensor, settings: Settings, placement: Placement) -> Tensor:
    """Return the mean of the posterior of `[1, 3, F, H, W]`."""
    return vae.encode(pixels.to(placement.device, placement.dtype), whole=settings.vae_encode == "whole").mean


def _per_prompt(name: str, given: Given, inputs: Inputs, index: int) -> Any:
    if inputs.batch % len(given[name]):
        raise ValueError(f"{name}: got a list of {len(given[name])}, want one, or one per prompt")
    return given[name][index]


def _for_batch(encoded: list[Tensor], inputs: Inputs) -> Tensor:
    return torch.cat(encoded).repeat_interleave(inputs.batch // len(encoded), dim=0)
