"""Check what a call is given beside its options: prompts, embeddings, videos, seeds and generators."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from cogvid.config import ModelConfig
from cogvid.media.tokenizer import check_text
from cogvid.options import check_int
from cogvid.parallel.share import share
from cogvid.run.settings import check_seed
from cogvid.sampling.samplers import Generators


@dataclass(frozen=True)
class Inputs:
    """What a call is given beside its options, checked.

    prompts, negatives: strings, or embeddings `[prompts, L, E]`; negatives is None without guidance.
    num_videos_per_prompt: of each. generator: one for all videos, or one for each. seeds: of the generators; None if
    the caller gave generators.
    """

    prompts: list[str] | Tensor
    negatives: list[str] | Tensor | None
    num_videos_per_prompt: int
    generator: Generators
    seeds: list[int] | None

    @property
    def batch(self) -> int:
        """The number of videos."""
        return len(self.prompts) * self.num_videos_per_prompt

    def record(self) -> dict[str, Any]:
        """Return what a record says of the inputs."""
        return {
            "prompt": None if isinstance(self.prompts, Tensor) else self.prompts,
            "negative_prompt": None if isinstance(self.negatives, Tensor) else self.negatives,
            "num_videos_per_prompt": self.num_videos_per_prompt,
            "seed": self.seeds[0] if self.seeds else None,
            "seeds": self.seeds,
        }


def check_inputs(
    model: ModelConfig,
    prompt: str | Sequence[str] | None,
    prompt_embeds: Tensor | None,
    negative: tuple[str | Sequence[str], Tensor | None, str] | None,
    num_videos_per_prompt: int,
    seed: int | None,
    generator: Generators | None,
) -> Inputs:
    """Check the arguments of these names.

    negative: the negative prompt, its embeddings and `unconditional_text`; None without guidance.
    """
    check_int("num_videos_per_prompt", num_videos_per_prompt, 1)
    prompts = _prompts(prompt, prompt_embeds, model)
    negatives = None if negative is None else _negatives(*negative, prompts, model)
    generator, seeds = _generators(seed, generator, len(prompts) * num_videos_per_prompt)
    return Inputs(prompts, negatives, num_videos_per_prompt, generator, seeds)


def frames_to_use(video: Any, num_frames: int | None) -> int:
    """Return how many frames of a video are used: those asked for, which must be there, or all."""
    num_frames = len(video) if num_frames is None else num_frames
    check_int("num_frames", num_frames, 1, len(video))
    return num_frames


def _prompts(prompt: str | Sequence[str] | None, embeds: Tensor | None, model: ModelConfig) -> list[str] | Tensor:
    if (prompt is None) == (embeds is None):
        raise ValueError(f"prompt, prompt_embeds: got {'neither' if prompt is None else 'both'}, want one of them")
    if embeds is not None:
        width = model.transformer.text_embed_dim
        if embeds.ndim != 3 or embeds.shape[2] != width:
            raise ValueError(f"prompt_embeds: got shape {tuple(embeds.shape)}, want [prompts, L, {width}]")
        return embeds
    return _strings("prompt", prompt)


def _negatives(
    prompt: str | Sequence[str], embeds: Tensor | None, text: str, prompts: list[str] | Tensor, model: ModelConfig
) -> list[str] | Tensor:
    count = len(prompts)
    if text == "zeros":
        if prompt or embeds is not None:
            name = "negative_prompt" if embeds is None else "negative_prompt_embeds"
            raise ValueError(f"{name}: got one with unconditional_text='zeros', want none")
        length = prompts.shape[1] if isinstance(prompts, Tensor) else model.text_length
        return torch.zeros(count, length, model.transformer.text_embed_dim)
    if embeds is not None:
        if prompt:
            raise ValueError("negative_prompt, negative_prompt_embeds: got both, want one of them")
        length = prompts.shape[1] if isinstance(prompts, Tensor) else model.text_length
        if tuple(embeds.shape) != (shape := (count, length, model.transformer.text_embed_dim)):
            raise ValueError(f"negative_prompt_embeds: got shape {tuple(embeds.shape)}, want {shape} as the prompts'")
        return embeds
    prompts = _strings("negative_prompt", prompt)
    if len(prompts) not in (1, count):
        raise ValueError(f"negative_prompt: got {len(prompts)}, want 1 or one per prompt, {count}")
    return prompts * (count // len(prompts))


def _strings(name: str, prompt: object) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"{name}: got {prompt!r:.60}, want a string or a list of strings")
    for each in prompts:
        check_text(name, each)
    return list(prompts)


def _generators(seed: int | None, generator: Generators | None, batch: int) -> tuple[Generators, list[int] | None]:
    """Return the caller's generators, or else those of the seeds, one for each video, and the seeds."""
    if generator is not None:
        if seed is not None:
            raise ValueError("seed, generator: got both, want one of them")
        if not isinstance(generator, Generator) and len(generator) != batch:
            raise ValueError(f"generator: got a list of {len(generator)}, want one per video, {batch}")
        return generator, None
    if seed is None:
        seed = share(lambda: secrets.randbelow(2**32))
    check_seed(seed, batch)
    seeds = [seed + k for k in range(batch)]
    return [Generator("cpu").manual_seed(each) for each in seeds], seeds
