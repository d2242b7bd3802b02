"""Which worker gets which jobs, and what becomes of the jobs of workers that die. The workers are plain objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cogvid.run import pool as pool_module
from cogvid.run.batch import Queue
from cogvid.run.batch import entry_of as entry
from cogvid.run.jobs import BatchJob, make_jobs
from cogvid.run.pool import MOST_RUNS, Event, Made, run_on
from cogvid.run.signals import Interrupted
from cogvid.run.stages import Stage, listen

MEASURED = {"batch_size": 1, "seconds": 1.0, "peak_memory": 2**20, "stages": {"load": 1.0}}


class Fake:
    """A pool whose workers start at once, up to `most`, and answer one at each `wait`, the one that began first.

    dies: called with the places of jobs and how often they were sent before; a reason kills their worker.
    """

    def __init__(self, most: int = 2, dies: Callable[[list[int], int], str | None] = lambda *_: None) -> None:
        self.most, self.dies = most, dies
        self.hired: list[str] = []
        self.ready: list[str] = []
        self.gone: list[str] = []
        self.working: list[tuple[str, list[BatchJob]]] = []
        self.sent: list[tuple[str, list[int]]] = []

    def hire(self) -> str:
        self.hired.append(f"w{len(self.hired)}")
        return self.hired[-1]

    def send(self, worker: str, jobs: Sequence[BatchJob]) -> None:
        assert worker in self.ready
        assert worker not in dict(self.working)
        self.sent.append((worker, [job.place for job in jobs]))
        self.working.append((worker, list(jobs)))

    def dismiss(self, worker: str) -> None:
        assert worker not in self.gone
        self.gone.append(worker)

    def shortage(self) -> str:
        return "there are none"

    def wait(self, seconds: float) -> list[Event]:
        assert 0 < seconds <= 1
        waiting = [w for w in self.hired if w not in self.ready and w not in self.gone]
        alive = sum(w not in self.gone for w in self.ready)
        started = waiting[: self.most - alive]
        self.ready += started
        events = [Event(w) for w in started]
        if not started and self.working:
            worker, jobs = self.working.pop(0)
            places = [job.place for job in jobs]
            reason = self.dies(places, sum(each == places for _, each in self.sent) - 1)
            events.append(Event(worker, died=reason) if reason else Event(worker, self.made(jobs)))
        return events

    def made(self, jobs: list[BatchJob]) -> Made:
        bad = {job.place: ValueError("height: got 1, want 16") for job in jobs if job.values.get("height") == 1}
        entries = [entry(job, bad.get(job.place), MEASURED) for job in jobs]
        return Made(entries, {job.name: job.name.encode() for job in jobs if job.place not in bad})


def jobs_of(*models: str, **values: Any) -> list[BatchJob]:
    return make_jobs([{"prompt": "a", "seed": i, "model": m, **values} for i, m in enumerate(models)], [], {})


def run(pool: Fake, jobs: list[BatchJob], directory: Path, batch_size: int = 1) -> list[dict[str, Any]]:
    queue = Queue(jobs, directory, batch_size)
    queue.leave_out_finished()
    run_on(pool, queue)
    assert not pool.working
    return [json.loads(line) for line in (directory / "manifest.jsonl").read_text().splitlines()]


def test_jobs_are_pulled_by_whoever_is_free(tmp_path: Path) -> None:
    """The worker that is busy with a long job gets no other one, and all the others go to the free one."""

    class Slow(Fake):
        def wait(self, seconds: float) -> list[Event]:
            self.working.sort(key=lambda each: each[1][0].place == 0)  # job 0 answers last
            return super().wait(seconds)

    pool = Slow()
    entries = run(pool, jobs_of("a", "a", "a", "a", "a"), tmp_path)
    assert [entry["status"] for entry in entries] == ["done"] * 5
    assert [entry["place"] for entry in entries] == list(range(5))
    assert pool.sent == [("w0", [0]), ("w1", [1]), ("w1", [2]), ("w1", [3]), ("w1", [4])]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.mp4")} == {
        e["output"]: e["output"].encode() for e in entries
    }


def test_there_are_as_many_workers_as_jobs_and_none_stays(tmp_path: Path) -> None:
    pool = Fake(most=3)
    run(pool, jobs_of(*"aaaaa"), tmp_path)
    assert len(pool.hired) == 5
    assert set(pool.gone) >= {"w3", "w4"}  # never ready, and not waited for when their jobs were done by others
    again = Fake()
    run(again, jobs_of(*"aaaaa"), tmp_path)
    assert again.hired == []  # all were done


def test_a_worker_keeps_its_model_while_there_are_jobs_of_it(tmp_path: Path) -> None:
    pool = Fake()
    run(pool, jobs_of(*"abababc"), tmp_path)
    of = {worker: [place for w, [place] in pool.sent if w == worker] for worker in ("w0", "w1")}
    assert of == {"w0": [0, 2, 4, 6], "w1": [1, 3, 5]}


def test_a_worker_takes_another_model_before_it_is_idle(tmp_path: Path) -> None:
    pool = Fake()
    run(pool, jobs_of(*"abaaaa"), tmp_path)
    assert [place for w, [place] in pool.sent if w == "w1"] == [1, 3, 5]


def test_a_job_whose_worker_dies_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = Fake(dies=lambda places, before: "its node died" if places == [1] and before < MOST_RUNS - 1 else None)
    entries = run(pool, jobs_of(*"aaa"), tmp_path)
    assert [entry["status"] for entry in entries] == ["done"] * 3
    workers = [worker for worker, places in pool.sent if places == [1]]
    assert len(set(workers)) == MOST_RUNS
    assert set(workers[:-1]) <= set(pool.gone)
    assert capsys.readouterr().err.count("cogvid: job 1 runs again, for its worker died: its node died") == 2


def test_a_job_that_kills_three_workers_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = Fake(dies=lambda places, _: "killed" if 1 in places else None)
    entries = run(pool, jobs_of(*"aaaa"), tmp_path)
    assert [entry["status"] for entry in entries] == ["done", "failed", "done", "done"]
    said = "worker: got 3 that died at this job, the last one: killed, want one that ends"
    assert entries[1]["error"] == said
    assert f"cogvid: job 1 of 4: failed: {said}" in capsys.readouterr().err
    assert sum(places == [1] for _, places in pool.sent) == MOST_RUNS
    # The next run tries it again.
    assert [entry["status"] for entry in run(Fake(), jobs_of(*"aaaa"), tmp_path)] == ["done"] * 4


def test_a_job_that_raises_fails_at_once(tmp_path: Path) -> None:
    pool = Fake()
    entries = run(pool, jobs_of("a", height=1), tmp_path)
    assert [entry["status"] for entry in entries] == ["failed"]
    assert len(pool.sent) == 1


def test_jobs_that_go_together_are_sent_together(tmp_path: Path) -> None:
    pool = Fake(dies=lambda places, before: "killed" if places == [0, 1] and not before else None)
    entries = run(pool, jobs_of(*"aaaab"), tmp_path, batch_size=2)
    assert [entry["status"] for entry in entries] == ["done"] * 5
    assert sorted(places for _, places in pool.sent) == [[0, 1], [0, 1], [2, 3], [4]]


def test_a_video_that_cannot_be_written_is_a_job_that_failed(tmp_path: Path) -> None:
    jobs = jobs_of(*"ab")
    (tmp_path / jobs[0].name / "in the way").mkdir(parents=True)
    entries = run(Fake(), jobs, tmp_path)
    assert [entry["status"] for entry in entries] == ["failed", "done"]
    assert "Is a directory" in entries[0]["error"]


def test_workers_that_never_start_end_the_batch(tmp_path: Path) -> None:
    class Broken(Fake):
        def wait(self, _: float) -> list[Event]:
            return [Event(w, died="no module cogvid") for w in self.hired if w not in self.gone]

    with pytest.raises(
        ValueError, match=r"ray: got 3 workers that did not start \(no module cogvid\), want some that do"
    ):
        run(Broken(), jobs_of(*"aaaa"), tmp_path)
    assert [entry["status"] for entry in run(Fake(), jobs_of(*"aaaa"), tmp_path)] == ["done"] * 4  # nothing is locked


def test_jobs_of_other_processes_are_left_to_them_until_they_end(tmp_path: Path) -> None:
    jobs = jobs_of(*"aa")
    group = Queue(jobs, tmp_path, 1).take()
    assert group is not None

    class Patient(Fake):
        waited = 0

        def wait(self, seconds: float) -> list[Event]:
            self.waited += 1
            if self.waited == 6:
                assert [places for _, places in self.sent] == [[1]]
                group.close()  # as when the other process is killed
            return super().wait(seconds)

    entries = run(pool := Patient(), jobs, tmp_path)
    assert [places for _, places in pool.sent] == [[1], [0]]
    assert [entry["status"] for entry in entries] == ["done"] * 2


def test_after_a_signal_finished_jobs_stay_and_the_others_are_free(tmp_path: Path) -> None:
    class Stopped(Fake):
        def wait(self, seconds: float) -> list[Event]:
            if len(self.sent) == 3:
                raise Interrupted(2)
            return super().wait(seconds)

    with pytest.raises(Interrupted):
        run(Stopped(), jobs_of(*"aaaa"), tmp_path)
    assert [path.name for path in tmp_path.glob("*.mp4")] == ["0000-seed0.mp4"]
    pool = Fake()
    run(pool, jobs_of(*"aaaa"), tmp_path)
    assert [places for _, places in pool.sent] == [[1], [2], [3]]


def test_stages_and_warnings_of_workers_are_told_here(tmp_path: Path) -> None:
    class Telling(Fake):
        def made(self, jobs: list[BatchJob]) -> Made:
            made = super().made(jobs)
            return Made(made.entries, made.videos, [Stage("denoise", 1.0, 2, 3)], ["bfloat16 is slow"])

    heard: list[Stage] = []
    with listen(heard.append), pytest.warns(UserWarning, match="bfloat16 is slow"):
        run(Telling(), jobs_of("a"), tmp_path)
    assert [stage.name for stage in heard] == ["denoise"]


def test_a_line_says_what_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pool_module, "_PATIENCE", 0.0)

    class Late(Fake):
        waited = 0

        def wait(self, seconds: float) -> list[Event]:
            self.waited += 1
            return super().wait(seconds) if self.waited > 3 else []

    run(Late(), jobs_of("a"), tmp_path)
    assert capsys.readouterr().err.count("cogvid: no worker after 0 s: there are none; waiting") == 1
