"""Run a batch on a Ray cluster: one actor for each device, or for each of the devices that make a video together.

Ray finds the machines, starts the actors, and notices those that die; autoscaling is Ray's. The command reads the
pictures and videos of the jobs and sends them, gets each MP4 as bytes, and writes it and the manifest, so the nodes
need no common disk. They need cogvid in the same version, and the models: a hub id, a pack, or a directory that is at
the same path on each.

Without GPUs an actor gets as many CPUs as this process has threads. It computes with so many threads, because the last
bits of a video may depend on their number. Another processor or GPU can change them too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

import cogvid
from cogvid.media.download import one_line, shown
from cogvid.media.image import HAS_SCHEME, load_image
from cogvid.media.video import count_frames
from cogvid.options import check_int
from cogvid.run.batch import Queue, Worker, prepare_job
from cogvid.run.generate import Job
from cogvid.run.given import IMAGES, VIDEOS
from cogvid.run.jobs import BatchJob
from cogvid.run.pipeline import Pipeline
from cogvid.run.pool import Event, Made, run_on
from cogvid.run.stages import Stage, listen
from cogvid.weights.parallel_option import parse_parallel, world_size

CONNECT = 30  # seconds in which a cluster must answer
_MAX_FILE = 2**31  # bytes of a picture or video that is sent to a node
_OBJECTS = 2**28  # bytes of memory for what a local Ray sends; more goes to the disk
_REASON = 300  # characters

Inputs = dict[str, "bytes | Exception"]  # the files of a job by the names of its values; why one cannot be read


def run_batch_on_ray(
    jobs: Sequence[BatchJob],
    directory: str | os.PathLike[str],
    batch_size: int = 1,
    *,
    address: str,
    devices: int | None = None,
) -> list[dict[str, Any]]:
    """Do what `run_batch` does, on a Ray cluster.

    A job whose actor or node dies runs again on another, three times at most; then it has failed.

    Args:
        batch_size: as of `run_batch`; videos that are sampled together are sent together.
        address: "local" starts Ray on this machine and ends it; "auto", `host:port` or `ray://host:port` is a cluster.
        devices: that make one video; None is what the jobs' `parallel` says, and otherwise 1.

    Raises:
        ValueError: no cluster answers at the address within 30 s, or it has other versions of Ray or Python; its nodes
            have another version of cogvid; jobs that need different numbers of devices.
        ImportError: Ray is missing.
    """
    devices = _devices(jobs, devices)
    if world_size() > 1:
        raise ValueError(f"ray: got it on {world_size()} processes of torchrun, want one, with --ray-devices")
    _import_ray()
    _check_address(address)
    queue = Queue(jobs, directory, batch_size)
    queue.leave_out_finished()
    if queue.left:
        with RayPool(address, [job.values.get("device") for job in jobs], devices) as pool:
            run_on(pool, queue)
    return queue.failed()


def _devices(jobs: Sequence[BatchJob], asked: int | None) -> int:
    """Return how many devices make one video."""
    if asked is not None:
        check_int("ray_devices", asked, 1)
    splits = {parse_parallel(job.values.get("parallel")) for job in jobs}
    found = {split.devices for split in splits if split is not None} | ({asked} if asked else set())
    if len(found) > 1 or (found and not asked and None in splits and found != {1}):
        counts = ", ".join(str(count) for count in sorted(found))
        raise ValueError(f"ray_devices, parallel: got {counts} devices for one video, want one number for all jobs")
    return found.pop() if found else 1


def _import_ray() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"ray: got none ({error!s:.100}), want the extra 'ray' (pip install 'cogvid[ray]')") from None
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    return ray


def _check_address(address: str) -> None:
    """Raise unless a cluster answers: Ray itself waits for minutes, and may end the process."""
    if address == "local":
        return
    wanted = f"'local', 'auto', HOST:PORT, or ray:// before it, of a Ray cluster that answers within {CONNECT} s"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto":
        if not (host and port.isascii() and port.isdigit() and int(port) < 2**16):
            raise ValueError(f"ray: got {address!r:.100}, want {wanted}")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT).close()
        except OSError as error:
            raise ValueError(f"ray: got {address!r:.100} ({one_line(error)}), want {wanted}") from None
    if address.startswith("ray://"):
        return  # whose client has a time limit of its own
    ask = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    ask += [] if address == "auto" else ["--address", address]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=CONNECT, check=False)
        failed = answer.returncode != 0
        reason = (answer.stderr.strip() or "no answer").splitlines()[-1]
    except subprocess.TimeoutExpired:
        failed, reason = True, "no answer"
    if failed:
        raise ValueError(f"ray: got {address!r:.100} ({one_line(reason)}), want {wanted}")


@dataclass(frozen=True)
class Place:
    """Where a member is: the address of its node, and the GPUs that Ray gave it. port: of its store, if it has one."""

    node: str
    gpus: list[str]
    port: int


class Member:
    """What an actor is: one process that runs jobs, alone or as one of several that make each video together.

    directory: the working directory of the command, which is taken where the node has it. threads: of computations.
    """

    def __init__(self, directory: str, threads: int) -> None:
        with contextlib.suppress(OSError):
            os.chdir(directory)
        torch.set_num_threads(threads)
        self._worker, self._store = Worker(), None

    def where(self, version: str, first: bool) -> Place:
        """Say where this is. version: of cogvid, which must be the same. first: hold the store of the members."""
        import ray

        node = ray.util.get_node_ip_address()
        if version != cogvid.__version__:
            raise ValueError(f"ray: got cogvid {cogvid.__version__} on {node}, want {version} as here")
        if first:
            self._store = dist.TCPStore(node, 0, is_master=True, wait_for_workers=False)
        gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
        return Place(node, gpus, self._store.port if self._store is not None else 0)

    def join(self, rank: int, *places: Place) -> None:
        """Set the environment as torchrun does, if there are several members. places: of all, in the order of ranks."""
        if len(places) == 1:
            return
        node = places[rank].node
        beside = [other for other, place in enumerate(places) if place.node == node]
        gpus = [gpu for other in beside for gpu in places[other].gpus]
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)  # CUDA was not used yet
        counts = {"RANK": rank, "WORLD_SIZE": len(places)}
        counts |= {"LOCAL_RANK": beside.index(rank), "LOCAL_WORLD_SIZE": len(beside)}
        store = {"MASTER_ADDR": places[0].node, "MASTER_PORT": places[0].port, "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ.update({name: str(value) for name, value in (counts | store).items()})

    def run(self, sent: tuple[Sequence[BatchJob], Sequence[Inputs]]) -> Made:
        """Run jobs at once, and return what the manifest is to have and the MP4s."""
        jobs, files = sent
        stages: list[Stage] = []
        known: dict[str, str] = {}  # what messages are to say instead of the paths here
        inputs = {job.place: each for job, each in zip(jobs, files, strict=True)}
        outputs = {job.name: os.path.join(tempfile.gettempdir(), f"cogvid-{secrets.token_hex(8)}.mp4") for job in jobs}

        def prepare(pipe: Pipeline, job: BatchJob) -> Job:
            with tempfile.TemporaryDirectory(prefix="cogvid-") as directory:
                paths = _put(job, inputs[job.place], directory, known)
                return prepare_job(pipe, job, outputs[job.name], **paths)

        try:
            with warnings.catch_warnings(record=True) as caught, listen(stages.append):
                warnings.simplefilter("ignore")
                warnings.filterwarnings("always", module=r"cogvid(\.|$)")
                entries = self._worker.run(jobs, prepare)
            entries = [entry | {"error": entry["error"] and _told(entry["error"], known)} for entry in entries]
            said = [_told(str(each.message), known) for each in caught]
            videos = {name: Path(path).read_bytes() for name, path in outputs.items() if os.path.exists(path)}
            return Made(entries, videos, stages, said)
        finally:
            for path in outputs.values():
                Path(path).unlink(missing_ok=True)


def _read(job: BatchJob) -> Inputs:
    """Read the pictures and videos of a job; an image's URL is left to the node."""
    found: Inputs = {}
    for name in (*IMAGES, *VIDEOS):
        path = job.values.get(name)
        if not path or (name in IMAGES and HAS_SCHEME.match(path)):
            continue
        try:
            found[name] = _read_file(name, path)
        except Exception as error:
            found[name] = error
    return found


