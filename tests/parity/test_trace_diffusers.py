"""scripts/trace_diffusers.py: nothing departs from diffusers, and a block that is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trace_diffusers
from cogvid.weights.load import load_transformer
from references import TEXT_LEN, TEXT_WIDTH, TRANSFORMER_VARIANTS, tiny_transformer


def trace(variant: str, dtype: torch.dtype, folder: Path, wrong: int | None = None) -> trace_diffusers.Trace:
    theirs = tiny_transformer(variant)
    theirs.save_pretrained(folder)
    ours = load_transformer(folder, dtype="float32").to(dtype)
    if wrong is not None:
        with torch.no_grad():
            ours.get_submodule(f"blocks.{wrong}.out").weight.mul_(1.1)
    generator = torch.Generator().manual_seed(1)
    frames = 4 if variant.startswith("1.5") else 3
    latents = torch.randn(1, ours.config.in_channels, frames, 8, 12, generator=generator).to(dtype)
    text = torch.randn(1, TEXT_LEN, TEXT_WIDTH, generator=generator).to(dtype)
    with torch.no_grad():
        return trace_diffusers.trace_transformer(ours, theirs.to(dtype), latents, text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", TRANSFORMER_VARIANTS)
def test_nothing_departs(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    found = trace(variant, dtype, tmp_path)
    assert [call.name for call in found.calls] == ["embedding", "blocks.0", "blocks.1", "output"]
    assert found.first is None, found.calls
    assert max(call.error for call in found.calls) > 0


def test_a_block_that_is_wrong_is_named(tmp_path: Path) -> None:
    found = trace("5b", torch.float32, tmp_path, wrong=1)
    assert [call.name for call in found.calls if call.departs] == ["blocks.1"]


def test_the_script_traces_a_pack(capsys: pytest.CaptureFixture[str]) -> None:
    assert trace_diffusers.main(["tiny-t2v", "--height", "32", "--width", "32", "--num-frames", "9"]) == 0
    assert "none departs beyond rounding" in capsys.readouterr().out
