"""What a checkpoint is, and whether a run is legal and how it is set up, before a weight is loaded.

`settle` turns what a caller asks for and what a model's authors recommend into `Settings`: every choice of a run that
is not a tensor. Sizes follow from the VAE's strides (8 in space, 4 in time) and the transformer's patches.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cogvid.config import CONFIGS, ModelConfig, SchedulerConfig, VAEConfig
from cogvid.hub import WEIGHTS, component_variants, find
from cogvid.image import RESIZE_MODES
from cogvid.sampler import SAMPLERS, GuidanceMode, alphas_cumprod, timesteps
from cogvid.transformer import LearnedPositions
from cogvid.weights import (
    load_state,
    map_transformer_state_dict,
    map_vae_state_dict,
    read_model_config,
    read_model_index,
    stored_dtype,
)

TASKS = ("text-to-video", "image-to-video", "video-to-video")

DEFAULTS = ("recommended", "diffusers")

ImageLatentScale = Literal["diffusers", "none", "multiply"]
PreviousTimestep = Literal["diffusers", "next"]


@dataclass(frozen=True)
class Settings:
    """Hold every choice of a run that is not a tensor, checked, with nothing left to default.

    task: one of `TASKS`. height, width: pixels. num_frames: pixel frames, all of them kept.
    guidance_mode: the rule of `sampler.guidance_schedule`. strength: the share of the steps that video-to-video runs.
    resize: how a picture of another shape is fitted, see `image.prepare_image`.
    image_latent_scale: what the image latents of a model with `invert_scale_latents` are multiplied by, where upstream
    disagrees with itself: "diffusers" 1 / scaling_factor; "none" 1; "multiply" scaling_factor.
    previous_timestep: where a step lands, see `sampler.make_schedule`.
    learned_positions: what a model with learned positions adds at another frame count, see `Transformer.forward`.
    """

    task: str
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    guidance_mode: GuidanceMode
    scheduler: str
    strength: float
    resize: str
    image_latent_scale: ImageLatentScale
    previous_timestep: PreviousTimestep
    learned_positions: LearnedPositions

    @property
    def guided(self) -> bool:
        """True when the unconditional branch is run too; the static scale decides, also for a dynamic one."""
        return self.guidance_scale > 1

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def settle(
    model: ModelConfig,
    *,
    task: str,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    use_dynamic_cfg: bool | GuidanceMode | None = None,
    scheduler: str | None = None,
    strength: float = 0.8,
    resize: str = "stretch",
    image_latent_scale: ImageLatentScale = "diffusers",
    previous_timestep: PreviousTimestep = "diffusers",
    learned_positions: LearnedPositions = "sincos",
) -> Settings:
    """Fill in the model's defaults and check the whole; `untrained` says what is legal but of doubtful use."""
    check_task(model, task)
    scheduler = model.sampler if scheduler is None else scheduler
    if use_dynamic_cfg is None:
        use_dynamic_cfg = model.dynamic_guidance and scheduler == "dpm"
    if isinstance(use_dynamic_cfg, bool):
        use_dynamic_cfg = "diffusers" if use_dynamic_cfg else "constant"
    settings = Settings(
        task=task,
        height=model.height if height is None else height,
        width=model.width if width is None else width,
        num_frames=model.num_frames if num_frames is None else num_frames,
        num_inference_steps=model.num_inference_steps if num_inference_steps is None else num_inference_steps,
        guidance_scale=model.guidance_scale if guidance_scale is None else guidance_scale,
        guidance_mode=use_dynamic_cfg,
        scheduler=scheduler,
        strength=strength,
        resize=resize,
        image_latent_scale=image_latent_scale,
        previous_timestep=previous_timestep,
        learned_positions=learned_positions,
    )
    check_choice("scheduler", settings.scheduler, tuple(SAMPLERS))
    check_choice("use_dynamic_cfg", settings.guidance_mode, get_args(GuidanceMode))
    check_choice("resize", settings.resize, RESIZE_MODES)
    check_choice("image_latent_scale", settings.image_latent_scale, get_args(ImageLatentScale))
    check_choice("previous_timestep", settings.previous_timestep, get_args(PreviousTimestep))
    check_choice("learned_positions", settings.learned_positions, get_args(LearnedPositions))
    check_size(model, settings.height, settings.width)
    check_frames(model.vae, settings.num_frames)
    check_int("num_inference_steps", settings.num_inference_steps, 1, model.scheduler.num_train_timesteps)
    if not (math.isfinite(settings.guidance_scale) and settings.guidance_scale >= 0):
        raise ValueError(f"guidance_scale: got {settings.guidance_scale}, wanted a finite number, 0 or more")
    if not 0 < settings.strength <= 1:
        raise ValueError(f"strength: got {settings.strength}, wanted more than 0 and at most 1")
    if task == "video-to-video" and int(settings.num_inference_steps * settings.strength) < 1:
        raise ValueError(
            f"strength: {settings.strength} of {settings.num_inference_steps} steps is none, "
            f"wanted at least {1 / settings.num_inference_steps:g}"
        )
    check_schedule(model.scheduler, settings)
    return settings


