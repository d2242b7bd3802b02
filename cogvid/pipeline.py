"""From a prompt, and an image or a video, to a video: encode -> latents -> sample -> decode.

Each stage is a function that stands alone; `Pipeline` only orders them. Must equal diffusers' `CogVideoXPipeline`,
`CogVideoXImageToVideoPipeline` and `CogVideoXVideoToVideoPipeline`: the same generator, consumed in the same order,
gives the same video.

Letters: `B` videos (prompts x videos per prompt), `F` pixel and `T` latent frames, `H W` pixels, `h w` latents,
`L E` text tokens and their width. Inside, latents are `[B, C, T, h, w]`; at the boundary (`latents=`, the callback,
`output_type="latent"`) they are `[B, T, C, h, w]`, as in diffusers.
"""

from __future__ import annotations

import os
import platform
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Generator, Tensor
from tqdm.auto import tqdm

import cogvid
from cogvid import plan, versions
from cogvid.config import ModelConfig, VAEConfig
from cogvid.hub import component_variants, find
from cogvid.image import prepare_image, prepare_video
from cogvid.ops import Ops, resolve_ops
from cogvid.plan import ImageLatentScale, PreviousTimestep, Settings
from cogvid.sampler import (
    SAMPLERS,
    GuidanceMode,
    OnStep,
    Schedule,
    add_noise,
    draw_noise,
    guidance_schedule,
    guide,
    make_schedule,
)
from cogvid.text import TextEncoder, load_text_encoder
from cogvid.transformer import LearnedPositions, StepCache, Transformer
from cogvid.vae import VAE
from cogvid.video import denormalize, to_uint8
from cogvid.weights import DTYPES, load_transformer, load_vae, resolve_device, resolve_dtype

if TYPE_CHECKING:
    from PIL.Image import Image

OUTPUT_TYPES = ("pil", "np", "pt", "uint8", "latent", "stream")

