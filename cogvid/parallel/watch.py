"""The end of a command on several processes: one line of one of them, and none that waits for a process that is gone.

Each process says once a second that it lives, to torchrun's store, which outlives it. One that does not for `LOST`
seconds was killed or hangs, and the others end. Whoever has an error of its own asks the store whether to print it: the
first may. An error that only follows from the end of another process waits until that one could print, and names it if
it could not.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import Store

from cogvid.media.whole_file import remove_hidden
from cogvid.parallel.start import connect
from cogvid.weights.parallel_option import rank, world_size

BEAT = 1.0  # seconds between two signs of life
LOST = 60.0  # seconds without one after which a process is lost
GRACE = 3.0  # seconds that an error which follows from another process waits for the line of that one
_LEFT = 1 << 40  # in place of a count of signs: the process ended in order
_OF_OTHERS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


class Watch:
    """Say that this process lives, and watch the others, until `close`. say: prints a line of an error."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._ended = say, threading.Event()
        self._store: Store | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        """Let the others know that this process ends in order."""
        self._ended.set()
        _ask(lambda store: store.add(_beat(rank()), _LEFT), None)

    def _run(self) -> None:
        seen: dict[int, tuple[int, int]] = {}  # rank -> its count of signs, and for how many beats it is the same
        try:
            store = _own_connection()
            while not self._ended.wait(BEAT):
                store.add(_beat(rank()), 1)
                for other in range(world_size()):
                    count = store.add(_beat(other), 0)
                    before, beats = seen.get(other, (count, 0))
                    seen[other] = count, beats + 1 if count == before else 0
                    if 0 < count < _LEFT and seen[other][1] * BEAT >= LOST:
                        end(self._say, no_answer([other], LOST), 1)
        except RuntimeError:
            return  # the store is gone, and with it torchrun, which ends the processes


def end(say: Callable[[str], None], line: str, status: int) -> None:
    """End the process at once, whatever its main thread waits for; print the line if no other process had one."""
    if may_speak(status):
        say(line)
    remove_hidden()
    os._exit(status)


def judge(line: str, status: int, error: BaseException) -> tuple[str | None, int]:
    """Return what this process prints of its error, if anything, and its exit status."""
    signalled = isinstance(error, KeyboardInterrupt)
    lost: list[int] = []
    if signalled or is_of_others(error):
        lost = _silent(GRACE)
    if may_speak(status):
        return (no_answer(lost, GRACE) if lost else line), status
    said = _ask(lambda store: store.get("cogvid/status") if store.check(["cogvid/status"]) else b"", b"")
    return None, status if signalled or not said else int(said)


def is_of_others(error: BaseException) -> bool:
    """Say whether an error is that another process is gone or does not answer."""
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_OTHERS)
    return told or isinstance(error, dist.DistError)


def may_speak(status: int) -> bool:
    """Say whether no process has printed its line before; from then on this one has. Without a store, yes."""
    first = _ask(lambda store: store.add("cogvid/said", 1) == 1, True)
    if first:
        _ask(lambda store: store.set("cogvid/status", str(status)), None)
    return first


def no_answer(ranks: list[int], seconds: float) -> str:
    """Return the line about processes that were killed or hang."""
    named = ", ".join(map(str, ranks))
    return f"rank {named}: got no answer for {seconds:g} s, want one: the process was killed, or hangs"


def _silent(seconds: float) -> list[int]:
    """Return the processes that gave no sign of life within these seconds and did not end in order."""

    def counts(store: Store) -> list[int]:
        return [store.add(_beat(other), 0) for other in range(world_size())]

    before = _ask(counts, [])
    threading.Event().wait(seconds)
    after = _ask(counts, [])
    return [other for other, (a, b) in enumerate(zip(before, after, strict=False)) if 0 < a == b < _LEFT]


def _beat(rank: int) -> str:
    return f"cogvid/beat/{rank}"


def _own_connection() -> Store:
    """Another thread may be waiting in the first one."""
    store: Any = connect()  # torch's stubs lack `clone`
    return store.clone()


def _ask(question: Callable[[Store], Any], otherwise: Any) -> Any:
    """Ask the store, and return `otherwise` if it is gone."""
    try:
        return question(_own_connection())
    except (RuntimeError, ValueError):
        return otherwise
