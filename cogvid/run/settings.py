"""The options of a run. Each is written once, as a field of `Settings`, with its default, its check and its help.

The call, the command line and the record in a video derive from the fields. A new option is a field and the code that
obeys it. This file imports no torch, so that `cogvid --help` answers at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cogvid.config import CONFIGS, LEARNED_POSITIONS, PREVIOUS_TIMESTEPS, TASKS, ModelConfig, VAEConfig
from cogvid.options import check, check_choice, check_int, fill, names, option, options_of

IMAGE_LATENT_SCALES = ("diffusers", "none", "multiply")
MAX_SIDE, MAX_FRAMES = 2**24, 2**20  # far beyond any memory; larger numbers have no place in a tensor's size
MAX_SCALE = 1e6
_INPAINTING = ("alibaba-pai/CogVideoX-Fun-V1.1-2b-InP", "alibaba-pai/CogVideoX-Fun-V1.1-5b-InP")
_OTHER_MODELS = {  # for what no model of `CONFIGS` was trained for
    "first-and-last-frame": ("feizhengcong/CogvideoX-Interpolation", *_INPAINTING),
    "inpainting": _INPAINTING,
    "control-to-video": tuple(f"alibaba-pai/CogVideoX-Fun-V1.1-5b-{kind}" for kind in ("Control", "Pose")),
}


@dataclass(frozen=True)
class Settings:
    """Every choice of a run that is not a tensor. `resolve_settings` checks them and leaves none open.

    task: one of `config.TASKS`; it follows from the inputs.
    """

    task: str
    height: int = option(None, int, "pixels, a multiple of 16", model="height", low=1, high=MAX_SIDE)
    width: int = option(None, int, "pixels, a multiple of 16", model="width", low=1, high=MAX_SIDE)
    num_frames: int = option(None, int, "pixel frames, 8N or 8N + 1", model="num_frames", low=1, high=MAX_FRAMES)
    num_inference_steps: int = option(None, int, "denoising steps, 1 to 1000", model="num_inference_steps")
    guidance_scale: float = option(
        None,
        float,
        "how much the prompt counts; no guidance at 1 and below",
        model="guidance_scale",
        low=0,
        high=MAX_SCALE,
    )
    use_dynamic_cfg: str = option(
        None,
        str,
        "guidance rule: constant, diffusers (its dynamic guidance) or cosine; in Python also False for constant and "
        "True for diffusers; by default diffusers with dpm, and constant with ddim or with the defaults of diffusers",
        choices=names("cogvid.sampling.guidance", "GUIDANCE"),
    )
    scheduler: str = option(
        None, str, "sampler: dpm or ddim", model="sampler", choices=names("cogvid.sampling.samplers", "SAMPLERS")
    )
    strength: float = option(
        0.8,
        float,
        "of video-to-video and inpainting: share of the steps that run; more steps start from more noise, all of them "
        "from noise alone",
        above=0,
        high=1,
    )
    resize: str = option(
        "stretch",
        str,
        "fit the image or video by stretch, crop or pad",
        choices=names("cogvid.media.image", "RESIZE_MODES"),
    )
    image_latent_scale: str = option(
        "diffusers",
        str,
        "factor of 1.5 image latents, where upstream contradicts itself: diffusers (1 / scaling_factor), none (1) or "
        "multiply (scaling_factor)",
        choices=IMAGE_LATENT_SCALES,
    )
    previous_timestep: str = option(
        "diffusers",
        str,
        "where a step ends: diffusers (t - 1000 // steps) or next (the next timestep)",
        choices=PREVIOUS_TIMESTEPS,
    )
    noise_aug_strength: float = option(
        None,
        float,
        "of Fun-InP: noise added to the pixels that are kept, which gives more motion; 0.0563 for models trained so",
        model="noise_aug_strength",
        low=0,
        high=1,
    )
    learned_positions: str = option(
        "sincos", str, "what 5B-I2V adds at other frame counts than 49: sincos or slice", choices=LEARNED_POSITIONS
    )

    @property
    def starts_from_video(self) -> bool:
        """True when the run starts from a video that is noised, and does the last `strength` of the steps."""
        return "video" in TASKS[self.task]

    @property
    def guided(self) -> bool:
        """True when the unconditional branch may run. This depends on `guidance_scale`, not on the rule."""
        return self.guidance_scale > 1

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


OPTIONS = options_of(Settings)


def resolve_settings(model: ModelConfig, *, task: str, **options: Any) -> Settings:
    """Fill in the model's defaults and check the whole. options: the fields of `Settings`.

    `outside_training` says what is legal but was not trained for.

    Raises:
        TypeError: an unknown option.
        ValueError: an illegal value; the message names the option.
    """
    check_task(model, task)
    defaults = {name: getattr(model, of) for name, field in OPTIONS.items() if (of := field.metadata["model"])}
    values = fill(OPTIONS, options, defaults)
    rule = values["use_dynamic_cfg"]
    if rule is None:
        rule = model.dynamic_guidance and values["scheduler"] == "dpm"
    values["use_dynamic_cfg"] = {True: "diffusers", False: "constant"}[rule] if isinstance(rule, bool) else rule
    settings = Settings(task=task, **check(OPTIONS, values))
    if settings.noise_aug_strength and "inpainting" not in model.tasks:
        got = settings.noise_aug_strength
        raise ValueError(f"noise_aug_strength: got {got} with {model.name}, which takes no mask, want 0")
    check_size(model, settings.height, settings.width)
    check_frames(model.vae, settings.num_frames)
    _check_schedule(model, settings)
    return settings


def task_of(image: object | None = None, video: object | None = None, **others: object | None) -> str:
    """Return the task that follows from the inputs, which have the names of the call's arguments; None is not given."""
    inputs = {"image": image, "video": video, **others}
    names = {name for name, value in inputs.items() if value is not None}
    for task, wanted in TASKS.items():
        if names == set(wanted):
            return task
    if names == {"image", "video"}:
        raise ValueError("image, video: got both, want one of them or neither")
    wanted = "; ".join(" and ".join(each) for each in TASKS.values() if each)
    raise ValueError(f"{', '.join(sorted(names))}: got this alone or together, want nothing or one of: {wanted}")