Generators = Generator | Sequence[Generator]
Callback = Callable[["Pipeline", int, int, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class Output:
    """Hold what a run made.

    frames: by `output_type`: "pil" a list of PIL images per video; "np" float32 `[B, F, H, W, 3]` in [0, 1]; "pt"
    float32 `[B, F, 3, H, W]` in [0, 1]; "uint8" a tensor `[B, F, H, W, 3]`; "latent" `[B, T, C, h, w]`, padding of the
    1.5 models included; "stream" one iterator per video of uint8 `[f, H, W, 3]` on the CPU, decoded on demand.
    seed: that of the first video, or None if the caller gave generators; `provenance["seeds"]` lists them all.
    fps: frames per second that the model was trained at. provenance: everything that decided the result, ready for
    JSON.
    """

    frames: Any
    seed: int | None
    fps: int
    provenance: dict[str, Any]


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    ops: str | Ops = "auto",
    defaults: str = "recommended",
    revision: str | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
) -> Pipeline:
    """Load a model: a shipped pack, a directory in the official layout, or a hub id, which is fetched.

    Args:
        device: None is CUDA where there is a GPU, else the CPU.
        dtype: "float32", "bfloat16" or "float16"; None is what the model's authors recommend.
        ops: "torch", "triton", "auto" (triton on CUDA, torch elsewhere), or an `Ops`.
        defaults: of a call's arguments: "recommended" by the model's authors, or those of "diffusers", so that a call
            ported from there gives the same video; see `plan.read_model`.
        revision: branch, tag or commit of a hub id. local_files_only: take a hub id from the local cache.
        variant: which of several sets of weights to load, by the infix of its files' names, such as "fp16"; a part that
            lacks it is loaded from its plain files, with a warning. It does not choose the dtype.
    """
    versions.check()
    device = resolve_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    bundle, ops_name = resolve_ops(ops, device)
    plan.check_choice("defaults", defaults, plan.DEFAULTS)  # before anything is fetched
    # Absolute, because a directory "tiny-i2v" would be taken for the shipped pack from here on.
    directory = find(
        os.fspath(source), revision=revision, local_files_only=local_files_only, variant=variant
    ).absolute()
    variants = component_variants(directory, variant)
    model = plan.read_model(str(directory), defaults=defaults, variant=variant)
    # Decided here once, so that all three parts agree and what has to be said about it is said once.
    dtype = resolve_dtype(dtype, device, stored=DTYPES[model.dtype])
    return Pipeline(
        model,
        transformer=load_transformer(
            directory, device=device, dtype=dtype, ops=bundle, variant=variants["transformer"]
        ),
        vae=load_vae(directory, device=device, dtype=dtype, ops=bundle, variant=variants["vae"]),
        text_encoder=load_text_encoder(
            directory, device=device, dtype=dtype, ops=bundle, variant=variants["text_encoder"]
        ),
        ops=ops_name,
        source=os.fspath(source),
        revision=revision,
        variant=variant,
    )


class Pipeline:
    """Generate videos with one loaded model; `cogvid.load` makes it.

    ops: the name of the ops that the model runs on. source, revision, variant: what was loaded. All four are for the
    provenance only.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        transformer: Transformer,
        vae: VAE,
        text_encoder: TextEncoder,
        ops: str,
        source: str,
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        self.model = model
        self.transformer = transformer
        self.vae = vae
        self.text_encoder = text_encoder
        self.ops = ops
        self.source = source
        self.revision = revision
        self.variant = variant

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.transformer.parameters()).dtype

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: Any = None,
        video: Any = None,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        use_dynamic_cfg: bool | GuidanceMode | None = None,
        scheduler: str | None = None,
        strength: float = 0.8,
        num_videos_per_prompt: int = 1,
        seed: int | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        step_cache: StepCache | None = None,
        resize: str = "stretch",
        image_latent_scale: ImageLatentScale = "diffusers",
        previous_timestep: PreviousTimestep = "diffusers",
        learned_positions: LearnedPositions = "sincos",
        progress: bool = True,
    ) -> Output:
        """Generate videos. What is None is the default of `self.model`: see `defaults` of `load`.

        Args:
            prompt: one or several; each becomes `num_videos_per_prompt` videos, which lie together in the batch.
            image: the first frame, anything that `load_image` takes, or a list with one per prompt.
            video: PIL images or uint8 `[F, H, W, 3]`, shared by all prompts; the first `num_frames` frames are used.
            negative_prompt: what to steer away from, for all prompts or one for each; unused without guidance.
            height, width: pixels. num_frames: pixel frames, 8N or 8N + 1.
            guidance_scale: classifier-free guidance, off at 1 and below.
            use_dynamic_cfg: None is on with dpm and off with ddim, and off with diffusers' defaults; or a mode of
                `sampler.guidance_schedule` by name.
            scheduler: "dpm" or "ddim".
            strength: (0, 1], how much of a video is noise at the start, and the share of the steps that are run.
            seed: of the first video; the k-th one has seed + k. Each video has a CPU generator of its own, so that with
                its seed alone it comes out the same, to rounding. Drawn if neither it nor `generator` is given.
            generator: one for the whole batch, or a list with one per video, consumed as diffusers consumes it.
            latents: `[B, T, C, h, w]` in place of the initial noise, or, for video-to-video, of the noised video.
            prompt_embeds, negative_prompt_embeds: `[prompts, L, E]` in place of the prompts.
            output_type: see `Output`.
            callback_on_step_end: called with (pipeline, step index, timestep, {"latents": fp32 `[B, T, C, h, w]`});
                the latents of the dictionary that it may return replace the present ones.
            step_cache: wraps the block loop of the transformer; a new one for each call.
            resize: "stretch", "crop" or "pad"; see `prepare_image`.
            image_latent_scale, previous_timestep, learned_positions: named choices where upstream is in
                doubt; see `plan.Settings`.
            progress: show a bar on stderr.
        """
        task = plan.task_of(image, video)
        plan.check_choice("output_type", output_type, OUTPUT_TYPES)
        plan.check_int("num_videos_per_prompt", num_videos_per_prompt, 1)
        if video is not None:
            plan.check_int("num_frames", len(video) if num_frames is None else num_frames, 1, len(video))
            num_frames = len(video) if num_frames is None else num_frames
        settings = plan.settle(
            self.model,
            task=task,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            use_dynamic_cfg=use_dynamic_cfg,
            scheduler=scheduler,
            strength=strength,
            resize=resize,
            image_latent_scale=image_latent_scale,
            previous_timestep=previous_timestep,
            learned_positions=learned_positions,
        )
        if departures := plan.untrained(self.model, settings.height, settings.width, settings.num_frames):
            warnings.warn(f"{self.model.name} was not trained for {' and '.join(departures)}", stacklevel=3)
        prompts = _prompts(prompt, prompt_embeds, self.model)
        negatives = None
        if settings.guided:
            negatives = _negatives(negative_prompt, negative_prompt_embeds, prompts, self.model)
        batch = len(prompts) * num_videos_per_prompt
        generator, seeds = _generators(seed, generator, batch)
        schedule = make_schedule(
            self.model.scheduler, settings.num_inference_steps, previous=settings.previous_timestep
        )
        if video is not None:
            schedule = schedule.tail(settings.strength)

        # The posterior of the image or video is drawn before the noise, as in diffusers: the order decides the video.
        image_latents = None
        if image is not None:
            image_latents = encode_image(self.vae, image, settings, batch, generator)
        if video is not None and latents is None:
            x = noised_video(self.vae, video, settings, batch, generator, schedule, self.padding(settings))
        else:
            x = initial_latents(self.latent_shape(settings, batch), generator, self.device, self.dtype, latents)
        if image_latents is not None:
            image_latents = _pad_end(image_latents, x.shape[2])
        embeds = encode_prompts(self.text_encoder, prompts, negatives, self.model.text_length)
        embeds = embeds.to(self.device, self.dtype).repeat_interleave(num_videos_per_prompt, dim=0)

        with tqdm(total=len(schedule), desc="denoise", unit="step", disable=not progress) as bar:

            def on_step(i: int, t: int, state: Tensor) -> Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                returned = callback_on_step_end(self, i, t, {"latents": rearrange(state, "b c t h w -> b t c h w")})
                if not returned or "latents" not in returned:
                    return None
                return rearrange(returned["latents"], "b t c h w -> b c t h w")

            x = sample(
                self.transformer,
                x,
                embeds,
                schedule,
                settings,
                image_latents=image_latents,
                generator=generator,
                on_step=on_step,
                step_cache=step_cache,
            )
        if not torch.isfinite(x).all():
            raise FloatingPointError(f"latents: not finite after sampling in {self.dtype}; wanted a wider dtype")
        frames = self._frames(x, settings, output_type)
        tensors = {
            "generator": generator if seeds is None else None,
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
        }
        provenance = {
            "prompt": None if isinstance(prompts, Tensor) else prompts,
            "negative_prompt": None if isinstance(negatives, Tensor) else negatives,
            "num_videos_per_prompt": num_videos_per_prompt,
            "seed": seeds[0] if seeds else None,
            "seeds": seeds,
            "given": [name for name, value in tensors.items() if value is not None],
            **self._provenance(settings, schedule),
        }
        return Output(frames=frames, seed=provenance["seed"], fps=self.model.fps, provenance=provenance)

    def padding(self, settings: Settings) -> int:
        """Return how many latent frames the temporal patches of a 1.5 model need on top; they are cut off in front."""
        return -plan.latent_frames(self.model.vae, settings.num_frames) % (self.model.transformer.patch_size_t or 1)

    def latent_shape(self, settings: Settings, batch: int) -> tuple[int, int, int, int, int]:
        """Return `(B, T, C, h, w)` of the latents that the transformer sees, padding included."""
        stride = self.model.vae.spatial_compression_ratio
        frames = plan.latent_frames(self.model.vae, settings.num_frames) + self.padding(settings)
        channels = self.model.transformer.out_channels
        return batch, frames, channels, settings.height // stride, settings.width // stride

    def _frames(self, x: Tensor, settings: Settings, output_type: str) -> Any:
        if output_type == "latent":
            return rearrange(x, "b c t h w -> b t c h w")
        videos = [decode(self.vae, video) for video in x[:, :, self.padding(settings) :].split(1)]
        if output_type == "stream":
            return [(to_uint8(chunk).cpu() for chunk in video) for video in videos]
        if output_type in ("np", "pt"):
            pixels = torch.stack([torch.cat(list(video)) for video in videos])
            return pixels.cpu().numpy() if output_type == "np" else rearrange(pixels, "b f h w c -> b f c h w")
        pixels = torch.stack([torch.cat([to_uint8(chunk) for chunk in video]) for video in videos])
        return pixels if output_type == "uint8" else [_to_pil(video) for video in pixels]

    def _provenance(self, settings: Settings, schedule: Schedule) -> dict[str, Any]:
        scales = guidance_schedule(settings.guidance_scale, schedule, settings.guidance_mode)
        return {
            "model": self.model.name,
            "source": self.source,
            "revision": self.revision,
            "variant": self.variant,
            "defaults": "recommended" if self.model.recommended is None else "diffusers",
            "max_sequence_length": self.model.text_length,
            **settings.to_dict(),
            "timesteps": list(schedule.timesteps),
            "guidance_schedule": scales if settings.guided else None,
            "fps": self.model.fps,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "ops": self.ops,
            "versions": {
                "cogvid": cogvid.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


def encode_prompts(
    encoder: TextEncoder, prompts: list[str] | Tensor, negative: list[str] | Tensor | None, max_length: int
) -> Tensor:
    """Encode prompts, or take their embeddings as they are; the negative ones come first.

    prompts, negative: strings, or embeddings `[B, L, E]`; negative is None without guidance.
    max_length: tokens that strings are padded or cut to; embeddings that are given decide it themselves.
    Returns `[B, L, E]`, or `[2B, L, E]` with negative ones.
    """
    cond = prompts if isinstance(prompts, Tensor) else encoder(prompts, max_length)
    if negative is None:
        return cond
    uncond = negative if isinstance(negative, Tensor) else encoder(negative, cond.shape[1])
    return torch.cat([uncond.to(cond), cond])


def encode_image(vae: VAE, image: Any, settings: Settings, batch: int, generator: Generators) -> Tensor:
    """Encode the first frame to scaled latents `[B, C, 1, h, w]`, drawing one posterior sample per video.

    image: anything that `load_image` takes, or a list whose length divides `batch`.
    """
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if not images or batch % len(images):
        raise ValueError(f"image: got a list of {len(images)}, wanted one, or one per prompt")
    pixels = [prepare_image(each, settings.height, settings.width, settings.resize) for each in images]
    z = _posterior_samples(vae, [each[:, :, None] for each in pixels], generator, batch)
    return image_latent_factor(vae.config, settings.image_latent_scale) * z


def image_latent_factor(config: VAEConfig, choice: ImageLatentScale) -> float:
    """Return what image latents are multiplied by; `choice` matters only for models with `invert_scale_latents`."""
    if not config.invert_scale_latents or choice == "multiply":
        return config.scaling_factor
    # These models were trained without the factor at this place, and diffusers answers with its inverse.
    return 1 / config.scaling_factor if choice == "diffusers" else 1.0


def noised_video(
    vae: VAE,
    video: Any,
    settings: Settings,
    batch: int,
    generator: Generators,
    schedule: Schedule,
    padding: int,
) -> Tensor:
    """Encode a video and take it to the first timestep of the schedule: `[B, C, padding + T, h, w]`.

    video: what `prepare_video` takes, `settings.num_frames` frames or more. padding: latent frames repeated in front.
    generator: one draws the posterior once, for all videos alike, as in diffusers; those of a list once for each.
    """
    pixels = prepare_video(video[: settings.num_frames], settings.height, settings.width, settings.resize)
    draws = 1 if isinstance(generator, Generator) else batch
    z = vae.config.scaling_factor * _posterior_samples(vae, [pixels], generator, draws)
    z = torch.cat([*[z[:, :, :1]] * padding, z], dim=2).expand(batch, -1, -1, -1, -1)
    b, c, t, h, w = z.shape
    return add_noise(z, initial_latents((b, t, c, h, w), generator, z.device, z.dtype), schedule.timesteps[0], schedule)


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
        raise ValueError(f"latents: got shape {tuple(latents.shape)}, wanted [B, T, C, h, w] = {shape_btchw}")
    return rearrange(latents.to(device, dtype), "b t c h w -> b c t h w")


def sample(
    transformer: Transformer,
    x: Tensor,
    embeds: Tensor,
    schedule: Schedule,
    settings: Settings,
    *,
    image_latents: Tensor | None = None,
    generator: Generators | None = None,
    on_step: OnStep | None = None,
    step_cache: StepCache | None = None,
) -> Tensor:
    """Denoise `x` `[B, C, T, h, w]` with guidance; the result has the shape and the dtype of `x`.

    embeds: as `encode_prompts` returns them. image_latents: `[B, C, T, h, w]`, joined to `x` on the channels.
    """
    timesteps = torch.tensor(schedule.timesteps, device=x.device)
    scales = guidance_schedule(settings.guidance_scale, schedule, settings.guidance_mode)

    def denoise(x: Tensor, i: int) -> Tensor:
        inputs = x if image_latents is None else torch.cat([x, image_latents], dim=1)
        if settings.guided:
            inputs = torch.cat([inputs, inputs])
        prediction = transformer(
            inputs,
            embeds,
            timesteps[i].expand(len(inputs)),
            step_cache=step_cache,
            learned_positions=settings.learned_positions,
        )
        if not settings.guided:
            return prediction.float()
        uncond, cond = prediction.chunk(2)
        return guide(uncond, cond, scales[i])

    return SAMPLERS[settings.scheduler](denoise, x, schedule, generator=generator, on_step=on_step)


@torch.no_grad()
def decode(vae: VAE, latents: Tensor) -> Iterator[Tensor]:
    """Decode the scaled latents `[1, C, T, h, w]` of one video; yield float32 `[f, H, W, 3]` in [0, 1] as ready."""
    for chunk in vae.decode_chunks(1 / vae.config.scaling_factor * latents):
        yield rearrange(denormalize(chunk[0]), "c f h w -> f h w c")


def _posterior_samples(vae: VAE, pixels: list[Tensor], generator: Generators, count: int) -> Tensor:
    """Encode each `[1, 3, F, H, W]` once, and draw `count` samples `[count, C, T, h, w]`, as many of each, in order."""
    weight = next(vae.parameters())
    posteriors = [vae.encode(each.to(weight.device, weight.dtype)) for each in pixels]
    generators = [generator] * count if isinstance(generator, Generator) else generator
    return torch.cat([posteriors[i * len(pixels) // count].sample(generators[i]) for i in range(count)])


def _to_pil(pixels: Tensor) -> list[Image]:
    from PIL import Image as pil

    return [pil.fromarray(frame) for frame in pixels.cpu().numpy()]


def _pad_end(latents: Tensor, frames: int) -> Tensor:
    """Add zero frames behind, up to `frames`."""
    b, c, t, h, w = latents.shape
    return torch.cat([latents, latents.new_zeros(b, c, frames - t, h, w)], dim=2)


def _prompts(prompt: str | Sequence[str] | None, embeds: Tensor | None, model: ModelConfig) -> list[str] | Tensor:
    if (prompt is None) == (embeds is None):
        raise ValueError(f"prompt, prompt_embeds: got {'neither' if prompt is None else 'both'}, wanted one of them")
    if embeds is not None:
        width = model.transformer.text_embed_dim
        if embeds.ndim != 3 or embeds.shape[2] != width:
            raise ValueError(f"prompt_embeds: got shape {tuple(embeds.shape)}, want [prompts, L, {width}]")
        return embeds
    return _strings("prompt", prompt)


def _negatives(
    prompt: str | Sequence[str], embeds: Tensor | None, prompts: list[str] | Tensor, model: ModelConfig
) -> list[str] | Tensor:
    count = len(prompts)
    if embeds is not None:
        if prompt:
            raise ValueError("negative_prompt, negative_prompt_embeds: got both, wanted one of them")
        length = prompts.shape[1] if isinstance(prompts, Tensor) else model.text_length
        if tuple(embeds.shape) != (shape := (count, length, model.transformer.text_embed_dim)):
            raise ValueError(f"negative_prompt_embeds: got shape {tuple(embeds.shape)}, want {shape} as the prompts'")
        return embeds
    prompts = _strings("negative_prompt", prompt)
    if len(prompts) not in (1, count):
        raise ValueError(f"negative_prompt: got {len(prompts)}, wanted 1 or one per prompt, {count}")
    return prompts * (count // len(prompts))


def _strings(name: str, prompt: object) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"{name}: got {prompt!r}, wanted a string or a list of strings")
    return list(prompts)


def _generators(seed: int | None, generator: Generators | None, batch: int) -> tuple[Generators, list[int] | None]:
    """Return the caller's generators, or else those of the seeds, one for each video, and the seeds."""
    if generator is not None:
        if seed is not None:
            raise ValueError("seed, generator: got both, wanted one of them")
        if not isinstance(generator, Generator) and len(generator) != batch:
            raise ValueError(f"generator: got a list of {len(generator)}, wanted one per video, {batch}")
        return generator, None
    if seed is None:
        seed = secrets.randbelow(2**32)
    plan.check_seed(seed, batch)
    seeds = [seed + k for k in range(batch)]
    return [Generator("cpu").manual_seed(each) for each in seeds], seeds
