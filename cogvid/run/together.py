"""Videos that are sampled at once: those of a batch, and a replay of one of them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from cogvid.models.text import TextEncoder
from cogvid.parallel.share import lead
from cogvid.run.generate import Job, covers_of, write_video
from cogvid.run.pipeline import Pipeline

_KEPT_PROMPTS = 256


class RememberingEncoder(TextEncoder):
    """A text encoder that encodes each prompt once, by itself, so that its embedding does not depend on the others."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__(encoder.t5, encoder.tokenizer, encoder.device)
        self._encoder = encoder
        self._one = functools.lru_cache(_KEPT_PROMPTS)(self._encode)

    def __call__(self, prompts: Sequence[str], max_length: int) -> Tensor:
        return torch.cat([self._one(prompt, max_length).to(self.device) for prompt in prompts])

    def _encode(self, prompt: str, max_length: int) -> Tensor:
        return self._encoder([prompt], max_length).cpu()


@dataclass(frozen=True)
class Sampled:
    """A video that was sampled. frames: uint8 `[f, H, W, 3]`, decoded when they are taken. covers: of all videos."""

    job: Job
    frames: Iterable[Tensor]
    record: dict[str, Any]
    covers: Sequence[bytes]

    def write(self) -> dict[str, Any]:
        """Write the file of the job, whole or not at all, and return its record."""
        return lead(lambda frames: write_video(self.job, frames, self.record, self.covers), self.frames)


def sample_together(pipe: Pipeline, jobs: Sequence[Job]) -> list[Sampled]:
    """Sample the videos of jobs at once. They differ only in prompts, seed and image, and each has a seed.

    The record of each has what all of them were made of, and its own place among them, so that one of them can be made
    again. pipe: its text encoder must be a `RememberingEncoder` if there are several jobs.
    """
    inputs, seeds = dict(jobs[0].inputs), [job.inputs["seed"] for job in jobs]
    several = len(jobs) > 1
    if several:
        inputs |= {name: [job.inputs[name] for job in jobs] for name in ("prompt", "negative_prompt")}
        if inputs["image"] is not None:
            inputs["image"] = [job.inputs["image"] for job in jobs]
        inputs |= {"seed": None, "generator": [Generator("cpu").manual_seed(seed) for seed in seeds]}
    out = pipe(**inputs, output_type="stream")
    covers = [cover for job in jobs for cover in covers_of(job)] if several else []
    made: list[Sampled] = []
    for index, (job, frames) in enumerate(zip(jobs, out.frames, strict=True)):
        together = {"given": [], "seed": seeds[index], "seeds": seeds, "batch_size": len(jobs), "batch_index": index}
        made.append(Sampled(job, frames, {**out.provenance, **(together if several else {})}, covers))
    return made
