"""Step caches by name: the option, what is kept, saved runs, replays, batches. tests/parity has what they compute."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cogvid
from cogvid.cli import main
from cogvid.config import CONFIGS
from cogvid.models.transformer import Transformer
from cogvid.ops import BlockContext
from cogvid.run.settings import resolve_settings
from cogvid.sampling.cache import kept_units, make_step_cache
from cogvid.sampling.schedule import make_schedule
from tests.unit.test_plan import live_bytes, plan

PROMPT = "the red circle moves right"
QUICK: dict[str, Any] = {"num_frames": 9, "num_inference_steps": 8, "seed": 1, "progress": False}
LATENT = {**QUICK, "output_type": "latent"}
NAMED = ("first-block=0.25", "teacache=0.9:coefficients=1/0", "pyramid=2")


@pytest.fixture(scope="module")
def pipe() -> cogvid.Pipeline:
    return cogvid.load("tiny-t2v", device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("first-block", "got 'first-block', want NAME=VALUE with a NAME of first-block, teacache, pyramid"),
        ("magic=1", "got 'magic=1', want NAME=VALUE with a NAME of first-block, teacache, pyramid"),
        ("", "got '', want NAME=VALUE with a NAME of first-block, teacache, pyramid"),
        ("first-block=0", "got first-block=0, want more than 0"),
        ("first-block=nan", "got 'nan', want a finite number"),
        ("first-block=0.1:range=1-2", "got 'range=1-2' for first-block, want nothing after the first colon, once"),
        ("pyramid=2:range=1-2:range=1-2", "got 'range=1-2' for pyramid, want range=... after the first colon, once"),
        ("pyramid=1", "got pyramid=1, want an integer, 2 or more"),
        ("pyramid=2.5", "got pyramid=2.5, want an integer, 2 or more"),
        ("pyramid=2:range=800-100", "got range=800-100, want LOW-HIGH, two timesteps such as 100-800"),
        ("teacache=0.1:coefficients=1/x", "got 'x', want a finite number"),
        (3, "got 3, want NAME=VALUE, or an object with `run`"),
        (
            "teacache=0.1",
            "got teacache for tiny-t2v, which has no published coefficients, want them too, such as "
            "teacache=0.1:coefficients=1/0, or one of cogvideox-2b, cogvideox-5b, cogvideox-5b-i2v, cogvideox1.5-5b, "
            "cogvideox1.5-5b-i2v",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_said_before_anything_runs(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^step_cache: ") as error:
        resolve_settings(CONFIGS["tiny-t2v"], task="text-to-video", step_cache=given)
    assert str(error.value) == f"step_cache: {message}"


def test_nothing_lossy_is_a_default() -> None:
    for model in CONFIGS.values():
        settings = resolve_settings(model, task=model.tasks[0])
        assert settings.step_cache is None
        assert settings.guidance_interval == (0.0, 1.0)


@pytest.mark.parametrize("name", [name for name, model in CONFIGS.items() if model.repo])
def test_the_official_models_have_coefficients(name: str) -> None:
    model = CONFIGS[name]
    cache: Any = make_step_cache("teacache=0.1", model, make_schedule(model.schedule, 50))
    assert len(cache.coefficients) == 5


@pytest.mark.parametrize("named", NAMED)
def test_a_cut_off_run_with_a_cache_ends_in_the_same_bits(pipe: cogvid.Pipeline, tmp_path: Path, named: str) -> None:
    class Cut(Exception):
        pass

    def cut(_pipe: object, index: int, *_: object) -> None:
        if index == 5:
            raise Cut

    options = {**LATENT, "step_cache": named, "guidance_scale": 3.0}
    whole = pipe(PROMPT, **options)
    assert whole.skipped_steps
    with cogvid.SavedRun(tmp_path) as saved, pytest.raises(Cut):
        pipe(PROMPT, **options, saved_run=saved, callback_on_step_end=cut)
    with cogvid.SavedRun(tmp_path) as saved:
        again = pipe(PROMPT, **options, saved_run=saved, callback_on_step_end=lambda *_: None)
    assert torch.equal(again.frames, whole.frames)
    assert again.skipped_steps == whole.skipped_steps
    assert not torch.equal(whole.frames, pipe(PROMPT, **{**options, "step_cache": None}).frames)


@pytest.mark.parametrize("named", NAMED)
def test_what_one_branch_kept_is_never_used_for_another(pipe: cogvid.Pipeline, named: str) -> None:
    """Guidance in steps 2, 3, 6 and 7 of 10: a step after a change of the rows, 2, 4, 6 and 8, is computed."""
    scales = [None, None, 3.0, 3.0, None, None, 3.0, 3.0, None, None]
    named = named.replace("0.25", "1000").replace("0.9", "1000").replace("pyramid=2", "pyramid=9:range=0-1000")
    rows: list[int] = []
    handle = pipe.transformer.blocks[1].q_proj.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    out = pipe(PROMPT, **{**LATENT, "num_inference_steps": 10}, step_cache=named, use_dynamic_cfg=scales)
    handle.remove()
    assert out.skipped_steps == ([1, 3, 5, 7] if named.startswith("teacache") else [1, 3, 5, 7, 9])
    assert rows[:5] == [1, 2, 1, 2, 1]


def test_a_branch_that_ran_long_ago_is_forgotten(pipe: cogvid.Pipeline) -> None:
    cache: Any = make_step_cache("pyramid=9:range=0-1000", pipe.model, make_schedule(pipe.model.schedule, 10))
    scales = [3.0, 3.0, None, None, None, None, None, None, None, None]
    pipe(PROMPT, **{**LATENT, "num_inference_steps": 10}, step_cache=cache, use_dynamic_cfg=scales)
    assert set(cache.state["branches"]) == {"cond"}


@pytest.mark.parametrize("named", NAMED)
def test_what_is_kept_while_the_blocks_run_is_in_the_plan(named: str) -> None:
    """The peak of a step that is computed, with what was kept, over that of a run without a cache."""
    config = dataclasses.replace(CONFIGS["tiny-t2v"].transformer, num_layers=3)
    model = Transformer(config).eval().requires_grad_(False)
    cache = make_step_cache(named, CONFIGS["tiny-t2v"], make_schedule(CONFIGS["tiny-t2v"].schedule, 4))
    assert cache is not None
    x, text = torch.randn(2, 16, 4, 16, 16), torch.randn(2, 16, 64)

    def step(index: int, step_cache: Any = None) -> Callable[[], Tensor]:
        return lambda: model(x + index, text, torch.full((2,), 999 - index), step=index, step_cache=step_cache)

    step(0)()  # makes the tables
    without = live_bytes(model, step(0))
    step(0, cache)()
    cache.threshold = -1.0  # pyright: ignore - so that all is computed
    kept = sum(_tensors(cache.state))
    peak = live_bytes(model, step(0 if named.startswith("pyramid") else 1, cache))
    unit = 2 * (16 + 4 * 8 * 8) * config.hidden_size * 4
    units = kept_units(named, config.num_layers)
    if named.startswith("pyramid"):  # kept before: the counter does not see it
        assert kept == pytest.approx(units * unit, rel=0.01)
    else:
        assert peak - without == pytest.approx(units * unit, abs=0.1 * unit)
    with_cache, plain = (plan("tiny-t2v", step_cache=name).memory[0].phases["denoise"] for name in (named, None))
    assert (with_cache > plain) == (units > 0)


def _tensors(value: Any) -> list[int]:
    if isinstance(value, dict):
        return [size for each in value.values() for size in _tensors(each)]
    return [value.numel() * value.element_size()] if isinstance(value, Tensor) else []


def test_the_plan_says_that_its_flops_are_those_without(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "x", "--step-cache", "first-block=0.1"]) == 0
    assert "the FLOPs are those without first-block=0.1" in capsys.readouterr().out


def test_the_command_line_says_what_was_skipped_and_a_replay_has_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")
    options = ["--num-frames", "9", "--num-inference-steps", "8", "--seed", "1", "--step-cache", "pyramid=2"]
    assert main(["generate", PROMPT, "-o", first, *options]) == 0
    assert "pyramid=2 skipped work in 3 steps" in capsys.readouterr().err
    assert cogvid.read_record(first)["step_cache"] == "pyramid=2"
    assert main(["replay", first, "-o", again]) == 0
    assert Path(first).read_bytes() == Path(again).read_bytes()
    assert main(["generate", PROMPT, "-o", first, "--step-cache", "teacache=0.1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("cogvid: error: step_cache: got teacache for tiny-t2v")


def test_jobs_with_a_cache_run_one_by_one(tmp_path: Path) -> None:
    """The first block's cache decides for a whole batch, so a video would depend on those beside it."""
    options = ["--prompt", PROMPT, "--sweep", "seed=1..2", "step_cache=first-block=0.25,pyramid=2"]
    options += ["--num-frames", "9", "--num-inference-steps", "4", "--batch-size", "2", "-o", str(tmp_path)]
    assert main(["batch", *options]) == 0
    entries = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [entry["job"]["step_cache"] for entry in entries] == ["first-block=0.25", "pyramid=2"] * 2
    assert {entry["batch_size"] for entry in entries} == {1}


