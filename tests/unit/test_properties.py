"""What holds whatever the weights are: the same seed gives the same bytes; a batch is its parts; a stream its whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cogvid
from cogvid.cli import main
from measure import rel_rms
from references import picture, save_pipeline, tiny_pipeline
from tests import tolerances

SIZE: dict[str, Any] = {"height": 32, "width": 48}
QUICK: dict[str, Any] = {**SIZE, "num_inference_steps": 4, "progress": False}
VARIANTS = {"5b": 17, "1.5-5b-i2v": 9}  # and the frames to make
pytestmark = pytest.mark.filterwarnings("ignore:.* was not trained for")


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    pytest.importorskip("diffusers", reason="needs diffusers")
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


@pytest.mark.parametrize("per_prompt", [1, 2])
@pytest.mark.parametrize("scheduler", cogvid.SAMPLERS)
@pytest.mark.parametrize(
    ("model", "source"),
    [("5b", "text"), ("5b", "video"), ("1.5-5b-i2v", "one image"), ("1.5-5b-i2v", "images")],
    indirect=["model"],
    scope="module",  # that of the fixture; pytest 8.3 does not find it
)
@pytest.mark.every(3)
def test_each_video_of_a_batch_is_the_one_of_its_seed(
    pipe: cogvid.Pipeline, inputs: dict[str, Any], source: str, scheduler: str, per_prompt: int
) -> None:
    prompts = ["a red", "two dogs"]
    options = {**inputs, "scheduler": scheduler, "output_type": "np"}
    alone: list[dict[str, Any]] = [{}, {}]
    if source == "video":
        options["video"] = [picture(40, 60, seed=i) for i in range(options["num_frames"])]
    if source == "images":
        options["image"] = [picture(40, 60), picture(50, 30, seed=1)]
        alone = [{"image": image} for image in options["image"]]
    out = pipe(prompts, seed=7, num_videos_per_prompt=per_prompt, **options)
    seeds = out.provenance["seeds"]
    assert seeds == [7 + k for k in range(2 * per_prompt)]
    assert out.seed == out.provenance["seed"] == 7
    for k, seed in enumerate(seeds):
        frames = pipe(prompts[k // per_prompt], seed=seed, **{**options, **alone[k // per_prompt]}).frames
        assert rel_rms(torch.from_numpy(out.frames[k]), torch.from_numpy(frames[0])) <= tolerances.PIPELINE_BATCH


def test_one_video_has_the_noise_of_its_seed_to_the_bit(pipe: cogvid.Pipeline, inputs: dict[str, Any]) -> None:
    of_seed = pipe("a red", seed=5, output_type="latent", **inputs)
    of_generator = pipe("a red", generator=torch.Generator("cpu").manual_seed(5), output_type="latent", **inputs)
    assert torch.equal(of_seed.frames, of_generator.frames)
    assert of_generator.provenance["seeds"] is None


def test_the_seed_of_the_last_video_has_63_bits(pipe: cogvid.Pipeline, inputs: dict[str, Any]) -> None:
    options = {**inputs, "num_inference_steps": 1, "output_type": "latent"}
    last = pipe(["a red", "two dogs"], seed=2**63 - 2, **options)
    assert last.provenance["seeds"] == [2**63 - 2, 2**63 - 1]
    with pytest.raises(ValueError, match=r"^seed: got 9223372036854775807, want an integer, 0 to 92233720368547758"):
        pipe(["a red", "two dogs"], seed=2**63 - 1, **options)


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
