"""Fun-control, Fun-InP, a last frame, and video-to-video on several videos, against upstream, from one generator."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cogvid
from measure import rel_rms
from references import TEXT_LEN, as_video_to_video, assemble, picture, save_pipeline, tiny_pipeline, tiny_transformer
from tests import tolerances
from tests.schedulers import SCHEDULERS

PROMPT, SECOND = "a red", "the blue square"
SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": 2.0}
CLIP = [picture(40, 50, seed=i) for i in range(17)]
OTHER = [picture(30, 60, seed=50 + i) for i in range(17)]


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quietly(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


def make(variant: str, directory: Path, kind: type | None = None, **transformer: Any) -> tuple[Any, cogvid.Pipeline]:
    """The same tiny model in diffusers and here. kind: diffusers' pipeline; by default that of the variant."""
    reference, spiece = tiny_pipeline(variant, **transformer)
    if kind is not None:
        parts = reference.components
        # The weights of the patch projection have other channels, so the parts are joined anew.
        model = tiny_transformer(variant, **transformer)
        reference, spiece = assemble(kind, model, parts["vae"], parts["scheduler"])
        parts["vae"].decoder.conv_out.conv.weight /= 0.15  # `assemble` makes it smaller each time
    saved = save_pipeline(reference, spiece, directory)
    return reference, cogvid.load(saved, device="cpu")


@pytest.fixture(scope="module", params=["2b", "5b", "1.5-5b"])
def control(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, cogvid.Pipeline]:
    from diffusers import CogVideoXFunControlPipeline

    directory = tmp_path_factory.mktemp("control")
    return make(request.param, directory, CogVideoXFunControlPipeline, in_channels=32)


@pytest.mark.parametrize("frames", [8, 9])
def test_control_equals_diffusers(control: tuple[Any, cogvid.Pipeline], frames: int) -> None:
    reference, ours = control
    assert ours.model.name == "custom-control"
    assert ours.model.tasks == ["control-to-video"]
    options = {**SMALL, "prompt": PROMPT, "negative_prompt": "two dogs", "use_dynamic_cfg": True}
    there = {**options, "control_video": CLIP[:frames], "output_type": "latent", "max_sequence_length": TEXT_LEN}
    here = {**options, "control_video": CLIP[:frames], "output_type": "latent", "scheduler": "ddim", "progress": False}
    out = quietly(ours, **here, generator=generator())
    if frames == 9 and ours.model.transformer.patch_size_t:
        with pytest.raises(ValueError, match="divisible"):  # 3 latent frames; here the first is repeated in front
            reference(**there, generator=generator())
        assert out.frames.shape[1] == 4
    else:
        expected = reference(**there, generator=generator()).frames
        assert rel_rms(out.frames, expected) <= tolerances.PIPELINE_LATENTS
    other = quietly(ours, **{**here, "control_video": OTHER[:frames]}, generator=generator())
    assert rel_rms(other.frames, out.frames) > 1e-3
    assert isinstance(out.provenance["control_video"], str)
    assert out.provenance["task"] == "control-to-video"


def test_control_with_a_video_for_each_prompt(control: tuple[Any, cogvid.Pipeline]) -> None:
    reference, ours = control
    options = {**SMALL, "prompt": [PROMPT, SECOND], "control_video": [CLIP[:8], OTHER[:8]], "output_type": "latent"}
    if ours.model.transformer.patch_size_t is None:
        expected = reference(**options, generator=generator(), max_sequence_length=TEXT_LEN).frames
        out = quietly(ours, **options, scheduler="ddim", use_dynamic_cfg=False, generator=generator(), progress=False)
        assert rel_rms(out.frames, expected) <= tolerances.PIPELINE_LATENTS
        assert len(out.provenance["control_video"]) == 2


def test_a_control_model_says_what_it_takes(control: tuple[Any, cogvid.Pipeline]) -> None:
    _, ours = control
    for given in ({}, {"image": picture(8, 8)}, {"video": CLIP[:9]}):
        with pytest.raises(ValueError, match=r"^model: got custom-control, which takes a control video and cannot do "):
            ours(PROMPT, **SMALL, **given)
    t2v = cogvid.load("tiny-t2v", device="cpu")
    with pytest.raises(
        ValueError, match=r"cannot do control-to-video, want one of alibaba-pai/CogVideoX-Fun-V1\.1-5b-C"
    ):
        t2v(PROMPT, control_video=CLIP[:9])
    with pytest.raises(ValueError, match=r"cannot do inpainting, want one of alibaba-pai/CogVideoX-Fun-V1\.1-2b-InP"):
        t2v(PROMPT, video=CLIP[:9], mask=picture(8, 8))
    with pytest.raises(ValueError, match=r"^mask: got this alone or together, want nothing or one of: image; "):
        t2v(PROMPT, mask=picture(8, 8))


