"""DDIM inversion: from a video to the noise that it would be sampled from, and editing with what was on the way.

Must equal the arithmetic of the official script, `inference/ddim_inversion.py` of https://github.com/zai-org/CogVideo
(7a1af71), and so diffusers' `DDIMInverseScheduler`. Two differences: the posterior of the video is drawn from the seed,
where the script draws from torch's global generator; and the noise levels are those of the model with its SNR shift,
which diffusers' inverse scheduler leaves out. 5B, the only model that the script takes, has no shift.

    inversion = cogvid.invert(pipe, video)
    pipe(prompt, latents=inversion.noise, scheduler="ddim", ...)     # from the inverted latents
    cogvid.edit(pipe, inversion, prompt)                             # as the script: its attention sees the video
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from tqdm.auto import tqdm

from cogvid.config import ModelConfig
from cogvid.ops import AttentionOp, BlockContext
from cogvid.options import check_choice, takes_options
from cogvid.parallel.share import agree
from cogvid.parallel.transformer import SplitTransformer
from cogvid.run.conditioning import encode_conditions, encode_prompts
from cogvid.run.given import as_lists, frames_of, resized
from cogvid.run.inputs import check_inputs
from cogvid.run.latents import encoded_video
from cogvid.run.output import Output
from cogvid.run.pipeline import Pipeline, denoise
from cogvid.run.settings import OPTIONS, Settings, resolve_settings
from cogvid.sampling.samplers import Generators, State, Step
from cogvid.sampling.schedule import Schedule, make_schedule
from cogvid.weights.parallel_option import rank

_SAME = ("height", "width", "num_frames", "num_inference_steps", "previous_timestep")  # an edit has those of its video


@dataclass(frozen=True, eq=False)
class Inversion:
    """What an inversion went through.

    clean: `[B, T, C, h, w]`, the encoded video. latents: `[steps, B, T, C, h, w]`, after each step, the last ones being
    noise. timesteps: of `latents`, ascending. settings: the options of the inversion.
    """

    clean: Tensor
    latents: Tensor
    timesteps: tuple[int, ...]
    settings: Settings

    @property
    def noise(self) -> Tensor:
        """What to give as `latents` to a call with the same size and steps and `scheduler="ddim"`."""
        return self.latents[-1]


@torch.no_grad()
@takes_options(OPTIONS, "options: the fields of `Settings`.")
def invert(
    pipe: Pipeline,
    video: Any,
    prompt: str | list[str] = "",
    *,
    negative_prompt: str | list[str] = "",
    seed: int | None = None,
    generator: Generators | None = None,
    progress: bool = True,
    **options: Any,
) -> Inversion:
    """Take a video to the noise from which DDIM would sample it, step by step.

    Args:
        video: as for the call of a pipeline; one, or a list with one per prompt.
        prompt: what the network is told on the way. The script tells it nothing, twice: with guidance, the scale of
            which then does not matter. So `guidance_scale` is 1 if it is not given.
        seed, generator: draw the posterior of the video.
        options: the fields of `Settings`.

    Raises:
        ValueError: the model takes a condition that this has not; an option cannot be; `scheduler` or `strength` is
            given.
    """
    told = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed, "generator": generator}
    agree({"video": video, **told, **options})
    for name in ("scheduler", "strength"):
        if name in options:
            raise ValueError(f"{name}: got {options[name]!r} for an inversion, which is all of DDIM, want none")
    pictures = as_lists({"video": video})
    options["num_frames"] = frames_of(pictures, options.get("num_frames"))
    if options.get("guidance_scale") is None:
        options["guidance_scale"] = 1.0
    settings = resolve_settings(pipe.model, task="video-to-video", scheduler="ddim", **options)
    check_choice("zero_snr", settings.zero_snr, ("diffusers",))
    if pipe.model.schedule.prediction_type == "sample":
        raise ValueError("prediction_type: got 'sample', from which no noise follows at a clean video, want another")
    negative = (negative_prompt, None, settings.unconditional_text) if settings.guided else None
    inputs = check_inputs(pipe.model, prompt, None, negative, 1, seed, generator)
    schedule = _reversed_schedule(pipe.model, settings)
    frames, _, _ = pipe.model.latent_size(settings.height, settings.width, settings.num_frames)
    padding = pipe.model.padding(settings.num_frames)
    x = encoded_video(pipe.vae, resized(pictures, settings)["video"], settings, inputs, padding, pipe.placement)
    embeds = encode_prompts(pipe.text_encoder, inputs.prompts, inputs.negatives, pipe.model.text_length)
    embeds = embeds.to(pipe.device, pipe.dtype)
    latents: list[Tensor] = []
    with tqdm(total=len(schedule), desc="invert", unit="step", disable=not (progress and rank() == 0)) as bar:

        def keep(step: Step, x: Tensor, state: State) -> None:  # noqa: ARG001 - the driver's signature
            latents.append(_swap(x).to(pipe.dtype))
            bar.update()

        config = pipe.model.schedule
        clip = config.clip_sample_range if config.clip_sample else None
        inverse: Any = functools.partial(ddim_inverse, clip=clip)  # `sample` takes a name or a function
        run = dataclasses.replace(settings, scheduler=inverse)
        conditioning = encode_conditions(pipe.vae, pipe.model, {}, settings, inputs, frames, pipe.placement)
        denoise(pipe.transformer, x, embeds, schedule, run, conditioning=conditioning, on_step=keep)
    return Inversion(_swap(x), torch.stack(latents), schedule.timesteps, settings)


def _reversed_schedule(model: ModelConfig, settings: Settings) -> Schedule:
    schedule = make_schedule(model.schedule, settings.num_inference_steps, previous=settings.previous_timestep)
    return dataclasses.replace(
        schedule, timesteps=schedule.timesteps[::-1], prev_timesteps=schedule.prev_timesteps[::-1]
    )


def ddim_inverse(x: Tensor, step: Step, state: State, clip: float | None = None) -> tuple[Tensor, State]:
    """Take one step of DDIM back, from `step.prev_timestep` to `step.timestep`. Must equal `DDIMInverseScheduler`.

    The network is asked about `x` as if it were at `step.timestep` already. clip: of the clean latents, for schedules
    with `clip_sample`, which the inverse scheduler obeys and the two of CogVideoX do not.
    """
    here, there = step.alpha_prev, step.alpha
    prediction = step.predict(x, step.timestep)
    x0 = step.schedule.predicted_x0(prediction, x, step.prev_timestep)
    step.predicted.append(x0 if clip is None else x0.clamp(-clip, clip))
    noise = prediction
    if step.schedule.prediction_type == "v_prediction":
        noise = here.sqrt() * prediction + (1 - here).sqrt() * x
    return there.sqrt() * step.predicted[-1] + (1 - there).sqrt() * noise, state


def edit(pipe: Pipeline, inversion: Inversion, prompt: str | list[str], **options: Any) -> Output:
    """Generate a video whose attention sees an inverted one: it keeps the layout of that video and obeys the prompt.

    At each step the network runs on the latents of the inversion at that timestep too, with the same prompt; the tokens
    of the new video attend to the keys and values of both. One step costs two, and more in attention.

    Args:
        inversion: with the same size and steps, which need not be given again. One video, or one for each.
        options: the arguments of the pipeline's call; `scheduler` is "ddim" if not given.
    """
    for name in _SAME:
        value = getattr(inversion.settings, name)
        if options.get(name) not in (None, value):
            raise ValueError(f"{name}: got {options[name]}, want {value} as in the inversion")
        options[name] = value
    with _reference(pipe, inversion.latents.flip(0)):
        out = pipe(prompt, **{"scheduler": "ddim", **options})
    given = [*out.provenance["given"], "inversion"]  # a record cannot hold it, so no replay is promised
    return dataclasses.replace(out, provenance={**out.provenance, "given": given})


@contextlib.contextmanager
def _reference(pipe: Pipeline, latents: Tensor) -> Iterator[None]:
    """Let the transformer see `latents` `[steps, B, T, C, h, w]` beside its own, in attention."""
    transformer, ops = pipe.transformer, pipe.transformer.ops
    if isinstance(transformer, SplitTransformer) and transformer.mesh.split.cfg > 1:
        raise ValueError("parallel: got cfg=2 with an edit, whose attention sees two rows at once, want cfg=1")

    def double(_module: object, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        x, text, timestep = args
        reference = rearrange(latents[options["step"]], "b t c h w -> b c t h w").to(x)
        rows = len(x) // 2 if options["branch"] == "both" else len(x)
        if len(reference) not in (1, rows):
            raise ValueError(f"inversion: got one of {len(reference)} videos, want 1 or one per video, {rows}")
        reference = reference.expand(rows, -1, -1, -1, -1).repeat(len(x) // rows, 1, 1, 1, 1)
        beside = torch.cat([reference, x[:, reference.shape[1] :]], dim=1)  # with the channels of its conditions
        return (torch.cat([x, beside]), torch.cat([text, text]), torch.cat([timestep, timestep])), options

    def half(_module: object, _args: object, out: Tensor) -> Tensor:
        return out.chunk(2)[0]

    with contextlib.ExitStack() as stack:
        stack.callback(transformer.set_ops, ops)
        transformer.set_ops(dataclasses.replace(ops, attention=_joined(ops.attention)))
        stack.callback(transformer.register_forward_pre_hook(double, with_kwargs=True).remove)
        stack.callback(transformer.register_forward_hook(half).remove)
        yield


def _joined(attention: AttentionOp) -> AttentionOp:
    """Return attention in which the first half of the batch sees the keys and values of the second half too."""

    def joined(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
        (q, q_ref), (k, k_ref), (v, v_ref) = (each.chunk(2) for each in (q, k, v))
        own = attention(q, torch.cat([k, k_ref], dim=1), torch.cat([v, v_ref], dim=1), context)
        return torch.cat([own, attention(q_ref, k_ref, v_ref, context)])

    return joined


def _swap(x: Tensor) -> Tensor:
    return rearrange(x, "b c t h w -> b t c h w")