def test_a_users_own_cache_has_a_name(pipe: cogvid.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    class Every:
        def __init__(self, model: Any, schedule: Any, n: float, *, offset: str = "0") -> None:  # noqa: ARG002
            self.n, self.offset, self.skipped, self.state = int(n), int(offset), [], {}

        def run(self, x: Tensor, context: BlockContext, blocks: Callable[..., Tensor]) -> Tensor:
            assert context.step is not None
            if "change" in self.state and (context.step + self.offset) % self.n:
                self.skipped.append(context.step)
                return x + self.state["change"]
            self.state["change"] = blocks(x) - x
            return x + self.state["change"]

    monkeypatch.setitem(cogvid.STEP_CACHES, "every", Every)
    options = {**LATENT, "num_inference_steps": 6}
    assert pipe(PROMPT, **options, step_cache="every=3").skipped_steps == [1, 2, 4, 5]
    assert pipe(PROMPT, **options, step_cache="every=3:offset=1").skipped_steps == [1, 3, 4]


def test_outside_a_run_a_cache_needs_the_step(pipe: cogvid.Pipeline) -> None:
    cache = make_step_cache("pyramid=2", pipe.model, make_schedule(pipe.model.schedule, 4))
    with pytest.raises(ValueError, match=r"^step: got None, want the index"):
        pipe.transformer(torch.zeros(1, 16, 3, 8, 8), torch.zeros(1, 16, 64), torch.zeros(1), step_cache=cache)
