"""The data of the tiny models, and the measurements of their videos."""

from __future__ import annotations

import random

import pytest
import torch
from PIL import Image, ImageDraw

from scripts.tiny_world import (
    COLOURS,
    MOTIONS,
    SHAPES,
    corpus,
    find_shapes,
    is_held_out,
    observe,
    prompt_for,
    render,
    sample_scenes,
)

pytest.importorskip("scipy", reason="needs scipy, which finds the shapes")


def scenes(n: int, seed: int = 0, **options):
    return sample_scenes(n, torch.Generator().manual_seed(seed), **options)


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


def test_the_same_seed_draws_the_same_pixels():
    a, b = render(scenes(6)), render(scenes(6))
    assert torch.equal(a, b)
    assert a.shape == (6, 3, 17, 64, 64)
    assert a.min() >= -1
    assert a.max() <= 1


def test_some_frames_are_those_of_the_whole_video():
    drawn = scenes(4)
    index = torch.tensor([0, 7, 16])
    assert torch.equal(render(drawn, frames=index), render(drawn)[:, :, index])


def test_held_out_combinations_never_appear_in_training():
    train, test = scenes(400), scenes(400, held_out=True)
    assert not is_held_out(train.colour[:, 0], train.shape[:, 0], train.motion).any()
    assert is_held_out(test.colour[:, 0], test.shape[:, 0], test.motion).all()
    assert set(test.motion.tolist()) == set(range(len(MOTIONS)))
    assert set(test.colour[:, 0].tolist()) == set(range(len(COLOURS)))
    assert set(test.shape[:, 0].tolist()) == set(range(len(SHAPES)))


def test_the_words_decide_which_of_two_shapes_is_meant():
    drawn = scenes(300, two=1.0)
    same_colour = drawn.colour[:, 0] == drawn.colour[:, 1]
    same_shape = drawn.shape[:, 0] == drawn.shape[:, 1]
    assert not (same_colour & same_shape).any()
    assert same_colour.sum() > 20
    assert same_shape.sum() > 60


def test_prompts_name_colour_shape_and_motion():
    drawn, rng, known = scenes(200), random.Random(0), set(corpus())
    for i in range(len(drawn)):
        plain = prompt_for(drawn, i)
        assert plain in known
        said = prompt_for(drawn, i, rng).lower().rstrip(".")
        assert COLOURS[int(drawn.colour[i, 0])] in said
        assert SHAPES[int(drawn.shape[i, 0])] in said
        assert len(said.split()) <= 15


@pytest.mark.parametrize("radial", [False, True], ids=["linear", "radial"])
def test_measurements_agree_with_what_was_drawn(radial: bool):
    """At least 97 % are right; shapes cut by the border are hard to name."""
    drawn = scenes(40, seed=2, radial=radial)
    videos = to_uint8(render(drawn, frames=torch.tensor([0, 4, 8, 12, 16])))
    right = total = 0
    for i, video in enumerate(videos):
        tracks = observe(video)
        for k in range(1 + int(drawn.two[i])):
            centre = drawn.centre[i, k]
            track = min(tracks, key=lambda t: (torch.tensor(t.first.centre) - centre).norm())
            wanted = MOTIONS[int(drawn.motion[i])] if k == 0 else "still"
            names = (COLOURS[int(drawn.colour[i, k])], SHAPES[int(drawn.shape[i, k])], wanted)
            right += (track.first.colour, track.first.shape, track.motion) == names
            total += 1
    assert right >= 0.97 * total, f"{right} of {total}"


@pytest.mark.parametrize("colour", COLOURS)
def test_measurements_know_the_colours_that_others_paint_with(colour: str):
    image = Image.new("RGB", (256, 256), (70, 75, 90))
    ImageDraw.Draw(image).ellipse((60, 90, 140, 170), fill=colour)
    pixels = torch.frombuffer(bytearray(image.resize((64, 64), Image.Resampling.BICUBIC).tobytes()), dtype=torch.uint8)
    (found,) = find_shapes(pixels.view(64, 64, 3))
    assert (found.colour, found.shape) == (colour, "circle")
    assert found.centre == pytest.approx((100 / 256, 130 / 256), abs=0.01)
