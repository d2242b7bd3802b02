"""Measure what step caches, guidance intervals and 8-bit weights save and what they cost; write a table and a plot.

    OMP_NUM_THREADS=1 python scripts/step_cache_curve.py --samples 40 --write

Each pack makes the same videos, two at a time, from the same noise, without and with each cache. Work is the FLOPs of
the transformer's blocks, counted from the calls of blocks and of attention. Time is the processor time of sampling
the first two videos, the least of several rounds in which all runs take turns; use one thread. Both are shares of
those without a cache. PSNR and SSIM are to the videos without a cache; the other columns are what `eval_tiny.py` sees
in the pixels. `--write` replaces the table in scripts/STEP_CACHES.md and the plot beside this file; the table is
printed in any case. `--json FILE` writes the figures for `cogvid report FILE -o report.html`. `--kinds` names some of
the kinds of runs alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import cogvid
from cogvid.run.compare import psnr, ssim
from cogvid.run.figures import header
from cogvid.run.machine import cpu_name
from eval_tiny import judge, judge_words, to_uint8
from tiny_world import prompt_for, render, sample_scenes

PAGE = Path(__file__).parent / "STEP_CACHES.md"
PLOT = Path(__file__).parent / "step_caches.png"
BATCH, ROUNDS = 2, 5
METERS = ("motion", "colour", "shape", "end IoU", "first frame dB")  # of `eval_tiny.py`, where a pack has them
TEACACHE = "teacache={}:coefficients=1/0"  # no polynomial was fitted for the packs: the distance is taken as it is
RUNS: dict[str, list[dict[str, Any]]] = {
    "none": [{}],
    "first-block": [{"step_cache": f"first-block={value}"} for value in (0.05, 0.1, 0.2, 0.3)],
    "teacache": [{"step_cache": TEACACHE.format(value)} for value in (0.2, 0.3, 0.5, 0.8)],
    "pyramid": [{"step_cache": f"pyramid={value}"} for value in (2, 3, 4)],
    "guidance interval": [{"guidance_interval": value} for value in ("0-0.75", "0-0.5", "0-0.25")],
    "8-bit weights": [{"quantize": mode} for mode in ("int8", "int8-dynamic", "fp8", "fp8-storage")],
}
NAMED = ("guidance interval", "8-bit weights")  # kinds whose values do not name the option


@dataclass
class Row:
    """What was measured of one way to run. work: FLOPs of the blocks. seconds: of the processor, in each round."""

    kind: str
    options: dict[str, Any]
    work: float = 0.0
    skipped: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    videos: list[Tensor] = field(default_factory=list)
    judged: list[dict[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        option, value = next(iter(self.options.items()), ("", "none"))
        return f"{option}={value}" if self.kind in NAMED else value.partition(":")[0]


class Work:
    """Count the FLOPs of transformers' blocks while they run: products and attention, a multiply-add as two."""

    def __init__(self, transformers: Iterable[nn.Module]) -> None:
        self.flops = 0
        for block in (block for each in transformers for block in each.blocks):  # pyright: ignore[reportGeneralTypeIssues]
            block.register_forward_pre_hook(self._block)
            block.q_proj.register_forward_pre_hook(self._attention)

    def _block(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        rows, tokens, width = args[0].shape
        self.flops += rows * tokens * 16 * width**2

    def _attention(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        rows, tokens, width = args[0].shape
        self.flops += rows * (tokens * 8 * width**2 + 4 * tokens**2 * width)


def measure(pack: str, samples: int, steps: int, kinds: Sequence[str] = tuple(RUNS)) -> list[Row]:
    """Make the videos of a pack in each way, a batch in all ways before the next batch."""
    rows = [Row(kind, options) for kind in dict.fromkeys(("none", *kinds)) for options in RUNS[kind]]
    modes = dict.fromkeys(row.options.get("quantize") for row in rows)
    pipes = {mode: cogvid.load(pack, device="cpu", quantize=mode) for mode in modes}
    pipe = pipes[None]
    work = Work(each.transformer for each in pipes.values())
    generator, rng = torch.Generator().manual_seed(1234), random.Random(1234)
    options: dict[str, Any] = {"two": 0.0} if pipe.model.conditions else {}
    scenes = sample_scenes(samples, generator, held_out=True, **options)
    truth = to_uint8(render(scenes, pipe.model.num_frames, pipe.model.height))
    prompts = [prompt_for(scenes, i, rng) for i in range(samples)]

    def run(row: Row, begin: int, output_type: str) -> cogvid.Output:
        some = slice(begin, begin + BATCH)
        options: dict[str, Any] = {"seed": begin, "num_inference_steps": steps, "output_type": output_type}
        options |= {name: value for name, value in row.options.items() if name != "quantize"}
        call = pipes[row.options.get("quantize")]
        return call(prompts[some], **options, progress=False, **_images(pipe, truth[some]))

    for _ in range(ROUNDS):
        for row in rows:
            begun = time.process_time()
            run(row, 0, "latent")
            row.seconds.append(time.process_time() - begun)
    for begin in range(0, samples, BATCH):
        for row in rows:
            work.flops = 0
            out = run(row, begin, "uint8")
            row.work += work.flops
            row.skipped.append(len(out.skipped_steps or []))
            row.videos += list(out.frames)
        print(f"{pack}: {begin + BATCH} of {samples} videos of each row", file=sys.stderr, flush=True)
    for row in rows:
        judged = pipe.model.conditions
        row.judged = [
            judge(video, truth[i], scenes, i) if judged else judge_words(video, scenes, i)
            for i, video in enumerate(row.videos)
        ]
    return rows


def _images(pipe: Any, truth: Tensor) -> dict[str, Any]:
    return {"image": [Image.fromarray(video[0].numpy()) for video in truth]} if pipe.model.conditions else {}


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Return of each row its kind, name, mean of steps with a skip, shares of work and time, likeness, and meters."""
    first, found = rows[0], []
    for row in rows:
        frames = [pair for a, b in zip(row.videos, first.videos, strict=True) for pair in zip(a, b, strict=True)]
        likeness = {
            "psnr": statistics.fmean(min(psnr(x, y, 255) or 99.0, 99.0) for x, y in frames),
            "ssim": statistics.fmean(ssim(x, y) for x, y in frames),
        }
        meters = [name for name in METERS if any(name in each for each in first.judged)]
        found.append(
            {
                "kind": row.kind,
                "name": row.name,
                "skips": statistics.fmean(row.skipped) if "step_cache" in row.options else None,
                "work": row.work / first.work,
                "time": min(row.seconds) / min(first.seconds),
                **(dict.fromkeys(likeness) if row is first else likeness),
                **{name: statistics.fmean(each[name] for each in row.judged if name in each) for name in meters},
            }
        )
    return found


def table(found: list[dict[str, Any]], steps: int) -> list[str]:
    """Return the lines of a table."""
    meters = [name for name in METERS if name in found[0]]
    lines = [
        f"| run | steps with a skip, of {steps} | work | time | PSNR | SSIM | {' | '.join(meters)} |",
        "|---|" + "--:|" * (5 + len(meters)),
    ]
    digits = {"skips": 1, "work": 2, "time": 2, "psnr": 1, "ssim": 3} | {
        name: 1 if "dB" in name else 2 for name in meters
    }
    for row in found:
        name = row["name"] if row["kind"] == "none" else f"`{row['name']}`"
        cells = ["" if row[name] is None else f"{row[name]:.{places}f}" for name, places in digits.items()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw PSNR against work, a panel for each pack and a line for each kind."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(5 * len(found), 3.8), sharey=True, squeeze=False)
    for axis, (pack, rows) in zip(axes[0], found.items(), strict=True):
        for kind in RUNS:
            line = sorted((row["work"], row["psnr"]) for row in rows if row["kind"] == kind != "none")
            if line:
                axis.plot(*zip(*line, strict=True), marker="o", label=kind)
        axis.set(title=pack, xlabel="FLOPs of the blocks, without a cache = 1")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("PSNR to the run without, dB")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", nargs="+", default=["tiny-i2v", "tiny-t2v"], help="shipped packs or directories")
    parser.add_argument("--samples", type=int, default=40, help="videos for each row, at least 1")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="KIND")
    parser.add_argument("--write", action="store_true", help="write the table and the plot")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, for `cogvid report`")
    args = parser.parse_args(argv)
    if args.samples < 1:
        parser.error(f"samples: got {args.samples}, want at least 1")
    parts, found = [_conditions(args)], {}
    for pack in args.packs:
        found[pack] = figures(measure(pack, args.samples, args.steps, args.kinds))
        parts.append(f"**{pack}**\n\n" + "\n".join(table(found[pack], args.steps)))
    text = "\n\n".join(parts)
    print(text)
    if args.json:
        command = " ".join(["python scripts/step_cache_curve.py", *(sys.argv[1:] if argv is None else argv)])
        values = {"kind": "curves", "header": header(torch.device("cpu"), command), "packs": found}
        args.json.write_text(json.dumps(values) + "\n")
    if args.write:
        plot(found, PLOT)
        page = PAGE.read_text()
        PAGE.write_text(re.sub(r"(?<=<!-- curve -->\n).*(?=\n<!-- end -->)", lambda _: text, page, flags=re.DOTALL))


def _conditions(args: argparse.Namespace) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=PAGE.parent)
    return (
        f"`python scripts/step_cache_curve.py --samples {args.samples} --steps {args.steps} --write`, commit "
        f"{commit.stdout.strip()}, {cpu_name()}, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}, fp32."
    )


if __name__ == "__main__":
    main()
