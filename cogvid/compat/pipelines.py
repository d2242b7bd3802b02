"""The four pipelines of diffusers over the one of cogvid."""

from __future__ import annotations

import dataclasses
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cogvid.compat.adapters import Adapters
from cogvid.compat.media import levels
from cogvid.compat.parts import (
    PARTS,
    SCHEDULERS,
    T5,
    AutoencoderKLCogVideoX,
    CogVideoXPipelineOutput,
    CogVideoXTransformer3DModel,
    Scheduler,
    T5Tokenizer,
    Weights,
    device_dtype,
    load_options,
    unknown,
)
from cogvid.compat.steps import Interrupted, Steps
from cogvid.models.text import TextEncoder, use_ops
from cogvid.options import check_choice
from cogvid.run.load import load
from cogvid.run.output import decode_output
from cogvid.run.pipeline import Pipeline
from cogvid.run.settings import check_task, resolve_settings, schedule_of
from cogvid.sampling.guidance import guidance_schedule
from cogvid.weights.checkpoint import read_checkpoint
from cogvid.weights.hub import COMPONENTS, find

_GROUP_TUNING = (
    "offload_device",
    "num_blocks_per_group",
    "use_stream",
    "non_blocking",
    "record_stream",
    "low_cpu_mem_usage",
)
_OPTIONS = ("height", "width", "num_frames", "guidance_scale", "use_dynamic_cfg", "strength")


