"""One option is one field of `Settings`: the call, the command line and the record derive from it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cogvid
from cogvid import cli
from cogvid.run.jobs import KINDS
from cogvid.run.settings import OPTIONS, Settings, resolve_settings
from cogvid.sampling.samplers import State, Step
from cogvid.sampling.schedule import Schedule
from cogvid.weights.load_options import LOAD_OPTIONS
from cogvid.weights.placement import Placement

# The public contract. A name that disappears breaks users.
CONTRACT = (
    "prompt", "image", "video", "negative_prompt", "height", "width", "num_frames", "num_inference_steps",
    "guidance_scale", "use_dynamic_cfg", "scheduler", "strength", "num_videos_per_prompt", "seed", "generator",
    "latents", "prompt_embeds", "negative_prompt_embeds", "output_type", "callback_on_step_end",
)  # fmt: skip
QUICK: dict[str, Any] = {"num_inference_steps": 3, "num_frames": 9, "seed": 1, "progress": False}


@pytest.fixture(scope="module")
def pipe() -> cogvid.Pipeline:
    return cogvid.load("tiny-t2v", device="cpu")


def test_the_call_shows_every_option() -> None:
    parameters = inspect.signature(cogvid.Pipeline.__call__).parameters
    assert not set(CONTRACT) - set(parameters)
    assert not set(OPTIONS) - set(parameters)
    assert "options" not in parameters
    for name, field in OPTIONS.items():
        assert parameters[name].default == field.default
        assert f"{name}: {field.metadata['help']}" in (cogvid.Pipeline.__call__.__doc__ or "")


def test_the_command_line_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    parsed = vars(cli._parser().parse_args(["generate", "x", "-o", "x.mp4"]))
    options = {**OPTIONS, **LOAD_OPTIONS}
    assert {name: parsed[name] for name in options} == {name: field.default for name, field in options.items()}
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in options.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert " ".join(field.metadata["help"].split()[:4]) in shown


def test_loads_jobs_and_placements_have_every_option_of_a_load() -> None:
    parameters = inspect.signature(cogvid.load).parameters
    for name, field in LOAD_OPTIONS.items():
        assert parameters[name].default == field.default
        assert f"{name}: {field.metadata['help']}" in (cogvid.load.__doc__ or "")
    assert set(LOAD_OPTIONS) <= {field.name for field in dataclasses.fields(Placement)}
    assert set(LOAD_OPTIONS) <= set(KINDS)


def test_an_unknown_option_of_a_load_is_named() -> None:
    with pytest.raises(TypeError, match=r"^opps: got an unknown option, want one of device, dtype, ops, qk_norm"):
        cogvid.load("tiny-t2v", opps="torch")


def test_the_record_has_every_option(pipe: cogvid.Pipeline) -> None:
    record = pipe("the red circle moves right", output_type="latent", **QUICK).provenance
    assert {field.name for field in dataclasses.fields(Settings)} <= set(record)
    assert [name for name in OPTIONS if record[name] is None] == ["step_cache"]
    assert set(LOAD_OPTIONS) <= set(record)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"strength": 0.5}, "strength: got 0.5 {where}, want 0.8"),
        ({"resize": "crop"}, "resize: got 'crop' {where}, want 'stretch'"),
        ({"image_latent_scale": "none"}, "image_latent_scale: got 'none' {where}, want 'diffusers'"),
        ({"learned_positions": "slice"}, "learned_positions: got 'slice' {where}, want 'sincos'"),
        ({"vae_encode": "whole"}, "vae_encode: got 'whole' {where}, want 'chunks'"),
        ({"noise_aug_strength": 0.1}, "noise_aug_strength: got 0.1 {where}, want 0.0"),
        (
            {"guidance_interval": (0, 0.5), "guidance_scale": 1.0},
            "guidance_interval: got (0.0, 0.5) {where}, want (0.0, 1.0)",
        ),
    ],
)
def test_an_option_without_effect_is_refused(option: dict[str, Any], message: str) -> None:
    where = "for text-to-video with cogvideox-5b, where it has no effect"
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(where=where))}$"):
        resolve_settings(cogvid.CONFIGS["cogvideox-5b"], task="text-to-video", **option)


def test_options_that_have_an_effect_or_are_as_by_default_are_taken() -> None:
    model = cogvid.CONFIGS["cogvideox-5b"]
    resolve_settings(model, task="video-to-video", strength=0.5, resize="crop", vae_encode="whole")
    resolve_settings(cogvid.CONFIGS["cogvideox-5b-i2v"], task="image-to-video", learned_positions="slice")
    resolve_settings(cogvid.CONFIGS["cogvideox1.5-5b-i2v"], task="image-to-video", image_latent_scale="none")
    plain = resolve_settings(model, task="text-to-video")
    again = {name: getattr(plain, name) for name in OPTIONS}
    assert resolve_settings(model, task="text-to-video", **again) == plain


def test_an_unknown_option_is_named(pipe: cogvid.Pipeline) -> None:
    with pytest.raises(TypeError, match=r"^hieght: got an unknown option, want one of height, width, num_frames, "):
        pipe("the red circle moves right", hieght=64)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"height": True}, "height: got True, want an integer, 1 to 16777216"),
        ({"height": 64.0}, "height: got 64.0, want an integer, 1 to 16777216"),
        ({"guidance_scale": "6"}, "guidance_scale: got '6', want a finite number, 0 or more"),
        ({"guidance_scale": 10**400}, f"guidance_scale: got 1{'0' * 59}, want at most 1e+06"),
        ({"guidance_scale": 1e7}, "guidance_scale: got 10000000.0, want at most 1e+06"),
        ({"num_frames": 2**62 + 1}, "num_frames: got 4611686018427387905, want an integer, 1 to 1048576"),
        ({"strength": 10**400}, f"strength: got 1{'0' * 59}, want more than 0 and at most 1"),
        ({"strength": 2}, "strength: got 2, want more than 0 and at most 1"),
        ({"strength": True}, "strength: got True, want more than 0 and at most 1"),
        ({"scheduler": 3}, "scheduler: got 3, want one of dpm, ddim"),
        ({"resize": 3}, "resize: got 3, want one of stretch, crop, pad"),
        (
            {"use_dynamic_cfg": 1},
            "use_dynamic_cfg: got 1, want one of constant, diffusers, cosine, falling, or the scale of each step",
        ),
        ({"image_latent_scale": "half"}, "image_latent_scale: got 'half', want one of diffusers, none, multiply"),
    ],
    ids=str,
)
def test_values_that_cannot_be_are_named(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        resolve_settings(cogvid.CONFIGS["tiny-t2v"], task="text-to-video", **option)
    assert str(error.value) == message


def test_settings_import_no_torch() -> None:
    code = "import sys, cogvid.run.settings, cogvid.config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def euler(x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
    """A sampler as a user writes one: it knows nothing of dtypes, noise or callbacks."""
    x0 = step.x0(x)
    noise = (x - step.alpha.sqrt() * x0) / (1 - step.alpha).sqrt()
    return step.alpha_prev.sqrt() * x0 + (1 - step.alpha_prev).sqrt() * noise, state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_users_sampler_works_in_any_dtype_and_under_a_callback(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cogvid.SAMPLERS, "euler", euler)
    pipe, seen = cogvid.load("tiny-t2v", device="cpu", dtype=dtype), []

    def replace(_pipe: object, index: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((index, timestep, tensors["latents"].dtype))
        return {"latents": torch.full_like(tensors["latents"], 0.5)} if index == 2 else {}

    options = {"scheduler": "euler", "output_type": "latent", "previous_timestep": "next", **QUICK}
    out = pipe("the red circle moves right", callback_on_step_end=replace, **options)
    assert [index for index, *_ in seen] == [0, 1, 2]
    assert {dtype for *_, dtype in seen} == {torch.float32}
    assert (out.frames == 0.5).all()
    free = pipe("the red circle moves right", **options)
    assert free.frames.dtype == getattr(torch, dtype)
    assert free.provenance["scheduler"] == "euler"
    # It is DDIM written in another way.
    ddim = pipe("the red circle moves right", **{**options, "scheduler": "ddim"})
    torch.testing.assert_close(free.frames, ddim.frames, rtol=0.05 if dtype == "bfloat16" else 1e-4, atol=1e-2)


def test_a_users_guidance_rule_skips_the_unconditional_branch(
    pipe: cogvid.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_step_only(guidance_scale: float, index: int, schedule: Schedule) -> float | None:  # noqa: ARG001
        return guidance_scale if index == 0 else None

    monkeypatch.setitem(cogvid.GUIDANCE, "first", first_step_only)
    batches: list[int] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _module, args: batches.append(len(args[0])))
    out = pipe("the red circle moves right", use_dynamic_cfg="first", guidance_scale=3.0, **QUICK)
    handle.remove()
    assert batches == [2, 1, 1]
    assert out.provenance["guidance_schedule"] == [3.0, None, None]
    assert out.provenance["use_dynamic_cfg"] == "first"


def test_a_run_goes_on_from_a_saved_step_with_its_step_cache(pipe: cogvid.Pipeline, tmp_path: Path) -> None:
    """x, the sampler's, the cache's and the generator's state are all that a run carries from step to step."""
    from cogvid.run.conditioning import encode_prompts
    from cogvid.run.pipeline import denoise
    from cogvid.sampling.schedule import make_schedule

    class EveryOther:
        def __init__(self, state: dict[str, Any] | None = None) -> None:
            self.state = state or {}

        def run(self, x: Tensor, context: cogvid.BlockContext, blocks: Any) -> Tensor:
            assert context.step is not None
            if context.step % 2 == 0:
                self.state["delta"] = blocks(x) - x
            return x + self.state["delta"]

    settings = resolve_settings(pipe.model, task="text-to-video", num_inference_steps=5)
    schedule = make_schedule(pipe.model.schedule, 5)
    embeds = encode_prompts(pipe.text_encoder, ["the red circle moves right"], [""], pipe.model.text_length)
    x = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    generator, cache = torch.Generator().manual_seed(3), EveryOther()

    def save(step: Step, x: Tensor, state: State) -> None:
        if step.index == 2:
            saved = {"x": x, "sampler": state, "cache": cache.state, "generator": generator.get_state()}
            torch.save(saved, tmp_path / "step")

    with torch.no_grad():
        whole = denoise(
            pipe.transformer, x, embeds, schedule, settings, generator=generator, on_step=save, step_cache=cache
        )
        saved = torch.load(tmp_path / "step", weights_only=True)
        generator = torch.Generator()
        generator.set_state(saved["generator"])
        again = denoise(
            pipe.transformer, saved["x"], embeds, schedule, settings,
            generator=generator, start=3, state=saved["sampler"], step_cache=EveryOther(saved["cache"]),
        )  # fmt: skip
    assert torch.equal(whole, again)
