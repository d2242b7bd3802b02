"""Run settings and what the pipeline refuses; that it computes the right thing is shown in tests/parity."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cogvid
from cogvid.config import CONFIGS, ScheduleConfig
from cogvid.ops import BlockContext
from cogvid.run.settings import OPTIONS, check_frames, outside_training, resolve_settings
from cogvid.weights.checkpoint import read_checkpoint
from references import TEXT_LEN, picture, save_pipeline, tiny_pipeline

QUICK: dict[str, Any] = {
    "height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent", "progress": False,
}  # fmt: skip
OFFICIAL = {
    "cogvideox-2b": (480, 720, 49, "ddim", "constant"),
    "cogvideox-5b": (480, 720, 49, "dpm", "diffusers"),
    "cogvideox-5b-i2v": (480, 720, 49, "dpm", "diffusers"),
    "cogvideox1.5-5b": (768, 1360, 81, "dpm", "diffusers"),
    "cogvideox1.5-5b-i2v": (768, 1360, 81, "dpm", "diffusers"),
}


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> cogvid.Pipeline:
    pytest.importorskip("diffusers", reason="needs diffusers")
    return cogvid.load(save_pipeline(*tiny_pipeline("5b"), tmp_path_factory.mktemp("t2v")), device="cpu")


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> cogvid.Pipeline:
    pytest.importorskip("diffusers", reason="needs diffusers")
    return cogvid.load(save_pipeline(*tiny_pipeline("5b-i2v"), tmp_path_factory.mktemp("i2v")), device="cpu")


def test_a_directory_with_the_name_of_a_pack_is_that_directory(
    t2v: cogvid.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny-t2v").symlink_to(t2v.checkpoint.directory)
    monkeypatch.chdir(tmp_path)
    pipe = cogvid.load("./tiny-t2v", device="cpu")
    assert pipe.model == t2v.model
    assert pipe.transformer.config == t2v.transformer.config


def own_task(name: str) -> str:
    return CONFIGS[name].tasks[0]


@pytest.mark.parametrize("name", OFFICIAL)
def test_defaults_are_the_recommendation_of_the_authors(name: str) -> None:
    settings = resolve_settings(CONFIGS[name], task=own_task(name))
    height, width, frames, scheduler, guidance = OFFICIAL[name]
    assert (settings.height, settings.width, settings.num_frames) == (height, width, frames)
    assert (settings.scheduler, settings.use_dynamic_cfg) == (scheduler, guidance)
    assert (settings.num_inference_steps, settings.guidance_scale) == (50, 6.0)
    assert outside_training(CONFIGS[name], height, width, frames) == []


def test_the_defaults_of_diffusers_in_settings(i2v: cogvid.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """That they give diffusers' videos is shown in tests/parity/test_defaults.py."""
    model = read_checkpoint(i2v.checkpoint.directory, defaults="diffusers").model
    settings = resolve_settings(model, task="image-to-video", scheduler="dpm")
    assert (settings.height, settings.width, settings.num_frames, settings.use_dynamic_cfg) == (64, 96, 49, "constant")
    assert model.text_length == 226
    assert read_checkpoint(i2v.checkpoint.directory).model.text_length == TEXT_LEN
    # What was trained stays what it was.
    assert outside_training(model, 64, 96, 49) == ["49 frames (recommended: 9; 8N + 1 up to 9)"]
    monkeypatch.setattr("cogvid.weights.hub._fetch", None)
    with pytest.raises(ValueError, match=r"^defaults: got 'none', want one of recommended, diffusers, sat$"):
        cogvid.load("zai-org/CogVideoX-2b", device="cpu", defaults="none")


@pytest.mark.parametrize(
    ("scheduler", "asked", "mode"),
    [
        ("dpm", None, "diffusers"),
        ("ddim", None, "constant"),
        ("dpm", False, "constant"),
        ("ddim", True, "diffusers"),
        ("ddim", "cosine", "cosine"),
        ("dpm", "constant", "constant"),
    ],
)
def test_dynamic_guidance_is_on_with_dpm_unless_said_otherwise(scheduler: str, asked: Any, mode: str) -> None:
    model = CONFIGS["cogvideox-5b"]
    settings = resolve_settings(model, task="text-to-video", scheduler=scheduler, use_dynamic_cfg=asked)
    assert settings.use_dynamic_cfg == mode


