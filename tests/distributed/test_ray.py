"""A batch on a Ray cluster of two nodes: what is made, what is left out, and what dies in between."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cogvid.cli import main
from cogvid.media.video import export_to_video
from cogvid.run import ray_batch
from cogvid.run.compare import compare
from cogvid.run.jobs import BatchJob
from cogvid.run.record import read_record
from references import picture

ROOT = Path(__file__).parents[2]
STEPS = ["--num-inference-steps", "20", "--num-frames", "9", "--dtype", "float32", "--model", "tiny-t2v"]
LIMIT = 300  # seconds that a command may take; Ray starts slowly on a busy machine
JOBS: list[dict[str, Any]] = [
    {"prompt": "the red circle moves right", "seed": 1},
    {"prompt": "the blue square moves left", "seed": 2, "height": 100},
    {"prompt": "the blue square moves left", "seed": 3},
    {"prompt": "the red circle moves right", "image": "in.png", "model": "tiny-i2v", "seed": 4},
    {"prompt": "the red circle moves right", "video": "in.mp4", "seed": 5},
    {"prompt": "the red circle moves right", "image": "missing.png", "model": "tiny-i2v", "seed": 6},
    {"prompt": "the blue square moves up", "seed": 7},
]
FAILED = {1: "height: got 100, want a multiple of 16", 5: "image: got 'missing.png', which cannot be read"}
MEASURED = ("seconds", "peak_memory", "stages", "ended")

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with jobs and their inputs."""
    folder = tmp_path_factory.mktemp("ray")
    picture(64, 64, seed=0).save(folder / "in.png")
    frames = torch.randint(0, 256, (9, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    export_to_video(frames, folder / "in.mp4", fps=8)
    (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in JOBS))
    return folder


def environment() -> dict[str, str]:
    """One thread, as each actor has; and the code beside this file."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "kernels"))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def start(folder: Path, *arguments: object, change: str | None = None) -> subprocess.Popen[str]:
    program = ["-m", "cogvid"] if change is None else [str(ROOT / "tests" / "distributed" / "ray_members.py"), change]
    command = [sys.executable, *program, "batch", *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment(), text=True, **pipes)


def run(folder: Path, *arguments: object, change: str | None = None) -> tuple[int, list[str]]:
    """Run a command; return its status and the lines of cogvid on stderr."""
    return finish(start(folder, *arguments, change=change))


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    try:
        _, said = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    lines = [line.strip() for line in re.split(r"[\r\n]", said)]
    lines = [line for line in lines if line and not re.match(r"(batch|denoise|decode):? ", line)]
    assert all(line.startswith("cogvid: ") for line in lines), lines  # Ray says nothing
    return process.returncode, lines


def manifest(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "manifest.jsonl").read_text().splitlines()]


def videos(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.mp4")}


@pytest.fixture(scope="module")
def serial(folder: Path) -> Path:
    """The directory of a batch without Ray."""
    process = start(folder, "jobs.jsonl", "-o", "serial", *STEPS)
    process.communicate(timeout=LIMIT)
    assert process.returncode == 3
    return folder / "serial"


def check_same(made: Path, serial: Path) -> None:
    """The same videos, to the byte, and the same manifest but for what is measured."""
    assert videos(made) == videos(serial)
    assert [set(entry) for entry in manifest(made)] == [set(entry) for entry in manifest(serial)]
    first, second = (
        [{name: value for name, value in entry.items() if name not in MEASURED} for entry in manifest(directory)]
        for directory in (made, serial)
    )
    assert first == second


class TwoNodes:
    """A cluster of a head and another node, each with one CPU."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._size = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        self._cluster = Cluster(initialize_head=True, head_node_args=self._size)
        self.address = self._cluster.address
        self.second = self._cluster.add_node(**self._size)

    def actors(self, node: Any = None) -> list[int]:
        """The processes of actors that run a job just now, on this node or all."""
        import psutil

        nodes = [node] if node else [self._cluster.head_node, *self._cluster.worker_nodes]
        raylets = {each.all_processes["raylet"][0].process.pid for each in nodes}
        found = psutil.process_iter(["ppid", "cmdline"])
        titles = [(each.pid, each.info["ppid"], " ".join(each.info["cmdline"] or [])) for each in found]
        return [pid for pid, parent, title in titles if parent in raylets and re.match(r"ray::\w+\.run", title)]

    def wait_for_actors(self, node: Any = None, count: int = 1) -> list[int]:
        return until(lambda: found if len(found := self.actors(node)) >= count else None)

    def kill_second(self) -> None:
        self._cluster.remove_node(self.second, allow_graceful=False)

    def mend(self) -> None:
        if self.second not in self._cluster.worker_nodes:
            self.second = self._cluster.add_node(**self._size)

    def close(self) -> None:
        self._cluster.shutdown()


def until(found: Callable[[], Any]) -> Any:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.05)
    raise TimeoutError