class BasePipeline(Adapters):
    """What the pipelines share. `core` is the pipeline of `cogvid.load`, with all that it can do."""

    _task: ClassVar[str]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(self, weights: Weights, model: Any, scheduler: Scheduler) -> None:
        check_task(model, self._task)
        self._weights, self._model, self.scheduler = weights, model, scheduler
        self._progress = True
        self._guidance_scale: float = 0.0
        self._num_timesteps = 0
        self._interrupt = False
        self._current_timestep: Tensor | None = None
        self._attention_kwargs: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        torch_dtype: Any = None,
        revision: str | None = None,
        variant: str | None = None,
        local_files_only: bool = False,
        scheduler: Scheduler | None = None,
        **options: Any,
    ) -> Self:
        """Find or fetch a checkpoint. It is loaded when it is first used, on the CPU if no other device was named.

        Args:
            source: a hub id, a directory, or a shipped pack. torch_dtype: of all parts, float32 if not given.
            scheduler, transformer, vae, text_encoder, tokenizer: parts of this or another checkpoint;
                `text_encoder` may be transformers' own `T5EncoderModel`.
            options: `LoadOptions`, such as `quantize`, `compile`, `ops` or `device`.
        """
        given = {name: options.pop(name) for name in PARTS if name in options}
        options = load_options(torch_dtype=torch_dtype, **options)
        t5 = given.pop("text_encoder") if type(given.get("text_encoder")).__name__ == "T5EncoderModel" else None
        for name, part in given.items():
            if not isinstance(part, PARTS[name]):
                raise ValueError(f"{name}: got {type(part).__name__}, want one of cogvid.compat, or nothing")
        found = find(os.fspath(source), revision=revision, local_files_only=local_files_only, variant=variant)
        folders = {name: found.absolute() / name for name in COMPONENTS}
        folders |= {name: part.folder for name, part in given.items()}
        same = [part.weights for part in given.values() if part.weights.folders == folders]
        if same and t5 is None:
            weights = same[0]
        else:
            weights = Weights(folders, _Source(found.absolute(), folders, variant, t5), **options)
        model = read_checkpoint(weights.source.directory, defaults="diffusers", variant=variant).model
        return cls(weights, model, scheduler or SCHEDULERS[model.sampler](**model.schedule.to_dict()))

    @classmethod
    def from_pipe(cls, pipeline: BasePipeline) -> Self:
        """Make a pipeline of another task with the same weights, loaded once."""
        return cls(pipeline._weights, pipeline._model, pipeline.scheduler)

    @property
    def core(self) -> Pipeline:
        """The pipeline of `cogvid.load`. Load options cannot be changed once it was asked for."""
        return self._weights.get(lend=True)

    @property
    def scheduler(self) -> Scheduler:
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler) -> None:
        if not isinstance(scheduler, Scheduler):
            names = " or ".join(each.__name__ for each in SCHEDULERS.values())
            raise ValueError(f"scheduler: got {type(scheduler).__name__}, want a {names} of cogvid.compat")
        self._scheduler = scheduler

    @property
    def transformer(self) -> CogVideoXTransformer3DModel:
        return CogVideoXTransformer3DModel(self._weights)

    @property
    def vae(self) -> AutoencoderKLCogVideoX:
        return AutoencoderKLCogVideoX(self._weights)

    @property
    def text_encoder(self) -> T5:
        return T5(self._weights)

    @property
    def tokenizer(self) -> T5Tokenizer:
        return T5Tokenizer(self._weights)

    @property
    def components(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in COMPONENTS}

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def current_timestep(self) -> Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Run on another device or in another dtype: (device), (dtype) or (device, dtype)."""
        self._weights.set(**device_dtype(*args, **kwargs))
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Have one part on the device at a time: `offload="model"`."""
        self._weights.set(offload="model", device=_onload(gpu_id, device))

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Have one block on the device at a time: `offload="block"`."""
        self._weights.set(offload="block", device=_onload(gpu_id, device))

    def enable_group_offload(self, onload_device: Any, offload_type: str = "block_level", **tuning: Any) -> None:
        """As `enable_sequential_cpu_offload`; how many blocks are fetched at once, and when, is not a choice here."""
        check_choice("offload_type", offload_type, ("block_level", "leaf_level"))
        for name in tuning:
            check_choice("enable_group_offload", name, _GROUP_TUNING)
        self._weights.set(offload="block", device=onload_device)

    def set_progress_bar_config(self, disable: bool = False) -> None:
        self._progress = not disable

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = 226,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings of the prompts and, with guidance, of the negative ones, `[B, L, E]` each."""
        encoder = self._weights.get().text_encoder
        negative: Any = negative_prompt or ""

        def encode(prompts: Any, count: int) -> Tensor:
            listed = [prompts] * count if isinstance(prompts, str) else list(prompts)
            return encoder(listed, max_sequence_length).repeat_interleave(num_videos_per_prompt, dim=0)

        count = len(prompt_embeds) if prompt_embeds is not None else 1 if isinstance(prompt, str) else len(prompt or ())
        if prompt_embeds is None:
            prompt_embeds = encode(prompt, count)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative_prompt_embeds = encode(negative, count)
        return prompt_embeds, negative_prompt_embeds

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode latents as `output_type="latent"` returns them to pixels `[B, 3, F, H, W]`, about [-1, 1]."""
        core: Pipeline = self._weights.get()
        return core.vae.decode(1 / core.vae.config.scaling_factor * rearrange(latents, "b t c h w -> b c t h w"))

    def _run(
        self,
        *,
        num_inference_steps: int,
        timesteps: Any,
        eta: float,
        generator: Any,
        return_dict: bool,
        output_type: str,
        attention_kwargs: dict[str, Any] | None,
        callback_on_step_end: Callable[..., Any] | None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None,
        max_sequence_length: int,
        negative_prompt: Any,
        **arguments: Any,
    ) -> Any:
        """Run a call whose arguments are those of diffusers, all of them."""
        if timesteps is not None:
            raise ValueError("timesteps: got some, want None: these schedulers make their own of num_inference_steps")
        if eta:
            raise ValueError(f"eta: got {eta}, want 0: neither of these schedulers has it")
        names = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs) or ()
        for name in names:
            check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)
        core: Pipeline = self._weights.get()
        scheduler = {"schedule": self.scheduler.schedule, "sampler": self.scheduler.sampler}
        core.model = dataclasses.replace(self._model, **scheduler, max_sequence_length=max_sequence_length)
        arguments = self._media(arguments)
        options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
        options["num_inference_steps"] = num_inference_steps

        settings = resolve_settings(core.model, task=self._task, **options)
        # "next" warns of nothing, while the run itself warns; the timesteps are the same.
        schedule = schedule_of(core.model, dataclasses.replace(settings, previous_timestep="next"))
        scale, rule = options["guidance_scale"], options["use_dynamic_cfg"]
        rule = {True: "diffusers", False: "constant"}[rule] if isinstance(rule, bool) else rule
        self._num_timesteps, self._guidance_scale = len(schedule), scale
        self._interrupt, self._attention_kwargs = False, attention_kwargs
        steps = Steps(self, guidance_schedule(scale, schedule, rule), callback_on_step_end, names)
        hooked = steps.hooked(core.transformer, dynamic=rule != "constant")
        with self._scaled_adapters(attention_kwargs), hooked:
            try:
                frames = core(
                    **arguments,
                    **options,
                    negative_prompt=negative_prompt or "",
                    generator=_global_generator(core.device) if generator is None else generator,
                    output_type=output_type,
                    callback_on_step_end=steps,
                    progress=self._progress,
                ).frames
            except Interrupted as stopped:
                x = rearrange(stopped.latents, "b t c h w -> b c t h w")
                frames = decode_output(core.vae, x, core.model.padding(settings.num_frames), output_type)
            finally:
                self._current_timestep = None
        return CogVideoXPipelineOutput(frames=frames) if return_dict else (frames,)

    def _media(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments with pictures and videos as cogvid takes them, and the size and length of the run."""
        height = arguments["height"] or self._model.height
        width = arguments["width"] or self._model.width
        made = {**arguments, "height": height, "width": width}
        if "image" in made:
            made["image"] = _image(made["image"], height, width)
        for name in ("video", "control_video"):
            if name in made:
                made[name], frames = self._video(name, made[name], made["latents"], height, width)
                made["num_frames"] = made.get("num_frames") or frames
        return made

    def _video(self, name: str, video: Any, latents: Tensor | None, height: int, width: int) -> tuple[Any, int]:
        """Return a video, or a list of them, as cogvid takes it, and its number of frames."""
        if video is None and latents is not None and name == "video":  # they stand for the noised video
            frames = self._model.vae.decoded_frames(latents.shape[1])
            return np.zeros((frames, height, width, 3), np.uint8), frames
        if video is None:
            raise ValueError(f"{name}: got None, want a video")
        if isinstance(video, (Tensor, np.ndarray)) and video.dtype not in (torch.uint8, np.uint8):
            video = levels(name, video, height, width)
        if isinstance(video, (Tensor, np.ndarray)) and video.ndim == 5:
            video = list(video)
        several = isinstance(video, (list, tuple)) and not hasattr(video[0], "convert")
        if several and len(video) == 1:
            video, several = video[0], False
        return video, len(video[0]) if several else len(video)

    def __getattr__(self, name: str) -> Any:
        raise unknown(name, "`core`, the pipeline of cogvid.load")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PARTS:
            raise ValueError(
                f"{name}: got {type(value).__name__}, want it as from_pretrained(..., {name}=...); "
                "from_pretrained(..., compile=True) is torch.compile"
            )
        super().__setattr__(name, value)