@pytest.mark.parametrize(
    ("name", "size", "frames", "reasons"),
    [
        ("cogvideox-5b", (480, 720), 9, []),
        ("cogvideox-5b", (480, 720), 81, ["81 frames"]),
        ("cogvideox-5b", (480, 720), 48, ["48 frames"]),
        ("cogvideox-5b", (720, 480), 49, ["720x480 pixels"]),
        ("cogvideox1.5-5b", (768, 1360), 161, []),
        ("cogvideox1.5-5b", (768, 1360), 89, ["89 frames"]),
        ("cogvideox1.5-5b", (768, 768), 81, ["768x768 pixels"]),
        ("cogvideox1.5-5b-i2v", (768, 768), 81, []),
        ("cogvideox1.5-5b-i2v", (1360, 768), 81, []),
        ("cogvideox1.5-5b-i2v", (480, 720), 177, ["480x720 pixels", "177 frames"]),
    ],
)
def test_what_was_never_trained_is_named(name: str, size: tuple[int, int], frames: int, reasons: list[str]) -> None:
    found = outside_training(CONFIGS[name], *size, frames)
    assert [text.partition(" (")[0] for text in found] == reasons


@given(st.integers(1, 400))
def test_frames_are_legal_exactly_when_they_decode_to_themselves(num_frames: int) -> None:
    vae = CONFIGS["cogvideox-2b"].vae
    latents = vae.latent_frames(num_frames)
    # What the VAE does: the first of an odd number of latent frames becomes 1 frame, every other one 4.
    decoded = 1 + 4 * (latents - 1) if latents % 2 else 4 * latents
    assert vae.decoded_frames(latents) == decoded
    assert (decoded == num_frames) == (num_frames % 8 in (0, 1))
    if decoded == num_frames:
        check_frames(vae, num_frames)
    else:
        with pytest.raises(ValueError, match=r"nearest are") as caught:
            check_frames(vae, num_frames)
        below, above = (int(word) for word in str(caught.value).split() if word.isdigit())
        assert below < num_frames < above
        for near in (below, above):
            check_frames(vae, near)
        assert not any(n % 8 in (0, 1) for n in range(below + 1, above))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            {"timestep_spacing": "leading", "steps_offset": 20},
            "steps_offset: got 20, which with 50 steps begins at time",
        ),
        ({"snr_shift_scale": -1.0}, "scheduler: got betas and a shift that make a noise level below 0 or above 1"),
        ({"prediction_type": "epsilon"}, "prediction_type: got 'epsilon' with a first step at timestep 999"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_schedule_that_cannot_be_run_is_refused_with_the_settings(scheduler: dict[str, Any], message: str) -> None:
    model = dataclasses.replace(CONFIGS["cogvideox-5b"], schedule=ScheduleConfig(**scheduler))
    with pytest.raises(ValueError, match=f"^{message}"):
        resolve_settings(model, task="text-to-video")


def test_a_learned_table_of_positions_fixes_the_size() -> None:
    with pytest.raises(ValueError, match="height, width: got 480x640, want 480x720"):
        resolve_settings(CONFIGS["cogvideox-5b-i2v"], task="image-to-video", width=640)


EMBEDS = torch.zeros(1, TEXT_LEN, 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "prompt, prompt_embeds: got neither"),
        ({"prompt_embeds": EMBEDS}, "prompt, prompt_embeds: got both"),
        ({"prompt": []}, r"prompt: got \[\]"),
        ({"prompt": 3}, "prompt: got 3"),
        ({"prompt": ["a", 3]}, "prompt: got"),
        ({"prompt": None, "prompt_embeds": EMBEDS[0]}, r"prompt_embeds: got shape \(10, 40\)"),
        ({"prompt": None, "prompt_embeds": EMBEDS[..., :39]}, r"got shape \(1, 10, 39\), want \[prompts, L, 40\]"),
        ({"negative_prompt_embeds": EMBEDS.repeat(2, 1, 1)}, r"embeds: got shape \(2, 10, 40\), want \(1, 10, 40\)"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: got 2, want 1 or one per prompt, 1"),
        ({"negative_prompt": "a", "negative_prompt_embeds": EMBEDS}, "negative_prompt_embeds: got both"),
        ({"negative_prompt_embeds": EMBEDS[:, :5]}, r"negative_prompt_embeds: got shape \(1, 5, 40\)"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt: got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps: got 2.5"),
        ({"seed": 1, "generator": torch.Generator()}, "seed, generator: got both"),
        ({"seed": 1.5}, "seed: got 1.5"),
        ({"generator": [torch.Generator()] * 2}, "generator: got a list of 2, want one per video, 1"),
        ({"latents": torch.zeros(1, 16, 3, 8, 12)}, r"latents: got shape .* want .* \(1, 3, 16, 8, 12\)"),
        ({"output_type": "gif"}, "output_type: got 'gif', want one of pil, np"),
        ({"scheduler": "euler"}, "scheduler: got 'euler'"),
        ({"use_dynamic_cfg": "linear"}, "use_dynamic_cfg: got 'linear'"),
        ({"previous_timestep": "last"}, "previous_timestep: got 'last'"),
        ({"learned_positions": "none"}, "learned_positions: got 'none'"),
        ({"guidance_scale": float("nan")}, "guidance_scale: got nan"),
        ({"image": picture(8, 8)}, "cannot do image-to-video"),
        ({"video": [picture(8, 8)] * 9, "num_frames": 17}, "num_frames: got 17, want an integer, 1 to 9"),
        ({"video": [picture(8, 8)] * 10, "num_frames": None}, "num_frames: got 10, want 8N or"),
        ({"video": [picture(8, 8)] * 9, "strength": 0.4}, "strength: got 0.4, which is none of 2 steps"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_wrong_arguments_are_refused_before_any_model_runs(
    t2v: cogvid.Pipeline, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(t2v, "text_encoder", None)
    monkeypatch.setattr(t2v.vae, "encode", None)
    monkeypatch.setattr(t2v.transformer, "forward", None)
    with pytest.raises(ValueError, match=message):
        t2v(**{"prompt": "a red", **QUICK, **options})


def test_images_go_with_prompts(i2v: cogvid.Pipeline) -> None:
    with pytest.raises(ValueError, match="image: got a list of 2, want one, or one per prompt"):
        i2v("a red", image=[picture(8, 8)] * 2, **QUICK)
    with pytest.raises(ValueError, match="cannot do text-to-video"):
        i2v("a red", **QUICK)
    one = i2v(["a red", "two dogs"], image=picture(8, 9), seed=0, **QUICK).frames
    two = i2v(["a red", "two dogs"], image=[picture(8, 9)] * 2, seed=0, **QUICK).frames
    assert torch.equal(one, two)


def test_latents_that_are_not_finite_stop_the_run_at_that_step(t2v: cogvid.Pipeline) -> None:
    steps: list[int] = []

    def note(pipe: Any, index: int, timestep: int, tensors: dict[str, torch.Tensor]) -> Any:  # noqa: ARG001
        steps.append(index)
        return {"latents": tensors["latents"] / 0} if index == 1 else None

    at = r"^latents: got numbers that are not finite at step {} of 2 \(timestep {}\) in torch\.float32, want finite.*; "
    cause = "likely cause: prompt_embeds had such numbers before"
    with pytest.raises(FloatingPointError, match=at.format(1, 999) + cause):
        t2v(prompt_embeds=EMBEDS / 0, callback_on_step_end=note, **QUICK)
    assert steps == []
    with pytest.raises(FloatingPointError, match=at.format(2, 499) + "likely cause: callback_on_step_end returned"):
        t2v("a red", callback_on_step_end=note, **QUICK)
    assert steps == [0, 1]


def test_what_made_latents_infinite_is_named(t2v: cogvid.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = t2v.transformer.proj_out.bias
    with monkeypatch.context() as patch:
        patch.setitem(cogvid.SAMPLERS, "broken", lambda x, _step, state: (x / 0, state))
        with pytest.raises(FloatingPointError, match=r"step 1 of 2 .*: .*a sampler or a guidance scale"):
            t2v("a red", **{**QUICK, "scheduler": "broken"})
    monkeypatch.setattr(bias, "data", torch.full_like(bias.data, torch.nan))
    with pytest.raises(FloatingPointError, match=r"step 1 of 2 .*: the weight proj_out\.bias had such numbers before$"):
        t2v("a red", **QUICK)


def test_one_warning_outside_of_what_was_trained(t2v: cogvid.Pipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t2v("a red", **QUICK)
    with pytest.warns(UserWarning, match=r"64x64 pixels .* and 16 frames") as caught:
        t2v("a red", **{**QUICK, "width": 64, "num_frames": 16})
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_seeds(t2v: cogvid.Pipeline) -> None:
    first = t2v("a red", **QUICK)
    assert first.seed is not None
    assert torch.equal(first.frames, t2v("a red", **QUICK, seed=first.seed).frames)
    second = t2v("a red", **QUICK)
    assert second.seed != first.seed
    assert not torch.equal(second.frames, first.frames)
    generated = t2v("a red", **QUICK, generator=torch.Generator().manual_seed(first.seed))
    assert generated.seed is None
    assert torch.equal(generated.frames, first.frames)


def test_provenance_is_ready_for_json_and_repeats_the_run(t2v: cogvid.Pipeline) -> None:
    out = t2v(["a red", "two dogs"], negative_prompt="a cat", **QUICK, num_videos_per_prompt=2)
    made = json.loads(json.dumps(out.provenance))
    assert made == out.provenance
    names = ("prompt", "negative_prompt", "num_videos_per_prompt", "seed", *OPTIONS)
    again = t2v(output_type="latent", progress=False, **{name: made[name] for name in names})
    assert torch.equal(again.frames, out.frames)
    assert made["guidance_schedule"] is not None
    assert made["dtype"] == "float32"
    assert made["ops"] == "torch"
    assert made["versions"]["torch"] == torch.__version__


def test_an_image_may_be_whatever_load_image_takes(i2v: cogvid.Pipeline, tmp_path: Path) -> None:
    picture(20, 30).save(tmp_path / "a.png")
    from_path = i2v("a red", image=tmp_path / "a.png", seed=0, **QUICK).frames
    assert torch.equal(from_path, i2v("a red", image=picture(20, 30), seed=0, **QUICK).frames)
    cropped = i2v("a red", image=picture(20, 90), resize="crop", seed=0, **QUICK).frames
    assert not torch.equal(cropped, i2v("a red", image=picture(20, 90), seed=0, **QUICK).frames)


def test_the_bar_can_be_turned_off(t2v: cogvid.Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    t2v("a red", **QUICK)
    assert capsys.readouterr().err == ""
    t2v("a red", **{**QUICK, "progress": True})
    assert "denoise: 100%" in capsys.readouterr().err


def test_float16_on_a_cpu_is_said_once(t2v: cogvid.Pipeline) -> None:
    with pytest.warns(UserWarning, match="float16 arithmetic is not run on a CPU") as caught:
        pipe = cogvid.load(t2v.checkpoint.directory, device="cpu", dtype="float16")
    assert len(caught) == 1
    assert pipe.dtype in (torch.bfloat16, torch.float32)
    assert next(pipe.vae.parameters()).dtype == pipe.text_encoder.dtype == pipe.dtype


def test_bfloat16_runs_through(t2v: cogvid.Pipeline) -> None:
    pipe = cogvid.load(t2v.checkpoint.directory, device="cpu", dtype="bfloat16")
    frames = pipe("a red", seed=0, **{**QUICK, "output_type": "np"}).frames
    exact = t2v("a red", seed=0, **{**QUICK, "output_type": "np"}).frames
    assert frames.shape == exact.shape
    assert frames.dtype == exact.dtype


class Counting:
    """A step cache that runs every block and counts, or reuses its first result for ever."""

    def __init__(self, reuse: bool) -> None:
        self.reuse, self.seen, self.state = reuse, [], {}

    def run(self, x: torch.Tensor, context: BlockContext, blocks: Callable[..., torch.Tensor]) -> torch.Tensor:
        self.seen.append((context.step, context.branch))
        if "kept" not in self.state or not self.reuse:
            self.state["kept"] = blocks(x)
        return self.state["kept"]


def test_a_step_cache_wraps_the_blocks_of_every_step(t2v: cogvid.Pipeline) -> None:
    plain = t2v("a cat", seed=1, **QUICK).frames
    faithful, lazy = Counting(reuse=False), Counting(reuse=True)
    assert torch.equal(t2v("a cat", seed=1, step_cache=faithful, **QUICK).frames, plain)
    assert not torch.equal(t2v("a cat", seed=1, step_cache=lazy, **QUICK).frames, plain)
    assert faithful.seen == lazy.seen == [(0, "both"), (1, "both")]


def test_learned_positions_are_a_named_choice(i2v: cogvid.Pipeline) -> None:
    image = picture(64, 96)

    def run(frames: int, choice: str) -> cogvid.Output:
        return i2v("a cat", image=image, seed=1, learned_positions=choice, **{**QUICK, "num_frames": frames})

    assert torch.equal(run(9, "sincos").frames, run(9, "slice").frames)  # the trained count: the table as it is
    assert not torch.equal(run(8, "sincos").frames, run(8, "slice").frames)
    assert run(8, "slice").provenance["learned_positions"] == "slice"
