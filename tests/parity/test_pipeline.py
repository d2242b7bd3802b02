"""Whole pipelines against diffusers' with the same generator: latents and frames.

The grid is {models} x {samplers} x {guidance} x {two sizes} x {odd and even latent counts}. By default a part of it
runs in which every two choices meet; the rest is marked slow.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cogvid
from measure import rel_rms
from references import TEXT_LEN, TRANSFORMER_VARIANTS, as_video_to_video, picture, save_pipeline, tiny_pipeline
from tests import tolerances
from tests.frames import assert_frames_equal
from tests.schedulers import SCHEDULERS

SIZES = {"64x96": (64, 96), "96x48": (96, 48)}
GUIDANCE: dict[str, dict[str, Any]] = {
    "off": {"guidance_scale": 1.0, "use_dynamic_cfg": False},
    "on": {"guidance_scale": 2.0, "use_dynamic_cfg": False},
    "dynamic": {"guidance_scale": 2.0, "use_dynamic_cfg": True},
}
FRAMES = {"odd": 9, "even": 8}  # pixel frames for an odd and an even count of latent frames, 3 and 2
STEPS = 3
IMAGE = picture(50, 70)
PROMPT, NEGATIVE = "a red", "two dogs"

Case = tuple[str, str, str, str, str]
GRID: list[Case] = list(itertools.product(TRANSFORMER_VARIANTS, SCHEDULERS, GUIDANCE, SIZES, FRAMES))


def pairwise(grid: list[Case]) -> set[Case]:
    """Pick cases, greedily, until every two choices of different axes have met in one."""

    def pairs(case: Case) -> set[tuple[int, str, int, str]]:
        return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}

    chosen: set[Case] = set()
    open_pairs = set().union(*map(pairs, grid))
    while open_pairs:
        best = max(grid, key=lambda case: len(pairs(case) & open_pairs))
        chosen.add(best)
        open_pairs -= pairs(best)
    return chosen


DEFAULT = pairwise(GRID)


@dataclass(frozen=True)
class Pair:
    """The same tiny model in diffusers and here."""

    reference: Any
    ours: cogvid.Pipeline
    directory: Path

    def run_reference(self, scheduler: str = "ddim", **options: Any) -> Any:
        self.reference.scheduler = SCHEDULERS[scheduler].from_config(self.reference.scheduler.config)
        return self.reference(**options, max_sequence_length=TEXT_LEN)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    made: dict[tuple[Any, ...], Pair] = {}

    def get(variant: str, size: str = "64x96") -> Pair:
        # Only 5B-I2V has a table of positions, and so a size of its own.
        options = {}
        if variant == "5b-i2v":
            height, width = SIZES[size]
            options = {"sample_height": height // 8, "sample_width": width // 8}
        key = (variant, *options.values())
        if key not in made:
            reference, spiece = tiny_pipeline(variant, **options)
            directory = save_pipeline(reference, spiece, tmp_path_factory.mktemp(variant))
            made[key] = Pair(reference, cogvid.load(directory, device="cpu"), directory)
        return made[key]

    return get


def inputs(variant: str, size: str = "64x96", count: str = "odd") -> dict[str, Any]:
    height, width = SIZES[size]
    options = {"height": height, "width": width, "num_frames": FRAMES[count], "num_inference_steps": STEPS}
    return options | ({"image": IMAGE} if variant.endswith("i2v") else {})


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quietly(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call without the warnings about sizes and step counts, which `tests/unit/test_pipeline.py` tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


def test_default_grid_meets_every_pair() -> None:
    assert len(GRID) == 120
    for i, j in itertools.combinations(range(5), 2):
        assert {(c[i], c[j]) for c in DEFAULT} == {(c[i], c[j]) for c in GRID}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id="-".join(c), marks=() if c in DEFAULT else pytest.mark.slow) for c in GRID],
)
@pytest.mark.every(2)
def test_pipeline(pair: Callable[..., Pair], case: Case) -> None:
    variant, scheduler, guidance, size, count = case
    both = pair(variant, size)
    options = {"prompt": PROMPT, "negative_prompt": NEGATIVE, **inputs(variant, size, count), **GUIDANCE[guidance]}
    latents: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., dict[str, Tensor]]:
        def callback(*arguments: Any) -> dict[str, Tensor]:  # pipeline, index, timestep, values
            latents[name] = arguments[3]["latents"]
            return arguments[3]

        return callback

    expected = both.run_reference(
        scheduler, **options, generator=generator(), output_type="np", callback_on_step_end=keep("reference")
    ).frames
    actual = quietly(
        both.ours,
        **options,
        scheduler=scheduler,
        generator=generator(),
        output_type="np",
        callback_on_step_end=keep("ours"),
        progress=False,
    ).frames
    assert rel_rms(latents["ours"], latents["reference"]) <= tolerances.PIPELINE_LATENTS
    assert_frames_equal(actual, expected)


SMALL: dict[str, Any] = {
    "height": 32,
    "width": 48,
    "num_frames": 9,
    "num_inference_steps": STEPS,
    "guidance_scale": 2.0,
}


@pytest.mark.parametrize("variant", ["2b", "1.5-5b"])
def test_latent_output_has_the_layout_and_the_padding_of_diffusers(pair: Callable[..., Pair], variant: str) -> None:
    both = pair(variant)
    expected = both.run_reference(prompt=PROMPT, **SMALL, generator=generator(), output_type="latent").frames
    out = quietly(both.ours, PROMPT, **SMALL, scheduler="ddim", seed=3, output_type="latent", progress=False)
    assert out.seed == 3
    assert rel_rms(out.frames, expected) <= tolerances.PIPELINE_LATENTS


def test_output_types_agree_with_diffusers(pair: Callable[..., Pair]) -> None:
    both = pair("5b")
    ours, theirs = {}, {}
    for kind in ("np", "pt", "pil", "uint8"):
        ours[kind] = quietly(
            both.ours, PROMPT, **SMALL, scheduler="ddim", seed=3, output_type=kind, progress=False
        ).frames
    for kind in ("np", "pt", "pil"):
        theirs[kind] = both.run_reference(prompt=PROMPT, **SMALL, generator=generator(), output_type=kind).frames
        assert type(ours[kind]) is type(theirs[kind])
    assert_frames_equal(ours["np"], theirs["np"])
    assert ours["pt"].dtype == theirs["pt"].dtype
    assert_frames_equal(ours["pt"].numpy(), theirs["pt"].numpy())
    assert [len(video) for video in ours["pil"]] == [len(video) for video in theirs["pil"]] == [9]
    assert ours["pil"][0][0].mode == theirs["pil"][0][0].mode == "RGB"
    levels, their_levels = (np.stack([np.stack(v) for v in videos]) for videos in (ours["pil"], theirs["pil"]))
    # Both round; what their rounding was given says where the two may differ.
    assert_frames_equal(levels, theirs["np"])
    assert_frames_equal(their_levels, theirs["np"])
    assert ours["uint8"].dtype == torch.uint8
    assert np.array_equal(ours["uint8"].numpy(), levels)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("generators", ["one generator", "one per video"])
@pytest.mark.parametrize("variant", ["5b", "1.5-5b-i2v"])
def test_several_prompts(pair: Callable[..., Pair], variant: str, generators: str, scheduler: str) -> None:
    both = pair(variant)
    prompts, negatives = [PROMPT, "the blue square"], ["two dogs", ""]
    images = {"image": [picture(50, 70), picture(40, 40, seed=1)]} if variant.endswith("i2v") else {}
    make = generator if generators == "one generator" else lambda: [generator(5), generator(6)]
    options = {"prompt": prompts, "negative_prompt": negatives, **SMALL, **images, "output_type": "latent"}
    expected = both.run_reference(scheduler, **options, generator=make(), use_dynamic_cfg=True).frames
    actual = quietly(
        both.ours, **options, generator=make(), scheduler=scheduler, use_dynamic_cfg=True, progress=False
    ).frames
    assert rel_rms(actual, expected) <= tolerances.PIPELINE_LATENTS


def test_several_videos_per_prompt_are_the_prompt_repeated(pair: Callable[..., Pair]) -> None:
    """diffusers takes `num_videos_per_prompt` and ignores it, so it is asked for the same prompts several times."""
    both = pair("1.5-5b-i2v")
    prompts, images = [PROMPT, "the blue square"], [picture(50, 70), picture(40, 40, seed=1)]
    repeated = {"prompt": [p for p in prompts for _ in range(2)], "image": [i for i in images for _ in range(2)]}
    expected = both.run_reference(**repeated, **SMALL, generator=generator(), output_type="latent").frames
    actual = quietly(
        both.ours, prompts, image=images, num_videos_per_prompt=2, **SMALL,
        scheduler="ddim", generator=generator(), output_type="latent", progress=False,
    ).frames  # fmt: skip
    assert rel_rms(actual, expected) <= tolerances.PIPELINE_LATENTS
    assert rel_rms(actual[0], actual[1]) > 0.1


@pytest.mark.parametrize("negative", ["given", "encoded"])
def test_given_embeddings_and_latents(pair: Callable[..., Pair], negative: str) -> None:
    both = pair("5b")
    g = generator()
    tensors = {"prompt_embeds": torch.randn(2, TEXT_LEN, 40, generator=g)}
    if negative == "given":
        tensors["negative_prompt_embeds"] = torch.randn(2, TEXT_LEN, 40, generator=g)
    tensors["latents"] = torch.randn(2, 3, 16, 4, 6, generator=g)
    expected = both.run_reference("dpm", **tensors, **SMALL, generator=generator(1), output_type="latent").frames
    out = quietly(
        both.ours, **tensors, **SMALL, scheduler="dpm", use_dynamic_cfg=False, generator=generator(1),
        output_type="latent", progress=False,
    )  # fmt: skip
    assert rel_rms(out.frames, expected) <= tolerances.PIPELINE_LATENTS
    assert out.provenance["given"] == ["generator", "latents", *(k for k in tensors if k != "latents")]
    assert out.provenance["prompt"] is None


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_callback_replaces_latents_as_in_diffusers(pair: Callable[..., Pair], scheduler: str) -> None:
    both = pair("1.5-5b")
    steps = []

    def callback(_: Any, i: int, t: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append((i, int(t)))
        return {"latents": values["latents"] * 0.5} if i == 1 else {}

    options = {"prompt": PROMPT, **SMALL, "output_type": "latent", "callback_on_step_end": callback}
    expected = both.run_reference(scheduler, **options, generator=generator()).frames
    actual = quietly(
        both.ours, **options, scheduler=scheduler, use_dynamic_cfg=False, generator=generator(), progress=False
    ).frames
    assert steps[:STEPS] == steps[STEPS:]
    assert rel_rms(actual, expected) <= tolerances.PIPELINE_LATENTS


def test_image_latent_scales(pair: Callable[..., Pair]) -> None:
    """diffusers multiplies by the factor, or, with `invert_scale_latents`, by its inverse; the third is neither."""
    both = pair("1.5-5b-i2v")
    options = {"prompt": PROMPT, "image": IMAGE, **SMALL, "output_type": "latent"}

    def ours(scale: str) -> Tensor:
        return quietly(both.ours, **options, image_latent_scale=scale, scheduler="ddim", seed=3, progress=False).frames

    config = both.reference.vae.config
    try:
        both.reference.vae.register_to_config(invert_scale_latents=False)
        multiplied = both.run_reference(**options, generator=generator()).frames
    finally:
        both.reference.vae.register_to_config(invert_scale_latents=True)
    assert both.reference.vae.config == config
    assert rel_rms(ours("multiply"), multiplied) <= tolerances.PIPELINE_LATENTS
    factor = both.reference.vae_scaling_factor_image
    try:
        both.reference.vae_scaling_factor_image = 1.0
        raw = both.run_reference(**options, generator=generator()).frames
    finally:
        both.reference.vae_scaling_factor_image = factor
    assert rel_rms(ours("none"), raw) <= tolerances.PIPELINE_LATENTS
    assert rel_rms(raw, multiplied) > 1e-3


CLIP = [picture(40, 50, seed=i) for i in range(17)]


@pytest.mark.parametrize(
    ("variant", "frames", "scheduler", "strength"),
    [
        ("2b", 9, "ddim", 0.8),
        ("2b", 8, "dpm", 1.0),
        ("5b", 9, "dpm", 0.5),
        ("5b", 16, "ddim", 0.5),
        ("1.5-5b", 8, "dpm", 0.8),
        ("1.5-5b", 16, "ddim", 0.5),
    ],
)
def test_video_to_video(pair: Callable[..., Pair], variant: str, frames: int, scheduler: str, strength: float) -> None:
    both = pair(variant)
    options = {
        "prompt": PROMPT, "video": CLIP[:frames], "height": 32, "width": 48, "strength": strength,
        "num_inference_steps": 5, "guidance_scale": 2.0, "use_dynamic_cfg": True, "output_type": "np",
    }  # fmt: skip
    reference = as_video_to_video(both.reference)
    reference.scheduler = SCHEDULERS[scheduler].from_config(both.reference.scheduler.config)
    expected = reference(**options, generator=generator(), max_sequence_length=TEXT_LEN).frames
    out = quietly(both.ours, **options, scheduler=scheduler, generator=generator(), progress=False)
    assert_frames_equal(out.frames, expected)
    assert len(out.provenance["timesteps"]) == int(5 * strength)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("generators", ["one generator", "one per video"])
def test_video_to_video_with_several_prompts(pair: Callable[..., Pair], generators: str, scheduler: str) -> None:
    """One generator draws the posterior once for all videos, a list once for each.

    With a list diffusers takes an item of `video` per generator, and so fails on one clip for two prompts; given the
    clip twice it runs, and gives what is meant by one clip for all prompts here.
    """
    both = pair("5b")
    one = generators == "one generator"
    make = generator if one else lambda: [generator(5), generator(6)]
    options: dict[str, Any] = {
        "prompt": [PROMPT, "the blue square"], "height": 32, "width": 48, "num_inference_steps": 5,
        "guidance_scale": 2.0, "use_dynamic_cfg": True, "output_type": "latent",
    }  # fmt: skip
    reference = as_video_to_video(both.reference)
    reference.scheduler = SCHEDULERS[scheduler].from_config(both.reference.scheduler.config)
    clip = CLIP[:9]
    options_there = {**options, "max_sequence_length": TEXT_LEN}
    if not one:
        with pytest.raises(IndexError):
            reference(video=clip, **options_there, generator=make())
    expected = reference(video=clip if one else [clip, clip], **options_there, generator=make()).frames
    out = quietly(both.ours, video=clip, **options, scheduler=scheduler, generator=make(), progress=False)
    assert rel_rms(out.frames, expected) <= tolerances.PIPELINE_LATENTS
    assert rel_rms(out.frames[0], out.frames[1]) > 0.1
    # As many videos of a prompt as one of the prompt repeated.
    repeated = {**options, "prompt": [PROMPT, PROMPT]}
    expected = quietly(both.ours, video=clip, **repeated, scheduler=scheduler, generator=make(), progress=False).frames
    several = {**options, "prompt": PROMPT, "num_videos_per_prompt": 2}
    actual = quietly(both.ours, video=clip, **several, scheduler=scheduler, generator=make(), progress=False).frames
    assert rel_rms(actual, expected) <= tolerances.PIPELINE_LATENTS


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_video_to_video_with_odd_latent_counts_on_temporal_patches(pair: Callable[..., Pair], scheduler: str) -> None:
    """diffusers refuses these clips. Given latents that repeat the first one in front, as in training, it runs."""
    both = pair("1.5-5b")
    reference = as_video_to_video(both.reference)
    reference.scheduler = SCHEDULERS[scheduler].from_config(both.reference.scheduler.config)
    options = {"prompt": PROMPT, "num_inference_steps": 5, "guidance_scale": 2.0, "output_type": "latent"}
    size = {"height": 32, "width": 48}

    g = generator()
    video = reference.video_processor.preprocess_video(CLIP, **size)
    z = reference.vae.encode(video).latent_dist.sample(g).transpose(1, 2) * reference.vae_scaling_factor_image
    z = torch.cat([z[:, :1], z], dim=1)
    noise = torch.randn(z.shape, generator=g)
    reference.scheduler.set_timesteps(5)
    latents = reference.scheduler.add_noise(z, noise, reference.scheduler.timesteps[1:2])
    expected = reference(**options, latents=latents, **size, generator=g, max_sequence_length=TEXT_LEN).frames

    actual = quietly(
        both.ours, **options, video=CLIP, **size, scheduler=scheduler, use_dynamic_cfg=False,
        generator=generator(), progress=False,
    ).frames  # fmt: skip
    assert rel_rms(actual, expected) <= tolerances.PIPELINE_LATENTS
