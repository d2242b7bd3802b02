"""Make a video again from the record that it carries."""

from __future__ import annotations

import dataclasses
import filecmp
import os
from collections.abc import Callable, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np

from cogvid.media.download import shown
from cogvid.media.video import read_video
from cogvid.parallel.share import share
from cogvid.run.generate import Job, prepare, run
from cogvid.run.given import IMAGES, VIDEOS, as_lists, resized
from cogvid.run.load import load_checkpoint
from cogvid.run.noise import noise_hash
from cogvid.run.record import ENVIRONMENT, differences, environment, pixel_hash, read_embedded_images, read_record
from cogvid.run.settings import OPTIONS
from cogvid.run.side_files import SideFiles
from cogvid.run.together import RememberingEncoder, sample_together
from cogvid.weights.checkpoint import Checkpoint, read_checkpoint
from cogvid.weights.load_options import LOAD_OPTIONS
from cogvid.weights.lora_option import find_loras
from cogvid.weights.parallel_option import parse_parallel, world_size
from cogvid.weights.placement import Placement, resolve_placement, with_split

if TYPE_CHECKING:
    from PIL.Image import Image

    from cogvid.run.pipeline import Pipeline

_STRINGS = ("source", "source_kind", "defaults", "device", "dtype", "ops", "qk_norm")
_NEEDED = (*_STRINGS, *OPTIONS, *(name for name in ENVIRONMENT if name != "parallel"), "given", "noise", "image",
           "num_videos_per_prompt", "negative_prompt", "video", "revision", "variant", "fps", "seed")  # fmt: skip


