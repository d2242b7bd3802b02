"""Run many jobs: the model loaded once, each prompt encoded once, finished jobs left out, failing jobs reported."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

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


Prepare = Callable[[Pipeline, BatchJob], Job]


def run_batch(jobs: Sequence[BatchJob], directory: str | os.PathLike[str], batch_size: int = 1) -> list[dict[str, Any]]:
    """Make the videos of all jobs in a directory, and return what the manifest has of those that failed.

    Several processes may do this at once with the same jobs: each job is done by one of them. What was finished before
    is left out. A job that fails is reported on stderr and in the manifest. Processes of torchrun do each job together;
    what then fails in one of them alone, such as for want of memory, raises.

    Args:
        batch_size: the most videos that are sampled together. Jobs are sampled together if they differ only in prompt,
            seed and image, and have no step cache; the result differs from that of single ones by rounding.
    """
    queue, worker = Queue(jobs, directory, batch_size), Worker()
    for wait in (False, True):  # at last, for the jobs of other processes, which may end before they finish them
        while group := queue.take(wait=wait):
            with group:
                queue.add(worker.run(group.jobs, lambda pipe, job: prepare_job(pipe, job, queue.path(job))))
        queue.ask_again()
    return queue.failed()


class Group:
    """Jobs of one model that are sampled together. A context manager: until it ends, no other process has them."""

    def __init__(self, jobs: list[BatchJob], claims: ExitStack) -> None:
        self.jobs, self._claims = jobs, claims

    @property
    def model(self) -> str:
        """What tells their model from all others, with how it is loaded."""
        return _model(self.jobs[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes have the jobs."""
        self._claims.close()


class Queue:
    """The jobs of a batch that are left to do, those of one model after the other, and their manifest.

    Several processes may have such a queue of the same jobs and directory: each job is taken from one of them.
    """

    def __init__(self, jobs: Sequence[BatchJob], directory: str | os.PathLike[str], batch_size: int) -> None:
        check_int("batch_size", batch_size, 1)
        self.jobs, self.batch_size = jobs, batch_size
        self.manifest, self._begun = share(lambda: Manifest(directory)), time.time()
        places: dict[str, int] = {}
        for job in jobs:
            places.setdefault(_model(job), len(places))
        self.left = sorted(jobs, key=lambda job: places[_model(job)])
        self.others: list[BatchJob] = []  # that other processes work on

    def take(self, *, wait: bool = False, rank: Callable[[str], int] | None = None) -> Group | None:
        """Return the next jobs, or None if none are left.

        wait: for jobs of other processes. rank: of a model; jobs of the model with the lowest one are taken first.
        """
        while self.left:
            stop_if_asked()
            index = 0 if rank is None else min(range(len(self.left)), key=lambda i: rank(_model(self.left[i])))
            first = self.left.pop(index)
            with ExitStack() as claims:
                claimed = share(functools.partial(self._claim, first, wait, claims))
                if claimed is None:
                    self.others.append(first)
                if not claimed:
                    continue
                together = [first]
                for job in [each for each in self.left if _go_together(first, each)]:
                    if len(together) == self.batch_size:
                        break
                    if share(functools.partial(self._claim, job, False, claims)):
                        together.append(job)
                        self.left.remove(job)
                return Group(together, claims.pop_all())
        return None

    def models(self) -> set[str]:
        """Return the models of the jobs that are left, by what `Group.model` is."""
        return {_model(job) for job in self.left}

    def leave_out_finished(self) -> None:
        """Leave out what was finished before; `take` does so too, one by one."""
        self.left = [job for job in self.left if not self.manifest.is_done(job)]

    def ask_again(self) -> None:
        """Put the jobs that other processes had back among those that are left."""
        self.left, self.others = self.left + self.others, []

    def _claim(self, job: BatchJob, wait: bool, claims: ExitStack) -> bool | None:
        """Claim a job. False: there is nothing to do. None: another process works on it."""
        if self.manifest.is_done(job):
            return False
        file: IO[str] | None = self.manifest.claim(job, wait=wait)
        if file is None:
            return None
        # Asked again: another process may have finished it before it was claimed here.
        if self.manifest.is_done(job) or self.manifest.failed_since(job, self._begun):
            file.close()
            return False
        claims.enter_context(file)
        return True

    def path(self, job: BatchJob) -> Path:
        """Return where the video of a job goes."""
        return self.manifest.directory / job.name

    def add(self, entries: Sequence[dict[str, Any]]) -> None:
        """Write down what became of jobs, and say it on stderr."""
        share(lambda: self.manifest.add(entries))
        for entry in entries:
            said = f"failed: {entry['error']}" if entry["error"] else f"{entry['output']}, {entry['seconds']} s"
            tqdm.write(f"cogvid: job {entry['place']} of {len(self.jobs)}: {said}", file=sys.stderr)

    def failed(self) -> list[dict[str, Any]]:
        """Return what the manifest has of the jobs that failed since this queue was made."""

        def failed() -> list[dict[str, Any]]:
            entries = self.manifest.entries()
            return [entries[job.place] for job in self.jobs if self.manifest.failed_since(job, self._begun)]

        return share(failed)


