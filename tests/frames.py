"""The comparison of frames with those of diffusers."""

from __future__ import annotations

import numpy as np
import torch

from measure import rel_rms
from tests.tolerances import FRAMES_FP32, FRAMES_MAX_ABS


def assert_frames_equal(
    actual: np.ndarray, expected: np.ndarray, *, rms: float = FRAMES_FP32, max_abs: float = FRAMES_MAX_ABS
) -> None:
    """Hold frames of any shape against diffusers' float32 frames in [0, 1] of the same run.

    actual: float32 in [0, 1], which is held to an error; or uint8 levels, which must be those of `expected` wherever
    such an error cannot carry it over a tie (a level and a half), and one off at most where it can.
    """
    assert actual.shape == expected.shape
    exact = expected.astype(np.float64) * 255
    # A clamped picture would agree whatever was computed.
    assert ((exact > 0.5) & (exact < 254.5)).mean() > 0.9
    if actual.dtype == np.uint8:
        levels = actual.astype(np.float64)
    else:
        assert float(np.abs(actual - expected).max()) <= max_abs
        assert rel_rms(torch.from_numpy(actual), torch.from_numpy(expected)) <= rms
        levels = np.round(actual.astype(np.float64) * 255)
    off = np.abs(levels - np.round(exact))
    to_a_tie = np.abs(exact - np.floor(exact) - 0.5)
    assert off.max() <= 1
    assert off[to_a_tie > 255 * max_abs].max(initial=0) == 0