def _read_file(name: str, path: str) -> bytes:
    with contextlib.suppress(OSError):
        of_file = os.stat(path)
        if stat.S_ISREG(of_file.st_mode):
            if of_file.st_size > _MAX_FILE:
                raise ValueError(f"{name}: got {shown(path)} of {of_file.st_size} bytes, want at most {_MAX_FILE}")
            return Path(path).read_bytes()
    (load_image if name in IMAGES else count_frames)(path)  # which says what is wrong
    raise ValueError(f"{name}: got {shown(path)}, which cannot be read, want a file")


def _put(job: BatchJob, inputs: Inputs, directory: str, known: dict[str, str]) -> dict[str, str]:
    """Write the files of a job into a directory, and return their paths by the names of the values."""
    paths: dict[str, str] = {}
    for name, data in inputs.items():
        if isinstance(data, Exception):
            raise data
        given = job.values[name]
        paths[name] = os.path.join(directory, name + os.path.splitext(given)[1][:20])
        Path(paths[name]).write_bytes(data)
        known |= {shown(paths[name]): shown(given), paths[name]: given}
    return paths


def _told(text: str, known: dict[str, str]) -> str:
    for here, there in known.items():
        text = text.replace(here, there)
    return text


@dataclass(eq=False)
class Team:
    """A worker: the actors of one video, and the calls that they have not all answered yet."""

    actors: list[Any]
    group: Any
    calls: list[Any]
    answers: dict[int, Any] = field(default_factory=dict)


