"""`cogvid.load(..., defaults="diffusers")`: a call that passes no option gives what diffusers gives for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import cogvid
from cogvid.weights.hub import find
from references import as_video_to_video, picture, save_pipeline, tiny_pipeline
from tests.schedulers import SCHEDULERS

SIZE = {"sample_height": 4, "sample_width": 6}  # 32x48 pixels, so that 50 steps take seconds
# What diffusers' defaults need besides: room for 226 tokens where positions are added, and for 49 frames where they
# are learned.
VARIANTS: dict[str, dict[str, Any]] = {
    "2b": {"max_text_seq_length": 226},
    "5b": {},
    "5b-i2v": {"max_text_seq_length": 226, "sample_frames": 49},
    "1.5-5b": {"sample_frames": 9},
    "1.5-5b-i2v": {},
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def pixels(frames: Any) -> np.ndarray:
    """`[F, H, W, 3]` of the first video of PIL images."""
    return np.stack([np.asarray(frame) for frame in frames[0]]).astype(np.int16)


def assert_same_video(actual: cogvid.Output, expected: Any) -> None:
    a, e = pixels(actual.frames), pixels(expected.frames)
    assert a.shape == e.shape
    assert np.abs(a - e).max() <= 1  # both are rounded to uint8, and a tie may fall to either side
    assert ((e > 0) & (e < 255)).mean() > 0.7  # black and white agree whatever was computed
    assert actual.provenance["defaults"] == "diffusers"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Any, cogvid.Pipeline]]:
    made: dict[tuple[str, str], tuple[Any, cogvid.Pipeline]] = {}

    def get(variant: str, scheduler: str) -> tuple[Any, cogvid.Pipeline]:
        if (variant, scheduler) not in made:
            reference, spiece = tiny_pipeline(variant, **SIZE, **VARIANTS[variant])
            reference.scheduler = SCHEDULERS[scheduler].from_config(reference.scheduler.config)
            directory = save_pipeline(reference, spiece, tmp_path_factory.mktemp("model"))
            made[variant, scheduler] = reference, cogvid.load(directory, device="cpu", defaults="diffusers")
        return made[variant, scheduler]

    return get


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.every(3)
def test_text_and_image_to_video(both: Any, variant: str, scheduler: str) -> None:
    reference, ours = both(variant, scheduler)
    image = {"image": picture(50, 70)} if variant.endswith("i2v") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = ours(prompt="a red", **image, generator=generator())
    assert_same_video(out, reference(prompt="a red", **image, generator=generator()))
    assert (out.provenance["scheduler"], out.provenance["use_dynamic_cfg"]) == (scheduler, "constant")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_video_to_video(both: Any, scheduler: str) -> None:
    reference, ours = both("5b", scheduler)
    clip = [picture(40, 50, seed=i) for i in range(9)]
    expected = as_video_to_video(reference)(video=clip, prompt="a red", generator=generator())
    assert_same_video(ours(video=clip, prompt="a red", generator=generator()), expected)


def test_an_unusual_schedule_goes_all_the_way(both: Any, tmp_path: Path) -> None:
    """The settings of the checkpoint's scheduler arrive in the run."""
    reference, _ = both("5b", "dpm")
    config = dict(reference.scheduler.config)
    settings = {
        "timestep_spacing": "leading",
        "prediction_type": "sample",
        "beta_schedule": "linear",
        "steps_offset": 1,
    }
    other = type(reference)(**{**reference.components, "scheduler": SCHEDULERS["dpm"](**{**config, **settings})})
    other.set_progress_bar_config(disable=True)
    spiece = Path(both("5b", "dpm")[1].checkpoint.directory, "tokenizer", "spiece.model").read_bytes()
    ours = cogvid.load(save_pipeline(other, spiece, tmp_path), device="cpu", defaults="diffusers")
    expected = other(prompt="a red", generator=generator())
    assert_same_video(ours(prompt="a red", generator=generator()), expected)


def test_what_cannot_be_made_is_refused_as_always(tmp_path: Path) -> None:
    """Of the 13 frames that this model's config names, diffusers decodes 16."""
    reference, spiece = tiny_pipeline("1.5-5b", **SIZE, sample_frames=13)
    ours = cogvid.load(save_pipeline(reference, spiece, tmp_path), device="cpu", defaults="diffusers")
    with pytest.raises(ValueError, match="num_frames: got 13, want 8N or 8N"):
        ours("a red")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-t2v", "tiny-i2v"])
def test_shipped_packs(name: str) -> None:
    """Beyond what they were trained for: 50 steps, guidance 6, 226 tokens, and, for one, 49 frames."""
    reference = DiffusionPipeline.from_pretrained(find(name), torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    demo = Image.open(Path(__file__).parents[2] / "scripts" / "demo.png")
    image = {"image": demo.convert("RGB")} if name == "tiny-i2v" else {}
    prompt = "the red circle moves right"
    ours = cogvid.load(name, device="cpu", ops="torch", defaults="diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = ours(prompt, **image, generator=generator())
    assert_same_video(out, reference(prompt=prompt, **image, generator=generator()))
