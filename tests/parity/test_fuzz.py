"""Random configurations give here what they give in diffusers, or are refused for a reason that has a name.

`--fuzz-cases N` runs N cases, `--fuzz-start S` begins at number S; a case is made again from the number in its id.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXVideoToVideoPipeline
from torch import Generator, Tensor, nn

import cogvid
from cogvid.config import ScheduleConfig
from cogvid.sampling.samplers import sample
from cogvid.sampling.schedule import add_noise, make_schedule
from measure import rel_rms
from references import (
    TEXT_WIDTH,
    assemble,
    call_diffusers,
    picture,
    rotary_table,
    save_pipeline,
    tiny_transformer,
    tiny_vae,
)
from tests.fuzz import ILLEGAL, ILLEGAL_EVERY, KINDS, Case, draw_case
from tests.schedulers import SCHEDULERS
from tests.tolerances import FUZZ_CHAOS, FUZZ_FP32

ROOT = Path(__file__).parents[2]
PIPELINES = {
    "t2v": CogVideoXPipeline,
    "i2v": CogVideoXImageToVideoPipeline,
    "v2v": CogVideoXVideoToVideoPipeline,
}
WORDS = ("a red", "the blue square", "two dogs", "")


@dataclass(frozen=True)
class Runs:
    """One case, ready to run: both return the same tensors in the same order.

    theirs: takes the relative change of its weights (a sampler has none: of its noise), 0 for none.
    """

    ours: Callable[[], Sequence[Tensor]]
    theirs: Callable[[float], Sequence[Tensor]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        start, count = (metafunc.config.getoption(name) for name in ("--fuzz-start", "--fuzz-cases"))
        metafunc.parametrize("number", range(start, start + count), ids=lambda n: f"case-{n}")


def test_case(number: int, tmp_path: Path) -> None:
    case = draw_case(number)
    runs = {"transformer": transformer, "vae": vae, "sampler": sampler, "pipeline": pipeline}[case.kind](case, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes and step counts: tests/unit/test_pipeline.py
        if case.illegal is None:
            assert_agreement(case, runs)
        else:
            assert_refusal(case, runs)


def test_at_least_nine_of_ten_cases_are_legal(request: pytest.FixtureRequest) -> None:
    """And any hundred have every kind and all five variants in them, so that what `test_case` passes says something."""
    start = request.config.getoption("--fuzz-start")
    cases = [draw_case(number) for number in range(start, start + 100)]
    assert sum(case.illegal is None for case in cases) >= 90
    assert {case.kind for case in cases} == set(KINDS)
    for kind in ("transformer", "pipeline"):
        assert len({case.variant for case in cases if case.kind == kind}) == 5


def test_every_reason_of_a_refusal_is_drawn() -> None:
    drawn = {draw_case(number).illegal for number in range(ILLEGAL_EVERY - 1, 1000 * ILLEGAL_EVERY, ILLEGAL_EVERY)}
    assert drawn == ILLEGAL.keys()


def test_readme_names_what_only_we_refuse() -> None:
    differences = " ".join((ROOT / "tests/parity/DIFFERENCES.md").read_text().split())
    for illegal in ILLEGAL.values():
        assert illegal.readme is None or illegal.readme in differences


def assert_agreement(case: Case, runs: Runs) -> None:
    expected, actual = runs.theirs(0.0), runs.ours()
    assert len(actual) == len(expected)
    error = largest_error(actual, expected)
    if error <= FUZZ_FP32:
        return
    # Some random models amplify rounding: then diffusers itself is as far from diffusers with other last bits.
    moved = max(largest_error(runs.theirs(1e-7), expected) for _ in range(2))
    assert error <= FUZZ_CHAOS * moved, f"error {error:.1e}, diffusers' own {moved:.1e}, {case}"
    assert moved < 1e-3, f"diffusers' own error is {moved:.1e}, so that this says nothing: {case}"


def largest_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    assert all(torch.isfinite(e).all() for e in expected)
    return max(rel_rms(a, e) for a, e in zip(actual, expected, strict=True))


def assert_refusal(case: Case, runs: Runs) -> None:
    illegal = ILLEGAL[case.illegal or ""]
    with pytest.raises(ValueError, match=illegal.message) as caught:
        runs.ours()
    assert "\n" not in str(caught.value)
    if illegal.readme is None:
        with pytest.raises(Exception):  # noqa: B017, PT011 - diffusers fails in many ways
            runs.theirs(0.0)


@contextmanager
def changed(modules: Sequence[nn.Module], relative: float) -> Iterator[None]:
    """Change every weight by about that much of itself."""
    kept = [[p.clone() for p in module.parameters()] for module in modules]
    with torch.no_grad():
        for module in modules:
            for p in module.parameters():
                p.mul_(1 + relative * torch.randn_like(p))
        yield
        for module, parameters in zip(modules, kept, strict=True):
            for p, before in zip(module.parameters(), parameters, strict=True):
                p.copy_(before)


def generators(count: int, seed: int) -> Any:
    made = [Generator().manual_seed(seed + i) for i in range(count)]
    return made if count > 1 else made[0]


def transformer(case: Case, directory: Path) -> Runs:
    reference = tiny_transformer(case.variant, case.number, **case.transformer)
    reference.save_pretrained(directory)
    call, options, g = case.call, reference.config, Generator().manual_seed(case.number)
    batch, *size = call["size"]
    args = (
        torch.randn(batch, options["in_channels"], *size, generator=g),
        torch.randn(batch, call["text_len"], call.get("text_width", options["text_embed_dim"]), generator=g),
        torch.tensor(call["timesteps"][:batch]),
    )

    def theirs(change: float) -> list[Tensor]:
        with changed([reference], change), torch.no_grad():
            return [call_diffusers(reference, *args, rotary_table(reference, args[0]))]

    return Runs(lambda: [cogvid.load_transformer(directory)(*args)], theirs)


def vae(case: Case, directory: Path) -> Runs:
    reference = tiny_vae(case.number, **case.vae)
    reference.save_pretrained(directory)
    g = Generator().manual_seed(case.number)
    x, z = (torch.randn(case.call[name], generator=g) for name in ("pixels", "latents"))

    def ours() -> list[Tensor]:
        loaded = cogvid.load_vae(directory)
        encoded = loaded.encode(x)
        return [encoded.mean, encoded.sample(generators(1, 1)), loaded.decode(z)]

    def theirs(change: float) -> list[Tensor]:
        with changed([reference], change), torch.no_grad():
            encoded = reference.encode(x).latent_dist
            return [encoded.mean, encoded.sample(generators(1, 1)), reference.decode(z).sample]

    return Runs(ours, theirs)


def sampler(case: Case, _directory: Path) -> Runs:
    """Drive both samplers with a made-up network, from noised latents; every state is compared."""
    call = case.call
    scheduler = SCHEDULERS[call["sampler"]](**case.scheduler)
    g = Generator().manual_seed(case.number)
    x, x0 = (torch.randn(call["size"], generator=g) for _ in range(2))
    mix = torch.randn(4, 4, generator=g)

    def network(x: Tensor, t: int) -> Tensor:
        return (torch.einsum("bc...,cd->bd...", x, mix) + t / 500).sin()

    def ours() -> list[Tensor]:
        schedule = make_schedule(ScheduleConfig.from_dict(dict(scheduler.config)), call["steps"]).tail(strength)
        states = [add_noise(x0, x, call["add_noise_at"], schedule)]
        sample(
            lambda x, _index, timestep, _branch: network(x, timestep), x, schedule, sampler=call["sampler"],
            generator=generators(call["generators"], 1), on_step=lambda _step, x, _state: states.append(x.clone()),
        )  # fmt: skip
        return states

    strength = min(max(call["strength"], 1.001 / call["steps"]), 1.0)  # at least one step

    def theirs(change: float) -> list[Tensor]:
        """Without the step at t = -1 that rounding adds to some counts, see DIFFERENCES.md."""
        scheduler.set_timesteps(call["steps"])
        kept = min(int(call["steps"] * strength), call["steps"])
        timesteps = scheduler.timesteps[: call["steps"]][-kept:]
        states = [scheduler.add_noise(x0, x, torch.tensor([call["add_noise_at"]]))]
        latents = (x * (1 + change * torch.randn_like(x))).transpose(1, 2)
        old, draws = None, generators(call["generators"], 1)
        for i, t in enumerate(timesteps):
            out = network(latents.transpose(1, 2), int(t)).transpose(1, 2)
            if call["sampler"] == "dpm":
                back = timesteps[i - 1] if i > 0 else None
                latents, old = scheduler.step(out, old, t, back, latents, generator=draws, return_dict=False)
            else:
                latents = scheduler.step(out, t, latents, return_dict=False)[0]
            latents = latents.to(x.dtype)
            states.append(latents.transpose(1, 2))
        return states

    return Runs(ours, theirs)


def pipeline(case: Case, directory: Path) -> Runs:
    call, task = case.call, case.call["task"]
    reference, spiece = assemble(
        PIPELINES[task],
        tiny_transformer(case.variant, case.number, **case.transformer),
        tiny_vae(case.number, **case.vae),
        SCHEDULERS[call["sampler"]](**case.scheduler),
        case.number,
        call["extra_ids"],
    )
    # Upstream makes no difference between the two, but names the class of the first task that it loads.
    save_pipeline(reference, spiece, directory)
    size = {name: call[name] for name in ("height", "width", "num_inference_steps", "guidance_scale")}
    size |= {"use_dynamic_cfg": call["use_dynamic_cfg"], "output_type": call["output_type"]}
    per_prompt, prompts = call["videos_per_prompt"], call["prompts"]

    text, their_text = text_of(case)
    ours: dict[str, Any] = {**size, **text, "num_videos_per_prompt": per_prompt, "scheduler": call["sampler"]}
    theirs: dict[str, Any] = {**size, **their_text, "max_sequence_length": case.transformer["max_text_seq_length"]}
    if task == "v2v":
        clip = [picture(30, 40, seed) for seed in range(call["num_frames"])]
        ours |= {"video": clip, "strength": call["strength"]}
        # One generator draws one posterior for all videos of a batch, as it has one video to draw it for.
        clips = [clip] * (prompts * per_prompt) if call["generators"] > 1 else clip
        theirs |= {"video": clips, "strength": call["strength"]}
    else:
        ours["num_frames"] = theirs["num_frames"] = call["num_frames"]
    if task == "i2v":
        images = [picture(30, 40, seed) for seed in range(prompts)]
        ours["image"], theirs["image"] = images, per_video(images, prompts, per_prompt)
    if call["latents"]:
        ours["latents"] = theirs["latents"] = initial_latents(case)

    def run_ours() -> list[Tensor]:
        pipe = cogvid.load(directory, device="cpu")
        return [torch.as_tensor(pipe(**ours, generator=generators(call["generators"], 1), progress=False).frames)]

    def run_theirs(change: float) -> list[Tensor]:
        with changed([reference.transformer, reference.vae, reference.text_encoder], change):
            return [torch.as_tensor(reference(**theirs, generator=generators(call["generators"], 1)).frames)]

    return Runs(run_ours, run_theirs)


def text_of(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the prompts or embeddings for us, and for diffusers with one of each per video."""
    call, per_prompt, prompts = case.call, case.call["videos_per_prompt"], case.call["prompts"]
    shape = prompts, case.transformer["max_text_seq_length"], TEXT_WIDTH
    g = Generator().manual_seed(case.number)
    ours: dict[str, Any] = {"prompt": list(WORDS[:prompts])}
    if call["negative"] != "none":
        ours["negative_prompt"] = WORDS[1] if call["negative"] == "one" else list(WORDS[-prompts:])
    if call["embeddings"] != "none":
        ours["prompt_embeds"] = torch.randn(shape, generator=g)
        if call["embeddings"] != "twice":
            del ours["prompt"]
    if call["embeddings"] == "both":
        ours.pop("negative_prompt", None)
        ours["negative_prompt_embeds"] = torch.randn(shape, generator=g)
    return ours, {name: per_video(value, prompts, per_prompt) for name, value in ours.items()}


def per_video(value: Any, prompts: int, per_prompt: int) -> Any:
    """Repeat what is per prompt, because diffusers takes `num_videos_per_prompt` and ignores it."""
    if isinstance(value, Tensor):
        return value.repeat_interleave(per_prompt, dim=0)
    items = [value] * prompts if isinstance(value, str) else value
    return [item for item in items for _ in range(per_prompt)]


def initial_latents(case: Case) -> Tensor:
    """Draw `[B, T, C, h, w]`, with the frames that the temporal patches of a 1.5 model need on top."""
    call, stride = case.call, 2 ** (len(case.vae["block_out_channels"]) - 1)
    frames = (call["num_frames"] - 1) // case.vae["temporal_compression_ratio"] + 1
    frames += -frames % (case.transformer.get("patch_size_t", 1))
    shape = (
        call["prompts"] * call["videos_per_prompt"], frames, case.vae["latent_channels"],
        call["height"] // stride, call["width"] // stride,
    )  # fmt: skip
    return torch.randn(shape, generator=Generator().manual_seed(case.number + 1))
