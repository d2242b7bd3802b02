"""Run many jobs: the model loaded once, each prompt encoded once, finished jobs left out, failing jobs reported."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO, Any

from tqdm.auto import tqdm

from cogvid.media.download import one_line
from cogvid.options import check_int
from cogvid.parallel.share import all_or_none, is_common, share
from cogvid.run.generate import Job, default_model, prepare
from cogvid.run.given import IMAGES, VIDEOS
from cogvid.run.jobs import LOADING, BatchJob
from cogvid.run.load import load
from cogvid.run.manifest import Manifest
from cogvid.run.pipeline import Pipeline
from cogvid.run.settings import task_of
from cogvid.run.signals import stop_if_asked
from cogvid.run.stages import Stage, listen, stage
from cogvid.run.together import RememberingEncoder, sample_together

_LONGEST_LINE = 1000  # characters


def run_batch(jobs: Sequence[BatchJob], directory: str | os.PathLike[str], batch_size: int = 1) -> list[dict[str, Any]]:
    """Make the videos of all jobs in a directory, and return what the manifest has of those that failed.

    Several processes may do this at once with the same jobs: each job is done by one of them. What was finished before
    is left out. A job that fails is reported on stderr and in the manifest. Processes of torchrun do each job together;
    what then fails in one of them alone, such as for want of memory, raises.

    Args:
        batch_size: the most videos that are sampled together. Jobs are sampled together if they differ only in prompt,
            seed and image, and have no step cache; the result differs from that of single ones by rounding.
    """
    check_int("batch_size", batch_size, 1)
    manifest, begun = share(lambda: Manifest(directory)), time.time()
    waiting = list(jobs)
    for wait in (False, True):  # at last, for the jobs of other processes, which may end before they finish them
        waiting = _Run(manifest, begun, batch_size, len(jobs)).work(waiting, wait)

    def failed() -> list[dict[str, Any]]:
        entries = manifest.entries()
        return [entries[job.place] for job in jobs if manifest.failed_since(job, begun)]

    return share(failed)


class _Run:
    def __init__(self, manifest: Manifest, begun: float, batch_size: int, total: int) -> None:
        self.manifest, self.begun, self.batch_size, self.total = manifest, begun, batch_size, total
        self.loaded: tuple[dict[str, Any], Pipeline] | None = None

    def work(self, jobs: list[BatchJob], wait: bool) -> list[BatchJob]:
        """Do the jobs that are left to do, one model after the other; return those that other processes work on."""
        places: dict[str, int] = {}
        for job in jobs:
            places.setdefault(repr(_loading(job)), len(places))
        left = sorted(jobs, key=lambda job: places[repr(_loading(job))])
        others: list[BatchJob] = []
        while left:
            stop_if_asked()
            first = left.pop(0)
            with ExitStack() as claims:
                claimed = share(functools.partial(self._claim, first, wait, claims))
                if claimed is None:
                    others.append(first)
                if not claimed:
                    continue
                together = [first]
                for job in [each for each in left if _go_together(first, each)]:
                    if len(together) == self.batch_size:
                        break
                    if share(functools.partial(self._claim, job, False, claims)):
                        together.append(job)
                        left.remove(job)
                self._do(together)
        return others

    def _claim(self, job: BatchJob, wait: bool, claims: ExitStack) -> bool | None:
        """Claim a job. False: there is nothing to do. None: another process works on it."""
        if self.manifest.is_done(job):
            return False
        file: IO[str] | None = self.manifest.claim(job, wait=wait)
        if file is None:
            return None
        # Asked again: another process may have finished it before it was claimed here.
        if self.manifest.is_done(job) or self.manifest.failed_since(job, self.begun):
            file.close()
            return False
        claims.enter_context(file)
        return True

    def _do(self, together: list[BatchJob]) -> None:
        """Run jobs at once, and write down what became of each."""
        stages: list[Stage] = []
        failed: dict[int, Exception] = {}
        ready: list[tuple[BatchJob, Job]] = []
        begun = time.perf_counter()
        with listen(stages.append):
            try:
                pipe = self._load(_loading(together[0]))
                for job in together:
                    try:
                        ready.append((job, share(functools.partial(_prepare, pipe, job, self.manifest))))
                    except Exception as error:  # of whatever kind: the others go on
                        if not is_common(error):
                            raise
                        failed[job.place] = error
                if ready:
                    failed |= _run_together(pipe, ready)
            except Exception as error:
                if not is_common(error):
                    raise
                failed |= {job.place: error for job in together if job.place not in failed}
        measured = {
            "batch_size": len(ready),
            "seconds": round(time.perf_counter() - begun, 3),
            "peak_memory": max((each.peak for each in stages), default=None),
            "stages": {each.name: round(each.seconds, 3) for each in stages},
        }
        entries = [_entry(job, failed.get(job.place), measured) for job in together]
        share(lambda: self.manifest.add(entries))
        for entry in entries:
            said = f"failed: {entry['error']}" if entry["error"] else f"{entry['output']}, {entry['seconds']} s"
            tqdm.write(f"cogvid: job {entry['place']} of {self.total}: {said}", file=sys.stderr)

    def _load(self, loading: dict[str, Any]) -> Pipeline:
        if self.loaded is None or self.loaded[0] != loading:
            self.loaded = None  # so that two models are never in memory
            with stage("load"), all_or_none():
                pipe = load(loading["model"], **{name: value for name, value in loading.items() if name != "model"})
            pipe.text_encoder = RememberingEncoder(pipe.text_encoder)
            self.loaded = loading, pipe
        return self.loaded[1]


def _loading(job: BatchJob) -> dict[str, Any]:
    if "model" in job.loading:
        return job.loading
    task = task_of(**{name: job.values.get(name) for name in (*IMAGES, *VIDEOS)})
    return {"model": default_model(task), **job.loading}


def _go_together(first: BatchJob, other: BatchJob) -> bool:
    # A step cache may decide for a whole batch what is skipped.
    alone = ("last_image", "step_cache", *VIDEOS)
    return first.shape == other.shape and not any(first.values.get(name) for name in alone)


def _prepare(pipe: Pipeline, job: BatchJob, manifest: Manifest) -> Job:
    values = {name: value for name, value in job.values.items() if name not in LOADING}
    return prepare(pipe.model, output=manifest.directory / job.name, **{**values, "seed": job.seed})


def _run_together(pipe: Pipeline, ready: list[tuple[BatchJob, Job]]) -> dict[int, Exception]:
    """Sample jobs at once and write their files; return what failed, by place."""
    failed: dict[int, Exception] = {}
    made = sample_together(pipe, [job for _, job in ready])
    for (job, _), video in zip(ready, made, strict=True):
        try:
            video.write()
        except Exception as error:
            if not is_common(error):
                raise
            failed[job.place] = error
    return failed


def _entry(job: BatchJob, error: Exception | None, measured: dict[str, Any]) -> dict[str, Any]:
    return {
        "place": job.place,
        "output": job.name,
        "status": "failed" if error else "done",
        "seed": job.seed,
        **measured,
        "error": _one_line(error) if error else None,
        "ended": time.time(),
        "job": job.shown,
        "job_sha256": job.digest,
    }


def _one_line(error: Exception) -> str:
    """An error in one line; of a kind that a user's mistake never has, with its name."""
    text = one_line(error, _LONGEST_LINE) if str(error) else ""
    return text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"
