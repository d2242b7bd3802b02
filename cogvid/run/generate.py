"""Make an MP4: refuse what can be refused, then generate, and encode frames while the next ones are decoded.

The command line uses this, and so can a page or a batch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from cogvid.config import ModelConfig
from cogvid.media.image import load_image
from cogvid.media.video import VideoWriter, read_video
from cogvid.run.inputs import frames_to_use
from cogvid.run.output import Output
from cogvid.run.pipeline import Pipeline
from cogvid.run.saved_run import SavedRun
from cogvid.run.settings import Settings, check_seed, resolve_settings, task_of
from cogvid.run.stages import stage

DEFAULT_MODELS = {"text-to-video": "tiny-t2v", "image-to-video": "tiny-i2v", "video-to-video": "tiny-t2v"}


@dataclass(frozen=True)
class Job:
    """One video file to make. `prepare` checks it.

    inputs: arguments of `Pipeline.__call__`. settings: what they come to. fps: of the file.
    """

    output: str
    inputs: Mapping[str, Any]
    settings: Settings
    fps: float


def prepare(
    model: ModelConfig,
    prompt: str,
    output: str | os.PathLike[str],
    *,
    image: Any = None,
    video: str | os.PathLike[str] | Tensor | None = None,
    negative_prompt: str = "",
    seed: int | None = None,
    fps: float | None = None,
    **options: Any,
) -> Job:
    """Check all that can be checked without the weights, the cheapest first, and read the image or the video.

    Args:
        output: `.mp4` file to write. image: what `load_image` takes. video: a video to start from, its path or its
            frames `[F, H, W, 3]` uint8.
        fps: frames per second of the file; None is the model's.
        options: the fields of `Settings`.

    Raises:
        ValueError, OSError: an input or an option that cannot be used, or an output that cannot be written.
    """
    task, frames = task_of(image, video), None
    if video is not None:
        frames = video if isinstance(video, Tensor) else read_video(video, options.get("num_frames"))[0]
        options["num_frames"] = frames_to_use(frames, options.get("num_frames"))
    settings = resolve_settings(model, task=task, **options)
    if seed is not None:
        check_seed(seed, 1)
    fps = model.fps if fps is None else fps
    output = os.fspath(output)
    VideoWriter(output, settings.height, settings.width, fps)
    _try_writing(output)
    inputs = {
        "prompt": prompt,
        "image": None if image is None else load_image(image),
        "video": frames,
        "negative_prompt": negative_prompt,
        "seed": seed,
        **options,
    }
    return Job(output, inputs, settings, fps)


def run(pipe: Pipeline, job: Job, saved_run: SavedRun | None = None) -> Output:
    """Generate the video of a job and write its file, whole or not at all; return what the pipeline did."""
    out = pipe(**job.inputs, output_type="stream", saved_run=saved_run)
    write_video(job, out.frames[0], out.provenance)
    return out


def write_video(job: Job, video: Iterable[Tensor], record: Mapping[str, Any]) -> None:
    """Write the file of a job, whole or not at all. video: uint8 `[f, H, W, 3]`, decoded while they are encoded."""
    settings = job.settings
    with (
        stage("decode"),
        VideoWriter(job.output, settings.height, settings.width, job.fps, metadata=record) as writer,
        tqdm(total=settings.num_frames, desc="decode", unit="frame") as bar,
    ):
        for frames in video:
            writer.write(frames)
            bar.update(len(frames))


def _try_writing(path: str) -> None:
    """Raise unless a file can be made beside the output: fail before sampling, which may take hours."""
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):
            pass
    except OSError as error:
        raise OSError(error.errno, f"output: got {path!r}, which cannot be written: {error.strerror}") from error
