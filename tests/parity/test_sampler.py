"""Schedule, samplers, guidance and forward noising against the real diffusers schedulers and pipelines."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
)
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange
from torch import Generator, Tensor

from cogvid.config import CONFIGS, SCHEDULER_DEFAULTS, ScheduleConfig
from cogvid.run.settings import resolve_settings
from cogvid.sampling.guidance import guidance_schedule
from cogvid.sampling.samplers import draw_noise, sample
from cogvid.sampling.schedule import Schedule, add_noise, make_schedule, velocity
from measure import pooled_ratio, rel_rms
from references import tiny_transformer, tiny_vae
from tests.schedulers import SCHEDULERS
from tests.tolerances import ADD_NOISE_FP32, SAMPLER_FP32, SAMPLER_LOW_PRECISION

STEP_COUNTS = [1, 2, 5, 7, 20, 28, 50]  # 7 and 28 do not divide 1000 and end at t = 0
SHIFTS = [1.0, 3.0]


def schedule_for(steps: int, shift: float) -> Schedule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_schedule(ScheduleConfig(snr_shift_scale=shift), steps)


def scheduler_for(name: str, shift: float) -> Any:
    return SCHEDULERS[name](
        snr_shift_scale=shift,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def denoiser(x: Tensor, t: int) -> Tensor:
    """Mix channels, depend on the timestep, stay bounded; any layout whose channels are axis 1."""
    mix = torch.randn(4, 4, generator=Generator().manual_seed(7)).to(x)
    return (torch.einsum("bc...,cd->bd...", x, mix) + t / 500).sin().float()


def run_diffusers(
    name: str, x: Tensor, steps: int, shift: float, generator: Any, start: int = 0
) -> tuple[list[Tensor], Tensor]:
    scheduler = scheduler_for(name, shift)
    scheduler.set_timesteps(steps)
    return drive(scheduler, x, generator, start)


def drive(scheduler: Any, x: Tensor, generator: Any, start: int = 0) -> tuple[list[Tensor], Tensor]:
    """Drive the real scheduler as the pipelines do, cast to the latents' dtype after each step included."""
    timesteps = scheduler.timesteps[start:]
    latents, old, states = rearrange(x, "b c t h w -> b t c h w"), None, []
    for i, t in enumerate(timesteps):
        v = denoiser(rearrange(latents, "b t c h w -> b c t h w"), t.item())
        v = rearrange(v, "b c t h w -> b t c h w")
        if isinstance(scheduler, CogVideoXDPMScheduler):
            latents, old = scheduler.step(
                v, old, t, timesteps[i - 1] if i > 0 else None, latents, generator=generator, return_dict=False
            )
        else:
            latents = scheduler.step(v, t, latents, return_dict=False)[0]
        latents = latents.to(x.dtype)
        states.append(rearrange(latents, "b t c h w -> b c t h w"))
    return states, states[-1]


def run_ours(name: str, x: Tensor, schedule: Schedule, generator: Any) -> tuple[list[Tensor], Tensor]:
    states: list[Tensor] = []
    result = sample(
        lambda x, _index, timestep, _branch: denoiser(x, timestep),
        x,
        schedule,
        sampler=name,
        generator=generator,
        on_step=lambda _step, x, _state: states.append(x.clone()),
    )
    return states, result


def noise(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, 3, 5, 6, generator=Generator().manual_seed(seed))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_schedule_is_diffusers_to_the_bit(steps: int, shift: float) -> None:
    schedule, scheduler = schedule_for(steps, shift), scheduler_for("dpm", shift)
    scheduler.set_timesteps(steps)
    assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod)
    assert list(schedule.timesteps) == scheduler.timesteps.tolist()


def test_schedule_without_terminal_rescale() -> None:
    ours = make_schedule(ScheduleConfig(rescale_betas_zero_snr=False), 50)
    assert torch.equal(ours.alphas_cumprod, CogVideoXDDIMScheduler(snr_shift_scale=3.0).alphas_cumprod)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEP_COUNTS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_and_every_draw(name: str, steps: int, shift: float) -> None:
    ours_generator, theirs_generator = Generator().manual_seed(3), Generator().manual_seed(3)
    ours, result = run_ours(name, noise(), schedule_for(steps, shift), ours_generator)
    theirs, expected = run_diffusers(name, noise(), steps, shift, theirs_generator)
    assert len(ours) == len(theirs) == steps
    for a, b in zip(ours, theirs, strict=True):
        assert rel_rms(a, b) <= SAMPLER_FP32
    assert rel_rms(result, expected) <= SAMPLER_FP32
    assert torch.equal(ours_generator.get_state(), theirs_generator.get_state())