INPAINT = pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5b"])


def inpainting(variant: str, directory: Path, noisy: bool = False) -> tuple[Any, cogvid.Pipeline]:
    """A tiny model with 33 channels. diffusers has no pipeline for it, so only its parts are used."""
    reference, _ = make(variant, directory, in_channels=33)
    config = directory / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "add_noise_in_inpaint_model": noisy}))
    return reference, cogvid.load(directory, device="cpu")


def videox_latents(vae: Any, pixels: Tensor, mask: Tensor, noise: Tensor | None = None) -> Tensor:
    """What VideoX-Fun puts on the channels after the noise, `[1, T, 17, h, w]`.

    Written from `CogVideoXFunInpaintPipeline.__call__`, `prepare_mask_latents`, `add_noise_to_reference_video` and
    `resize_mask` of videox_fun/pipeline/pipeline_cogvideox_fun_inpaint.py, VideoX-Fun 804a425.

    pixels: `[1, 3, F, H, W]` in [-1, 1]. mask: `[1, 1, F, H, W]`, 0 or 1; 1 is made anew.
    """
    if (mask == 1).all():
        latents = vae.encode(pixels).latent_dist.mode().transpose(1, 2)
        return torch.zeros(1, latents.shape[1], 17, *latents.shape[3:])
    tiled = mask.tile(1, 3, 1, 1, 1)
    masked = pixels * (tiled < 0.5) + torch.ones_like(pixels) * (tiled > 0.5) * -1
    if noise is not None:
        masked = masked + torch.where(masked == -1, torch.zeros_like(masked), noise * 0.0563)
    z = vae.encode(masked).latent_dist.mode() * vae.config.scaling_factor
    size, keep = list(z.shape[2:]), 1 - mask
    resized = [F.interpolate(keep[:, :, :1], [1, *size[1:]], mode="trilinear", align_corners=False)]
    if size[0] > 1:
        rest = [size[0] - 1, *size[1:]]
        resized.append(F.interpolate(keep[:, :, 1:], rest, mode="trilinear", align_corners=False))
    return torch.cat([torch.cat(resized, dim=2) * vae.config.scaling_factor, z], dim=1).transpose(1, 2)


def denoised(reference: Any, extra: Tensor, noise: Tensor) -> Tensor:
    """Sample as diffusers' pipeline does, with `extra` `[1, T, C, h, w]` put after the latents on the channels."""
    reference.scheduler = SCHEDULERS["ddim"].from_config(reference.scheduler.config)
    original = reference.transformer.forward

    def forward(hidden_states: Tensor, **options: Any) -> Any:
        return original(torch.cat([hidden_states, extra.expand(len(hidden_states), -1, -1, -1, -1)], dim=2), **options)

    config = reference.transformer.config
    reference.transformer.forward = forward
    reference.transformer.register_to_config(in_channels=16)
    frames = 4 * extra.shape[1] - (0 if config.patch_size_t else 3)
    try:
        return reference(
            **SMALL, prompt=PROMPT, num_frames=frames, latents=noise, output_type="latent", max_sequence_length=TEXT_LEN
        ).frames
    finally:
        reference.transformer.forward = original
        reference.transformer.register_to_config(in_channels=33)


def as_pixels(frames: list[Any]) -> Tensor:
    from diffusers.video_processor import VideoProcessor

    return VideoProcessor(vae_scale_factor=8).preprocess_video(frames, height=32, width=48)


