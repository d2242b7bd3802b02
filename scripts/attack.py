"""Give every reader damaged and hostile input. Each case must end in a result, or be refused in one short line.

    python scripts/attack.py --seconds 60               # all readers in turns, each for its share of the time
    python scripts/attack.py --reader video --cases 500 --seed 7
    python scripts/attack.py --reader config --seed 7 --start 31 --cases 1     # one case again

A case follows from its reader, the seed and its number alone. The work is done by a second process with little memory,
so that a crash, a hang or an allocation without end is a finding of one case and not the end of the run. The exit
status is 0 if every case held, else 1; each that did not is printed with the command that repeats it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cogvid
from attack_readers import READERS, ROOT, SECRET

MEMORY = 4 * 2**30  # bytes that a case may add to what the imports take
SECONDS = 30  # that a case may take
LONGEST = 2500  # characters of a message; the command line cuts at 1000


def outcome(reader: str, seed: int, number: int, folder: Path) -> str:
    """Run a case: "read", "refused", or what went wrong."""
    rng = random.Random(f"{reader} {seed} {number}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            READERS[reader](rng, folder)
        except (ValueError, OSError) as error:
            line = str(error)
            if SECRET in line:
                return f"shows a secret: {line[:300]}"
            if "\n" in line or len(line) > LONGEST:
                return f"no short line ({len(line)} characters): {line[:200]!r}"
            if isinstance(error, ValueError) and " want " not in line and "cogvid: error" not in line:
                return f"says not what is wanted: {type(error).__name__}: {line[:200]}"
            return "refused"
        except FloatingPointError:  # values that no config check can tell from good ones
            return "refused"
        except BaseException as error:  # the finding; Rust's panics are no Exception
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "read"


def work(jobs: str) -> None:
    """Run cases "reader seed number" from stdin, each in an empty folder, and print what became of them."""
    import av
    import transformers.models.t5.modeling_t5  # noqa: F401 - what the limit below must not count

    av.logging.set_level(av.logging.PANIC)
    cogvid.load("tiny-t2v", device="cpu")
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + MEMORY, virtual + MEMORY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        reader, seed, number = line.split()
        with tempfile.TemporaryDirectory(dir=jobs) as folder:
            print(json.dumps(outcome(reader, int(seed), int(number), Path(folder))), file=answers, flush=True)


class Worker:
    """A process that runs cases; a new one is started after one that crashed or hung."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process = folder, None

    def run(self, reader: str, seed: int, number: int) -> str:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--work", str(self.folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            )  # fmt: skip
            if self._line(120) != "ready":
                raise RuntimeError("worker: got no start, want one")
        assert self.process.stdin is not None
        self.process.stdin.write(f"{reader} {seed} {number}\n".encode())
        self.process.stdin.flush()
        answer = self._line(SECONDS)
        if answer is not None and answer:
            return json.loads(answer)
        self.close()
        return f"takes over {SECONDS} seconds" if answer is None else "ends the process"

    def _line(self, seconds: float) -> str | None:
        """The next line, "" at the end of the process, None if it takes longer."""
        assert self.process is not None
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline().decode().strip() if ready else None

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def attack(
    readers: list[str], seed: int, start: int, cases: int | None, seconds: float | None
) -> Iterator[tuple[str, int, str]]:
    """Yield (reader, number, outcome), the readers in turns, until there were that many cases of each or time is up."""
    end = None if seconds is None else time.monotonic() + seconds
    folder = Path(tempfile.mkdtemp(prefix="cogvid-attack-"))
    worker = Worker(folder)
    try:
        number = start
        while cases is None or number < start + cases:
            for reader in readers:
                if end is not None and time.monotonic() > end:
                    return
                yield reader, number, worker.run(reader, seed, number)
            number += 1
    finally:
        worker.close()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, help="stop after so long; 60 if --cases is not given")
    parser.add_argument("--cases", type=int, help="of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--reader", action="append", choices=sorted(READERS), help="default: all; may be repeated")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return 0
    seconds = 60.0 if arguments.cases is None and arguments.seconds is None else arguments.seconds
    readers = arguments.reader or list(READERS)
    counts: dict[str, Counter[str]] = {reader: Counter() for reader in readers}
    for reader, number, result in attack(readers, arguments.seed, arguments.start, arguments.cases, seconds):
        held = result in ("read", "refused")
        counts[reader][result if held else "failed"] += 1
        if not held:
            print(
                f"{reader}: {result}\n  --reader {reader} --seed {arguments.seed} --start {number} --cases 1",
                flush=True,
            )
    print("| reader | cases | read | refused | failed |\n|---|--:|--:|--:|--:|")
    for reader, count in counts.items():
        print(f"| {reader} | {count.total()} | {count['read']} | {count['refused']} | {count['failed']} |")
    return 1 if any(count["failed"] for count in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
