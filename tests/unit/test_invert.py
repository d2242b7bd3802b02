"""DDIM inversion on a shipped pack: how much of a video comes back, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import cogvid
from measure import rel_rms

PROMPT = "a red circle moves right"


@pytest.fixture(scope="module")
def pipe() -> cogvid.Pipeline:
    return cogvid.load("tiny-t2v", device="cpu")


@pytest.fixture(scope="module")
def clip(pipe: cogvid.Pipeline) -> Tensor:
    return pipe(PROMPT, seed=1, output_type="uint8", progress=False).frames[0]


def come_back(pipe: cogvid.Pipeline, clip: Tensor, steps: int) -> float:
    """Invert, sample, and return how far the latents are from those of the video."""
    found = cogvid.invert(pipe, clip, PROMPT, seed=7, num_inference_steps=steps, progress=False)
    back = pipe(
        PROMPT, latents=found.noise, scheduler="ddim", guidance_scale=1.0, num_inference_steps=steps,
        output_type="latent", progress=False,
    )  # fmt: skip
    return rel_rms(back.frames, found.clean)


@pytest.mark.slow
def test_a_video_comes_back_the_better_the_more_steps(pipe: cogvid.Pipeline, clip: Tensor) -> None:
    """The error of DDIM's step falls as 1 / steps."""
    fifty, hundred = come_back(pipe, clip, 50), come_back(pipe, clip, 100)
    assert hundred < 0.25
    assert hundred < 0.65 * fifty


def test_an_edit_keeps_to_the_video(pipe: cogvid.Pipeline, clip: Tensor) -> None:
    found = cogvid.invert(pipe, clip, seed=7, progress=False)
    options: dict[str, Any] = {"seed": 3, "output_type": "latent", "progress": False}
    edited = cogvid.edit(pipe, found, PROMPT, **options)
    assert rel_rms(edited.frames, found.clean) < 0.4
    assert rel_rms(pipe(PROMPT, scheduler="ddim", **options).frames, found.clean) > 0.8
    # One inversion serves several videos.
    two = cogvid.edit(pipe, found, [PROMPT, "a blue square moves left"], **options)
    assert rel_rms(two.frames[:1], edited.frames) < 1e-4


def test_what_cannot_be_inverted_is_refused(pipe: cogvid.Pipeline, clip: Tensor) -> None:
    for given, message in (
        ({"scheduler": "dpm"}, r"^scheduler: got 'dpm' for an inversion, which is all of DDIM, want none$"),
        ({"strength": 0.5}, r"^strength: got 0.5 for an inversion, which is all of DDIM, want none$"),
        ({"num_frames": 18}, r"^num_frames: got 18, want an integer, 1 to 17$"),
        ({"seed": -1}, r"^seed: got -1, want an integer, 0 to "),
    ):
        with pytest.raises(ValueError, match=message):
            cogvid.invert(pipe, clip, **given)
    with pytest.raises(ValueError, match=r"^model: got tiny-i2v, which takes an image and cannot do video-to-video"):
        cogvid.invert(cogvid.load("tiny-i2v", device="cpu"), clip)
    found = cogvid.invert(pipe, clip[:9], num_inference_steps=2, seed=1, progress=False)
    with pytest.raises(ValueError, match=r"^num_inference_steps: got 3, want 2 as in the inversion$"):
        cogvid.edit(pipe, found, PROMPT, num_inference_steps=3)
    ops = pipe.transformer.ops
    several = cogvid.invert(pipe, [clip[:9], clip[8:]], [PROMPT] * 2, num_inference_steps=2, seed=1, progress=False)
    with pytest.raises(ValueError, match=r"^inversion: got one of 2 videos, want 1 or one per video, 3$"):
        cogvid.edit(pipe, several, [PROMPT] * 3, progress=False)
    assert pipe.transformer.ops is ops  # and it runs as before
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks
