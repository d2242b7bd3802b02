"""Make a video again from the record that it carries."""

from __future__ import annotations

import dataclasses
import filecmp
import os
from collections.abc import Callable
from types import NoneType
from typing import Any

import numpy as np

from cogvid.media.download import shown
from cogvid.media.video import read_video
from cogvid.run.generate import Job, prepare, run
from cogvid.run.given import IMAGES, VIDEOS, as_lists, resized
from cogvid.run.load import load_checkpoint
from cogvid.run.noise import noise_hash
from cogvid.run.output import Output
from cogvid.run.record import ENVIRONMENT, differences, environment, pixel_hash, read_embedded_image, read_record
from cogvid.run.settings import OPTIONS
from cogvid.run.side_files import SideFiles
from cogvid.weights.checkpoint import Checkpoint, read_checkpoint
from cogvid.weights.load_options import LOAD_OPTIONS
from cogvid.weights.placement import resolve_placement

_STRINGS = ("source", "source_kind", "defaults", "device", "dtype", "ops", "qk_norm")
_NEEDED = (*_STRINGS, *OPTIONS, *ENVIRONMENT, "given", "num_videos_per_prompt", "negative_prompt", "step_cache",
           "image", "video", "revision", "variant", "fps", "seed", "noise")  # fmt: skip


_KINDS = {
    "prompt": (list, NoneType), "negative_prompt": (list, NoneType), "given": list, "weights": dict, "machine": dict,
    "versions": dict, "image": (list, NoneType), "video": (str, NoneType), "noise": (str, NoneType),
    "revision": (str, NoneType), "variant": (str, NoneType), "step_cache": (str, NoneType), "seed": (int, NoneType),
    "last_image": (list, NoneType), "mask": (str, NoneType), "control_video": (str, NoneType), "fps": (int, float),
    "video_start": (int, float, NoneType), "video_fps": (int, float, NoneType),
}  # fmt: skip


def replay(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: str | None = None,
    image: Any = None,
    video: str | None = None,
    last_image: Any = None,
    mask: str | None = None,
    control_video: str | None = None,
    noise: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    ops: str | None = None,
    local_files_only: bool = False,
    say: Callable[[str], None] = print,
) -> Output:
    """Make the video at `path` again. On the same machine with the same versions the file has the same bytes.

    Args:
        output: `.mp4` file to write.
        model, device, dtype, ops: in place of what the record names.
        image, last_image, video, mask, control_video, noise: where the record has a hash alone, what has this hash.
        say: gets each line of what is not as in the record, before anything runs, and at the end whether the bytes are
            the same.

    Raises:
        ValueError: the record does not hold all that the run was given; an input is another one.
    """
    record = read_record(path)
    check_replayable(record, path)
    if os.path.realpath(output) == os.path.realpath(path):
        raise ValueError(f"output: got {shown(os.fspath(output))}, which is the video itself, want another file")
    checkpoint = find_checkpoint(record, model, local_files_only)
    given = {"last_image": last_image, "video": video, "mask": mask, "control_video": control_video}
    stored = read_embedded_image(path) if record["image"] else None
    job = prepare(
        checkpoint.model,
        record["prompt"][0],
        output,
        image=_image(record, image, stored),
        **{name: _by_hash(name, record, value) for name, value in given.items()},
        video_start=record.get("video_start"),
        video_fps=record.get("video_fps"),
        negative_prompt=(record["negative_prompt"] or [""])[0],
        seed=record["seed"],
        fps=record["fps"],
        files=SideFiles(embed=stored is not None, noise=_by_hash("noise", record, noise)),
        **{name: record[name] for name in OPTIONS},
    )
    _check_hashes(record, job)
    changed = {name: value for name, value in (("device", device), ("dtype", dtype), ("ops", ops)) if value}
    placement = resolve_placement(**{name: record[name] for name in LOAD_OPTIONS} | changed)(checkpoint.model.dtype)
    here = environment(checkpoint, placement)
    for line in differences({name: record[name] for name in ENVIRONMENT}, here):
        say(line)
    job = _with_origin(job, record, here)
    out = run(load_checkpoint(checkpoint, placement), job)
    say(_outcome(path, output))
    return out


