"""The shipped packs load unchanged in diffusers and give the same video there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline, CogVideoXPipeline, DiffusionPipeline
from PIL import Image

import cogvid
from cogvid.weights.hub import find
from measure import rel_rms
from tests.frames import assert_frames_equal
from tests.tolerances import PACK_FRAMES_FP32, PACK_FRAMES_MAX_ABS, PACK_LATENTS

DEMO = Path(__file__).parents[2] / "scripts" / "demo.png"
PROMPT = "the red circle moves right"


def reference(name: str, scheduler: str):
    pipe = DiffusionPipeline.from_pretrained(find(name), torch_dtype=torch.float32)
    assert isinstance(pipe, CogVideoXImageToVideoPipeline if name == "tiny-i2v" else CogVideoXPipeline)
    if scheduler == "ddim":
        pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scheduler", ["dpm", pytest.param("ddim", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["tiny-i2v", "tiny-t2v"])
def test_pack_gives_the_same_video_in_diffusers(name: str, scheduler: str):
    image = {"image": Image.open(DEMO).resize((64, 64))} if name == "tiny-i2v" else {}
    theirs = reference(name, scheduler)
    ours = cogvid.load(name, device="cpu", dtype="float32", ops="torch")
    settings = {
        "num_inference_steps": 8,
        "guidance_scale": 3.0,
        "use_dynamic_cfg": scheduler == "dpm",
        "num_frames": 17,
    }

    def run_theirs(output_type: str):
        return theirs(
            prompt=PROMPT, generator=torch.Generator().manual_seed(5), max_sequence_length=16, output_type=output_type,
            **image, **settings,
        ).frames  # fmt: skip

    def run_ours(output_type: str):
        return ours(
            PROMPT, seed=5, scheduler=scheduler, output_type=output_type, progress=False, **image, **settings
        ).frames

    error = rel_rms(run_ours("latent"), run_theirs("latent"))
    assert error <= PACK_LATENTS, error
    a, b = run_ours("np"), run_theirs("np")
    assert a.shape == (1, 17, 64, 64, 3)
    assert_frames_equal(a, b, rms=PACK_FRAMES_FP32, max_abs=PACK_FRAMES_MAX_ABS)