_LONGEST = 2000  # characters of a name
_KINDS = {
    "prompt": (list, NoneType), "negative_prompt": (list, NoneType), "given": list, "weights": dict, "machine": dict,
    "versions": dict, "image": (list, NoneType), "video": (str, NoneType), "noise": (str, NoneType),
    "revision": (str, NoneType), "variant": (str, NoneType), "step_cache": (str, NoneType), "seed": (int, NoneType),
    "last_image": (list, NoneType), "mask": (str, NoneType), "control_video": (str, NoneType), "fps": (int, float),
    "video_start": (int, float, NoneType), "video_fps": (int, float, NoneType), "lora": list,
    "enhanced": (dict, NoneType), "parallel": (str, NoneType),
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
    lora: Sequence[str] | None = None,
    local_files_only: bool = False,
    say: Callable[[str], None] = print,
    on_step: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Make the video at `path` again and return its record.

    On the same machine with the same versions the file has the same bytes. A video that was sampled with others is made
    with them again, and it alone is decoded and written.

    Args:
        output: `.mp4` file to write.
        model, device, dtype, ops: in place of what the record names.
        lora: where the adapters of the record are, in its order; they must be the same.
        image, last_image, video, mask, control_video, noise: where the record has a hash alone, what has this hash. Of
            videos that were sampled together, the image is that of this one.
        say: gets each line of what is not as in the record, before anything runs, and at the end whether the bytes are
            the same.
        on_step: as for `generate.run`; a video that was sampled with others does not call it.

    Raises:
        ValueError: the record does not hold all that the run was given; an input is another one.
    """
    record = share(lambda: read_record(path))
    check_replayable(record, path, together=True)
    if os.path.realpath(output) == os.path.realpath(path):
        raise ValueError(f"output: got {shown(os.fspath(output))}, which is the video itself, want another file")
    checkpoint = find_checkpoint(record, model, local_files_only)
    given = {"last_image": last_image, "video": video, "mask": mask, "control_video": control_video}
    given = {name: _by_hash(name, record, value) for name, value in given.items()}
    files = SideFiles(noise=_by_hash("noise", record, noise))
    more = {"image": image, "given": given, "files": files}
    jobs = share(lambda: _jobs(record, checkpoint, read_embedded_images(path), output, **more))
    options = {"device": device, "dtype": dtype, "ops": ops, "lora": find_loras(record["lora"], lora)}
    placement = _placement(record, checkpoint, {name: value for name, value in options.items() if value})
    here = environment(checkpoint, placement)
    for line in differences({name: record.get(name) for name in ENVIRONMENT}, here):
        say(line)
    jobs = [_with_origin(job, record, here) for job in jobs]
    pipe = load_checkpoint(checkpoint, placement, local_files_only)
    made = _run(pipe, jobs, record.get("batch_index", 0), on_step)
    say(share(lambda: _outcome(path, output)))
    return made


def _placement(record: dict[str, Any], checkpoint: Checkpoint, changed: dict[str, Any]) -> Placement:
    """Return the recorded placement, with what is changed; a split of other devices than those here is not taken."""
    split = parse_parallel(record.get("parallel"))
    here = split if split is not None and split.devices == world_size() else None
    recorded = {**{name: record.get(name) for name in LOAD_OPTIONS}, "parallel": here}
    recorded["shard_weights"] = bool(record.get("shard_weights")) and world_size() > 1
    return with_split(resolve_placement(**{**recorded, **changed})(checkpoint.model.dtype), checkpoint.model)


def _run(pipe: Pipeline, jobs: list[Job], own: int, on_step: Callable[..., None] | None) -> dict[str, Any]:
    """Make the video of one of several jobs that were sampled together, and return its record."""
    if len(jobs) == 1:
        return run(pipe, jobs[0], on_step=on_step).provenance
    pipe.text_encoder = RememberingEncoder(pipe.text_encoder)
    return sample_together(pipe, jobs)[own].write()


def _with_origin(job: Job, record: dict[str, Any], here: dict[str, Any]) -> Job:
    """Let a job's record name the origin of the weights as the old one does, if they are the same."""
    if here["weights"].get("headers") != record["weights"].get("headers"):
        return job
    origin = {name: record[name] for name in ("source", "source_kind", "revision")}
    return dataclasses.replace(job, origin={**job.origin, **origin})


def check_replayable(record: dict[str, Any], path: str | os.PathLike[str], *, together: bool = False) -> None:
    """Raise unless the record has all that a replay needs. together: a video that was sampled with others will do."""
    name = shown(os.fspath(path))
    missing = [field for field in _NEEDED if field not in record]
    wrong = [field for field in _STRINGS if field not in missing and not isinstance(record[field], str)]
    known = {field: kinds for field, kinds in _KINDS.items() if field not in missing}
    wrong += [field for field, kinds in known.items() if not isinstance(record.get(field), kinds)]
    wrong += [field for field in _NEEDED if isinstance(record.get(field), str) and len(record[field]) > _LONGEST]
    texts = [n for n in ("prompt", "negative_prompt", "image") if n not in (*missing, *wrong)]
    wrong += [n for n in texts if not all(isinstance(each, str) for each in record[n] or [])]
    for faults in (missing, wrong):
        if faults:
            got = "none" if missing else f"{record[faults[0]]!r:.40}"
            raise ValueError(f"{faults[0]}: got {got} in the record of {name}, want a record written by cogvid")
    if record["given"]:
        listed = f"{', '.join(map(str, record['given'])):.200}"
        raise ValueError(
            f"{record['given'][0]!s:.40}: got a run that was given {listed}, which its record does not hold, want one "
            "of options alone"
        )
    if record["step_cache"] is not None and "=" not in record["step_cache"]:  # an object's class
        raise ValueError(f"step_cache: got a run with {record['step_cache']}, which is no option, want one without")
    prompts = record["prompt"] or []
    if together and "batch_index" in record:
        _check_together(record, name)
    elif len(prompts) != 1 or record["num_videos_per_prompt"] != 1:
        raise ValueError("prompt: got a run of several videos in one batch, want one of a single video")
    if record["image"] and len(record["image"]) != len(prompts):
        raise ValueError(f"image: got {len(record['image'])} in the record of {name}, want {len(prompts)}")


def _check_together(record: dict[str, Any], name: str) -> None:
    """Raise unless the record says of which videos this one was made, as `cogvid batch` writes it."""
    size, index = record.get("batch_size"), record["batch_index"]
    if type(size) is not int or type(index) is not int or not 0 <= index < size:
        got = f"{index!r:.40} of {size!r:.40}"
        raise ValueError(f"batch_index: got {got} in the record of {name}, want an integer below batch_size")
    for field in ("prompt", "negative_prompt", "seeds"):
        values = record[field]
        optional = values is None and field == "negative_prompt"
        if not optional and (not isinstance(values, list) or len(values) != size):
            raise ValueError(f"{field}: got {values!r:.40} in the record of {name}, want a list of {size}")
    for field in ("video", "noise"):
        if record[field] is not None:
            raise ValueError(f"{field}: got one in the record of {name}, want none for a video made with others")
    if record["num_videos_per_prompt"] != 1 or record["seed"] != record["seeds"][index]:
        raise ValueError(f"seed: got {record['seed']!r:.40} in the record of {name}, want that of its batch_index")


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


def _jobs(
    record: dict[str, Any],
    checkpoint: Checkpoint,
    stored: list[Image],
    output: str | os.PathLike[str],
    *,
    image: Any,
    given: dict[str, Any],
    files: SideFiles,
) -> list[Job]:
    """Return the job of a record, or those of all videos that this one was sampled with, in their order.

    stored: the input images that the video carries, its own one first. image, given: as for `replay`.
    """
    prompts, own = record["prompt"], record.get("batch_index", 0)
    negatives = record["negative_prompt"] or [""] * len(prompts)
    seeds = record["seeds"] if len(prompts) > 1 else [record["seed"]]
    if not record["image"] and image is not None:
        raise ValueError("image: got one for a run without an image, want none")
    hashed = {pixel_hash(np.asarray(each)): each for each in stored}
    pictures: list[Any] = [hashed.get(each) for each in record["image"] or ()] or [None] * len(prompts)
    if record["image"]:
        pictures[own] = next((each for each in (image, pictures[own], *stored[:1]) if each is not None), None)
        if any(each is None for each in pictures):
            raise ValueError("image: got a record with the hash of an image alone, want the image (--image)")
    files = dataclasses.replace(files, embed=bool(stored))
    jobs: list[Job] = []
    for index, picture in enumerate(pictures):
        job = prepare(
            checkpoint.model,
            prompts[index],
            output,
            image=picture,
            **given,
            video_start=record.get("video_start"),
            video_fps=record.get("video_fps"),
            negative_prompt=negatives[index],
            seed=seeds[index],
            fps=record["fps"],
            files=files,
            **{name: record[name] for name in OPTIONS},
        )
        _check_hashes(record, job, index)
        jobs.append(dataclasses.replace(job, enhanced=record.get("enhanced")))
    return jobs


def _by_hash(name: str, record: dict[str, Any], given: Any) -> Any:
    """Return what was given, which must be something exactly if the record has its hash."""
    recorded = record.get(name)  # records of older versions do not have all names
    if given is None and recorded is not None:
        raise ValueError(f"{name}: got none for a run that was given one, want the file (--{name.replace('_', '-')})")
    if given is not None and recorded is None:
        raise ValueError(f"{name}: got one for a run without, want none")
    return given


def _check_hashes(record: dict[str, Any], job: Job, index: int) -> None:
    """Raise unless the inputs are those that the record names for the video with this index."""
    given = as_lists({name: job.inputs[name] for name in (*IMAGES, *VIDEOS)})
    for name, (pixels, *_) in resized(given, job.settings).items():
        wanted = record[name][index] if name == "image" else record[name]
        if pixel_hash(np.asarray(pixels)) not in wanted:
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
