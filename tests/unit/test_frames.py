"""The comparison of frames accepts rounding and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from tests.frames import assert_frames_equal

FRAMES = np.random.default_rng(0).uniform(0.01, 0.99, (1, 3, 16, 16, 3)).astype(np.float32)
FRAMES.flat[0] = (100.5 - 1e-3) / 255  # a thousandth of a level below a tie
FRAMES.flat[1] = 100.4 / 255
LEVELS = np.round(FRAMES.astype(np.float64) * 255).astype(np.uint8)


def changed(frames: np.ndarray, index: int, by: float) -> np.ndarray:
    frames = frames.copy()
    frames.flat[index] += by
    return frames


@pytest.mark.parametrize("frames", [FRAMES, LEVELS, changed(FRAMES, 0, 8e-6), changed(LEVELS, 0, 1)])
def test_rounding_passes(frames: np.ndarray) -> None:
    assert_frames_equal(frames, FRAMES)


WRONG = {
    "one-value": changed(FRAMES, 0, 2e-5),
    "all-values-a-little": FRAMES + np.float32(4e-6),
    "a-level-beside-a-tie": changed(LEVELS, 1, 1),
    "two-levels-at-a-tie": changed(LEVELS, 0, 2),
    "truncated": np.floor(FRAMES * 255).astype(np.uint8),
    "shape": FRAMES[:, :1],
}


@pytest.mark.parametrize("frames", WRONG.values(), ids=WRONG)
def test_more_than_rounding_fails(frames: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        assert_frames_equal(frames, FRAMES)


def test_a_clamped_picture_is_no_evidence() -> None:
    black = np.zeros_like(FRAMES)
    with pytest.raises(AssertionError):
        assert_frames_equal(black, black)
