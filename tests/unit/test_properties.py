"""What holds whatever the weights are: the same seed gives the same bytes; a batch is its parts; a stream its whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cogvid
from cogvid.cli import main
from tests import tolerances
from tests.pipelines import picture, save_pipeline, tiny_pipeline
from tests.reference import rel_rms

SIZE: dict[str, Any] = {"height": 32, "width": 48}
QUICK: dict[str, Any] = {**SIZE, "num_inference_steps": 4, "progress": False}
VARIANTS = {"5b": 17, "1.5-5b-i2v": 9}  # and the frames to make
pytestmark = pytest.mark.filterwarnings("ignore:.* was not trained for")


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, save_pipeline(*tiny_pipeline(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def pipe(model: tuple[str, Path]) -> cogvid.Pipeline:
    return cogvid.load(model[1], device="cpu")


@pytest.fixture
def inputs(model: tuple[str, Path]) -> dict[str, Any]:
    variant = model[0]
    image = {"image": picture(40, 60)} if variant.endswith("i2v") else {}
    return {"num_frames": VARIANTS[variant], **QUICK, **image}


@pytest.mark.parametrize("scheduler", cogvid.SAMPLERS)
def test_the_same_seed_gives_the_same_file(model: tuple[str, Path], tmp_path: Path, scheduler: str) -> None:
    variant, directory = model
    picture(40, 60).save(tmp_path / "image.png")
    image = ["--image", str(tmp_path / "image.png")] if variant.endswith("i2v") else []
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        files.append(tmp_path / f"{name}.mp4")
        options = ["--model", directory, "--height", 32, "--width", 48, "--num-frames", 9, "--num-inference-steps", 2]
        options += ["--scheduler", scheduler, "--seed", seed, "-o", files[-1]]
        assert main(["generate", "a red", *map(str, options), *image]) == 0
    first, again, other = (file.read_bytes() for file in files)
    assert first == again
    assert first != other


@pytest.mark.parametrize("scheduler", cogvid.SAMPLERS)
def test_a_batch_of_two_is_two_batches_of_one(pipe: cogvid.Pipeline, inputs: dict[str, Any], scheduler: str) -> None:
    prompts = ["a red", "two dogs"]
    options = {**inputs, "scheduler": scheduler, "output_type": "np"}
    both = pipe(prompts, generator=[torch.Generator().manual_seed(s) for s in (1, 2)], **options).frames
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, seed=i + 1, **options).frames
        assert rel_rms(torch.from_numpy(both[i]), torch.from_numpy(alone[0])) <= tolerances.PIPELINE_BATCH


def test_a_stream_is_the_whole(pipe: cogvid.Pipeline, inputs: dict[str, Any]) -> None:
    whole = pipe("a red", seed=1, num_videos_per_prompt=2, output_type="uint8", **inputs).frames
    out = pipe("a red", seed=1, num_videos_per_prompt=2, output_type="stream", **inputs)
    assert len(out.frames) == len(whole) == 2
    for video, expected in zip(out.frames, whole, strict=True):
        chunks = list(video)
        assert len(chunks) > 1 or len(expected) <= 9
        assert all(len(chunk) <= 9 for chunk in chunks)
        assert torch.equal(torch.cat(chunks), expected)


def test_decoding_in_a_stream_waits_to_be_asked(pipe: cogvid.Pipeline, inputs: dict[str, Any]) -> None:
    """So that the pixels of a whole video are never held."""
    decoded = []
    hook = pipe.vae.decoder.register_forward_hook(lambda *_: decoded.append(1))
    try:
        (video,) = pipe("a red", seed=1, output_type="stream", **inputs).frames
        assert decoded == []
        next(video)
        assert decoded == [1]
    finally:
        hook.remove()


def test_gradients_are_not_kept(pipe: cogvid.Pipeline, inputs: dict[str, Any]) -> None:
    pipe.transformer.requires_grad_(True)
    try:
        out = pipe("a red", seed=1, output_type="pt", **inputs)
    finally:
        pipe.transformer.requires_grad_(False)
    assert not out.frames.requires_grad
    assert not out.frames.is_inference()