def task_of(image: object | None, video: object | None) -> str:
    """Return the task that follows from the inputs."""
    if image is not None and video is not None:
        raise ValueError("image, video: got both, wanted one of them or neither")
    return "image-to-video" if image is not None else "video-to-video" if video is not None else "text-to-video"


def read_model(
    source: str,
    *,
    defaults: str = "recommended",
    revision: str | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
) -> ModelConfig:
    """Say which model a checkpoint is, with the defaults of a call.

    The arguments are those of `cogvid.load`.

    defaults: "recommended" by the model's authors, or those of "diffusers": its three CogVideoX pipelines take the
        scheduler of `model_index.json`, 50 steps, constant guidance of 6, 226 text tokens, the size that the
        transformer's config names, and its frame count, or 49 for image-to-video.
    """
    check_choice("defaults", defaults, DEFAULTS)
    directory = find(source, revision=revision, local_files_only=local_files_only, variant=variant)
    model = read_model_config(directory, variant)
    if defaults == "recommended":
        return model
    stride, transformer = model.vae.spatial_compression_ratio, model.transformer
    return dataclasses.replace(
        model,
        height=transformer.sample_height * stride,
        width=transformer.sample_width * stride,
        num_frames=49 if transformer.takes_image else transformer.sample_frames,
        num_inference_steps=50,
        guidance_scale=6.0,
        sampler="dpm" if "CogVideoXDPMScheduler" in read_model_index(directory)["scheduler"] else "ddim",
        dynamic_guidance=False,
        max_sequence_length=226,
        recommended=model,
    )


def describe(
    source: str, *, revision: str | None = None, local_files_only: bool = False, variant: str | None = None
) -> dict[str, Any]:
    """Say what a checkpoint is, ready for JSON; raise if its weights are not those of its configs.

    The arguments are those of `cogvid.load`. Only configs and the headers of the safetensors are read.
    """
    directory = find(source, revision=revision, local_files_only=local_files_only, variant=variant)
    model = read_model_config(directory, variant)
    variants = component_variants(directory, variant)
    states = {part: load_state(directory / part, base, variants[part]) for part, base in WEIGHTS.items()}
    on_meta = {part: {name: tensor.to("meta") for name, tensor in state.items()} for part, state in states.items()}
    map_transformer_state_dict(on_meta["transformer"], model.transformer)
    map_vae_state_dict(on_meta["vae"], model.vae)
    recommended = ("height", "width", "num_frames", "max_frames", "fps", "dtype", "num_inference_steps")
    return {
        "model": model.name,
        "official": model.repo,
        "directory": str(directory),
        "tasks": [task for task in TASKS if (task == "image-to-video") == model.transformer.takes_image],
        "recommended": {
            **{name: getattr(model, name) for name in recommended},
            "guidance_scale": model.guidance_scale,
            "scheduler": model.sampler,
        },
        "weights": {
            part: {
                "tensors": len(state),
                "parameters": sum(tensor.numel() for tensor in state.values()),
                "bytes": sum(tensor.nbytes for tensor in state.values()),
                "dtype": str(stored_dtype(state, directory / part)).removeprefix("torch."),
            }
            for part, state in states.items()
        },
        "config": {
            "transformer": model.transformer.to_dict(),
            "vae": model.vae.to_dict(),
            "scheduler": model.scheduler.to_dict(),
        },
    }


def check_task(model: ModelConfig, task: str) -> None:
    """Raise unless the model can do the task, naming those that can."""
    check_choice("task", task, TASKS)
    if (task == "image-to-video") != model.transformer.takes_image:
        takes = "an image" if model.transformer.takes_image else "no image"
        raise ValueError(
            f"model: got {model.name}, which takes {takes} and cannot do {task}, want one of "
            f"{', '.join(models_for(task))}"
        )


