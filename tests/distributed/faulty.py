"""A program for torchrun: the command of cogvid, with a fault in one rank. `faulty.py FAULT RANK STEP ARGUMENT...`.

FAULT: what happens in the rank as its denoiser begins the step: none, kill, memory, stop (it hangs), term, interrupt;
or, before the command begins, option (another one) or parse (one that there is not).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from cogvid import cli
from cogvid.weights.parallel_option import rank

LOST = 8.0  # seconds; in place of a minute


def main(fault: str, at_rank: str, at_step: str, *arguments: str) -> int:
    argv = list(arguments)
    if rank() == int(at_rank):
        if fault in ("option", "parse"):
            print(f"\nfault at {time.monotonic()}", file=sys.stderr, flush=True)
            argv += ["--height", "48"] if fault == "option" else ["--no-such-option"]
        else:
            break_at(fault, int(at_step))
    from cogvid.parallel import watch

    watch.LOST = LOST
    return cli.main(argv)


def break_at(fault: str, at_step: int) -> None:
    import torch

    from cogvid.models.transformer import Transformer

    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "interrupt": signal.SIGINT}
    forward = Transformer.forward

    def broken(self: Transformer, *inputs: Any, step: int, **options: Any) -> torch.Tensor:
        if step == at_step:
            print(f"\nfault at {time.monotonic()}", file=sys.__stderr__, flush=True)
        if step == at_step and fault in signals:
            os.kill(os.getpid(), signals[fault])
        if step == at_step and fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *inputs, step=step, **options)

    Transformer.forward = broken


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
