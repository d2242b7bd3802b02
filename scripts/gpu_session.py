"""Judge the kernels on a GPU that is there for some minutes: correctness first, then what each part costs.

    python scripts/gpu_session.py --out runs/h200                      # 540 seconds
    python scripts/gpu_session.py --out runs/h200 --budget 300 --resume
    TRITON_INTERPRET=1 python scripts/gpu_session.py --out runs/rehearsal --device cpu    # toy sizes, no GPU

Each stage (see `gpu_stages.py`) is a process of its own, so a fault ends that process and nothing else. Each result is
one line of `results.jsonl` as soon as it is there. A stage that dies is started again and leaves out the result at
which it died. `--resume` leaves out every result that is there already.

At the end the output directory holds `RESULTS.md`, tables for `kernels/RESULTS.md`, and `_tiles.py`, the block sizes of
`cogvid_kernels` with the fastest correct ones that were measured. Both are made from `results.jsonl` alone.

It needs torch, triton, einops, safetensors and transformers; diffusers is timed where it is installed, and
compute-sanitizer and ncu are used where they are on the PATH.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

RESULTS, RUNNING = "results.jsonl", "running"
OUT_OF_TIME, DEVICE_FAULT = 4, 5  # exit statuses of a stage's process
GRACE = 5.0  # seconds that a stage may run over its time before it is killed
# What a CUDA context is lost by; every later call of the process would fail too.
STICKY = ("CUDA error", "illegal memory access", "unspecified launch failure", "device-side assert")


class Recorder:
    """The results of one stage: measures what is missing, while there is time, and writes each at once.

    A result is a JSON object with `stage`, `key`, `state` and its values. States: "done"; "failed", with `reason`, for
    what raised or killed the process; "cut", for what was running when the time was over.
    """

    def __init__(self, out: Path, stage: str, deadline: float, die_at: str | None = None) -> None:
        """deadline: `time.time()` after which nothing new is begun. die_at: kill this process at that result."""
        self.out, self.stage, self.deadline, self.die_at = out, stage, deadline, die_at
        self.all = read_results(out)

    def measure(self, key: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of that key, measuring it by `function` unless it is there.

        Raises:
            SystemExit: the time is over, or the device is lost.
        """
        known = self.all.get((self.stage, key))
        if known is not None and known["state"] != "cut":
            return known
        if time.time() >= self.deadline:
            sys.exit(OUT_OF_TIME)
        (self.out / RUNNING).write_text(key)
        if self.die_at == f"{self.stage}/{key}":
            os.kill(os.getpid(), signal.SIGKILL)
        begin, lost = time.perf_counter(), False
        try:
            values = {"state": "done", **function()}
        except Exception as error:  # one result may fail in any way and must not end the others
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            values = {"state": "failed", "reason": reason}
            lost = any(words in reason for words in STICKY)
        line = {"stage": self.stage, "key": key, **values, "seconds": round(time.perf_counter() - begin, 3)}
        append(self.out, line)
        (self.out / RUNNING).unlink()
        self.all[self.stage, key] = line
        print(json.dumps(line), flush=True)
        if lost:
            sys.exit(DEVICE_FAULT)
        return line

    def value(self, stage: str, key: str) -> dict[str, Any]:
        """Return a result of this or an earlier stage, or an empty one."""
        line = self.all.get((stage, key), {})
        return line if line.get("state") == "done" else {}


def append(out: Path, line: dict[str, Any]) -> None:
    with (out / RESULTS).open("ab+") as file:
        if file.tell():  # a process that was killed while it wrote may have left half a line
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_results(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Read the last line of each (stage, key); a line that was cut off while it was written is left out."""
    results: dict[tuple[str, str], dict[str, Any]] = {}
    path = out / RESULTS
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            results[line["stage"], line["key"]] = line
    return results


def main(argv: Sequence[str] | None = None) -> int:
    from gpu_stages import STAGES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="of all stages together")
    parser.add_argument("--resume", action="store_true", help="go on in a directory that holds results")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES), metavar="STAGE")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--compile", action="store_true", help="time torch.compile too (minutes)")
    parser.add_argument("--die-at", metavar="STAGE/KEY", help="kill the stage at this result, to rehearse a fault")
    parser.add_argument("--worker", metavar="STAGE", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        recorder = Recorder(args.out, args.worker, args.deadline, args.die_at)
        STAGES[args.worker].run(recorder, args.device, args.compile)
        return 0
    if not args.budget > 0:
        parser.error(f"--budget: got {args.budget:g}, want more than 0")
    if not args.resume and (args.out / RESULTS).exists():
        parser.error(f"--out: got {args.out} with results in it, want another directory, or --resume")
    args.out.mkdir(parents=True, exist_ok=True)
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    command = " ".join(["python scripts/gpu_session.py", *(sys.argv[1:] if argv is None else argv)])
    append(args.out, {"stage": "session", "key": now, "state": "done", "note": command})
    run_stages(args, {name: STAGES[name].seconds for name in args.stages})
    from gpu_tables import write_tables

    for path in write_tables(args.out):
        print(path)
    return 0


def run_stages(args: argparse.Namespace, seconds: dict[str, float]) -> None:
    """Run the stages one after another; what one leaves of its time goes to those after it, by their shares."""
    end, left = time.time() + args.budget, dict(seconds)
    for name in seconds:
        share = left[name] / sum(left.values())
        del left[name]
        how = run_stage(args, name, time.time() + share * (end - time.time()))
        append(args.out, {"stage": "stages", "key": name, "state": "done", "note": how})
        print(f"stage {name}: {how}", flush=True)


def run_stage(args: argparse.Namespace, name: str, deadline: float) -> str:
    """Run one stage, again after each death that a result is to blame for; say how it ended."""
    command = [sys.executable, __file__, "--out", str(args.out), "--device", args.device, "--worker", name]
    command += ["--deadline", str(deadline), *(["--compile"] if args.compile else [])]
    command += ["--die-at", args.die_at] if args.die_at else []
    running = args.out / RUNNING
    while True:
        running.unlink(missing_ok=True)
        with (args.out / f"{name}.log").open("a") as log:
            child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                status = child.wait(timeout=max(deadline + GRACE - time.time(), 0.1))
            except subprocess.TimeoutExpired:
                status = OUT_OF_TIME
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        at = running.read_text() if running.exists() else None
        if status == 0:
            return "done"
        if status == OUT_OF_TIME:
            if at is not None:
                append(args.out, {"stage": name, "key": at, "state": "cut", "reason": "the time was over"})
            return "out of time" + (f", at {at}" if at else "")
        if status == DEVICE_FAULT:
            continue
        if at is None:
            reason = (args.out / f"{name}.log").read_text().strip().splitlines()[-1:]
            append(args.out, {"stage": name, "key": "", "state": "failed", "reason": f"{status}: {reason}"[:300]})
            return f"failed with status {status}; see {name}.log"
        append(args.out, {"stage": name, "key": at, "state": "failed", "reason": f"the process died: {status}"})


if __name__ == "__main__":
    sys.exit(main())
