"""Measure what a tiny pack can do, from the pixels of its videos, on combinations that training never had.

    python scripts/eval_tiny.py tiny-i2v --samples 200 --sheet sheet.png

An image-to-video pack gets first frames of held-out colour x shape x motion combinations: one shape, one shape on a
kind of background that training never shows, two shapes of which the prompt names one, and, as a control, one shape
and an empty prompt. A text-to-video pack gets the prompts alone. Everything is measured from decoded pixels.
The last line printed is JSON. scipy is needed, which the test extra installs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from scipy import ndimage  # noqa: F401 - `observe` needs it; its absence is found here, before any video is made
from torch import Tensor
from tqdm import tqdm

import cogvid
from tiny_world import COLOURS, MOTIONS, SHAPES, Scenes, observe, prompt_for, render, sample_scenes

BATCH = 20


def to_uint8(pixels: Tensor) -> Tensor:
    """Turn `[n, 3, F, H, W]` in [-1, 1] into uint8 `[n, F, H, W, 3]`."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


def psnr(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10(max(((a.float() - b.float()) / 255).square().mean().item(), 1e-10))


def generate(pipe: Any, prompts: list[str], images: list[Image.Image] | None, args: argparse.Namespace) -> Tensor:
    """Make one uint8 video `[F, H, W, 3]` per prompt, `[n, F, H, W, 3]` in all."""
    videos = []
    for i in tqdm(range(0, len(prompts), BATCH), leave=False):
        settings: dict[str, Any] = {} if images is None else {"image": images[i : i + BATCH]}
        out = pipe(
            prompts[i : i + BATCH],
            seed=args.seed + i,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            use_dynamic_cfg=args.use_dynamic_cfg,
            scheduler=args.scheduler,
            output_type="uint8",
            progress=False,
            **settings,
        )
        videos.append(out.frames)
    return torch.cat(videos)


def judge(video: Tensor, truth: Tensor, scenes: Scenes, i: int) -> dict[str, float]:
    """Measure an image-to-video result against its scene; 1.0 is yes and 0.0 is no."""
    tracks, wanted = observe(video[::2]), observe(truth[[0, -1]])
    named = _nearest(tracks, tuple(scenes.centre[i, 0].tolist()))
    reference = _nearest(wanted, tuple(scenes.centre[i, 0].tolist()))
    row = {"motion": 0.0, "colour": 0.0, "first frame dB": psnr(video[0], truth[0]), "video dB": psnr(video, truth)}
    if named is not None and named.last is not None:
        row["motion"] = float(named.motion == MOTIONS[int(scenes.motion[i])])
        row["colour"] = float(named.last.colour == COLOURS[int(scenes.colour[i, 0])])
        if reference is not None and reference.last is not None:
            row["end error px"] = math.dist(named.last.centre, reference.last.centre) * video.shape[1]
            both = (named.last.mask & reference.last.mask).sum() / (named.last.mask | reference.last.mask).sum()
            row["end IoU"] = both.item()
    if scenes.two[i]:
        other = _nearest(tracks, tuple(scenes.centre[i, 1].tolist()))
        row["other still"] = float(other is not None and other is not named and other.motion == "still")
        row["both right"] = row["motion"] * row["other still"]
    return row


def judge_words(video: Tensor, scenes: Scenes, i: int) -> dict[str, float]:
    """Measure a text-to-video result: one shape of the right name that does the right thing."""
    tracks = observe(video[::2])
    seen = tracks[0] if tracks else None
    row = {
        "one shape": float(len(tracks) == 1),
        "colour": float(seen is not None and seen.first.colour == COLOURS[int(scenes.colour[i, 0])]),
        "shape": float(seen is not None and seen.first.shape == SHAPES[int(scenes.shape[i, 0])]),
        "motion": float(seen is not None and seen.motion == MOTIONS[int(scenes.motion[i])]),
    }
    row["all right"] = row["colour"] * row["shape"] * row["motion"]
    return row


def _nearest(tracks: list, centre: tuple[float, ...]) -> Any:
    track = min(tracks, key=lambda t: math.dist(t.first.centre, centre), default=None)
    return track if track is not None and math.dist(track.first.centre, centre) < 0.12 else None


def contact_sheet(videos: Tensor, prompts: list[str], path: Path, columns: int = 9) -> None:
    """Write a PNG with one row per video and evenly spaced frames from left to right."""
    count, frames, height, width, _ = videos.shape
    scale, margin = 96 / height, 250
    chosen = torch.linspace(0, frames - 1, columns).round().long()
    sheet = Image.new("RGB", (margin + columns * 98, count * 98), "white")
    for row, (video, prompt) in enumerate(zip(videos, prompts, strict=True)):
        ImageDraw.Draw(sheet).text((6, row * 98 + 40), prompt or "(empty prompt)", fill="black")
        for column, frame in enumerate(video[chosen]):
            picture = Image.fromarray(frame.numpy()).resize((round(width * scale), 96), Image.Resampling.NEAREST)
            sheet.paste(picture, (margin + column * 98, row * 98))
    sheet.save(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", help="a shipped pack's name or a directory")
    parser.add_argument("--samples", type=int, default=200, help="videos per row of the table, at least 1")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, help="the pack's recommendation by default")
    parser.add_argument("--use-dynamic-cfg", metavar="RULE", help="constant, diffusers, cosine or falling")
    parser.add_argument("--scheduler", choices=("dpm", "ddim"))
    parser.add_argument("--dtype", help="float32, bfloat16 or float16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="where a contact sheet goes, as PNG")
    args = parser.parse_args(argv)
    if args.samples < 1:
        parser.error(f"samples: got {args.samples}, want at least 1")
    pipe = cogvid.load(args.pack, dtype=args.dtype)
    generator, rng = torch.Generator().manual_seed(1234 + args.seed), random.Random(1234 + args.seed)
    if pipe.model.conditions:
        kinds: dict[str, dict[str, Any]] = {
            "one shape": {"two": 0.0},
            "unseen background": {"two": 0.0, "radial": True},
            "two shapes": {"two": 1.0},
            "empty prompt": {"two": 0.0},
        }
    else:
        kinds = {"words alone": {"two": 0.0}}

    shown: list[Tensor] = []
    captions: list[str] = []
    results: dict[str, dict[str, float]] = {}
    for kind, options in kinds.items():
        scenes = sample_scenes(args.samples, generator, held_out=True, **options)
        empty = kind == "empty prompt"
        prompts = ["" if empty else prompt_for(scenes, i, rng) for i in range(len(scenes))]
        truth = to_uint8(render(scenes, pipe.model.num_frames, pipe.model.height))
        images = [Image.fromarray(t[0].numpy()) for t in truth] if pipe.model.conditions else None
        began = time.monotonic()
        videos = generate(pipe, prompts, images, args)
        seconds = (time.monotonic() - began) / len(videos)
        rows = [
            judge_words(video, scenes, i) if images is None else judge(video, truth[i], scenes, i)
            for i, video in enumerate(videos)
        ]
        results[kind] = {
            name: statistics.median(values) if name in ("end error px", "end IoU") else statistics.fmean(values)
            for name in dict.fromkeys(name for row in rows for name in row)
            if (values := [row[name] for row in rows if name in row])
        } | {"seconds a video": seconds}
        count = 4 if images is not None else 16
        shown.append(videos[:count])
        captions += prompts[:count]
        figures = ", ".join(f"{name} {value:.3f}" for name, value in results[kind].items())
        print(f"{kind:18s} {len(videos)} videos: {figures}", flush=True)
    if args.sheet:
        contact_sheet(torch.cat(shown), captions, args.sheet)
    print(json.dumps({"pack": args.pack, "steps": args.steps, "samples": args.samples, **results}))


if __name__ == "__main__":
    main()
