"""Make an MP4: check everything first, then generate, and encode frames while the next ones are decoded."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from cogvid.config import ModelConfig
from cogvid.media.image import resize_image
from cogvid.media.tokenizer import check_text
from cogvid.media.video import VideoWriter
from cogvid.parallel.share import lead, share
from cogvid.run.capture import capture_attention, captured_steps
from cogvid.run.conditioning import draws_before_noise
from cogvid.run.given import VIDEOS, count_given, read_given
from cogvid.run.noise import Noise, load_noise, noise_hash
from cogvid.run.output import Output
from cogvid.run.pipeline import Pipeline
from cogvid.run.record import embedded
from cogvid.run.saved_run import SavedRun
from cogvid.run.settings import Settings, check_seed, models_for, resolve_settings, task_of
from cogvid.run.side_files import NO_FILES, SideFiles, Watched, write_sidecar
from cogvid.run.signals import stop_if_asked
from cogvid.run.stages import Stage, listen, stage

DEFAULT_MODELS = {"text-to-video": "tiny-t2v", "image-to-video": "tiny-i2v", "video-to-video": "tiny-t2v"}
Video = str | os.PathLike[str] | Tensor


def default_model(task: str) -> str:
    """Return the shipped pack for a task.

    Raises:
        ValueError: there is none; the message names models.
    """
    if task not in DEFAULT_MODELS:
        raise ValueError(f"model: got none for {task}, want one such as {', '.join(models_for(task))}")
    return DEFAULT_MODELS[task]


@dataclass(frozen=True)
class Job:
    """One video file to make. `prepare` checks it.

    inputs: arguments of `Pipeline.__call__`. settings: the options, resolved. fps: of the file. noise: what it draws,
    if not from the seed. files: what else to write. origin: what the record says of where the video and the weights
    are from, in place of what the pipeline knows of it. enhanced: what the prompt was made of, see `enhance_job`: the
    short `prompt`, the `llm` and its `host`. The record has it, and it decides nothing more.
    """

    output: str
    inputs: Mapping[str, Any]
    settings: Settings
    fps: float
    noise: Noise | None = None
    files: SideFiles = NO_FILES
    origin: Mapping[str, Any] = field(default_factory=dict)
    enhanced: Mapping[str, str] | None = None


def prepare(
    model: ModelConfig,
    prompt: str,
    output: str | os.PathLike[str],
    *,
    image: Any = None,
    last_image: Any = None,
    video: Video | None = None,
    mask: Video | None = None,
    control_video: Video | None = None,
    video_start: float | None = None,
    video_fps: float | None = None,
    negative_prompt: str = "",
    seed: int | None = None,
    fps: float | None = None,
    files: SideFiles = NO_FILES,
    **options: Any,
) -> Job:
    """Check everything that can be checked without the weights, and read the pictures and videos.

    Args:
        output: `.mp4` file to write. image, last_image: what `load_image` takes.
        video, mask, control_video: a path, or frames `[F, H, W, 3]` uint8; a mask may be a picture too.
        video_start, video_fps: which frames of these paths are taken, as `start` and `fps` of `read_video`; frames
            that are given were chosen before.
        fps: frames per second of the file; None is the model's.
        files: what to write beside the video.
        options: the fields of `Settings`.

    Raises:
        ValueError, OSError: an input or an option that cannot be used, or an output that cannot be written.
    """
    given = {"image": image, "last_image": last_image, "video": video, "mask": mask, "control_video": control_video}
    task, chosen = task_of(**given), {"start": video_start, "fps": video_fps}
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        check_text(name, text)
    # Counted and checked first, then only the frames that are used are decoded.
    options["num_frames"] = count_given(given, chosen, options.get("num_frames"))
    settings = resolve_settings(model, task=task, **options)
    given = read_given(given, chosen, settings.num_frames)
    if seed is not None:
        check_seed(seed, 1)
        if files.noise is not None:
            raise ValueError("seed, noise: got both, want one of them")
    noise = None if files.noise is None else load_noise(files.noise)
    fps = model.fps if fps is None else fps
    output = os.fspath(output)
    VideoWriter(output, settings.height, settings.width, fps)
    _try_writing(output)
    files.check(output)
    inputs = {"prompt": prompt, **given, "negative_prompt": negative_prompt, "seed": seed, **options}
    has_video = any(given[name] is not None for name in VIDEOS)
    origin = {f"video_{name}": value for name, value in chosen.items()} if has_video else {}
    return Job(output, inputs, settings, fps, noise, files, origin)


def run(
    pipe: Pipeline, job: Job, saved_run: SavedRun | None = None, on_step: Callable[..., None] | None = None
) -> Output:
    """Generate the video of a job and write its files, each whole or not at all; return what the pipeline did.

    on_step: a `callback_on_step_end` that only looks.
    """
    stages: list[Stage] = []
    with contextlib.ExitStack() as stack:
        if job.files.sidecar is not None:
            stack.enter_context(listen(stages.append))
        draws = draws_before_noise(pipe.model.conditions, job.settings)
        with Watched(job.files, draws, job.noise) as watched, _capturing(pipe, job):
            callback = _both(watched.callback, on_step)
            out = pipe(**job.inputs, output_type="stream", callback_on_step_end=callback, saved_run=saved_run)
        provenance = {**out.provenance, "given": []}  # the callbacks only look
        share(lambda: watched.save(record_of(job, provenance)))
        record = lead(lambda frames: write_video(job, frames, provenance), out.frames[0])
    if job.files.sidecar is not None:
        sidecar = job.files.sidecar
        share(lambda: write_sidecar(sidecar, record, stages))
    return replace(out, seed=record["seed"], provenance=record)


def _both(first: Callable[..., None] | None, second: Callable[..., None] | None) -> Callable[..., None] | None:
    """Return a callback that calls those of two that are there."""
    if first is None or second is None:
        return first or second

    def call(*arguments: Any) -> None:
        first(*arguments)
        second(*arguments)

    return call


def _capturing(pipe: Pipeline, job: Job) -> contextlib.AbstractContextManager[None]:
    if job.files.capture is None:
        return contextlib.nullcontext()
    return capture_attention(pipe, job.files.capture, steps=captured_steps(pipe, job.settings))


def record_of(job: Job, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a job's video: that of the run, and what the job adds to it."""
    record = {**provenance, **job.origin, "fps": job.fps}
    if job.noise is not None:
        record |= {"noise": noise_hash(job.noise), "seed": None, "seeds": None}
    if job.enhanced is not None:
        record["enhanced"] = dict(job.enhanced)
    return record


