"""Give the jobs of a batch to workers of a pool as they become free. Jobs of a worker that dies are run by another."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tqdm.auto import tqdm

from cogvid.media.whole_file import write_bytes
from cogvid.run.batch import Group, Queue, entry_of, error_line
from cogvid.run.jobs import BatchJob
from cogvid.run.signals import stop_if_asked
from cogvid.run.stages import Stage, announce

MOST_RUNS = 3  # of a job whose workers die
MOST_WORKERS = 256
_PATIENCE = 30.0  # seconds without a first worker, after which a line says so
_POLL = 1.0  # seconds; how often jobs of other processes are looked at


@dataclass(frozen=True)
class Made:
    """What a worker made of jobs. entries: of the manifest. videos: the MP4s of those that are done, by their names."""

    entries: Sequence[dict[str, Any]]
    videos: dict[str, bytes]
    stages: Sequence[Stage] = ()
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Event:
    """What happened to a worker. made: of its jobs. died: why it is no more. Neither: it is ready for its first."""

    worker: Any
    made: Made | None = None
    died: str | None = None


class Pool(Protocol):
    """Workers, each of which runs one group of jobs at a time. A worker is any object that can be a key."""

    def hire(self) -> Any:
        """Ask for one more worker, and return it. It may take long until it is ready."""
        ...

    def send(self, worker: Any, jobs: Sequence[BatchJob]) -> None:
        """Let a worker run jobs."""
        ...

    def dismiss(self, worker: Any) -> None:
        """End a worker, whatever it does."""
        ...

    def wait(self, seconds: float) -> Sequence[Event]:
        """Return what happened, after so many seconds at most."""
        ...

    def shortage(self) -> str:
        """Return what workers need and what there is, in a few words."""
        ...


def run_on(pool: Pool, queue: Queue) -> None:
    """Run all jobs of a queue on a pool, and show how many are done."""
    done = len(queue.jobs) - len(queue.left)
    with tqdm(total=len(queue.jobs), initial=done, desc="batch", unit="job") as bar, _Dispatch(pool, queue) as dispatch:
        while dispatch.step():
            bar.update(len(queue.jobs) - dispatch.open - bar.n)
        bar.update(len(queue.jobs) - bar.n)


class _Dispatch:
    """Which worker runs which jobs.

    hired: workers that are not ready. idle: that are. running, again: jobs and how often they were begun before; those
    of `again` wait for another worker. models: what each worker has loaded.
    """

    def __init__(self, pool: Pool, queue: Queue) -> None:
        self.pool, self.queue = pool, queue
        self.hired: list[Any] = []
        self.idle: list[Any] = []
        self.running: dict[Any, tuple[Group, int]] = {}
        self.again: list[tuple[Group, int]] = []
        self.models: dict[Any, str] = {}
        self.begun, self.said, self.not_started = time.monotonic(), False, 0

    def __enter__(self) -> _Dispatch:
        return self

    def __exit__(self, *error: object) -> None:
        for group, _ in [*self.running.values(), *self.again]:  # after an error or a signal: others may take them
            group.close()

    @property
    def open(self) -> int:
        """The number of jobs that are not finished."""
        taken = sum(len(group.jobs) for group, _ in [*self.running.values(), *self.again])
        return len(self.queue.left) + len(self.queue.others) + taken

    def step(self) -> bool:
        """Send jobs, hire and dismiss workers, wait for what happens; False when no job is left."""
        stop_if_asked()
        self._assign()
        self._staff()
        if not self.open:
            return False
        for event in self.pool.wait(_POLL):
            self._handle(event)
        if not self.said and time.monotonic() > self.begun + _PATIENCE:
            self.said = True
            tqdm.write(f"cogvid: no worker after {_PATIENCE:.0f} s: {self.pool.shortage()}; waiting", file=sys.stderr)
        return True

    def _assign(self) -> None:
        """Send jobs to idle workers: first to those that have loaded a model that there are jobs of."""
        wanted = self.queue.models()
        for worker in sorted(self.idle, key=lambda worker: self.models.get(worker) not in wanted):
            group, runs = self.again.pop(0) if self.again else (self._take(worker), 0)
            if group is None:
                return
            self.idle.remove(worker)
            self.running[worker], self.models[worker] = (group, runs), group.model
            self.pool.send(worker, group.jobs)

    def _take(self, worker: Any) -> Group | None:
        """Take jobs of the model that a worker has; if there are none, of one that no worker has; or else any."""
        if not self.queue.left:
            self.queue.ask_again()  # another process may have ended
        mine, loaded = self.models.get(worker), set(self.models.values())
        return self.queue.take(rank=lambda model: 0 if model == mine else 2 if model in loaded else 1)

    def _staff(self) -> None:
        """Have as many workers as jobs wait, so that a cluster that can grow does; and no others."""
        wanted = len(self.queue.left) + len(self.again) + bool(self.queue.others)
        free = [*self.idle, *self.hired]  # those that come last go first
        for worker in free[wanted:]:
            self._dismiss(worker)
        for _ in range(min(wanted - len(free), MOST_WORKERS - len(free) - len(self.running))):
            self.hired.append(self.pool.hire())

    def _dismiss(self, worker: Any) -> None:
        for workers in (self.hired, self.idle):
            if worker in workers:
                workers.remove(worker)
        self.models.pop(worker, None)
        self.pool.dismiss(worker)

    def _handle(self, event: Event) -> None:
        worker = event.worker
        running = self.running.pop(worker, None)
        group, runs = running or (None, 0)
        if event.made is not None and group is not None:
            self._write(group, event.made)
        if event.died is None:
            if worker in self.hired:
                self.hired.remove(worker)
                self.said, self.not_started = True, 0
            self.idle.append(worker)
            return
        if worker in self.hired:
            self.not_started += 1
            if self.not_started == MOST_RUNS:
                raise ValueError(f"ray: got {MOST_RUNS} workers that did not start ({event.died}), want some that do")
        self._dismiss(worker)
        if event.made is None and group is not None:
            self._run_again(group, runs + 1, event.died)

    def _run_again(self, group: Group, runs: int, reason: str) -> None:
        places = ", ".join(str(job.place) for job in group.jobs)
        if runs < MOST_RUNS:
            self.again.append((group, runs))
            tqdm.write(f"cogvid: job {places} runs again, for its worker died: {reason}", file=sys.stderr)
            return
        error = ValueError(f"worker: got {MOST_RUNS} that died at this job, the last one: {reason}, want one that ends")
        measured = {"batch_size": len(group.jobs), "seconds": None, "peak_memory": None, "stages": {}}
        with group:
            self.queue.add([entry_of(job, error, measured) for job in group.jobs])

    def _write(self, group: Group, made: Made) -> None:
        """Write the videos and what became of the jobs, as a batch without workers does."""
        for stage in made.stages:
            announce(stage)
        with tqdm.external_write_mode(file=sys.stderr):  # above the bar
            for text in made.warnings:
                warnings.warn(text, stacklevel=1)
        entries: list[dict[str, Any]] = []
        with group:
            for job, entry in zip(group.jobs, made.entries, strict=True):
                failed: dict[str, Any] = {}
                if entry["status"] == "done":
                    try:
                        write_bytes(self.queue.path(job), made.videos[job.name])
                    except OSError as error:
                        failed = {"status": "failed", "error": error_line(error)}
                entries.append({**entry, **failed, "ended": time.time()})  # by the clock of this machine
            self.queue.add(entries)
