"""Actors of tests: a job can kill its own, and say what it finds in its environment. And the command that uses them."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

import cogvid
from cogvid.cli import main
from cogvid.run import ray_batch
from cogvid.run.jobs import BatchJob
from cogvid.run.pool import Made


class Dying(ray_batch.Member):
    """Its process ends at a job whose prompt says so."""

    def run(self, sent: tuple[Sequence[BatchJob], Sequence[ray_batch.Inputs]]) -> Made:
        if any("die" in job.values["prompt"] for job in sent[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(sent)


class Joining(ray_batch.Member):
    """Adds up the ranks of all processes, with gloo; the sum is a warning, and so is the environment."""

    def run(self, sent: tuple[Sequence[BatchJob], Sequence[ray_batch.Inputs]]) -> Made:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        found = {name: int(os.environ[name]) for name in names}
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        total = torch.tensor(found["RANK"])
        dist.all_reduce(total)
        made = super().run(sent)
        return replace(made, warnings=[*made.warnings, f"sum {int(total)} of {found}"])


class FailingRank(ray_batch.Member):
    """Rank 1 alone fails, and rank 0 waits for it."""

    def run(self, sent: tuple[Sequence[BatchJob], Sequence[ray_batch.Inputs]]) -> Made:  # noqa: ARG002
        if os.environ["RANK"] == "0":
            signal.pause()
        raise MemoryError("no memory")


def changed(what: str) -> None:
    """Change what the command of this process uses."""
    import ray

    changes: dict[str, tuple[Any, str, Any]] = {
        "dying": (ray_batch, "Member", Dying),
        "joining": (ray_batch, "Member", Joining),
        "failing rank": (ray_batch, "Member", FailingRank),
        "ray": (ray, "__version__", "1.0.0"),
        "cogvid": (cogvid, "__version__", "0.0.0"),
    }
    setattr(*changes[what])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    from tests.distributed import ray_members  # so that actors find the classes by a name that they can import

    ray_members.changed(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