KINDS = ("image", "first and last", "picture mask", "video mask", "text", "all anew")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "noisy"])
@INPAINT
@pytest.mark.every(3)
def test_inpainting_equals_videox_fun(variant: str, kind: str, noisy: bool, tmp_path: Path) -> None:
    reference, ours = inpainting(variant, tmp_path, noisy)
    assert ours.model.name == "custom-inpaint"
    assert ours.model.noise_aug_strength == (0.0563 if noisy else 0.0)
    count = 8 if variant.startswith("1.5") else 9  # latent frames that 1.5 need not pad
    white = np.zeros((count, 32, 48, 3), np.uint8)
    white[:, 8:, 20:] = 255
    if kind == "video mask":
        white = np.stack([np.roll(white[0], 3 * i, axis=1) for i in range(count)])
    pixels, mask = as_pixels(CLIP[:count]), torch.from_numpy(white[..., :1] / 255.0).float().permute(3, 0, 1, 2)[None]
    given: dict[str, Any] = {"video": CLIP[:count], "mask": white, "strength": 1.0}
    if kind == "picture mask":
        given["mask"] = cogvid.load_image(_png(white[0]))
    if kind == "all anew":
        given["mask"], mask = np.full_like(white, 255), torch.ones_like(mask)
    if kind in ("image", "first and last", "text"):
        given, mask = {"num_frames": count}, torch.ones_like(mask)
        pixels = pixels[:, :, :1].expand(-1, -1, count, -1, -1).clone()
        if kind != "text":
            given["image"], mask[:, :, 0] = CLIP[0], 0
        if kind == "first and last":
            given["last_image"], mask[:, :, -1] = OTHER[0], 0
            pixels[:, :, -1] = as_pixels(OTHER[:1])[:, :, 0]
    # The draws in their order here: the noise on the known pixels, the posterior of a video, the initial noise.
    g, size = generator(), (1, (count + 3) // 4, 16, 4, 6)
    aug = torch.randn(pixels.shape, generator=g) if noisy and kind != "text" else None
    extra = videox_latents(reference.vae, pixels, mask, aug)
    if "video" in given:
        torch.randn(1, 16, *extra.shape[1:2], 4, 6, generator=g)
    expected = denoised(reference, extra, torch.randn(size, generator=g))
    out = quietly(
        ours, PROMPT, **SMALL, **given, scheduler="ddim", use_dynamic_cfg=False, generator=generator(),
        output_type="latent", progress=False,
    )  # fmt: skip
    assert rel_rms(out.frames, expected) <= tolerances.PIPELINE_LATENTS
    assert out.provenance["noise_aug_strength"] == (0.0563 if noisy else 0.0)


def _png(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_inpainting_keeps_what_is_black(tmp_path: Path) -> None:
    """The condition of a pixel that is kept depends on it; that of one that is made anew does not."""
    _, ours = inpainting("5b", tmp_path)
    clip = np.stack([np.asarray(frame.resize((48, 32))) for frame in CLIP[:9]])
    white = np.zeros_like(clip)
    white[:, :, 24:] = 255
    options: dict[str, Any] = {**SMALL, "mask": white, "strength": 1.0, "seed": 3, "output_type": "latent"}

    def run(video: np.ndarray) -> Tensor:
        return quietly(ours, PROMPT, video=video, **options, progress=False).frames

    hidden, seen = clip.copy(), clip.copy()
    hidden[:, :, 24:] = 255 - hidden[:, :, 24:]
    seen[:, :, :24] = 255 - seen[:, :, :24]
    assert torch.equal(run(clip), run(hidden))
    assert rel_rms(run(seen), run(clip)) > 1e-3


def test_inpainting_at_less_strength_starts_from_the_video(tmp_path: Path) -> None:
    _, ours = inpainting("5b", tmp_path)
    options: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 4, "seed": 3, "output_type": "latent"}
    white = np.full((9, 32, 48, 3), 255, np.uint8)
    plain = quietly(ours, PROMPT, video=CLIP[:9], strength=0.5, **options, progress=False)
    masked = quietly(ours, PROMPT, video=CLIP[:9], mask=white, strength=0.5, **options, progress=False)
    assert plain.provenance["task"] == "video-to-video"
    assert len(masked.provenance["timesteps"]) == 2
    assert torch.equal(plain.frames, masked.frames)  # nothing is known in both


@pytest.mark.parametrize("generators", ["one generator", "one per video"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_last_frame_equals_the_pipeline_of_its_models(tmp_path: Path, scheduler: str, generators: str) -> None:
    """As `prepare_latents` of cogvideox_interpolation/pipeline.py, feizc/CogvideX-Interpolation 7ed3938."""
    reference, ours = make("5b-i2v", tmp_path, sample_height=4, sample_width=6)
    seeds = generator if generators == "one generator" else lambda: [generator(5), generator(6)]
    first, last = [CLIP[0], CLIP[1]], [OTHER[0], OTHER[1]]
    original = reference.prepare_latents

    def prepare_latents(image: Tensor, batch_size: int, *args: Any) -> Any:
        """Called by diffusers' pipeline; the posterior of the last frames is drawn after that of the first ones."""
        (channels, frames, height, width, dtype, device, drawn, _) = args
        size = (batch_size, (frames - 1) // 4 + 1, channels, height // 8, width // 8)
        one = [drawn] * batch_size if isinstance(drawn, torch.Generator) else drawn
        ends = []
        for pixels in (image, torch.cat([as_pixels([each])[:, :, 0] for each in last])):
            means = [reference.vae.encode(each[None, :, None]).latent_dist for each in pixels]
            z = torch.cat([each.sample(g) for each, g in zip(means, one, strict=True)]).transpose(1, 2)
            ends.append(reference.vae.config.scaling_factor * z)
        zeros = torch.zeros(batch_size, size[1] - 2, *size[2:])
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(size, generator=drawn, device=device, dtype=dtype), torch.cat([ends[0], zeros, ends[1]], 1)

    reference.prepare_latents = prepare_latents
    reference.scheduler = SCHEDULERS[scheduler].from_config(reference.scheduler.config)
    options: dict[str, Any] = {**SMALL, "num_frames": 9, "output_type": "latent", "prompt": [PROMPT, SECOND]}
    expected = reference(image=first, **options, generator=seeds(), max_sequence_length=TEXT_LEN).frames
    reference.prepare_latents = original
    options |= {"scheduler": scheduler, "use_dynamic_cfg": False, "progress": False}
    out = quietly(ours, image=first, last_image=last, **options, generator=seeds())
    assert rel_rms(out.frames, expected) <= tolerances.PIPELINE_LATENTS
    assert out.provenance["task"] == "first-and-last-frame"
    assert len(out.provenance["last_image"]) == 2
    without = quietly(ours, image=first, **options, generator=seeds())
    assert rel_rms(without.frames, out.frames) > 1e-3


@pytest.mark.parametrize("generators", ["one generator", "one per video"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.every(2)
def test_video_to_video_on_several_videos(tmp_path: Path, scheduler: str, generators: str) -> None:
    base, ours = make("5b", tmp_path)
    reference = as_video_to_video(base)
    reference.scheduler = SCHEDULERS[scheduler].from_config(base.scheduler.config)
    seeds = generator if generators == "one generator" else lambda: [generator(5), generator(6)]
    options: dict[str, Any] = {**SMALL, "num_inference_steps": 5, "prompt": [PROMPT, SECOND], "output_type": "latent"}
    videos = [CLIP[:9], OTHER[:9]]
    expected = reference(video=videos, **options, generator=seeds(), max_sequence_length=TEXT_LEN).frames
    options |= {"scheduler": scheduler, "use_dynamic_cfg": False, "progress": False}
    out = quietly(ours, video=videos, **options, generator=seeds())
    assert rel_rms(out.frames, expected) <= tolerances.PIPELINE_LATENTS
    assert len(set(out.provenance["video"])) == 2
    arrays = np.stack([np.stack([np.asarray(f.resize((48, 32), 1)) for f in video]) for video in videos])
    assert torch.equal(  # an array of videos is a list of them
        quietly(ours, video=arrays, **options, generator=seeds()).frames,
        quietly(ours, video=list(arrays), **options, generator=seeds()).frames,
    )
    # Several videos of a prompt are the prompt and its video repeated.
    twice = {**options, "prompt": [PROMPT, PROMPT, SECOND, SECOND]}
    several = {**options, "num_videos_per_prompt": 2}
    assert torch.equal(
        quietly(ours, video=[CLIP[:9], CLIP[:9], OTHER[:9], OTHER[:9]], **twice, generator=generator()).frames,
        quietly(ours, video=videos, **several, generator=generator()).frames,
    )


def test_videos_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _, ours = make("5b", tmp_path)
    for given, message in (
        ({"video": [CLIP[:9], CLIP[:17]]}, r"^num_frames: got none, and videos of 9 and 17 frames, want it$"),
        ({"video": [CLIP[:9], CLIP[:17]], "num_frames": 17}, r"^num_frames: got 17, want an integer, 1 to 9$"),
        ({"video": [CLIP[:9]] * 3}, r"^video: got a list of 3, want one, or one per prompt$"),
        ({"video": []}, r"^video: got list of none, want the frames of a video, or a list of videos$"),
        ({"video": "clip.mp4"}, r"^video: got str, want the frames of a video$"),
    ):
        with pytest.raises(ValueError, match=message):
            quietly(ours, prompt=[PROMPT, SECOND], **SMALL, **given)