# Every setting that the classes take. Where a setting may stand beside others, those that it could be confused with.
SETTINGS: dict[str, dict[str, Any]] = {
    "leading": {"timestep_spacing": "leading"},
    "linspace": {"timestep_spacing": "linspace"},
    "epsilon": {"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
    "epsilon leading": {"prediction_type": "epsilon", "timestep_spacing": "leading"},
    "sample": {"prediction_type": "sample"},
    "sample linspace": {"prediction_type": "sample", "timestep_spacing": "linspace"},
    "clip": {"clip_sample": True, "clip_sample_range": 0.1, "sample_max_value": 0.1},
    "level 0 at the end": {"set_alpha_to_one": False},
    "level 0 at the end, leading": {"set_alpha_to_one": False, "timestep_spacing": "leading"},
    "offset": {"timestep_spacing": "leading", "steps_offset": 1},
    "offset past a step": {"timestep_spacing": "leading", "steps_offset": 19, "set_alpha_to_one": False},
    "offset, trailing": {"steps_offset": 5},
    "linear": {"beta_schedule": "linear"},
    "linear, leading": {"beta_schedule": "linear", "timestep_spacing": "leading", "beta_end": 0.02},
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "squaredcos leading": {
        "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading", "rescale_betas_zero_snr": False,
    },
    "betas": {"trained_betas": [0.001 + 1e-5 * i for i in range(1000)], "set_alpha_to_one": False},
    "more betas than steps": {"trained_betas": [0.001 + 1e-5 * i for i in range(1200)], "beta_schedule": "linear"},
    "some signal at the end": {"rescale_betas_zero_snr": False},
    "shift": {"snr_shift_scale": 7.0},
    "other betas": {"beta_start": 0.002, "beta_end": 0.03},
    "500 levels": {"num_train_timesteps": 500},
    "class defaults": SCHEDULER_DEFAULTS,
}  # fmt: skip


@pytest.mark.parametrize("steps", [1, 3, 7, 50])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_setting_of_the_schedulers(name: str, setting: str, steps: int) -> None:
    config = {**ScheduleConfig().to_dict(), **SETTINGS[setting]}
    scheduler = SCHEDULERS[name](**config)
    scheduler.set_timesteps(steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule = make_schedule(ScheduleConfig.from_dict(config), steps)
    assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod)
    assert list(schedule.timesteps) == scheduler.timesteps.tolist()
    generators = Generator().manual_seed(3), Generator().manual_seed(3)
    ours, _ = run_ours(name, noise(), schedule, generators[0])
    theirs, _ = drive(scheduler, noise(), generators[1])
    assert len(ours) == len(theirs) == steps
    for a, b in zip(ours, theirs, strict=True):
        assert torch.isfinite(b).all()
        assert rel_rms(a, b) <= SAMPLER_FP32
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("steps", [61, 103])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_counts_for_which_diffusers_takes_a_step_more(name: str, steps: int) -> None:
    """Up to that step the states are the same; ours end there."""
    scheduler = scheduler_for(name, 1.0)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist()[steps - 1 :] == [*schedule_for(steps, 1.0).timesteps[-1:], -1]
    ours, _ = run_ours(name, noise(), schedule_for(steps, 1.0), Generator().manual_seed(3))
    theirs, _ = drive(scheduler, noise(), Generator().manual_seed(3))
    for a, b in zip(ours, theirs[:steps], strict=True):
        assert rel_rms(a, b) <= SAMPLER_FP32
    assert rel_rms(ours[-1], theirs[-1]) > 0.1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_settings_and_their_defaults_are_those_of_the_class(name: str) -> None:
    parameters = inspect.signature(SCHEDULERS[name].__init__).parameters
    theirs = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
    assert {**ScheduleConfig().to_dict(), **SCHEDULER_DEFAULTS} == theirs


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_noise_cannot_be_predicted_where_there_is_nothing_else(name: str) -> None:
    """diffusers divides by zero at the first step, and so do the samplers; a run is refused before it begins."""
    config = ScheduleConfig(prediction_type="epsilon")
    scheduler = SCHEDULERS[name](**config.to_dict())
    scheduler.set_timesteps(5)
    theirs, _ = drive(scheduler, noise(), Generator().manual_seed(1))
    assert not torch.isfinite(theirs[0]).any()
    model = dataclasses.replace(CONFIGS["cogvideox-2b"], schedule=config)
    with pytest.raises(ValueError, match=r"^prediction_type: got 'epsilon' with a first step at timestep 999, where"):
        resolve_settings(model, task="text-to-video", scheduler=name, num_inference_steps=5)
    # With the noisiest step left out, both run.
    resolve_settings(model, task="video-to-video", scheduler=name, num_inference_steps=5, strength=0.8)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_list_of_generators(name: str) -> None:
    def generators() -> list[Generator]:
        return [Generator().manual_seed(seed) for seed in (5, 6)]

    _, ours = run_ours(name, noise(), schedule_for(5, 1.0), generators())
    _, theirs = run_diffusers(name, noise(), 5, 1.0, generators())
    assert rel_rms(ours, theirs) <= SAMPLER_FP32


@pytest.mark.parametrize("strength", [0.05, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_video_to_video_tail(name: str, strength: float) -> None:
    pipe = CogVideoXVideoToVideoPipeline(None, None, tiny_vae(), tiny_transformer("2b"), scheduler_for(name, 1.0))  # pyright: ignore
    pipe.scheduler.set_timesteps(20)
    timesteps, count = pipe.get_timesteps(20, pipe.scheduler.timesteps, strength, "cpu")
    schedule = schedule_for(20, 1.0).tail(strength)
    assert list(schedule.timesteps) == timesteps.tolist()
    assert len(schedule) == count
    _, ours = run_ours(name, noise(), schedule, Generator().manual_seed(1))
    _, theirs = run_diffusers(name, noise(), 20, 1.0, Generator().manual_seed(1), start=20 - count)
    assert rel_rms(ours, theirs) <= SAMPLER_FP32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_low_precision_is_closer_to_fp64_than_diffusers(name: str, dtype: torch.dtype) -> None:
    """The noise is drawn in the low dtype by all three, so only the arithmetic differs."""
    schedule, errors = schedule_for(20, 1.0), []
    for seed in range(8):
        x = noise(seed=seed).to(dtype)
        _, ours = run_ours(name, x, schedule, Generator().manual_seed(1))
        _, theirs = run_diffusers(name, x, 20, 1.0, Generator().manual_seed(1))
        truth = _fp64_loop(name, x, schedule)
        assert ours.dtype == dtype
        errors.append((rel_rms(ours, truth), rel_rms(theirs, truth)))
    assert pooled_ratio(errors) <= SAMPLER_LOW_PRECISION


def _fp64_loop(name: str, x: Tensor, schedule: Schedule) -> Tensor:
    """Run the real scheduler in fp64 on noise drawn in the dtype of x."""
    scheduler = scheduler_for(name, 1.0)
    scheduler.set_timesteps(len(schedule))
    generator, low = Generator().manual_seed(1), x.dtype
    latents, old = rearrange(x, "b c t h w -> b t c h w").double(), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            f"{CogVideoXDPMScheduler.__module__}.randn_tensor",
            lambda shape, generator, device, dtype: randn_tensor(shape, generator, device, low).to(dtype),
        )
        for i, t in enumerate(scheduler.timesteps):
            mix = torch.randn(4, 4, generator=Generator().manual_seed(7)).double()
            v = (torch.einsum("btchw,cd->btdhw", latents, mix) + t.item() / 500).sin()
            if name == "dpm":
                back = scheduler.timesteps[i - 1] if i > 0 else None
                latents, old = scheduler.step(v, old, t, back, latents, generator=generator, return_dict=False)
            else:
                latents = scheduler.step(v, t, latents, return_dict=False)[0]
    return rearrange(latents, "b t c h w -> b c t h w")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)], ids=["one", "list"])