class RayPool:
    """Actors of a Ray cluster as a `Pool`. A context manager, which ends what it started."""

    def __init__(self, address: str, named: Sequence[str | None], devices: int) -> None:
        self._address, self._named, self._devices = address, named, devices
        self._ray = _import_ray()
        self._teams: list[Team] = []

    def __enter__(self) -> Self:
        before = signal.getsignal(signal.SIGTERM)
        try:
            self._connect()
        finally:
            if before is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray has one of its own
        try:
            self._needs, self._threads = self._resources()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # a cluster that is gone
            for team in list(self._teams):
                self.dismiss(team)
        self._ray.shutdown()

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        if self._address == "local":
            quiet |= {"include_dashboard": False, "object_store_memory": _OBJECTS}
        try:
            self._ray.init(self._address, **quiet)
        except Exception as error:  # Ray raises many kinds, and plain ones
            reason = one_line(error, _REASON)
            wanted = "a cluster that can be used from here"
            raise ValueError(f"ray: got {self._address!r:.100} ({reason}), want {wanted}") from None

    def _resources(self) -> tuple[dict[str, int], int]:
        """Return what an actor takes, and its threads: a GPU where jobs name one or the cluster has some, else CPUs."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        there = {name: sum(node.get(name, 0) for node in nodes) for name in ("GPU", "CPU")}
        on_gpu = any((name or "").startswith("cuda") for name in self._named)
        on_cpu = all(name == "cpu" for name in self._named)
        if on_gpu or (there["GPU"] >= 1 and not on_cpu):
            needs, threads = {"num_gpus": 1, "num_cpus": 1}, 1
            found, wanted = there["GPU"], self._devices
        else:
            most = int(max((node.get("CPU", 0) for node in nodes), default=1))
            threads = max(1, min(torch.get_num_threads(), most // self._devices))
            needs, found, wanted = {"num_cpus": threads}, there["CPU"], threads * self._devices
        if self._address == "local" and found < wanted:
            kind = "GPUs" if "num_gpus" in needs else "CPUs"
            raise ValueError(f"ray: got 'local' with {found:.0f} {kind}, want {wanted} for one video")
        return needs, threads

    def shortage(self) -> str:
        there = self._ray.cluster_resources()
        have = ", ".join(f"{there.get(name, 0):.0f} {name}" for name in ("GPU", "CPU"))
        needs = ", ".join(f"{count * self._devices} {name[4:-1].upper()}" for name, count in self._needs.items())
        return f"the cluster has {have}, and a worker takes {needs}"

    def hire(self) -> Team:
        options: dict[str, Any] = {**self._needs, "max_restarts": 0, "max_task_retries": 0}
        options["runtime_env"] = {"env_vars": {"TQDM_DISABLE": "1"}}
        each, group = [options] * self._devices, None
        if self._devices > 1:
            group, each = self._together(options)
        kind = self._ray.remote(Member)
        actors = [kind.options(**own).remote(os.getcwd(), self._threads) for own in each]
        several = len(actors) > 1
        places = [actor.where.remote(cogvid.__version__, several and not rank) for rank, actor in enumerate(actors)]
        team = Team(actors, group, [actor.join.remote(rank, *places) for rank, actor in enumerate(actors)])
        self._teams.append(team)
        return team

    def _together(self, options: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
        """Reserve what several actors need, all or nothing; return the reservation and the options of each."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle: dict[str, float] = {name[4:-1].upper(): count for name, count in self._needs.items()}
        group = placement_group([bundle] * self._devices, strategy="PACK")
        strategies = [PlacementGroupSchedulingStrategy(group, index) for index in range(self._devices)]
        return group, [{**options, "scheduling_strategy": strategy} for strategy in strategies]

    def send(self, worker: Team, jobs: Sequence[BatchJob]) -> None:
        sent = self._ray.put((list(jobs), [_read(job) for job in jobs]))
        worker.calls = [actor.run.remote(sent) for actor in worker.actors]
        worker.answers = {}

    def dismiss(self, worker: Team) -> None:
        if worker not in self._teams:
            return
        self._teams.remove(worker)
        for actor in worker.actors:
            self._ray.kill(actor)
        if worker.group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(worker.group)

    def wait(self, seconds: float) -> list[Event]:
        calls = [call for team in self._teams for call in team.calls]
        if not calls:
            time.sleep(seconds)
            return []
        if self._ray.wait(calls, timeout=seconds)[0]:
            calls = self._ray.wait(calls, num_returns=len(calls), timeout=0)[0]
        else:
            calls = []
        events = [self._event(team, [call for call in team.calls if call in calls]) for team in self._teams]
        return [event for event in events if event is not None]

    def _event(self, team: Team, answered: list[Any]) -> Event | None:
        """Say what happened to a team: all its actors answered, or one died or raised, for which the others wait."""
        if not team.calls:
            return None
        for rank, call in enumerate(team.calls):
            if call not in answered or rank in team.answers:
                continue
            try:
                team.answers[rank] = self._ray.get(call)
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, ValueError):  # of `where`: it would be the same on the next
                    raise error.cause from None
                return Event(team, died=one_line(error.cause, _REASON))
            except self._ray.exceptions.RayError as error:
                return Event(team, died=_reason(error))
        if len(team.answers) < len(team.calls):
            return None
        team.calls = []
        return Event(team, team.answers[0])  # rank 0 is the one that writes


def _reason(error: Exception) -> str:
    """Return why an actor died, in a few words of Ray's long text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [
        line for line in lines if not line.startswith(("class_name", "actor_id", "pid", "name", "namespace", "ip"))
    ]
    return one_line(" ".join(telling), _REASON)
