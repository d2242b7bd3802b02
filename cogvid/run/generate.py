"""Make an MP4: refuse what can be refused, then generate, and encode frames while the next ones are decoded.

The command line uses this, and so can a page or a batch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm.auto import tqdm

from cogvid.config import ModelConfig
from cogvid.media.image import load_image, resize_image
from cogvid.media.video import VideoWriter, read_video
from cogvid.run.inputs import frames_to_use
from cogvid.run.noise import Noise, load_noise, noise_hash
from cogvid.run.output import Output
from cogvid.run.pipeline import Pipeline
from cogvid.run.record import embedded
from cogvid.run.settings import Settings, check_seed, resolve_settings, task_of
from cogvid.run.side_files import NO_FILES, Measured, SideFiles, Watched, write_sidecar

DEFAULT_MODELS = {"text-to-video": "tiny-t2v", "image-to-video": "tiny-i2v", "video-to-video": "tiny-t2v"}


@dataclass(frozen=True)
class Job:
    """One video file to make. `prepare` checks it.

    inputs: arguments of `Pipeline.__call__`. settings: what they come to. fps: of the file. noise: what it draws,
    if not from the seed. files: what else to write.
    origin: what the record says of where the weights are from, in place of what the pipeline knows of it.
    """

    output: str
    inputs: Mapping[str, Any]
    settings: Settings
    fps: float
    noise: Noise | None = None
    files: SideFiles = NO_FILES
    origin: Mapping[str, Any] = field(default_factory=dict)


def prepare(
    model: ModelConfig,
    prompt: str,
    output: str | os.PathLike[str],
    *,
    image: Any = None,
    video: str | os.PathLike[str] | None = None,
    negative_prompt: str = "",
    seed: int | None = None,
    fps: float | None = None,
    files: SideFiles = NO_FILES,
    **options: Any,
) -> Job:
    """Check all that can be checked without the weights, the cheapest first, and read the image or the video.

    Args:
        output: `.mp4` file to write. image: what `load_image` takes. video: path of a video to start from.
        fps: frames per second of the file; None is the model's.
        files: what to write beside the video.
        options: the fields of `Settings`.

    Raises:
        ValueError, OSError: an input or an option that cannot be used, or an output that cannot be written.
    """
    task, frames = task_of(image, video), None
    if video is not None:
        frames, _ = read_video(video, options.get("num_frames"))
        options["num_frames"] = frames_to_use(frames, options.get("num_frames"))
    settings = resolve_settings(model, task=task, **options)
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
    inputs = {
        "prompt": prompt,
        "image": None if image is None else load_image(image),
        "video": frames,
        "negative_prompt": negative_prompt,
        "seed": seed,
        **options,
    }
    return Job(output, inputs, settings, fps, noise, files)


def run(pipe: Pipeline, job: Job) -> Output:
    """Generate the video of a job and write its file, whole or not at all; return what the pipeline did."""
    settings, measured, image = job.settings, Measured(), job.inputs["image"]
    with measured.stage("sample"), Watched(job.files, settings.task, job.noise) as watched:
        out = pipe(**job.inputs, output_type="stream", callback_on_step_end=watched.callback)
    record = {**out.provenance, **job.origin, "fps": job.fps, "noise": None, "given": []}  # the callback only looks
    if job.noise is not None:
        record |= {"noise": noise_hash(job.noise), "seed": None, "seeds": None}
    watched.save(record)
    cover = None
    if image is not None and job.files.embed:
        cover = embedded(resize_image(image, settings.height, settings.width, settings.resize))
    with (
        measured.stage("decode"),
        VideoWriter(job.output, settings.height, settings.width, job.fps, metadata=record, cover=cover) as writer,
        tqdm(total=settings.num_frames, desc="decode", unit="frame") as bar,
    ):
        for frames in out.frames[0]:
            writer.write(frames)
            bar.update(len(frames))
    if job.files.sidecar is not None:
        write_sidecar(job.files.sidecar, record, measured, pipe.device)
    return replace(out, seed=record["seed"], provenance=record)


def _try_writing(path: str) -> None:
    """Raise unless a file can be made beside the output: fail before sampling, which may take hours."""
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):
            pass
    except OSError as error:
        raise OSError(error.errno, f"output: got {path!r}, which cannot be written: {error.strerror}") from error
