"""The runs of a page: who asked for what, one queue, one worker, one loaded model. It knows nothing of browsers."""

from __future__ import annotations

import collections
import dataclasses
import gc
import os
import secrets
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cogvid.media.image import load_image
from cogvid.run.enhance import enhance_job
from cogvid.run.errors import is_out_of_memory, judged, line_of
from cogvid.run.generate import Job, default_model, prepare, run
from cogvid.run.load import load_checkpoint
from cogvid.run.machine import look_at
from cogvid.run.pipeline import Pipeline
from cogvid.run.plan import Plan, Subject, make_plan, mode_of, out_of_memory, refuse_hopeless, survey
from cogvid.run.record import read_record
from cogvid.run.replay import replay
from cogvid.run.settings import task_of
from cogvid.run.signals import Cancelled, Interrupted, stop_when
from cogvid.run.stages import Stage, listen
from cogvid.ui.preview import Previewer
from cogvid.weights.checkpoint import Checkpoint, read_checkpoint
from cogvid.weights.hub import packs
from cogvid.weights.lora_file import check_loras
from cogvid.weights.placement import Placement, resolve_placement

WAITING = 8  # the most runs that wait
_KEPT = 24  # finished runs that are remembered, with their pictures
ACTIVE = ("waiting", "loading", "enhancing", "encoding", "denoising", "decoding")


@dataclass(frozen=True)
class Ask:
    """What a visitor asks for. Arguments have the names of the command line.

    model: a name of `Engine.models`; "" is the shipped pack for the task. image: the file of a picture. options: fields
    of `Settings`. enhance: run with the long form of the prompt. replay: the name of a video of the directory, which is
    made again; the rest then does not count.
    """

    prompt: str = ""
    negative_prompt: str = ""
    model: str = ""
    image: bytes | None = None
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    enhance: bool = False
    replay: str | None = None

    @property
    def task(self) -> str:
        return task_of(image=self.image)


@dataclass
class Run:
    """What became of an ask. Times are in seconds of `time.monotonic`.

    state: one of `ACTIVE`, "done", "failed" or "cancelled". ahead: runs before it in the queue. step, steps: that are
    done, and of all. preview: a JPEG. name: of the video's file, once it is there. record: of the video. notes: lines
    to show with it; of a failed run the line that says why.
    """

    id: str
    visitor: str
    ask: Ask
    state: str = "waiting"
    ahead: int = 0
    step: int = 0
    steps: int = 0
    denoising_since: float | None = None
    step_ended: float | None = None
    preview: bytes | None = None
    name: str | None = None
    record: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    @property
    def seconds_left(self) -> float | None:
        """The time that the remaining steps will take, by those that are done; None before there is one."""
        if not self.step or self.denoising_since is None or self.step_ended is None:
            return None
        return (self.step_ended - self.denoising_since) / self.step * (self.steps - self.step)