def models_for(task: str) -> list[str]:
    """Return what `load` can be given for a task: the hub ids of the official models, and the shipped packs."""
    return [m.repo or m.name for m in CONFIGS.values() if m.transformer.takes_image == (task == "image-to-video")]


def check_size(model: ModelConfig, height: int, width: int) -> None:
    """Raise unless height and width are whole numbers of patches, and, for a learned position table, its own size."""
    stride = model.vae.spatial_compression_ratio
    patch = stride * model.transformer.patch_size
    for name, pixels in (("height", height), ("width", width)):
        check_int(name, pixels, 1)
        if pixels % patch:
            below, above = pixels // patch * patch, (pixels // patch + 1) * patch
            nearest = f"{below} or {above}" if below else f"{above}"
            raise ValueError(f"{name}: got {pixels}, wanted a multiple of {patch}; the nearest is {nearest}")
    table = (model.transformer.sample_height * stride, model.transformer.sample_width * stride)
    if model.transformer.use_learned_positional_embeddings and (height, width) != table:
        raise ValueError(
            f"height, width: got {height}x{width}, wanted {table[0]}x{table[1]}, the size of the learned position "
            f"table of {model.name}"
        )


def check_schedule(config: SchedulerConfig, settings: Settings) -> None:
    """Raise unless the noise schedule has every step of the run, and the first one can be taken."""
    levels, steps = alphas_cumprod(config), timesteps(config, settings.num_inference_steps)
    if settings.task == "video-to-video":
        steps = steps[-int(len(steps) * settings.strength) :]
    if config.prediction_type == "epsilon" and levels[steps[0]] == 0:
        # diffusers divides by zero here, and makes a video of no numbers.
        raise ValueError(
            f"prediction_type: got 'epsilon' with a first step at timestep {steps[0]}, where the signal is zero and "
            "cannot be told from the noise, want 'v_prediction' or 'sample', or rescale_betas_zero_snr false"
        )


def check_frames(vae: VAEConfig, num_frames: int) -> None:
    """Raise unless the VAE decodes exactly this many frames (8N or 8N + 1)."""
    check_int("num_frames", num_frames, 1)

    def exact(n: int) -> bool:
        return decoded_frames(vae, latent_frames(vae, n)) == n

    if not exact(num_frames):
        period = 2 * vae.temporal_compression_ratio
        below = next(n for n in range(num_frames, 0, -1) if exact(n))
        above = next(n for n in range(num_frames, num_frames + period + 1) if exact(n))
        raise ValueError(
            f"num_frames: got {num_frames}, wanted {period}N or {period}N + 1; the nearest are {below} and {above}"
        )


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise unless the value is an integer from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        wanted = f"{low} or more" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: got {value!r}, wanted an integer, {wanted}")


def check_seed(seed: object, videos: int) -> None:
    """Raise unless this seed and those of the videos behind it, one more each, have 63 bits, as many as torch takes."""
    check_int("seed", seed, 0, 2**63 - videos)


def latent_frames(vae: VAEConfig, num_frames: int) -> int:
    """Return how many latent frames the VAE makes of a clip."""
    return (num_frames - 1) // vae.temporal_compression_ratio + 1


def decoded_frames(vae: VAEConfig, frames: int) -> int:
    """Return how many pixel frames the VAE makes of latent frames: the first of an odd count stands for one."""
    ratio = vae.temporal_compression_ratio
    return ratio * frames - (ratio - 1) * (frames % 2)


def untrained(model: ModelConfig, height: int, width: int, num_frames: int) -> list[str]:
    """Name what of a legal run lies outside what the model was trained for."""
    model = model.recommended or model
    departures = []
    shorter, longer = sorted((height, width))
    # CogVideoX1.5-I2V saw every aspect ratio with the same shorter side
    free_ratio = model.transformer.takes_image and model.transformer.patch_size_t is not None
    in_range = shorter == min(model.height, model.width) and longer <= max(model.height, model.width)
    if (height, width) != (model.height, model.width) and not (free_ratio and in_range):
        departures.append(f"{height}x{width} pixels (recommended: {model.height}x{model.width})")
    if num_frames > model.max_frames or num_frames % model.frame_multiple != 1:
        departures.append(
            f"{num_frames} frames (recommended: {model.num_frames}; {model.frame_multiple}N + 1 up to "
            f"{model.max_frames})"
        )
    return departures


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(choices)}")
