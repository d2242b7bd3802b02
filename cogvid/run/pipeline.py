"""From a prompt, and an image or a video, to a video: encode -> latents -> sample -> decode.

Each stage is a function that can be used alone; `Pipeline` puts them in order. Must equal diffusers'
`CogVideoXPipeline`, `CogVideoXImageToVideoPipeline` and `CogVideoXVideoToVideoPipeline`: the same generator, consumed
in the same order, gives the same video.

Letters: `B` videos (prompts x videos per prompt), `F` pixel and `T` latent frames, `H W` pixels, `h w` latents,
`L E` text tokens and their width. Inside, latents are `[B, C, T, h, w]`; at the boundary (`latents=`, the callback,
`output_type="latent"`) they are `[B, T, C, h, w]`, as in diffusers.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cogvid.models.text import TextEncoder
from cogvid.models.transformer import Transformer
from cogvid.models.vae import VAE
from cogvid.ops import Branch, Ops, StepCache
from cogvid.options import check_choice, takes_options
from cogvid.run.conditioning import encode_conditions, encode_prompts
from cogvid.run.given import as_lists, frames_of, resized
from cogvid.run.inputs import check_inputs
from cogvid.run.latents import initial_latents, noised_video
from cogvid.run.notebook import pipeline_lines
from cogvid.run.output import OUTPUT_TYPES, Output, decode_output
from cogvid.run.record import make_record
from cogvid.run.saved_run import SavedRun
from cogvid.run.settings import OPTIONS, Settings, outside_training, resolve_settings, schedule_of, task_of
from cogvid.run.stages import stage
from cogvid.run.steps import after_each_step
from cogvid.sampling.cache import make_step_cache
from cogvid.sampling.samplers import Generators, OnStep, State, sample
from cogvid.sampling.schedule import Schedule
from cogvid.weights.checkpoint import Checkpoint
from cogvid.weights.lora import TakesLoras
from cogvid.weights.placement import Placement, resolve_ops

if TYPE_CHECKING:
    from cogvid.run.memory import Offload

Callback = Callable[["Pipeline", int, int, dict[str, Tensor]], dict[str, Tensor] | None]


class Pipeline(TakesLoras):
    """Generate videos with one loaded model; `cogvid.load` makes it.

    checkpoint: what was loaded. placement: where and how its parts run. offload: what moves their weights.
    """

    offload: Offload | None = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        placement: Placement,
        *,
        transformer: Transformer,
        vae: VAE,
        text_encoder: TextEncoder,
    ) -> None:
        self.checkpoint = checkpoint
        self.model = checkpoint.model
        self.placement = placement
        self.transformer = transformer
        self.vae = vae
        self.text_encoder = text_encoder
        super().__init__(transformer)

    def __repr__(self) -> str:
        return "\n".join(pipeline_lines(self))

    @property
    def device(self) -> torch.device:
        return self.placement.device

    @property
    def dtype(self) -> torch.dtype:
        return self.placement.dtype

    @property
    def ops(self) -> str:
        """The name of the operations that run: "torch", "triton" or "custom"; `set_ops` changes them."""
        return self.placement.ops_name

    def set_ops(self, ops: str | Ops) -> None:
        """Run these operations from now on, in the transformer, the VAE and the text encoder; `ops` as for `load`."""
        bundle, name = resolve_ops(ops, self.device)
        for part in (self.transformer, self.vae, self.text_encoder):
            part.set_ops(bundle)
        self.placement = dataclasses.replace(self.placement, ops=bundle, ops_name=name)

    @torch.no_grad()
    @takes_options(OPTIONS, "options: the fields of `Settings`.")
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: Any = None,
        last_image: Any = None,
        video: Any = None,
        mask: Any = None,
        control_video: Any = None,
        negative_prompt: str | Sequence[str] = "",
        num_videos_per_prompt: int = 1,
        seed: int | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        saved_run: SavedRun | None = None,
        progress: bool = True,
        **options: Any,
    ) -> Output:
        """Generate videos. An option that is None has the default of `self.model`: see `defaults` of `load`.

        Args:
            prompt: one or several; each gives `num_videos_per_prompt` videos, next to each other in the batch.
            image: the first frame, anything that `load_image` takes, or a list with one per prompt.
            last_image: the last frame, as `image`, for models that were trained for it.
            video: PIL images or uint8 `[F, H, W, 3]`, or a list with one per prompt; `num_frames` frames are used.
            mask: of `video`, a picture or a video: white is made anew, for Fun-InP. control_video: for Fun-Control.
            negative_prompt: what to avoid, for all prompts or one for each; unused without guidance.
            seed: of the first video; video k has seed + k. Each video has its own CPU generator, so the same seed gives
                the same video in any batch, up to rounding. Drawn if neither it nor `generator` is given.
            generator: one for the whole batch, or a list with one per video, consumed as diffusers consumes it.
            latents: `[B, T, C, h, w]` that replace the initial noise or, for video-to-video, the noised video.
            prompt_embeds, negative_prompt_embeds: `[prompts, L, E]` that replace the prompts.
            output_type: see `Output`.
            callback_on_step_end: called with (pipeline, step index, timestep, tensors). The tensors, fp32
                `[B, T, C, h, w]`, are "latents" and "x0", the clean latents that the network predicted.
                It may return a dictionary, whose latents replace the present ones.
            saved_run: where to save the run as it goes, and to go on from what is saved there.
            progress: show a bar on stderr.
            options: the fields of `Settings`.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        arguments = {"image": image, "last_image": last_image, "video": video}
        pictures = as_lists({**arguments, "mask": mask, "control_video": control_video})
        options["num_frames"] = frames_of(pictures, options.get("num_frames"))
        settings = resolve_settings(self.model, task=task_of(**pictures), **options)
        if reasons := outside_training(self.model, settings.height, settings.width, settings.num_frames):
            warnings.warn(f"{self.model.name} was not trained for {' and '.join(reasons)}", stacklevel=3)
        inputs = check_inputs(
            self.model,
            prompt,
            prompt_embeds,
            (negative_prompt, negative_prompt_embeds, settings.unconditional_text) if settings.guided else None,
            num_videos_per_prompt,
            seed,
            generator,
        )
        schedule = schedule_of(self.model, settings)
        pictures = resized(pictures, settings)

        # The posterior of the image or video is drawn before the noise, as in diffusers: the order changes the video.
        frames, height, width = self.model.latent_size(settings.height, settings.width, settings.num_frames)
        conditioning = encode_conditions(self.vae, self.model, pictures, settings, inputs, frames, self.placement)
        padding = self.model.padding(settings.num_frames)
        if settings.starts_from_video and latents is None:
            x = noised_video(self.vae, pictures["video"], settings, inputs, schedule, padding, self.placement)
        else:
            shape = (inputs.batch, frames, self.model.transformer.out_channels, height, width)
            x = initial_latents(shape, inputs.generator, self.device, self.dtype, latents)
        embeds = encode_prompts(self.text_encoder, inputs.prompts, inputs.negatives, self.model.text_length)
        embeds = embeds.to(self.device, self.dtype).repeat_interleave(num_videos_per_prompt, dim=0)

        given = {"generator": generator, "latents": latents, "callback_on_step_end": callback_on_step_end}
        given |= {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        record = make_record(
            self.checkpoint,
            self.placement,
            settings,
            schedule,
            pictures=pictures,
            given=[name for name, value in given.items() if value is not None],
            **inputs.record(),
        )
        first = {"latents": x, "prompt_embeds": embeds, "image": conditioning}
        cache = make_step_cache(options.get("step_cache"), self.model, schedule)
        run: dict[str, Any] = {"generator": inputs.generator, "step_cache": cache}
        if saved_run is not None:
            run["start"], x, run["state"], first = saved_run.begin(record, inputs.generator, cache, first)
        done, embeds, conditioning = run.get("start", 0), first["prompt_embeds"], first["image"]
        with tqdm(total=len(schedule), initial=done, desc="denoise", unit="step", disable=not progress) as bar:
            run["on_step"] = after_each_step(self, bar, first, callback_on_step_end, saved_run)
            x = denoise(self.transformer, x, embeds, schedule, settings, conditioning=conditioning, **run)
        skipped = getattr(cache, "skipped", None)
        del cache, run  # what a step cache keeps may be large
        decoded = decode_output(self.vae, x, padding, output_type)
        return Output(decoded, seed=record["seed"], fps=self.model.fps, provenance=record, skipped_steps=skipped)


@stage("denoise")
def denoise(
    transformer: Transformer,
    x: Tensor,
    embeds: Tensor,
    schedule: Schedule,
    settings: Settings,
    *,
    conditioning: Tensor | None = None,
    generator: Generators | None = None,
    on_step: OnStep | None = None,
    step_cache: StepCache | None = None,
    start: int = 0,
    state: State | None = None,
) -> Tensor:
    """Denoise `x` `[B, C, T, h, w]` with guidance; the result has the shape of `x` and the transformer's dtype.

    embeds: as `encode_prompts` returns them. conditioning: `[B, C, T, h, w]`, put after `x` on the channels.
    generator, on_step, start, state: see `samplers.sample`.
    """
    batch = len(x)

    def network(x: Tensor, index: int, timestep: int, branch: Branch) -> Tensor:
        inputs = x if conditioning is None else torch.cat([x, conditioning], dim=1)
        text = embeds if branch == "both" else embeds[-batch:]
        inputs = torch.cat([inputs, inputs]) if branch == "both" else inputs
        return transformer(
            inputs,
            text,
            torch.full((len(inputs),), timestep, device=x.device),
            step=index,
            branch=branch,
            step_cache=step_cache,
            learned_positions=settings.learned_positions,
        )

    return sample(
        network,
        x,
        schedule,
        sampler=settings.scheduler,
        scales=settings.guidance(schedule),
        generator=generator,
        dtype=transformer.dtype,
        on_step=on_step,
        start=start,
        state=state,
    )
