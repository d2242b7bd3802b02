"""A command on the processes of torchrun: all work, and the first of them alone prints, asks and writes."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable
from datetime import timedelta

from cogvid.parallel.share import agree
from cogvid.parallel.start import begin, leave
from cogvid.parallel.watch import Watch, may_speak
from cogvid.weights.parallel_option import rank, world_size

# As good as none: a process that is gone is noticed by `Watch`, and others may load or write for long.
_TIMEOUT = timedelta(days=7)
_OF_ALL = ("generate", "batch", "replay")


def run_on_ranks(arguments: argparse.Namespace, say: Callable[[str], None]) -> int | None:
    """Run a command as one of several processes and return its exit status. say: prints the line of an error.

    A command that needs one process runs in the first, and the others have nothing to do.

    Raises:
        ValueError: the processes were given other arguments; a trace.
    """
    if arguments.command not in _OF_ALL:
        if getattr(arguments, "trace", False):
            raise ValueError(f"trace: got it on {world_size()} processes, want one")
        if rank() != 0:
            return 0
        os.environ |= {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        return arguments.run(arguments)
    watch = Watch(say)
    begin(_TIMEOUT)
    agree(vars(arguments))
    with contextlib.ExitStack() as stack:
        if rank() != 0:
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nothing))
            stack.enter_context(contextlib.redirect_stderr(nothing))
        status = arguments.run(arguments)
    if status:
        may_speak(status)  # it was said; what torchrun then ends has no line of its own
    leave()
    watch.close()
    return status