def _with_origin(job: Job, record: dict[str, Any], here: dict[str, Any]) -> Job:
    """Let a job's record name the origin of the weights as the old one does, if they are the same."""
    if here["weights"].get("headers") != record["weights"].get("headers"):
        return job
    origin = {name: record[name] for name in ("source", "source_kind", "revision")}
    return dataclasses.replace(job, origin={**job.origin, **origin})


def check_replayable(record: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Raise unless the record has all that a replay needs."""
    name = shown(os.fspath(path))
    missing = [field for field in _NEEDED if field not in record]
    wrong = [field for field in _STRINGS if field not in missing and not isinstance(record[field], str)]
    wrong += [field for field, kinds in _KINDS.items() if field in record and not isinstance(record[field], kinds)]
    texts = [n for n in ("prompt", "negative_prompt") if n not in (*missing, *wrong)]
    wrong += [n for n in texts if not all(isinstance(each, str) for each in record[n] or [])]
    for faults in (missing, wrong):
        if faults:
            got = "none" if missing else f"{record[faults[0]]!r:.40}"
            raise ValueError(f"{faults[0]}: got {got} in the record of {name}, want a record written by cogvid")
    if record["given"]:
        listed = ", ".join(map(str, record["given"]))
        raise ValueError(
            f"{record['given'][0]}: got a run that was given {listed}, which its record does not hold, want one of "
            "options alone"
        )
    if record["step_cache"] is not None:
        raise ValueError(f"step_cache: got a run with {record['step_cache']}, which is no option, want one without")
    prompts = record["prompt"] or []
    if len(prompts) != 1 or record["num_videos_per_prompt"] != 1:
        raise ValueError("prompt: got a run of several videos in one batch, want one of a single video")


def find_checkpoint(record: dict[str, Any], model: str | None, local_files_only: bool) -> Checkpoint:
    """Find the checkpoint of a record: a pack or a repository by its name, a directory if its path is known."""
    source, weights = record["source"], record["weights"]
    revision = weights.get("commit") or record["revision"]
    if model is not None:
        source, revision = model, record["revision"] if model == source else None
    elif record["source_kind"] == "directory" and not os.path.isabs(source):
        raise ValueError(f"model: got a run of a directory named {source!r}, want its path (--model)")
    return read_checkpoint(
        source,
        defaults=record["defaults"],
        revision=revision,
        local_files_only=local_files_only,
        variant=record["variant"],
        hash_weights="sha256" in weights,
    )


def _image(record: dict[str, Any], given: Any, stored: Any) -> Any:
    if not record["image"]:
        if given is not None:
            raise ValueError("image: got one for a run without an image, want none")
        return None
    if given is None and stored is None:
        raise ValueError("image: got a record with the hash of an image alone, want the image (--image)")
    return stored if given is None else given


def _by_hash(name: str, record: dict[str, Any], given: Any) -> Any:
    """Return what was given, which must be something exactly if the record has its hash."""
    recorded = record.get(name)  # records of older versions do not have all names
    if given is None and recorded is not None:
        raise ValueError(f"{name}: got none for a run that was given one, want the file (--{name.replace('_', '-')})")
    if given is not None and recorded is None:
        raise ValueError(f"{name}: got one for a run without, want none")
    return given


def _check_hashes(record: dict[str, Any], job: Job) -> None:
    """Raise unless the inputs are those that the record names."""
    given = as_lists({name: job.inputs[name] for name in (*IMAGES, *VIDEOS)})
    for name, (pixels, *_) in resized(given, job.settings).items():
        if pixel_hash(np.asarray(pixels)) not in record[name]:
            raise ValueError(f"{name}: got other pixels than those of the record, want the {name} that the run had")
    if job.noise is not None and noise_hash(job.noise) != record["noise"]:
        raise ValueError("noise: got other draws than those of the record, want the noise that the run had")


def _outcome(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> str:
    """Say whether two videos have the same bytes, and if not, whether they have the same frames."""
    before, after = shown(os.fspath(path)), shown(os.fspath(output))
    if filecmp.cmp(path, output, shallow=False):
        return f"{after} has the same bytes as {before}"
    (old, _), (new, _) = read_video(path), read_video(output)
    unlike = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if not a.equal(b)]
    frames = "the frames are equal"
    if unlike:
        frames = f"{len(unlike)} of {len(old)} frames differ, the first is {unlike[0]}"
    return f"{after} has other bytes than {before}: {frames}"