class Worker:
    """Runs jobs, and keeps the model of the last ones."""

    def __init__(self) -> None:
        self._loaded: tuple[dict[str, Any], Pipeline] | None = None

    def run(self, together: Sequence[BatchJob], prepare: Prepare) -> list[dict[str, Any]]:
        """Run jobs of one model at once; return what the manifest is to have of each.

        prepare: checks a job and says where its video goes. What it raises is that job's failure alone.
        """
        stages: list[Stage] = []
        failed: dict[int, Exception] = {}
        ready: list[tuple[BatchJob, Job]] = []
        begun = time.perf_counter()
        with listen(stages.append):
            try:
                pipe = self._load(_loading(together[0]))
                for job in together:
                    try:
                        ready.append((job, share(functools.partial(prepare, pipe, job))))
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
        return [entry_of(job, failed.get(job.place), measured) for job in together]

    def _load(self, loading: dict[str, Any]) -> Pipeline:
        if self._loaded is None or self._loaded[0] != loading:
            self._loaded = None  # so that two models are never in memory
            with stage("load"), all_or_none():
                pipe = load(loading["model"], **{name: value for name, value in loading.items() if name != "model"})
            pipe.text_encoder = RememberingEncoder(pipe.text_encoder)
            self._loaded = loading, pipe
        return self._loaded[1]


def _model(job: BatchJob) -> str:
    return repr(_loading(job))


def _loading(job: BatchJob) -> dict[str, Any]:
    if "model" in job.loading:
        return job.loading
    task = task_of(**{name: job.values.get(name) for name in (*IMAGES, *VIDEOS)})
    return {"model": default_model(task), **job.loading}


def _go_together(first: BatchJob, other: BatchJob) -> bool:
    # A step cache may decide for a whole batch what is skipped.
    alone = ("last_image", "step_cache", *VIDEOS)
    return first.shape == other.shape and not any(first.values.get(name) for name in alone)


def prepare_job(pipe: Pipeline, job: BatchJob, output: str | os.PathLike[str], **inputs: str) -> Job:
    """Check a job that is run with a loaded model. output: the MP4 to write. inputs: its files, where they are now."""
    values = {name: value for name, value in job.values.items() if name not in LOADING}
    return prepare(pipe.model, output=output, **{**values, "seed": job.seed, **inputs})


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


def entry_of(job: BatchJob, error: Exception | None, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the manifest is to have of a job. error: why it failed. measured: seconds, memory and such."""
    return {
        "place": job.place,
        "output": job.name,
        "status": "failed" if error else "done",
        "seed": job.seed,
        **measured,
        "error": error_line(error) if error else None,
        "ended": time.time(),
        "job": job.shown,
        "job_sha256": job.digest,
    }


def error_line(error: Exception) -> str:
    """An error in one line; of a kind that a user's mistake never has, with its name."""
    text = one_line(error, _LONGEST_LINE) if str(error) else ""
    return text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"
