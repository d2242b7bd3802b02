"""A noise file gives diffusers the noise of a run here, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cogvid
from cogvid.run.noise import RecordedNoise, ReplayedNoise, load_noise, save_noise
from measure import rel_rms
from references import TEXT_LEN, as_video_to_video, picture, save_pipeline, tiny_pipeline
from tests import tolerances
from tests.schedulers import SCHEDULERS

SMALL: dict[str, Any] = {
    "prompt": "a red", "height": 32, "width": 48, "num_inference_steps": 4, "guidance_scale": 2.0,
    "use_dynamic_cfg": True, "output_type": "latent",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*was not trained for")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["words", "image", "video"])
def test_the_same_noise_gives_the_same_video_in_diffusers(kind: str, scheduler: str, tmp_path: Path) -> None:
    image = kind == "image"
    size = {"sample_height": 4, "sample_width": 6} if image else {}  # 5B-I2V has one size
    reference, spiece = tiny_pipeline("5b-i2v" if image else "5b", **size)
    ours = cogvid.load(save_pipeline(reference, spiece, tmp_path / "model"), device="cpu")
    theirs = as_video_to_video(reference) if kind == "video" else reference
    theirs.scheduler = SCHEDULERS[scheduler].from_config(reference.scheduler.config)
    options = dict(SMALL)
    if kind == "video":
        options["video"] = [picture(40, 50, seed=seed) for seed in range(9)]
    else:
        options["num_frames"] = 9
    if image:
        options["image"] = picture(40, 50)

    def count(recorded: RecordedNoise) -> Any:
        def step_done(_pipe: Any, index: int, *_: Any) -> dict[str, Any]:
            recorded.step = index + 1
            return {}

        return step_done

    def here(seed: int, **more: Any) -> torch.Tensor:
        return ours(**options, scheduler=scheduler, seed=seed, progress=False, **more).frames

    def there(seed: int, **more: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return theirs(**options, generator=generator, max_sequence_length=TEXT_LEN, **more).frames

    for record, replay in ((here, there), (there, here)):
        with RecordedNoise(kind != "words") as recorded:
            expected = record(1, callback_on_step_end=count(recorded))
        save_noise(tmp_path / "noise.safetensors", recorded.draws)
        noise = load_noise(tmp_path / "noise.safetensors")
        with ReplayedNoise(noise):
            actual = replay(2)
        assert rel_rms(actual, expected) <= tolerances.PIPELINE_LATENTS
        assert rel_rms(replay(2), expected) > 0.1
        steps = len([name for name in noise if name.startswith("step.")])
        taken = int(4 * 0.8) if kind == "video" else 4
        assert steps == (2 * taken - 2 if scheduler == "dpm" else 0)
    if kind == "words" and scheduler == "ddim":  # all that the sampler takes: it can be handed over as `latents` too
        assert rel_rms(there(2, latents=noise["initial"]), expected) <= tolerances.PIPELINE_LATENTS
