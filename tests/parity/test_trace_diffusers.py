"""scripts/trace_diffusers.py: nothing departs from diffusers, and a block that is wrong is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

import trace_diffusers
from cogvid.config import ScheduleConfig
from cogvid.ops import BlockContext
from cogvid.run.trace import Trace
from cogvid.sampling.schedule import make_schedule
from cogvid.weights.load import load_transformer
from references import TEXT_LEN, TEXT_WIDTH, TRANSFORMER_VARIANTS, tiny_transformer


def trace(variant: str, dtype: torch.dtype, folder: Path, wrong: tuple[int, int] | None = None) -> Trace:
    """Trace a run of four steps. wrong: the step and the layer whose attention is."""
    theirs = tiny_transformer(variant)
    theirs.save_pretrained(folder)
    ours = load_transformer(folder, dtype="float32").to(dtype)
    if wrong is not None:
        right = ours.ops.attention

        def attention(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
            return right(q, k, v * (1.1 if (context.step, context.layer) == wrong else 1), context)

        ours.set_ops(dataclasses.replace(ours.ops, attention=attention))
    generator = torch.Generator().manual_seed(1)
    frames = 4 if variant.startswith("1.5") else 3
    latents = torch.randn(1, ours.config.in_channels, frames, 8, 12, generator=generator).to(dtype)
    text = torch.randn(1, TEXT_LEN, TEXT_WIDTH, generator=generator).to(dtype)
    with torch.no_grad():
        return trace_diffusers.trace_run(ours, theirs.to(dtype), latents, text, make_schedule(ScheduleConfig(), 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", TRANSFORMER_VARIANTS)
def test_nothing_departs(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    found = trace(variant, dtype, tmp_path)
    parts = ["embedding", "blocks.0", "blocks.1", "output"]
    assert [(call.step, call.name) for call in found.calls] == [(step, part) for step in range(4) for part in parts]
    assert found.first is None, found.calls
    assert max(call.error for call in found.calls) > 0


@pytest.mark.parametrize("step", [0, 2])
def test_a_block_that_is_wrong_is_named(step: int, tmp_path: Path) -> None:
    """At one step alone: the others have the inputs of diffusers."""
    found = trace("5b", torch.float32, tmp_path, wrong=(step, 1))
    assert [(call.step, call.name) for call in found.calls if call.departs] == [(step, "blocks.1")]
    assert f"the first: step {step}, blocks.1, error" in found.lines()[-1]


def test_the_script_traces_a_pack(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--height", "32", "--width", "32", "--num-frames", "9", "--steps", "4"]
    assert trace_diffusers.main(["tiny-i2v", *sizes]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("32 calls of modules and operations, in 4 steps")  # 6 blocks, and before and after them
    assert "none departs beyond rounding" in lines[-1]
