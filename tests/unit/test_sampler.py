"""Samplers against closed forms, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from cogvid.config import ScheduleConfig
from cogvid.sampling.guidance import GUIDANCE, guidance_schedule, guide
from cogvid.sampling.samplers import SAMPLERS, Network, State, Step, draw_noise, sample
from cogvid.sampling.schedule import Schedule, add_noise, make_schedule, velocity

CONFIG = ScheduleConfig(snr_shift_scale=1.0)
SCHEDULE = make_schedule(CONFIG, 2)


def gaussian(schedule: Schedule, mean: float, std: float) -> Network:
    """Return the exact velocity for data distributed as N(mean, std^2) per element."""

    def network(x: Tensor, _index: int, timestep: int, _branch: str) -> Tensor:
        alpha = schedule.alpha(timestep)
        x0 = mean + std**2 * alpha.sqrt() / (alpha * std**2 + 1 - alpha) * (x - alpha.sqrt() * mean)
        noise = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * x0

    return network


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def test_ddim_follows_the_gaussian_flow() -> None:
    """The flow carries x_T to mean + std x_T, and DDIM approaches it as the steps grow."""
    x, mean, std, errors = noise(1, 2, 3, 4, 5), 0.7, 0.3, []
    for steps in (10, 100, 1000):
        schedule = make_schedule(CONFIG, steps)
        result = sample(gaussian(schedule, mean, std), x, schedule, sampler="ddim")
        errors.append((result - (mean + std * x)).abs().max().item())
    assert errors[0] > 5 * errors[1] > 25 * errors[2]  # measured 0.363, 0.0680, 0.0095
    assert errors[2] < 0.01


def test_ddim_turns_by_the_angle_between_levels() -> None:
    """For unit-variance data the velocity is zero, and N steps are the product of the cosines of the angles."""
    schedule = make_schedule(CONFIG, 25)
    angles = torch.stack([schedule.alpha(t) for t in (*schedule.timesteps, -1)]).sqrt().acos()
    x = noise(1, 2, 3, 4, 5)
    result = sample(gaussian(schedule, 0.0, 1.0), x, schedule, sampler="ddim")
    torch.testing.assert_close(result, x * angles.diff().cos().prod(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_one_point_distribution_is_reached_exactly(name: str, steps: int) -> None:
    schedule = make_schedule(CONFIG, steps)
    result = sample(gaussian(schedule, 0.7, 0.0), noise(1, 2, 3, 4, 5), schedule, sampler=name)
    torch.testing.assert_close(result, torch.full_like(result, 0.7), rtol=0, atol=1e-12)


def test_dpm_samples_the_gaussian() -> None:
    """Mean and deviation of 50,000 independent elements.

    The last step returns the posterior mean at the last timestep, whose deviation is below that of the data.
    """
    schedule, mean, std = make_schedule(CONFIG, 100), 0.7, 0.3
    x = noise(1, 4, 5, 50, 50)
    result = sample(gaussian(schedule, mean, std), x, schedule, generator=Generator().manual_seed(1))
    alpha = schedule.alpha(schedule.timesteps[-1]).item()
    expected_std = std**2 * alpha**0.5 / (alpha * std**2 + 1 - alpha) ** 0.5
    assert abs(result.mean().item() - mean) < 5e-3  # four standard errors
    assert abs(result.std().item() - expected_std) < 6e-3  # measured 0.2891, expected 0.2856: the step size
    assert abs(((result - mean) * x).mean().item()) < 5e-3  # stochastic: where the noise started is forgotten


def test_next_rule_reaches_clean_where_the_default_does_not() -> None:
    with pytest.warns(UserWarning, match=r"does not divide 1000: 19 steps .* does not reach clean"):
        default = make_schedule(CONFIG, 28)
    exact = make_schedule(CONFIG, 28, previous="next")
    assert default.timesteps == exact.timesteps
    assert default.prev_timesteps[-1] == 0
    assert exact.prev_timesteps == (*exact.timesteps[1:], -1)
    x, target = noise(1, 2, 3, 4, 5), torch.tensor(0.7, dtype=torch.float64)
    reached = sample(gaussian(exact, 0.7, 0.0), x, exact, sampler="ddim")
    missed = sample(gaussian(default, 0.7, 0.0), x, default, sampler="ddim")
    assert (reached - target).abs().max() < 1e-12
    assert (missed - target).abs().max() > 1e-2


def test_the_warning_says_where_diffusers_goes_on() -> None:
    """For counts like 61 and 103 diffusers takes a step more than was asked for."""
    with pytest.warns(
        UserWarning, match=r"24 steps .*, diffusers does the same and then takes a step more, at t = -1;"
    ):
        schedule = make_schedule(CONFIG, 61)
    assert len(schedule) == 61
    with pytest.warns(UserWarning, match=r"does not divide 1000: 3 steps land beside .*, as in diffusers;"):
        make_schedule(CONFIG, 6)
    with pytest.warns(UserWarning, match=r"=50 with spacing 'linspace': 19 steps land beside .*, as in diffusers;"):
        make_schedule(ScheduleConfig(timestep_spacing="linspace"), 50)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [1, 3, 7, 50, 61, 600])
def test_leading_steps_land_on_each_other(steps: int) -> None:
    schedule = make_schedule(ScheduleConfig(timestep_spacing="leading"), steps)
    assert schedule.prev_timesteps[:-1] == schedule.timesteps[1:]
    assert schedule.prev_timesteps[-1] < 0


@pytest.mark.filterwarnings("ignore:num_inference_steps")
def test_any_step_count_gives_that_many_falling_steps() -> None:
    for steps in (*range(1, 300), *range(300, 1001, 7), 397, 999):
        schedule = make_schedule(CONFIG, steps)
        assert len(schedule) == steps
        assert schedule.timesteps[0] == 999
        assert all(a > b >= 0 for a, b in pairwise(schedule.timesteps)), steps
        assert all(t > p for t, p in zip(schedule.timesteps, schedule.prev_timesteps, strict=True)), steps


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [1, 4, 5, 8, 10, 20, 25, 40, 50, 100, 1000])
def test_divisors_do_not_warn_and_both_rules_agree(steps: int) -> None:
    default, exact = make_schedule(CONFIG, steps), make_schedule(CONFIG, steps, previous="next")
    assert default.prev_timesteps[:-1] == exact.prev_timesteps[:-1]
    assert default.prev_timesteps[-1] < 0
    assert exact.prev_timesteps[-1] < 0


def test_terminal_snr_is_zero() -> None:
    schedule = make_schedule(CONFIG, 50)
    assert schedule.alpha(999) == 0
    assert schedule.alpha(-1) == 1
    assert (schedule.alphas_cumprod.diff() < 0).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_batch_with_generators_equals_single_runs(name: str) -> None:
    schedule, x = make_schedule(CONFIG, 5), noise(3, 2, 3, 4, 5).float()
    network = gaussian(schedule, 0.7, 0.3)
    batch = sample(network, x, schedule, sampler=name, generator=[Generator().manual_seed(s) for s in range(3)])
    for s in range(3):
        single = sample(network, x[s : s + 1], schedule, sampler=name, generator=Generator().manual_seed(s))
        assert torch.equal(batch[s : s + 1], single)


@pytest.mark.parametrize("name", SAMPLERS)
def test_on_step_sees_and_replaces_x(name: str) -> None:
    schedule, x, seen = make_schedule(CONFIG, 4), noise(1, 2, 3, 4, 5).bfloat16(), []

    def on_step(step: Step, x: Tensor, _state: State) -> Tensor | None:
        seen.append((step.index, step.timestep, x.dtype))
        return torch.full_like(x, 2.5, dtype=torch.bfloat16) if step.index == 3 else None

    result = sample(lambda x, *_: x, x, schedule, sampler=name, on_step=on_step)
    assert seen == [(i, t, torch.float32) for i, t in enumerate((999, 749, 499, 249))]
    assert result.dtype == torch.bfloat16
    assert (result == 2.5).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_observing_changes_nothing(name: str) -> None:
    schedule, x = make_schedule(CONFIG, 4), noise(1, 2, 3, 4, 5).bfloat16()
    runs = [
        sample(lambda y, *_: y.sin(), x, schedule, sampler=name, generator=Generator().manual_seed(1), on_step=on_step)
        for on_step in (None, lambda _step, x, _state: x)
    ]
    assert torch.equal(*runs)


def test_noise_is_drawn_frames_first() -> None:
    """One step from zero signal at an intermediate level adds exactly the drawn noise, frames before channels."""
    schedule = make_schedule(CONFIG, 2)
    x = torch.zeros(1, 2, 3, 4, 5)
    seen: list[Tensor] = []
    sample(
        lambda y, *_: torch.zeros_like(y),
        x,
        schedule,
        generator=Generator().manual_seed(1),
        on_step=lambda _step, x, _state: seen.append(x),
    )
    drawn = draw_noise((1, 3, 2, 4, 5), Generator().manual_seed(1), "cpu", torch.float32).transpose(1, 2)
    torch.testing.assert_close(seen[0], drawn * (1 - schedule.alpha(499)).sqrt().float())


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_goes_on_from_a_saved_step(name: str, tmp_path: Path) -> None:
    """x, the sampler's state and the generator's, written to disk after step 2, give the bytes of an unbroken run."""
    schedule, x = make_schedule(CONFIG, 5), noise(1, 2, 3, 4, 5).bfloat16()
    network, generator = gaussian(schedule, 0.7, 0.3), Generator().manual_seed(1)

    def save(step: Step, x: Tensor, state: State) -> None:
        if step.index == 2:
            torch.save({"x": x, "state": state, "generator": generator.get_state()}, tmp_path / "step")

    whole = sample(network, x, schedule, sampler=name, generator=generator, on_step=save)
    saved = torch.load(tmp_path / "step", weights_only=True)
    generator = Generator()
    generator.set_state(saved["generator"])
    again = sample(
        network, saved["x"], schedule, sampler=name, generator=generator, dtype=x.dtype, start=3, state=saved["state"]
    )
    assert torch.equal(whole, again)


def test_a_sampler_may_ask_the_network_twice_in_a_step() -> None:
    """Heun's second-order steps, between DDIM's, follow the Gaussian flow better than DDIM with twice the steps."""

    def derivative(x: Tensor, step: Step, timestep: int) -> Tensor:
        alpha = step.schedule.alpha(timestep)
        return (x - alpha.sqrt() * step.x0(x, timestep)) / (1 - alpha).sqrt()  # the noise in x

    def move(x: Tensor, direction: Tensor, step: Step) -> Tensor:
        a, b = step.alpha, step.alpha_prev
        return (b / a).sqrt() * x + ((1 - b).sqrt() - (b / a * (1 - a)).sqrt()) * direction

    def heun(x: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
        first = derivative(x, step, step.timestep)
        if step.prev_timestep < 0:
            return move(x, first, step), state
        second = derivative(move(x, first, step), step, step.prev_timestep)
        return move(x, (first + second) / 2, step), state

    # Without zero terminal SNR, because a step divides by the first signal level. The last step ends at clean latents,
    # where neither sampler can follow the flow, so the step before it is compared.
    config = ScheduleConfig(snr_shift_scale=1.0, rescale_betas_zero_snr=False)
    x, errors = noise(1, 2, 3, 4, 5), {}

    def flow(alpha: Tensor) -> tuple[Tensor, Tensor]:
        return 0.7 * alpha.sqrt(), (0.3**2 * alpha + 1 - alpha).sqrt()  # mean and deviation at a level

    for name, sampler, steps in (("heun", heun, 20), ("ddim", "ddim", 40)):
        schedule = make_schedule(config, steps)
        seen: list[Tensor] = []
        keep = partial(lambda seen, _step, x, _state: seen.append(x), seen)
        sample(gaussian(schedule, 0.7, 0.3), x, schedule, sampler=sampler, on_step=keep)
        (mean, std), (start_mean, start_std) = flow(schedule.alpha(249)), flow(schedule.alpha(999))
        expected = mean + (x - start_mean) / start_std * std
        at_249 = schedule.prev_timesteps.index(249)
        errors[name] = (seen[at_249] - expected).abs().max().item()
    assert errors["heun"] < errors["ddim"] / 2, errors  # for the same number of evaluations


def test_guidance_none_skips_the_unconditional_branch() -> None:
    schedule, asked = make_schedule(CONFIG, 4), []

    def network(x: Tensor, index: int, _timestep: int, branch: str) -> Tensor:
        asked.append((index, branch))
        return torch.cat([x, x]) if branch == "both" else x

    sample(network, noise(1, 2, 3, 4, 5), schedule, scales=[6.0, None, 1.0, None])
    assert asked == [(0, "both"), (1, "cond"), (2, "both"), (3, "cond")]


def test_noising_then_inverting() -> None:
    schedule = make_schedule(CONFIG, 50)
    x0, eps, t = noise(3, 2, 4), noise(3, 2, 4, seed=1), torch.tensor([0, 400, 999])
    x, v = add_noise(x0, eps, t, schedule), velocity(x0, eps, t, schedule)
    alpha = schedule.alphas_cumprod[t].reshape(-1, 1, 1)
    torch.testing.assert_close(alpha.sqrt() * x - (1 - alpha).sqrt() * v, x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((1 - alpha).sqrt() * x + alpha.sqrt() * v, eps, rtol=1e-12, atol=1e-12)


def test_bf16_noising_rounds_once() -> None:
    """At t = 0 the noise level, 0.03, survives; in bf16 arithmetic it would vanish."""
    schedule = make_schedule(CONFIG, 50)
    x0, eps = torch.zeros(2, 4).bfloat16(), torch.ones(2, 4).bfloat16()
    expected = (1 - schedule.alpha(0)).sqrt().bfloat16()
    assert (add_noise(x0, eps, 0, schedule) == expected).all()


def test_a_rule_of_guidance_may_skip_steps_and_must_give_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GUIDANCE, "early", lambda scale, index, schedule: scale if index < len(schedule) / 2 else None)
    monkeypatch.setitem(GUIDANCE, "broken", lambda *_: float("nan"))
    schedule = make_schedule(CONFIG, 4)
    assert guidance_schedule(6.0, schedule, "early") == [6.0, 6.0, None, None]
    assert guidance_schedule(1.0, schedule, "early") == [None] * 4
    with pytest.raises(ValueError, match=r"^use_dynamic_cfg: got nan from 'broken' at step 0, want a number or None$"):
        guidance_schedule(6.0, schedule, "broken")


def test_guidance() -> None:
    uncond, cond = torch.tensor([1.0]).bfloat16(), torch.tensor([1.5]).bfloat16()
    guided = guide(uncond, cond, 6.0)
    assert guided.dtype == torch.float32
    assert guided.item() == 4.0
    schedule = make_schedule(CONFIG, 50)
    assert guidance_schedule(6.0, schedule) == [6.0] * 50
    published = [2.29, 2.54, 6.97, 6.42, 2.79, 4.27, 1.04]
    assert [round(g, 2) for g in guidance_schedule(6.0, schedule, "diffusers")[:7]] == published
    smooth = guidance_schedule(6.0, schedule, "cosine")
    assert smooth[0] == 1.0
    assert all(a <= b for a, b in pairwise(smooth))
    assert 6.5 < smooth[-1] < 7.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_schedule(CONFIG, 0), "num_inference_steps: got 0, want 1 to 1000"),
        (lambda: make_schedule(CONFIG, 1001), "num_inference_steps: got 1001, want 1 to 1000"),
        (lambda: make_schedule(CONFIG, 50, previous="last"), "previous: got 'last', want one of diffusers, next"),
        (lambda: ScheduleConfig(timestep_spacing="log"), "timestep_spacing: got 'log', want one of leading, linspace"),
        (lambda: ScheduleConfig(prediction_type="x"), "prediction_type: got 'x', want one of epsilon, sample, v_pred"),
        (lambda: ScheduleConfig(beta_schedule="x"), "beta_schedule: got 'x', want one of linear, scaled_linear, squ"),
        (lambda: ScheduleConfig(trained_betas=(0.1,)), "trained_betas: got 1 of them, want one for each of the 1000"),
        (lambda: ScheduleConfig(beta_start=-1.0), "beta_start, beta_end: got -1.0, 0.012, want 0 or more"),
        (
            lambda: make_schedule(ScheduleConfig(beta_end=1.1), 50),
            "scheduler: got betas and a shift that make a noise",
        ),
        (lambda: make_schedule(ScheduleConfig(snr_shift_scale=0.0), 50), "scheduler: got betas and a shift that make"),
        (
            lambda: make_schedule(ScheduleConfig(timestep_spacing="leading", steps_offset=20), 50),
            "steps_offset: got 20, which with 50 steps begins at timestep 1000, want 999 at most",
        ),
        (lambda: make_schedule(CONFIG, 50).tail(0.0), "strength: got 0.0"),
        (lambda: make_schedule(CONFIG, 50).tail(1.5), "strength: got 1.5"),
        (
            lambda: make_schedule(CONFIG, 50).tail(0.01),
            "strength: got 0.01, which is none of 50 steps, want at least 0.02",
        ),
        (
            lambda: guidance_schedule(6.0, make_schedule(CONFIG, 5), "linear"),
            "use_dynamic_cfg: got 'linear', want one of con",
        ),
        (
            lambda: sample(lambda x, *_: x, noise(1, 1, 1, 1, 1), SCHEDULE, sampler="x"),
            "scheduler: got 'x', want one of",
        ),
        (
            lambda: sample(lambda x, *_: x, noise(1, 1, 1, 1, 1), SCHEDULE, sampler=lambda x, _, state: (x[0], state)),
            "sampler: got latents of shape [1, 1, 1, 1], want [1, 1, 1, 1, 1]",
        ),
        (
            lambda: sample(lambda x, *_: x, noise(1, 1, 1, 1, 1), SCHEDULE, on_step=lambda _step, x, _state: x[0]),
            "latents: got latents of shape [1, 1, 1, 1], want [1, 1, 1, 1, 1]",
        ),
        (
            lambda: draw_noise((2, 1, 1, 1, 1), [Generator()], "cpu", torch.float32),
            "generator: got a list of 1, want one per batch item, 2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        call()
    assert message in str(error.value)


def test_import_is_light() -> None:
    heavy = "{'transformers', 'sentencepiece', 'diffusers'}"
    code = f"import sys, cogvid.sampling.samplers, cogvid.models.text; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
