"""Guidance by steps: rules by name, a list of scales, and an interval; and where a step ends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import cogvid
from cogvid.cli import main
from cogvid.run.settings import resolve_settings
from cogvid.sampling.guidance import guidance_schedule
from cogvid.sampling.schedule import make_schedule
from tests.unit.test_plan import plan

PROMPT = "the red circle moves right"
MODEL = cogvid.CONFIGS["tiny-t2v"]
LATENT: dict[str, Any] = {
    "num_frames": 9,
    "num_inference_steps": 5,
    "seed": 1,
    "progress": False,
    "output_type": "latent",
}


@pytest.fixture(scope="module")
def pipe() -> cogvid.Pipeline:
    return cogvid.load("tiny-t2v", device="cpu", dtype="float32")


def rows_of(pipe: cogvid.Pipeline, **options: Any) -> tuple[list[int], cogvid.Output]:
    """The rows of each call of the transformer, and what came out."""
    rows: list[int] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    out = pipe(PROMPT, **{**LATENT, **options})
    handle.remove()
    return rows, out


def test_falling_begins_with_the_most_and_ends_near_one() -> None:
    schedule = make_schedule(MODEL.schedule, 50)
    scales = [scale for scale in guidance_schedule(6.0, schedule, "falling") if scale is not None]
    assert scales[0] == 7.0
    assert scales == sorted(scales, reverse=True)
    assert scales[25] == pytest.approx(1 + 6 * (1 - math.cos(math.pi * 0.5**5)) / 2)
    assert scales[-1] == pytest.approx(1, abs=1e-6)


def test_a_list_with_one_scale_is_the_constant_rule(pipe: cogvid.Pipeline) -> None:
    _, constant = rows_of(pipe, guidance_scale=3.0, use_dynamic_cfg="constant")
    rows, listed = rows_of(pipe, use_dynamic_cfg=[3.0] * 5)
    assert rows == [2] * 5
    assert torch.equal(constant.frames, listed.frames)
    assert listed.provenance["use_dynamic_cfg"] == [3.0] * 5
    assert listed.provenance["guidance_scale"] is None


def test_where_a_list_has_none_only_the_prompt_is_run(pipe: cogvid.Pipeline) -> None:
    rows, out = rows_of(pipe, use_dynamic_cfg=[3, None, 2.5, None, None])
    assert rows == [2, 1, 2, 1, 1]
    assert out.provenance["guidance_schedule"] == [3.0, None, 2.5, None, None]
    rows, out = rows_of(pipe, use_dynamic_cfg=[None] * 5, negative_prompt="red")
    assert rows == [1] * 5
    assert out.provenance["guidance_schedule"] is None
    assert torch.equal(out.frames, rows_of(pipe, guidance_scale=1.0)[1].frames)


@pytest.mark.parametrize("interval", ["0.2-0.6", (0.2, 0.6), [0.2, 0.6]])
def test_outside_an_interval_only_the_prompt_is_run(pipe: cogvid.Pipeline, interval: Any) -> None:
    rows, out = rows_of(pipe, guidance_scale=3.0, use_dynamic_cfg="constant", guidance_interval=interval)
    assert rows == [1, 2, 2, 1, 1]
    assert out.provenance["guidance_interval"] == [0.2, 0.6]
    assert torch.equal(out.frames, rows_of(pipe, use_dynamic_cfg=[None, 3.0, 3.0, None, None])[1].frames)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dynamic_cfg": [3.0] * 4}, "use_dynamic_cfg: got 4 scales, want 5, one for each step"),
        (
            {"use_dynamic_cfg": [3.0] * 5, "guidance_scale": 6.0},
            "guidance_scale, use_dynamic_cfg: got 6 and a list of scales, want one of them",
        ),
        ({"use_dynamic_cfg": "3,x"}, "use_dynamic_cfg: got '3,x', want one of constant, diffusers, cosine, falling, "),
        ({"use_dynamic_cfg": "3,,2"}, "use_dynamic_cfg: got '' in a list, want numbers from 0 to 1e+06, or -"),
        ({"use_dynamic_cfg": [math.nan]}, "use_dynamic_cfg: got nan in a list, want numbers from 0 to 1e+06, or -"),
        ({"use_dynamic_cfg": [True]}, "use_dynamic_cfg: got True in a list, want numbers from 0 to 1e+06, or -"),
        ({"use_dynamic_cfg": []}, "use_dynamic_cfg: got [], want one of "),
        ({"guidance_interval": "0.5"}, "guidance_interval: got '0.5', want LOW-HIGH, two shares of the steps such as"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval: got (0.5, 0.5), want LOW-HIGH, two shares"),
        ({"guidance_interval": (0, math.nan)}, "guidance_interval: got (0, nan), want LOW-HIGH, two shares"),
        (
            {"guidance_interval": "0.3-0.35"},
            "guidance_interval: got 0.3-0.35, in which none of 5 steps begins, want a wider one",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        resolve_settings(MODEL, task="text-to-video", num_inference_steps=5, **options)
    assert str(error.value).startswith(message)


def test_the_steps_of_a_list_are_those_that_run(pipe: cogvid.Pipeline) -> None:
    """Video-to-video runs a part of the steps."""
    options = {**LATENT, "strength": 0.6, "video": torch.zeros(9, 64, 64, 3, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"^use_dynamic_cfg: got 5 scales, want 3, one for each step$"):
        pipe(PROMPT, **options, use_dynamic_cfg=[3.0] * 5)
    out = pipe(PROMPT, **options, use_dynamic_cfg=[3.0, None, 2.0])
    assert out.provenance["guidance_schedule"] == [3.0, None, 2.0]


def test_a_plan_counts_the_guided_steps() -> None:
    listed = plan("tiny-t2v", num_inference_steps=5, use_dynamic_cfg="3,-,2,-,-")
    interval = plan("tiny-t2v", num_inference_steps=5, guidance_scale=3.0, guidance_interval="0.2-0.6")
    for found in (listed, interval):
        assert (found.guided_steps, found.rows) == (2, 2)
        assert found.flops["denoise"] == 2 * found.flops["guided_step"] + 3 * found.flops["step"]


def test_the_command_line_has_all_of_it_and_a_replay_the_same_bytes(tmp_path: Path) -> None:
    common = ["generate", PROMPT, "--num-frames", "9", "--num-inference-steps", "3", "--seed", "1", "-o"]
    runs = {
        "list": ["--use-dynamic-cfg", "3,-,2"],
        "interval": ["--guidance-interval", "0-0.5", "--guidance-scale", "3", "--use-dynamic-cfg", "falling"],
        "next": ["--previous-timestep", "next"],
        "plain": [],
    }
    paths = {name: str(tmp_path / f"{name}.mp4") for name in runs}
    for name, options in runs.items():
        assert main([*common, paths[name], *options]) == 0
    records = {name: cogvid.read_record(path) for name, path in paths.items()}
    assert records["list"]["guidance_schedule"] == [3.0, None, 2.0]
    assert records["interval"]["guidance_schedule"][0] == 4.0
    assert records["interval"]["guidance_schedule"][2] is None
    assert [records[name]["previous_timestep"] for name in ("next", "plain")] == ["next", "diffusers"]
    frames = [cogvid.read_video(path)[0] for path in paths.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(frames) for b in frames[:i])
    for name in ("list", "interval"):
        again = str(tmp_path / "again.mp4")
        assert main(["replay", paths[name], "-o", again]) == 0
        assert Path(again).read_bytes() == Path(paths[name]).read_bytes()