def outside_training(model: ModelConfig, height: int, width: int, num_frames: int) -> list[str]:
    """Return the reasons why a legal run is outside what the model was trained for."""
    model = model.recommended or model
    reasons = []
    shorter, longer = sorted((height, width))
    # CogVideoX1.5-I2V was trained on all aspect ratios, with one length of the shorter side.
    any_ratio = "image-to-video" in model.tasks and model.transformer.patch_size_t is not None
    in_range = shorter == min(model.height, model.width) and longer <= max(model.height, model.width)
    if (height, width) != (model.height, model.width) and not (any_ratio and in_range):
        reasons.append(f"{height}x{width} pixels (recommended: {model.height}x{model.width})")
    if num_frames > model.max_frames or num_frames % model.frame_multiple != 1:
        reasons.append(
            f"{num_frames} frames (recommended: {model.num_frames}; {model.frame_multiple}N + 1 up to "
            f"{model.max_frames})"
        )
    return reasons


def check_task(model: ModelConfig, task: str) -> None:
    """Raise unless the model can do the task, naming those that can."""
    check_choice("task", task, TASKS)
    if task not in model.tasks:
        takes = {"image": "an image", "control_video": "a control video"}
        taken = " and ".join(takes[condition.name] for condition in model.conditions if condition.name in takes)
        raise ValueError(
            f"model: got {model.name}, which takes {taken or 'no image'} and cannot do {task}, want one of "
            f"{', '.join(models_for(task))}"
        )


def models_for(task: str) -> list[str]:
    """Return what `load` can be given for a task: the hub ids of the official models, and the shipped packs."""
    if task in _OTHER_MODELS:
        return list(_OTHER_MODELS[task])
    return [m.repo or m.name for m in CONFIGS.values() if task in m.tasks]


def check_size(model: ModelConfig, height: int, width: int) -> None:
    """Raise unless height and width are whole numbers of patches, and, for a learned position table, its own size."""
    stride = model.vae.spatial_compression_ratio
    patch = stride * model.transformer.patch_size
    for name, pixels in (("height", height), ("width", width)):
        if pixels % patch:
            below, above = pixels // patch * patch, (pixels // patch + 1) * patch
            nearest = f"{below} or {above}" if below else f"{above}"
            raise ValueError(f"{name}: got {pixels}, want a multiple of {patch}; the nearest is {nearest}")
    table = (model.transformer.sample_height * stride, model.transformer.sample_width * stride)
    if model.transformer.use_learned_positional_embeddings and (height, width) != table:
        raise ValueError(
            f"height, width: got {height}x{width}, want {table[0]}x{table[1]}, the size of the learned position "
            f"table of {model.name}"
        )


def check_frames(vae: VAEConfig, num_frames: int) -> None:
    """Raise unless the VAE decodes exactly this many frames (8N or 8N + 1)."""

    def exact(n: int) -> bool:
        return vae.decoded_frames(vae.latent_frames(n)) == n

    if not exact(num_frames):
        period = 2 * vae.temporal_compression_ratio
        below = next(n for n in range(num_frames, 0, -1) if exact(n))
        above = next(n for n in range(num_frames, num_frames + period + 1) if exact(n))
        raise ValueError(
            f"num_frames: got {num_frames}, want {period}N or {period}N + 1; the nearest are {below} and {above}"
        )


def check_seed(seed: object, videos: int) -> None:
    """Raise unless the seeds of all videos (seed, seed + 1, ...) have at most 63 bits, torch's limit."""
    check_int("seed", seed, 0, 2**63 - videos)


def _check_schedule(model: ModelConfig, settings: Settings) -> None:
    """Raise unless the noise schedule has all steps of the run and the first one is possible."""
    from cogvid.sampling.schedule import make_schedule  # here, because it imports torch

    config = model.schedule
    check_int("num_inference_steps", settings.num_inference_steps, 1, config.num_train_timesteps)
    schedule = make_schedule(config, settings.num_inference_steps, previous="next")
    if settings.starts_from_video:
        schedule = schedule.tail(settings.strength)
    first = schedule.timesteps[0]
    if config.prediction_type == "epsilon" and schedule.alpha(first) == 0:
        # diffusers divides by zero here and makes a video of NaN.
        raise ValueError(
            f"prediction_type: got 'epsilon' with a first step at timestep {first}, where the signal is zero and "
            "cannot be told from the noise, want 'v_prediction' or 'sample', or rescale_betas_zero_snr false"
        )