class _Source:
    """Load a pipeline whose parts may come from several checkpoints; `directory` has links to all of them.

    t5: replaces the text encoder that was stored.
    """

    def __init__(self, found: Path, folders: Mapping[str, Path], variant: str | None, t5: Any) -> None:
        self.directory, self._variant, self._t5 = found, variant, t5
        if any(folder != found / name for name, folder in folders.items()):
            self._made = tempfile.TemporaryDirectory(prefix="cogvid-")  # removed with this object
            self.directory = Path(self._made.name)
            for name, folder in folders.items():
                (self.directory / name).symlink_to(folder, target_is_directory=True)
            shutil.copy(found / "model_index.json", self.directory)

    def __call__(self, **options: Any) -> Pipeline:
        core = load(self.directory, defaults="diffusers", variant=self._variant, **options)
        if self._t5 is not None:
            if options.get("offload") or options.get("quantize"):
                raise ValueError("text_encoder: got a T5EncoderModel with offload or quantize, want the stored one")
            use_ops(self._t5, core.placement.ops)
            t5 = self._t5.to(core.device, core.dtype)
            core.text_encoder = TextEncoder(t5, core.text_encoder.tokenizer, core.device)
        return core


def _image(image: Any, height: int, width: int) -> Any:
    """Return pictures as cogvid takes them."""
    from PIL import Image as pil

    if isinstance(image, (list, tuple)) and image and isinstance(image[0], Tensor):
        image = torch.stack([each.squeeze(0) for each in image])
    if not isinstance(image, (Tensor, np.ndarray)):
        return image
    pixels = levels("image", image, height, width).reshape(-1, height, width, 3)
    return [pil.fromarray(each) for each in pixels.numpy()]


