"""Image and video preparation equal diffusers' `VideoProcessor` bit for bit."""

import numpy as np
import pytest
import torch
from diffusers.utils import load_image as diffusers_load_image
from diffusers.video_processor import VideoProcessor
from PIL import Image

from cogvid.media.image import load_image, prepare_image, prepare_video
from cogvid.media.video import denormalize, to_uint8

PROCESSOR = VideoProcessor(vae_scale_factor=8)


def _image(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(480, 720), (64, 96), (96, 64), (768, 1360)], ids=lambda s: f"to{s[0]}x{s[1]}")
@pytest.mark.parametrize("source", [(300, 301), (64, 96), (37, 500)], ids=lambda s: f"from{s[0]}x{s[1]}")
def test_prepared_image_is_bit_identical(source: tuple[int, int], size: tuple[int, int]) -> None:
    image = _image(*source)
    ours = prepare_image(image, *size)
    theirs = PROCESSOR.preprocess(image, height=size[0], width=size[1])
    assert ours.shape == (1, 3, *size)
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(ours, theirs)


def test_every_level_is_normalised_to_the_same_bits() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    image = Image.fromarray(ramp)
    ours = prepare_image(image, 16, 16)
    assert torch.equal(ours, PROCESSOR.preprocess(image, height=16, width=16))
    assert ours.min() == -1
    assert ours.max() == 1


@pytest.mark.parametrize("num_frames", [1, 5])
def test_prepared_video_is_bit_identical(num_frames: int) -> None:
    frames = [_image(50, 70, seed) for seed in range(num_frames)]
    ours = prepare_video(frames, 64, 96)
    assert ours.shape == (1, 3, num_frames, 64, 96)
    assert torch.equal(ours, PROCESSOR.preprocess_video(frames, height=64, width=96))
    array = np.stack([np.asarray(frame) for frame in frames])
    assert torch.equal(ours, prepare_video(array, 64, 96))
    assert torch.equal(ours, prepare_video(torch.from_numpy(array), 64, 96))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_loaded_image_is_that_of_diffusers(mode: str, orientation: int) -> None:
    image = _image(20, 30).convert("RGBA").convert("LA" if mode == "LA" else "RGB").convert(mode)
    if mode == "RGBA":
        image.putalpha(_image(20, 30, 1).convert("L"))
    image.getexif()[0x0112] = orientation
    ours = load_image(image)
    assert ours.mode == "RGB"
    assert ours.tobytes() == diffusers_load_image(image).tobytes()


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["in-range", "beyond-range"])
def test_uint8_frames_are_those_of_diffusers(scale: float) -> None:
    video = torch.randn(2, 3, 4, 10, 12, generator=torch.Generator().manual_seed(0)) * scale
    unit = denormalize(video)
    assert torch.equal(unit.transpose(1, 2), PROCESSOR.postprocess_video(video, output_type="pt"))
    assert np.array_equal(unit.permute(0, 2, 3, 4, 1).numpy(), PROCESSOR.postprocess_video(video, output_type="np"))
    pil = PROCESSOR.postprocess_video(video, output_type="pil")
    theirs = np.stack([np.stack([np.asarray(frame) for frame in frames]) for frames in pil])
    assert np.array_equal(to_uint8(unit).permute(0, 2, 3, 4, 1).numpy(), theirs)


def test_ties_round_as_in_diffusers() -> None:
    unit = (torch.arange(255) + 0.5) / 255  # half-way between every two levels
    video = (unit * 2 - 1).reshape(1, 1, 1, 15, 17).expand(1, 3, 1, 15, 17)
    pil = PROCESSOR.postprocess_video(video, output_type="pil")[0][0]
    assert np.array_equal(to_uint8(denormalize(video))[0, :, 0].permute(1, 2, 0).numpy(), np.asarray(pil))


def test_bf16_frames_are_no_further_from_fp64_than_those_of_diffusers() -> None:
    video = torch.randn(1, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = (video.double() / 2 + 0.5).clamp(0, 1)
    ours = (denormalize(video).double() - exact).abs().max()
    theirs = (PROCESSOR.postprocess_video(video, output_type="pt").transpose(1, 2).double() - exact).abs().max()
    assert ours <= 2**-25  # half a unit in the last place of fp32 at a half
    assert theirs > 1000 * ours