@pytest.fixture(scope="module")
def cluster_of_module() -> Iterator[TwoNodes]:
    pytest.importorskip("ray", reason="needs the extra ray")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        cluster = TwoNodes()
        try:
            yield cluster
        finally:
            cluster.close()


@pytest.fixture
def cluster(cluster_of_module: TwoNodes) -> TwoNodes:
    cluster_of_module.mend()
    return cluster_of_module


@slow
def test_it_is_the_serial_batch(cluster: TwoNodes, folder: Path, serial: Path) -> None:
    arguments = ["jobs.jsonl", "-o", "whole", *STEPS, "--ray", cluster.address]
    status, said = run(folder, *arguments)
    assert status == 3
    check_same(folder / "whole", serial)
    entries = manifest(folder / "whole")
    assert {e["place"]: e["error"] for e in entries if e["error"]}.keys() == FAILED.keys()
    for place, words in FAILED.items():
        assert entries[place]["error"].startswith(words)
        assert f"cogvid: job {place} of {len(JOBS)}: failed: {entries[place]['error']}" in said
    done = [entry for entry in entries if entry["status"] == "done"]
    assert all(entry["seconds"] > 0 and entry["peak_memory"] > 50 * 2**20 for entry in done)
    assert all(f"cogvid: job {e['place']} of {len(JOBS)}: {e['output']}, {e['seconds']} s" in said for e in done)

    # Again: what is finished is left out, and what failed is tried again.
    before = {name: (folder / "whole" / name).stat().st_mtime_ns for name in videos(folder / "whole")}
    status, said = run(folder, *arguments)
    assert status == 3
    assert sorted(line.split()[2] for line in said if line.startswith("cogvid: job ")) == ["1", "5"]
    assert before == {name: (folder / "whole" / name).stat().st_mtime_ns for name in before}
    assert videos(folder / "whole").keys() == before.keys()


@slow
def test_jobs_are_sampled_together(cluster: TwoNodes, folder: Path) -> None:
    options = ["--prompt", "the red circle moves right", "--sweep", "seed=1..3", *STEPS, "--batch-size", "2"]
    assert run(folder, "-o", "two", *options)[0] == 0
    assert run(folder, "-o", "two-ray", *options, "--ray", cluster.address)[0] == 0
    assert [entry["batch_size"] for entry in manifest(folder / "two-ray")] == [2, 2, 1]
    check_same(folder / "two-ray", folder / "two")


@slow
def test_a_node_is_killed(cluster: TwoNodes, folder: Path, serial: Path) -> None:
    """While both nodes run a job; the one of the killed node runs again, and nothing is lost."""
    process = start(folder, "jobs.jsonl", "-o", "killed", *STEPS, "--ray", cluster.address)
    cluster.wait_for_actors(cluster.second)
    cluster.kill_second()
    status, said = finish(process)
    assert status == 3
    again = [line for line in said if " runs again, for its worker died: " in line]
    assert len(again) == 1
    assert not cluster.actors()
    check_same(folder / "killed", serial)


@slow
def test_an_actor_is_killed(cluster: TwoNodes, folder: Path) -> None:
    process = start(folder, "--prompt", "a", "--seed", "1", "-o", "one", *STEPS, "--ray", cluster.address)
    [pid] = cluster.wait_for_actors()
    os.kill(pid, signal.SIGKILL)
    status, said = finish(process)
    assert status == 0
    assert [line for line in said if line.startswith("cogvid: job 0 runs again, for its worker died: ")]
    assert [entry["status"] for entry in manifest(folder / "one")] == ["done"]


