"""Several processes that work together with gloo, as torchrun would start them; each has one thread."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Self

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(seconds=120)


class Ranks:
    """`count` processes that wait for functions to run. They begin once and run many, because a start takes seconds."""

    def __init__(self, count: int) -> None:
        # The parent holds the store, as torchrun's agent does, on a port that the system chooses.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        self._processes, self._pipes = [], []
        for rank in range(count):
            mine, theirs = context.Pipe()
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._store.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
            process = context.Process(target=_serve, args=(theirs, {k: str(v) for k, v in env.items()}), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a function of a module in every process and return what each returned, by rank.

        Raises:
            AssertionError: it raised in a process; with the trace of each that raised.
        """
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, arguments))
        answers = [pipe.recv() for pipe in self._pipes]
        failed = [f"rank {rank}: {trace}" for rank, (trace, _) in enumerate(answers) if trace]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]


def _serve(pipe: Connection, env: dict[str, str]) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send(("", getattr(importlib.import_module(module), name)(*arguments)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
    dist.destroy_process_group()