class Engine:
    """Do runs one after the other, in a thread of its own.

    Args:
        directory: where the videos go; it is made if it is not there.
        sources: models that visitors may choose beside the shipped packs: directories and hub ids. What is not here of
            a hub id's configs is fetched now.
        origin: `defaults`, `revision`, `variant` and `local_files_only` of `load`, of all models. load: the fields of
            `LoadOptions`.
        url, llm: of `enhance_job`; without a URL no prompt is enhanced.

    Raises:
        ValueError, OSError: a directory or a source that cannot be used.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        sources: Sequence[str] = (),
        *,
        origin: Mapping[str, Any] | None = None,
        load: Mapping[str, Any] | None = None,
        url: str | None = None,
        llm: str | None = None,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.url, self.llm = url, llm
        self._origin, self._load_options = dict(origin or {}), dict(load or {})
        self._place = resolve_placement(**self._load_options)
        self.models = _named([*sources, *packs()])
        for source in sources:
            self.subject(source, fetch=True)
        self._runs: dict[str, Run] = {}
        self._queue: collections.deque[Run] = collections.deque()
        self._changed = threading.Condition()
        # Warnings are caught where runs are checked, and their filters are of the whole process.
        self._checks = threading.Lock()
        self._loaded: tuple[Any, Pipeline] | None = None
        self._closing = False
        self._worker = threading.Thread(target=self._work, name="cogvid-runs", daemon=True)
        self._worker.start()

    def close(self, timeout: float = 30.0) -> None:
        """Stop what runs, and end the worker."""
        with self._changed:
            self._closing = True
            for each in self._runs.values():
                each.stop.set()
            self._changed.notify_all()
        self._worker.join(timeout)

    # -- what visitors ask for -----------------------------------------------------------------------------------------

    def submit(self, ask: Ask, visitor: str) -> Run:
        """Check an ask and put it into the queue.

        Raises:
            ValueError, OSError, MemoryError: as the command line; a queue that is full; a visitor whose run is active.
        """
        self._check_queue(visitor)
        if ask.replay is None:
            source = self.source(ask)
            if ask.enhance and self.url is None:
                raise ValueError("enhance: got it without a server, want the page started with --enhance URL")
            if ask.seed is None:
                ask = dataclasses.replace(ask, seed=secrets.randbelow(2**32))
            with self._checks:
                subject = self.subject(source)
                job = self._prepare(ask, subject.model, self._new_path(ask))
                refuse_hopeless(self._plan(ask, subject, self._placement(subject)))
                del job
        else:
            self._replayed(ask.replay)
        made = Run(secrets.token_urlsafe(16), visitor, ask)
        with self._changed:
            self._check_queue(visitor)
            finished = [key for key, each in self._runs.items() if not each.active]
            for key in finished[: max(len(finished) - _KEPT, 0)]:
                del self._runs[key]
            self._runs[made.id] = made
            self._queue.append(made)
            self._count()
            self._changed.notify_all()
        return made

    def _check_queue(self, visitor: str) -> None:
        found = self.latest(visitor)
        if found is not None and found.active:
            raise ValueError("run: got a second one while yours is not finished, want it finished or cancelled first")
        if len(self._queue) >= WAITING:
            raise ValueError(
                f"queue: got {len(self._queue)} runs that wait, want fewer than {WAITING}; try again later"
            )

    def cancel(self, visitor: str) -> None:
        """Stop a visitor's run: at once if it waits, else at the end of the step that it is in."""
        with self._changed:
            found = self.latest(visitor)
            if found is None or not found.active:
                return
            found.stop.set()
            if found in self._queue:
                self._queue.remove(found)
                found.state = "cancelled"
                self._count()

    def latest(self, visitor: str) -> Run | None:
        """Return the visitor's last run; None if there was none."""
        return next((each for each in reversed(list(self._runs.values())) if each.visitor == visitor), None)

    def plan(self, ask: Ask) -> Plan:
        """Return what a run would do and cost; its image counts as one, and is not read.

        Raises:
            ValueError: as for `submit`.
        """
        source = self.source(ask)
        with self._checks:
            subject = self.subject(source)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                placement = self._placement(subject)
            return self._plan(ask, subject, placement, notes=tuple(str(each.message) for each in caught))

    def source(self, ask: Ask) -> str:
        """Return what is loaded for an ask: one of `models`, or the pack for its task."""
        if not ask.model:
            return default_model(ask.task)
        if ask.model not in self.models:
            raise ValueError(f"model: got {ask.model!r:.60}, want one of {', '.join(self.models)}")
        return self.models[ask.model]

    def subject(self, source: str, fetch: bool = False) -> Subject:
        """Return what is known of a model before its weights are loaded."""
        return survey(source, fetch=fetch, **self._origin)

    # -- the worker ----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if self._closing:
                    return
                current = self._queue.popleft()
                current.state = "loading"
                self._count()
            ended = "done"
            try:
                with stop_when(current.stop):
                    self._do(current)
            except (Cancelled, Interrupted):
                ended = "cancelled"
            except BaseException as error:  # of whatever kind: the next run goes on
                said, _ = judged(error)
                if isinstance(said, str) and said.startswith("unexpected"):
                    traceback.print_exc()
                ended, current.notes = "failed", [line_of(said)]
                if is_out_of_memory(error):
                    self._free()
            current.state = ended

    def _count(self) -> None:
        for place, each in enumerate(self._queue):
            each.ahead = place + (1 if any(run.active and run.state != "waiting" for run in self._runs.values()) else 0)

    def _do(self, current: Run) -> None:
        ask = current.ask
        if ask.replay is not None:
            self._replay(current, ask.replay)
            return
        source, path = self.source(ask), self._new_path(ask)
        subject = self.subject(source, fetch=True)
        checkpoint = subject.checkpoint
        if checkpoint is None or checkpoint.source_kind == "hub":
            checkpoint = read_checkpoint(source, **self._origin)  # which may download it
        with self._checks:
            placement = self._placement(subject)
            job = self._prepare(ask, checkpoint.model, path)
            planned = self._plan(ask, subject, placement)
        current.steps = planned.steps
        if ask.enhance:
            current.state = "enhancing"
            job = enhance_job(job, self.url, self.llm)
        try:
            current.state = "loading"
            pipe = self._load(source, checkpoint, placement)
            current.state = "encoding"
            with listen(_before_steps(current)):
                out = run(pipe, job, on_step=self._watch(current))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(planned, subject, placement, error) from error
        current.record, current.name = out.provenance, path.name

    def _replay(self, current: Run, name: str) -> None:
        path, model = self._replayed(name)
        self._free()  # a replay loads the model of the record
        target = self._unused(f"{path.stem.removesuffix('-replay')}-replay")
        notes: list[str] = []
        current.steps = len(read_record(path)["timesteps"])
        shown = {"say": notes.append, "on_step": self._watch(current)}
        with listen(_before_steps(current)):
            local = bool(self._origin.get("local_files_only"))
            current.record = replay(path, target, model=model, local_files_only=local, **shown)
        # Paths of this machine are of no use to a visitor.
        current.notes = [line.replace(f"{self.directory}{os.sep}", "") for line in notes]
        current.name = target.name

    def _replayed(self, name: str) -> tuple[Path, str | None]:
        """Return the path of a video to replay, and what to load for it, which must be a model of the page."""
        path = self.video(name)
        record = read_record(path)
        source = str(record.get("source"))
        if source in packs():
            return path, None
        for label, of in self.models.items():
            if source in (label, of, os.path.basename(os.path.normpath(of))):
                return path, of
        raise ValueError(f"model: got a run of {source!r:.60}, want one of {', '.join(self.models)}")

    def _load(self, source: str, checkpoint: Checkpoint, placement: Placement) -> Pipeline:
        """Return the pipeline of a model; another one is freed first."""
        key = (source, checkpoint.model, checkpoint.weights)
        if self._loaded is None or self._loaded[0] != key:
            self._free()
            local = bool(self._origin.get("local_files_only"))
            self._loaded = key, load_checkpoint(checkpoint, placement, local)
        return self._loaded[1]

    def _free(self) -> None:
        self._loaded = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _watch(self, current: Run) -> Any:
        """Return what a pipeline calls after each step."""
        previewers: list[Previewer] = []

        def on_step(pipe: Pipeline, index: int, _timestep: int, tensors: Mapping[str, torch.Tensor]) -> None:
            now = time.monotonic()
            if not previewers:
                previewers.append(Previewer(pipe))
            current.step, current.step_ended = index + 1, now
            current.state = "denoising" if current.step < current.steps else "decoding"
            if "x0" in tensors and current.state == "denoising":
                current.preview = previewers[0].look(tensors["x0"]) or current.preview

        return on_step

    # -- what both need ------------------------------------------------------------------------------------------------

    def video(self, name: str) -> Path:
        """Return the path of a video of the directory by its name.

        Raises:
            ValueError: there is none of this name.
        """
        path = self.directory / name
        if Path(name).name != name or path.suffix != ".mp4" or name.startswith(".") or not path.is_file():
            raise ValueError(f"video: got {name!r:.60}, want the name of one in the directory of the page")
        return path

    def _prepare(self, ask: Ask, model: Any, path: Path) -> Job:
        image = None if ask.image is None else load_image(ask.image)
        negative = ask.negative_prompt
        return prepare(model, ask.prompt, path, image=image, negative_prompt=negative, seed=ask.seed, **ask.options)

    def _placement(self, subject: Subject) -> Placement:
        return self._place(subject.model.dtype, subject.model.follows)

    def _plan(self, ask: Ask, subject: Subject, placement: Placement, notes: tuple[str, ...] = ()) -> Plan:
        check_loras(placement.lora, subject.model.transformer)
        given = {"dtype": placement.dtype, "ops": placement.ops_name, "mode": mode_of(placement), "notes": notes}
        return make_plan(subject, task=ask.task, machine=look_at(placement.device), **given, **ask.options)

    def _new_path(self, ask: Ask) -> Path:
        return self._unused(f"{time.strftime('%Y%m%d-%H%M%S')}-seed{ask.seed}")

    def _unused(self, stem: str) -> Path:
        names = (f"{stem}{'' if count == 1 else f'-{count}'}.mp4" for count in range(1, 10**6))
        return self.directory / next(name for name in names if not (self.directory / name).exists())


def _before_steps(current: Run) -> Callable[[Stage], None]:
    """Return what notes when the stage before the first step ended."""

    def listener(_ended: Stage) -> None:
        if not current.step:
            current.denoising_since = time.monotonic()

    return listener


def _named(sources: Sequence[str]) -> dict[str, str]:
    """Return the models by the names that visitors see: of a directory its last name alone."""
    models: dict[str, str] = {}
    for source in sources:
        name = os.path.basename(os.path.abspath(source)) if os.path.isdir(source) and source not in packs() else source
        if models.get(name, source) != source:
            raise ValueError(f"model: got two that are called {name}, want models of different names")
        models[name] = source
    return models
