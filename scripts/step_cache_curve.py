"""Measure what step caches and guidance intervals save and what they cost, and write a table and a plot.

    OMP_NUM_THREADS=1 python scripts/step_cache_curve.py --samples 40 --write

Each pack makes the same videos, two at a time, from the same noise, without and with each cache. Work is the FLOPs of
the transformer's blocks, counted from the calls of blocks and of attention. Time is the processor time of sampling
the first two videos, the least of several rounds in which all runs take turns; use one thread. Both are shares of
those without a cache. PSNR and SSIM are to the videos without a cache; the other columns are what `eval_tiny.py` sees
in the pixels. `--write` replaces the table in scripts/STEP_CACHES.md and the plot beside this file; the table is
printed in any case.
"""

from __future__ import annotations

import argparse
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import cogvid
from cogvid.run.compare import psnr, ssim
from cogvid.run.machine import cpu_name
from eval_tiny import judge, judge_words, to_uint8
from tiny_world import prompt_for, render, sample_scenes

PAGE = Path(__file__).parent / "STEP_CACHES.md"
PLOT = Path(__file__).parent / "step_caches.png"
BATCH, ROUNDS = 2, 5
TEACACHE = "teacache={}:coefficients=1/0"  # no polynomial was fitted for the packs: the distance is taken as it is
RUNS: dict[str, list[dict[str, Any]]] = {
    "none": [{}],
    "first-block": [{"step_cache": f"first-block={value}"} for value in (0.05, 0.1, 0.2, 0.3)],
    "teacache": [{"step_cache": TEACACHE.format(value)} for value in (0.2, 0.3, 0.5, 0.8)],
    "pyramid": [{"step_cache": f"pyramid={value}"} for value in (2, 3, 4)],
    "guidance interval": [{"guidance_interval": value} for value in ("0-0.75", "0-0.5", "0-0.25")],
}


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
        return next(iter(self.options.values()), "none").partition(":")[0]


class Work:
    """Count the FLOPs of a transformer's blocks while they run: products and attention, a multiply-add as two."""

    def __init__(self, transformer: nn.Module) -> None:
        self.flops = 0
        for block in transformer.blocks:  # pyright: ignore[reportGeneralTypeIssues]
            block.register_forward_pre_hook(self._block)
            block.q_proj.register_forward_pre_hook(self._attention)

    def _block(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        rows, tokens, width = args[0].shape
        self.flops += rows * tokens * 16 * width**2

    def _attention(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        rows, tokens, width = args[0].shape
        self.flops += rows * (tokens * 8 * width**2 + 4 * tokens**2 * width)


def measure(pack: str, samples: int, steps: int) -> list[Row]:
    """Make the videos of a pack in each way, a batch in all ways before the next batch."""
    pipe = cogvid.load(pack, device="cpu")
    work = Work(pipe.transformer)
    generator, rng = torch.Generator().manual_seed(1234), random.Random(1234)
    options: dict[str, Any] = {"two": 0.0} if pipe.model.conditions else {}
    scenes = sample_scenes(samples, generator, held_out=True, **options)
    truth = to_uint8(render(scenes, pipe.model.num_frames, pipe.model.height))
    prompts = [prompt_for(scenes, i, rng) for i in range(samples)]
    rows = [Row(kind, options) for kind, listed in RUNS.items() for options in listed]

    def run(row: Row, begin: int, output_type: str) -> cogvid.Output:
        some = slice(begin, begin + BATCH)
        options: dict[str, Any] = {"seed": begin, "num_inference_steps": steps, "output_type": output_type}
        return pipe(prompts[some], **options, progress=False, **_images(pipe, truth[some]), **row.options)

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


def table(rows: list[Row], steps: int) -> tuple[list[str], list[tuple[str, float, float]]]:
    """Return the table's lines, and (kind, share of work, PSNR) of each row for the plot."""
    first = rows[0]
    wanted = ("motion", "colour", "shape", "end IoU", "first frame dB")
    meters = [name for name in wanted if any(name in each for each in first.judged)]
    lines = [
        f"| run | steps with a skip, of {steps} | work | time | PSNR | SSIM | {' | '.join(meters)} |",
        "|---|" + "--:|" * (5 + len(meters)),
    ]
    points = []
    for row in rows:
        work = row.work / first.work
        seconds = min(row.seconds) / min(first.seconds)
        frames = [pair for a, b in zip(row.videos, first.videos, strict=True) for pair in zip(a, b, strict=True)]
        likeness = ["", ""]
        if row is not first:
            decibels = statistics.fmean(min(psnr(x, y, 255) or 99.0, 99.0) for x, y in frames)
            likeness = [f"{decibels:.1f}", f"{statistics.fmean(ssim(x, y) for x, y in frames):.3f}"]
            points.append((row.kind, work, decibels))
        means = [statistics.fmean(each[name] for each in row.judged if name in each) for name in meters]
        shown = [f"{mean:.1f}" if "dB" in name else f"{mean:.2f}" for name, mean in zip(meters, means, strict=True)]
        skips = f"{statistics.fmean(row.skipped):.1f}" if "step_cache" in row.options else ""
        name = f"`{row.name}`" if row.kind != "guidance interval" else f"`guidance_interval={row.name}`"
        cells = [name if row is not first else "none", skips, f"{work:.2f}", f"{seconds:.2f}", *likeness, *shown]
        lines.append("| " + " | ".join(cells) + " |")
    return lines, points


def plot(found: dict[str, list[tuple[str, float, float]]], path: Path) -> None:
    """Draw PSNR against work, a panel for each pack and a line for each kind."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(5 * len(found), 3.8), sharey=True, squeeze=False)
    for axis, (pack, points) in zip(axes[0], found.items(), strict=True):
        for kind in RUNS:
            line = sorted((work, decibels) for each, work, decibels in points if each == kind)
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
    parser.add_argument("--write", action="store_true", help="write the table and the plot")
    args = parser.parse_args(argv)
    if args.samples < 1:
        parser.error(f"samples: got {args.samples}, want at least 1")
    parts, found = [_conditions(args)], {}
    for pack in args.packs:
        lines, found[pack] = table(measure(pack, args.samples, args.steps), args.steps)
        parts.append(f"**{pack}**\n\n" + "\n".join(lines))
    text = "\n\n".join(parts)
    print(text)
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
