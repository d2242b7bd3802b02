"""The options of a run. Each is written once, as a field of `Settings`, with its default, its check and its help.

The call, the command line and the record in a video derive from the fields. A new option is a field and the code that
obeys it. This file imports no torch, so that `cogvid --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogvid.config import CONFIGS, LEARNED_POSITIONS, PREVIOUS_TIMESTEPS, TASKS, UPSTREAMS, ModelConfig, VAEConfig
from cogvid.options import check, check_choice, check_int, fill, names, option, options_of, upstream_defaults

if TYPE_CHECKING:
    from cogvid.sampling.schedule import Schedule

if TYPE_CHECKING:
    from cogvid.sampling.schedule import Schedule

IMAGE_LATENT_SCALES = ("diffusers", "none", "multiply")
UNCONDITIONAL_TEXTS = ("encode", "zeros")
VAE_ENCODES = ("chunks", "whole")
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
    guidance_scale: float | None = option(
        None,
        float,
        "how much the prompt counts; no guidance at 1 and below; None in a run with a list of scales",
        model="guidance_scale",
        low=0,
        high=MAX_SCALE,
    )
    use_dynamic_cfg: str | tuple[float | None, ...] = option(
        None,
        str,
        "guidance rule: constant, diffusers (its dynamic guidance), cosine (rising) or falling; or the scale of each "
        "step, such as 6,6,5,- with - where only the prompt is run, in Python a list with None; in Python also False "
        "for constant and True for diffusers; by default diffusers with dpm, and constant with ddim or with the "
        "defaults of diffusers",
        parse=lambda value: _guidance_rule(value),
    )
    guidance_interval: tuple[float, float] = option(
        "0-1",
        str,
        "shares of the steps between which there is guidance, such as 0.1-0.8, in Python also a pair; outside it only "
        "the prompt is run",
        parse=lambda value: _interval(value),
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
        None,
        str,
        "fit the image or video by stretch, crop or pad; stretch if not given",
        model="resize",
        choices=names("cogvid.media.image", "RESIZE_MODES"),
    )
    image_latent_scale: str = option(
        None,
        str,
        "factor of 1.5 image latents, where upstream contradicts itself: diffusers (1 / scaling_factor), none (1) or "
        "multiply (scaling_factor); diffusers if not given",
        choices=IMAGE_LATENT_SCALES,
        upstream={"diffusers": "diffusers", "sat": "none"},
    )
    previous_timestep: str = option(
        None,
        str,
        "where a step ends: diffusers (t - 1000 // steps) or next (the next timestep); diffusers if not given",
        choices=PREVIOUS_TIMESTEPS,
        upstream={"diffusers": "diffusers", "sat": "next"},
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
        None,
        str,
        "what 5B-I2V adds at other frame counts than 49: sincos or slice; sincos if not given",
        choices=LEARNED_POSITIONS,
        upstream={"diffusers": "sincos", "sat": "slice"},
    )
    zero_snr: str = option(
        None,
        str,
        "noise levels: diffusers (all 1000 are rescaled to end at zero SNR, then the steps' are taken) or sat (those "
        "of sat's steps are rescaled); diffusers if not given",
        choices=UPSTREAMS,
        upstream={"diffusers": "diffusers", "sat": "sat"},
    )
    unconditional_text: str = option(
        None,
        str,
        "text of the unconditional branch: encode (the negative prompt) or zeros; encode if not given",
        choices=UNCONDITIONAL_TEXTS,
        upstream={"diffusers": "encode", "sat": "zeros"},
    )
    vae_encode: str = option(
        None,
        str,
        "how the VAE encodes a video: chunks (of 8 frames) or whole; chunks if not given",
        choices=VAE_ENCODES,
        upstream={"diffusers": "chunks", "sat": "whole"},
    )
    step_cache: str | None = option(
        None,
        str,
        "skip work that is like that of the step before, which changes the video: first-block=0.08, teacache=0.1 or "
        "pyramid=2; a larger number skips more; in Python also an object, made for this call",
        parse=lambda value: _step_cache(value),
    )

    @property
    def starts_from_video(self) -> bool:
        """True when the run starts from a video that is noised, and does the last `strength` of the steps."""
        return "video" in TASKS[self.task]

    @property
    def guided(self) -> bool:
        """True when the unconditional branch may run. This depends on `guidance_scale`, or on a list of scales."""
        if isinstance(self.use_dynamic_cfg, tuple):
            return self.use_dynamic_cfg.count(None) < len(self.use_dynamic_cfg)
        return self.guidance_scale is not None and self.guidance_scale > 1

    def guidance(self, schedule: Schedule) -> list[float | None]:
        """Return the guidance scale of each step; None where the unconditional branch is not run.

        Step i of n is inside `guidance_interval` where low <= i / n < high.

        Raises:
            ValueError: there are more or fewer scales than steps; no step is inside the interval.
        """
        from cogvid.sampling.guidance import guidance_schedule  # here, because it imports torch

        rule, (low, high), count = self.use_dynamic_cfg, self.guidance_interval, len(schedule)
        scales = list(rule) if isinstance(rule, tuple) else guidance_schedule(self.guidance_scale or 0, schedule, rule)
        if len(scales) != count:
            raise ValueError(f"use_dynamic_cfg: got {len(scales)} scales, want {count}, one for each step")
        inside = [low <= index / count < high for index in range(count)]
        if not any(inside):
            raise ValueError(
                f"guidance_interval: got {low:g}-{high:g}, in which none of {count} steps begins, want a wider one"
            )
        return [scale if within else None for scale, within in zip(scales, inside, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings ready for JSON."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


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
    defaults |= upstream_defaults(OPTIONS, model.follows)
    values = fill(OPTIONS, options, defaults)
    rule = values["use_dynamic_cfg"]
    if rule is None:
        rule = model.dynamic_guidance and values["scheduler"] == "dpm"
    values["use_dynamic_cfg"] = {True: "diffusers", False: "constant"}[rule] if isinstance(rule, bool) else rule
    settings = Settings(task=task, **check(OPTIONS, values))
    if isinstance(settings.use_dynamic_cfg, tuple):
        if (scale := options.get("guidance_scale")) is not None:
            raise ValueError(f"guidance_scale, use_dynamic_cfg: got {scale:g} and a list of scales, want one of them")
        settings = dataclasses.replace(settings, guidance_scale=None)
    _check_effects(model, settings, fill(OPTIONS, {}, defaults))
    check_size(model, settings.height, settings.width)
    check_frames(model.vae, settings.num_frames)
    _check_schedule(model, settings)
    return settings


def _check_effects(model: ModelConfig, settings: Settings, defaults: Mapping[str, Any]) -> None:
    """Raise unless each option that is not at its default has an effect on this run."""
    taken = {condition.name for condition in model.conditions}
    effects = {
        "strength": settings.starts_from_video,
        "resize": bool(TASKS[settings.task]),
        "image_latent_scale": "image" in taken and model.vae.invert_scale_latents,
        "learned_positions": model.transformer.use_learned_positional_embeddings,
        "vae_encode": settings.starts_from_video or bool(taken - {"image"}),
        "noise_aug_strength": "mask" in taken,
        "guidance_interval": settings.guided,
    }
    plain = check({name: OPTIONS[name] for name in effects}, defaults)
    for name, has_effect in effects.items():
        if not has_effect and (got := getattr(settings, name)) != plain[name]:
            where = f"for {settings.task} with {model.name}, where it has no effect"
            raise ValueError(f"{name}: got {got!r} {where}, want {plain[name]!r}")


def schedule_of(model: ModelConfig, settings: Settings) -> Schedule:
    """Return the schedule of a run; of one that starts from a video, the part that its strength leaves."""
    from cogvid.sampling.sat_schedule import make_sat_schedule  # here, because it imports torch
    from cogvid.sampling.schedule import make_schedule

    make = make_sat_schedule if settings.zero_snr == "sat" else make_schedule
    schedule = make(model.schedule, settings.num_inference_steps, previous=settings.previous_timestep)
    return schedule.tail(settings.strength) if settings.starts_from_video else schedule


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
    config = model.schedule
    check_int("num_inference_steps", settings.num_inference_steps, 1, config.num_train_timesteps)
    if settings.zero_snr == "diffusers":
        settings = dataclasses.replace(settings, previous_timestep="next")  # the other one warns, when the run begins
    schedule = schedule_of(model, settings)
    first = schedule.timesteps[0]
    if config.prediction_type == "epsilon" and schedule.alpha(first) == 0:
        # diffusers divides by zero here and makes a video of NaN.
        raise ValueError(
            f"prediction_type: got 'epsilon' with a first step at timestep {first}, where the signal is zero and "
            "cannot be told from the noise, want 'v_prediction' or 'sample', or rescale_betas_zero_snr false"
        )
    settings.guidance(schedule)
    if settings.step_cache is not None and "=" in settings.step_cache:
        from cogvid.sampling.cache import make_step_cache

        make_step_cache(settings.step_cache, model, schedule)


def _guidance_rule(value: Any) -> str | tuple[float | None, ...]:
    """Read a name in `GUIDANCE`, or a scale for each step: a list, or text with commas."""
    from cogvid.sampling.guidance import GUIDANCE

    if isinstance(value, str) and value in GUIDANCE:
        return value
    listed = value.split(",") if isinstance(value, str) and set(value) <= set("0123456789.,+-e ") else value
    if not isinstance(listed, (list, tuple)) or not listed:
        raise ValueError(
            f"use_dynamic_cfg: got {value!r:.60}, want one of {', '.join(GUIDANCE)}, or the scale of each step"
        )
    return tuple(_scale(each) for each in listed)


def _scale(value: Any) -> float | None:
    scale = None if value is None or value == "-" else _float(value)
    if scale is not None and not 0 <= scale <= MAX_SCALE:
        raise ValueError(f"use_dynamic_cfg: got {value!r:.60} in a list, want numbers from 0 to {MAX_SCALE:g}, or -")
    return scale


def _interval(value: Any) -> tuple[float, float]:
    """Read a pair of shares, or text with a hyphen."""
    pair = value.split("-") if isinstance(value, str) else value
    low, high = (_float(each) for each in pair) if isinstance(pair, (list, tuple)) and len(pair) == 2 else (1.0, 0.0)
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"guidance_interval: got {value!r:.60}, want LOW-HIGH, two shares of the steps such as 0.1-0.8"
        )
    return low, high


def _float(value: Any) -> float:
    """Return a number, NaN if it is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _step_cache(value: Any) -> str | None:
    from cogvid.sampling.cache import step_cache_name

    return step_cache_name(value)