def test_draw_noise_is_randn_tensor(seeds: tuple[int, ...], dtype: torch.dtype) -> None:
    shape = (3, 2, 4, 5, 6)

    def generator() -> Any:
        made = [Generator().manual_seed(s) for s in seeds]
        return made if len(made) > 1 else made[0]

    ours = draw_noise(shape, generator(), "cpu", dtype)
    assert torch.equal(ours, randn_tensor(shape, generator(), torch.device("cpu"), dtype))


@pytest.mark.parametrize("shift", SHIFTS)
def test_add_noise_and_velocity(shift: float) -> None:
    schedule, scheduler = schedule_for(50, shift), scheduler_for("ddim", shift)
    t = torch.tensor([0, 1, 19, 500, 998, 999])
    x0, eps = noise(6, 1), noise(6, 2)
    assert rel_rms(add_noise(x0, eps, t, schedule), scheduler.add_noise(x0, eps, t)) <= ADD_NOISE_FP32
    assert rel_rms(velocity(x0, eps, t, schedule), scheduler.get_velocity(x0, eps, t)) <= ADD_NOISE_FP32
    assert torch.equal(add_noise(x0, eps, 999, schedule), eps)


@pytest.mark.parametrize("steps", [3, 20])
@pytest.mark.parametrize(("mode", "dynamic"), [("constant", False), ("diffusers", True)])
def test_guidance_scales_of_the_real_pipeline(mode: Any, dynamic: bool, steps: int) -> None:
    pipe = CogVideoXPipeline(None, None, tiny_vae(), tiny_transformer("2b"), scheduler_for("dpm", 1.0))  # pyright: ignore
    pipe.set_progress_bar_config(disable=True)
    scales: list[float] = []

    def record(pipeline: Any, _i: int, _t: int, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        scales.append(pipeline.guidance_scale)
        return {}

    embeds = torch.zeros(1, 10, 40)
    pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=embeds,
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=6.0,
        use_dynamic_cfg=dynamic,
        output_type="latent",
        callback_on_step_end=record,
        max_sequence_length=10,
    )
    assert guidance_schedule(6.0, schedule_for(steps, 1.0), mode) == scales
