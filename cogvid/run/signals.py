"""Ctrl-C, SIGTERM and SIGHUP end a program in order; a second one ends it at once. Only the command line asks for it.

Python drops an exception that is raised within a `__del__`, and so may a library or a callback that catches everything.
So a signal is also remembered, and `stop_if_asked` raises it again: at each stage, step and chunk of a run. `stop_when`
ends the run of one thread in the same way, without a signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_entered: list[StopOnSignals] = []  # the blocks that the process is in
PATIENCE = 10.0  # seconds
_asked: ContextVar[threading.Event | None] = ContextVar("asked", default=None)  # of a thread
_SAME = 0.1  # seconds; `timeout` and a closed terminal send one signal twice


class Interrupted(KeyboardInterrupt):
    """A signal that asks the program to stop. number: which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that says so, as shells count."""
        return 128 + self.number

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return "interrupted" if self.number == signal.SIGINT else f"interrupted by {name}"


class Cancelled(Exception):
    """Someone asked a run to end, by the event of `stop_when`."""


def stop_if_asked() -> None:
    """Raise `Interrupted` if a signal asked the program to stop, and `Cancelled` if the event of `stop_when` is set.

    In a program that watches neither it does nothing.
    """
    for block in _entered:
        if block.received is not None:
            raise Interrupted(block.received.number)
    event = _asked.get()
    if event is not None and event.is_set():
        raise Cancelled("cancelled")


@contextlib.contextmanager
def stop_when(event: threading.Event) -> Iterator[None]:
    """Within the block, and in this thread alone, `stop_if_asked` raises `Cancelled` once the event is set."""
    token = _asked.set(event)
    try:
        yield
    finally:
        _asked.reset(token)


class StopOnSignals:
    """Within the block, the first signal raises `Interrupted` in the main thread, and a second one ends the process.

    at_last: called with `Interrupted` from another thread if the process is still there `PATIENCE` seconds after the
    first signal, as one that waits for other processes may be. Then a second signal, which torchrun may send, does not
    end it.

    A signal that is ignored stays so, as `nohup` wants it. Outside of the main thread the block does nothing. Python
    runs a handler only between two of its own instructions, so a thread of its own waits for the second signal, which
    need not wait for a long call into a library.

    After a signal no exception leaves the block. received: the first signal's `Interrupted`; None before.
    """

    def __init__(self, at_last: Callable[[Interrupted], None] | None = None) -> None:
        self.received: Interrupted | None = None
        self._at_last = at_last
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=_watch, args=(reader, self._at_last), daemon=True).start()
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._stop)
        _entered.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writer)  # which ends the thread
            _entered.remove(self)
        return self.received is not None  # what fails after a signal fails because of it

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received = Interrupted(number)
            raise self.received


def _watch(reader: int, at_last: Callable[[Interrupted], None] | None = None) -> None:
    """End the process at the second signal. Python's handler in C writes each signal's number to the pipe."""
    first: tuple[int, float] | None = None
    with open(reader, "rb", buffering=0) as pipe:
        while received := pipe.read(1):
            [number] = received
            if number not in _SIGNALS:
                continue
            now = time.monotonic()
            if first is None:
                first = number, now
                if at_last is not None:
                    timer = threading.Timer(PATIENCE, at_last, [Interrupted(number)])
                    timer.daemon = True
                    timer.start()
            elif at_last is None and (number != first[0] or now - first[1] > _SAME):
                os._exit(128 + number)