@slow
def test_a_job_that_kills_its_actors_has_failed(cluster: TwoNodes, folder: Path) -> None:
    (folder / "die.txt").write_text("the red circle moves right\ndie\nthe blue square moves left\n")
    arguments = ["--prompt-file", "die.txt", "-o", "die", *STEPS, "--ray", cluster.address]
    status, said = run(folder, *arguments, change="dying")
    assert status == 3
    entries = manifest(folder / "die")
    assert [entry["status"] for entry in entries] == ["done", "failed", "done"]
    assert entries[1]["error"].startswith("worker: got 3 that died")
    assert sum("cogvid: job 1 runs again" in line for line in said) == 2


@slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(cluster: TwoNodes, folder: Path, serial: Path, number: signal.Signals) -> None:
    """Finished jobs stay, nothing is half-written, no actor runs on; a second run does the rest."""
    directory = folder / f"signal{number}"
    arguments = ["jobs.jsonl", "-o", directory, *STEPS, "--ray", cluster.address]
    process = start(folder, *arguments)
    until(lambda: directory.exists() and videos(directory))
    cluster.wait_for_actors()
    process.send_signal(number)
    begun = time.monotonic()
    status, said = finish(process)
    assert status == 128 + number
    assert said[-1].startswith("cogvid: error: interrupted")
    assert time.monotonic() - begun < 60
    until(lambda: not cluster.actors())
    finished = videos(directory)
    assert 0 < len(finished) < len(videos(serial))
    assert finished.items() <= videos(serial).items()
    assert sorted(path.name for path in directory.iterdir() if not path.name.endswith(".mp4")) == [
        ".claims", "manifest.csv", "manifest.jsonl",
    ]  # fmt: skip
    status, said = run(folder, *arguments)
    assert status == 3
    check_same(directory, serial)
    assert not [line for line in said for name in finished if name in line]


@slow
def test_a_group_of_actors(cluster: TwoNodes, folder: Path) -> None:
    """They have the environment of torchrun, and find each other."""
    options = ["--prompt", "a", "--seed", "1", *STEPS]
    assert run(folder, "-o", "alone", *options)[0] == 0
    status, said = run(folder, "-o", "group", *options, "--ray", cluster.address, "--ray-devices", 2, change="joining")
    assert status == 0
    found = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}  # both nodes are this machine
    assert f"cogvid: warning: sum 1 of {found}" in said
    [one], [other] = (sorted((folder / name).glob("*.mp4")) for name in ("group", "alone"))
    # They share the work of the video, so it is the same to rounding, which may move a pixel by a level of 255, and
    # then the encoder a few more.
    compared = compare(one, other)
    assert all(row["psnr"] is None or row["psnr"] > 45 for row in compared.rows), compared.table()
    assert read_record(one)["parallel"] == "cfg=2,ulysses=1,ring=1"


@slow
def test_one_of_a_group_is_killed_or_fails(cluster: TwoNodes, folder: Path) -> None:
    options = ["--prompt", "a", "--seed", "1", *STEPS, "--ray", cluster.address, "--ray-devices", 2]
    process = start(folder, "-o", "group-killed", *options, change="joining")
    os.kill(cluster.wait_for_actors(count=2)[1], signal.SIGKILL)
    status, said = finish(process)
    assert status == 0
    assert [line for line in said if line.startswith("cogvid: job 0 runs again, for its worker died: ")]
    status, said = run(folder, "-o", "group-failed", *options, change="failing rank")
    assert status == 3
    reason = "worker: got 3 that died at this job, the last one: no memory, want one that ends"
    assert f"cogvid: job 0 of 1: failed: {reason}" in said
    until(lambda: not cluster.actors())


@slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("ray", r"ray: got '[^']+' \(.*Version mismatch.*Ray: 1\.0\.0.*\), want a cluster that can be used from here"),
        ("cogvid", r"ray: got cogvid 0\.1\.0 on [\d.]+, want 0\.0\.0 as here"),
    ],
)
def test_other_versions_are_one_line(cluster: TwoNodes, folder: Path, change: str, words: str) -> None:
    arguments = ["--prompt", "a", "-o", f"version-{change}", *STEPS, "--ray", cluster.address]
    status, [line] = run(folder, *arguments, change=change)
    assert status == 2
    assert re.search(words, line), line