def _onload(gpu_id: int | None, device: Any) -> Any:
    """Return where offloaded parts run: the GPU, or the CPU where there is none."""
    if device is not None and gpu_id is None:
        return device
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    return kind if gpu_id is None else f"{kind}:{gpu_id}"


def _global_generator(device: torch.device) -> torch.Generator:
    """Return what torch.manual_seed seeds, from which diffusers draws if it is given no generator."""
    if device.type == "cpu":
        return torch.default_generator
    torch.cuda.init()
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def _call(arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a `__call__` with these arguments and defaults, which may be given by position too, as in diffusers."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(name, kind, default=default) for name, default in arguments.items()]
    signature = inspect.Signature([inspect.Parameter("self", kind), *named])

    def __call__(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments.pop("self")._run(**bound.arguments)

    __call__.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    __call__.__doc__ = "Generate videos; the arguments are those of diffusers' class."
    return __call__


_PROMPTS = {"prompt": None, "negative_prompt": None}
_SIZE = {"height": None, "width": None}
_STEPS = {"num_inference_steps": 50, "timesteps": None}
_GUIDANCE = {"guidance_scale": 6, "use_dynamic_cfg": False}
_NOISE = {"num_videos_per_prompt": 1, "eta": 0.0, "generator": None, "latents": None}
_REST = {
    "prompt_embeds": None,
    "negative_prompt_embeds": None,
    "output_type": "pil",
    "return_dict": True,
    "attention_kwargs": None,
    "callback_on_step_end": None,
    "callback_on_step_end_tensor_inputs": ("latents",),
    "max_sequence_length": 226,
}


class CogVideoXPipeline(BasePipeline):
    """Text to video."""

    _task = "text-to-video"
    __call__ = _call({**_PROMPTS, **_SIZE, "num_frames": None, **_STEPS, **_GUIDANCE, **_NOISE, **_REST})


class CogVideoXImageToVideoPipeline(BasePipeline):
    """An image, the first frame, and text to video."""

    _task = "image-to-video"
    __call__ = _call(
        {
            "image": inspect.Parameter.empty,
            **_PROMPTS,
            **_SIZE,
            "num_frames": 49,
            **_STEPS,
            **_GUIDANCE,
            **_NOISE,
            **_REST,
        }
    )


class CogVideoXVideoToVideoPipeline(BasePipeline):
    """A video and text to video. num_frames: of the video that are used; all if not given."""

    _task = "video-to-video"
    __call__ = _call(
        {"video": None, **_PROMPTS, **_SIZE, **_STEPS, "strength": 0.8, **_GUIDANCE, **_NOISE, **_REST}
        | {"num_frames": None}
    )


class CogVideoXFunControlPipeline(BasePipeline):
    """A control video and text to video, with the Fun-Control checkpoints. `control_video_latents` are not taken."""

    _task = "control-to-video"
    __call__ = _call({**_PROMPTS, "control_video": None, **_SIZE, **_STEPS, **_GUIDANCE, **_NOISE, **_REST})