def write_video(
    job: Job, video: Iterable[Tensor], provenance: Mapping[str, Any], covers: Sequence[bytes] = ()
) -> dict[str, Any]:
    """Write the file of a job, whole or not at all, and return its record.

    video: uint8 `[f, H, W, 3]`, decoded while they are encoded. covers: of the videos that it was sampled with.
    """
    settings, record = job.settings, record_of(job, provenance)
    covers = list(dict.fromkeys([*covers_of(job), *covers]))
    with (
        stage("decode"),
        VideoWriter(job.output, settings.height, settings.width, job.fps, metadata=record, cover=covers) as writer,
        tqdm(total=settings.num_frames, desc="decode", unit="frame") as bar,
    ):
        for frames in video:
            writer.write(frames)
            bar.update(len(frames))
            stop_if_asked()

    return record


def covers_of(job: Job) -> list[bytes]:
    """Return what a job embeds in its video: the input image, as the model sees it, or nothing."""
    image, settings = job.inputs["image"], job.settings
    if image is None or not job.files.embed:
        return []
    return [embedded(resize_image(image, settings.height, settings.width, settings.resize))]


def _try_writing(path: str) -> None:
    """Raise unless a file can be made beside the output: fail before sampling, which may take hours."""
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):
            pass
    except OSError as error:
        raise OSError(error.errno, f"output: got {path!r}, which cannot be written: {error.strerror}") from error