@slow
def test_on_this_machine(folder: Path, serial: Path) -> None:
    """Ray is started and ended."""
    import psutil

    def raylets() -> set[int]:
        return {each.pid for each in psutil.process_iter() if each.name() in ("raylet", "gcs_server")}

    pytest.importorskip("ray", reason="needs the extra ray")
    before = raylets()
    assert run(folder, "jobs.jsonl", "-o", "local", *STEPS, "--ray", "local")[0] == 3
    check_same(folder / "local", serial)
    until(lambda: raylets() <= before)


@slow
def test_what_listens_but_is_no_cluster_is_refused(folder: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        begun = time.monotonic()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        status, [line] = run(folder, "--prompt", "a", "-o", "nothing", "--ray", address)
    assert status == 2
    assert f"ray: got '{address}' (no answer), want 'local', 'auto', HOST:PORT" in line
    assert time.monotonic() - begun < 60
    assert not (folder / "nothing").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ray", "nowhere"], "ray: got 'nowhere', want 'local', 'auto', HOST:PORT, or "),
        (["--ray", "127.0.0.1:1"], "ray: got '127.0.0.1:1' ([Errno 111] Connection refused), want 'local', 'auto', "),
        (["--ray", "127.0.0.1:x"], "ray: got '127.0.0.1:x', want "),
        (["--ray", "local", "--ray-devices", "0"], "ray_devices: got 0, want an integer, 1 or more"),
        (["--ray-devices", "2"], "ray_devices: got 2 without --ray, want both or neither"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    monkeypatch.chdir(tmp_path)
    assert main(["batch", "--prompt", "a", "-o", "out", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line
    assert os.listdir(tmp_path) == []


def test_without_ray_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    assert main(["batch", "--prompt", "a", "-o", "out", "--ray", "local"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("cogvid: error: ray: got none (")
    assert line.endswith("want the extra 'ray' (pip install 'cogvid[ray]')")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("parallel", "asked", "count"),
    [
        ([None, None], None, 1),
        ([None], 4, 4),
        (["cfg=2,ulysses=2", "cfg=2,ring=2"], None, 4),
        (["cfg=2", "cfg=2"], 2, 2),
        (["cfg=2", "ulysses=3"], None, "2, 3"),
        (["cfg=2", None], None, "2"),
        (["cfg=2"], 4, "2, 4"),
    ],
)
def test_how_many_devices_make_a_video(parallel: list[str | None], asked: int | None, count: int | str) -> None:
    jobs = [BatchJob(i, {"prompt": "a"} | ({"parallel": each} if each else {})) for i, each in enumerate(parallel)]
    if isinstance(count, int):
        assert ray_batch._devices(jobs, asked) == count
        return
    with pytest.raises(ValueError, match=f"ray_devices, parallel: got {count} devices for one video, want one number"):
        ray_batch._devices(jobs, asked)


@pytest.mark.parametrize(
    ("nodes", "named", "devices", "needs"),
    [
        ([{"CPU": 8}, {"CPU": 2}], [None], 1, {"num_cpus": 3}),
        ([{"CPU": 2}, {"CPU": 2}], [None], 1, {"num_cpus": 2}),  # no node has as many CPUs as there are threads
        ([{"CPU": 4}], [None], 2, {"num_cpus": 2}),
        ([{"CPU": 8}, {"CPU": 8, "GPU": 2}], [None, "cpu"], 1, {"num_gpus": 1, "num_cpus": 1}),
        ([{"CPU": 8, "GPU": 2}], ["cpu", "cpu"], 1, {"num_cpus": 3}),
        ([{"CPU": 8}], ["cuda", None], 1, {"num_gpus": 1, "num_cpus": 1}),  # GPUs that are to come
    ],
)
def test_what_an_actor_takes(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, int]],
    named: list[str | None],
    devices: int,
    needs: dict[str, int],
) -> None:
    alive = [{"Alive": True, "Resources": node} for node in nodes] + [{"Alive": False, "Resources": {"GPU": 8}}]
    monkeypatch.setattr(ray_batch, "_import_ray", lambda: SimpleNamespace(nodes=lambda: alive))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found, threads = ray_batch.RayPool("auto", named, devices)._resources()
    assert found == needs
    assert threads == needs["num_cpus"]
    if "num_gpus" in needs and not any("GPU" in node for node in nodes):
        with pytest.raises(ValueError, match="ray: got 'local' with 0 GPUs, want 1 for one video"):
            ray_batch.RayPool("local", named, devices)._resources()
