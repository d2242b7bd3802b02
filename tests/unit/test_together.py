"""Options of a load and of a run that are used together change what each changes alone, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cogvid
from cogvid.run.compiled import compile_modules
from measure import rel_rms
from references import picture

LORA = f"{Path(__file__).parents[2] / 'scripts' / 'demo_lora.safetensors'}:0.7"
RUN: dict[str, Any] = {
    "image": picture(64, 64), "seed": 1, "num_inference_steps": 4, "num_frames": 9, "output_type": "pt",
    "step_cache": "first-block=0.2", "use_dynamic_cfg": [6.0, 4.0, 2.5, None], "progress": False,
}  # fmt: skip
PROMPT = "the red circle moves right"


@pytest.fixture(scope="module")
def plain() -> cogvid.Output:
    return cogvid.load("tiny-i2v", device="cpu", lora=[LORA])(PROMPT, **RUN)


@pytest.mark.parametrize("offload", ["model", "block"])
def test_offloading_changes_nothing_of_a_run_with_an_adapter_and_a_step_cache(
    offload: str, plain: cogvid.Output
) -> None:
    out = cogvid.load("tiny-i2v", device="cpu", lora=[LORA], offload=offload)(PROMPT, **RUN)
    assert out.frames.equal(plain.frames)
    assert out.skipped_steps == plain.skipped_steps
    assert {**out.provenance, "offload": None} == plain.provenance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # the pack is in fp16
def test_a_fused_adapter_is_the_same_while_blocks_are_offloaded(dtype: str) -> None:
    found = []
    for offload in (None, "block"):
        pipe = cogvid.load("tiny-i2v", device="cpu", dtype=dtype, lora=[LORA], offload=offload)
        pipe.fuse_lora()
        found.append(pipe(PROMPT, **RUN).frames)
    assert found[0].equal(found[1])


def test_an_adapter_comes_and_goes_while_blocks_are_offloaded(plain: cogvid.Output) -> None:
    pipe = cogvid.load("tiny-i2v", device="cpu", offload="block")
    before = pipe(PROMPT, **RUN).frames
    path, _, scale = LORA.rpartition(":")
    pipe.load_lora(path, scale=float(scale))
    assert pipe(PROMPT, **RUN).frames.equal(plain.frames)
    pipe.fuse_lora()
    assert rel_rms(pipe(PROMPT, **RUN).frames, plain.frames) < 1e-5
    pipe.unload_lora()
    assert pipe(PROMPT, **RUN).frames.equal(before)
    assert rel_rms(before, plain.frames) > 1e-3


def test_compiled_blocks_take_adapters_and_offloading(plain: cogvid.Output) -> None:
    pipe = cogvid.load("tiny-i2v", device="cpu", lora=[LORA], offload="block")
    compile_modules(pipe.transformer.blocks, "eager")
    assert rel_rms(pipe(PROMPT, **RUN).frames, plain.frames) < 1e-5


def test_an_adapter_beside_8_bit_weights() -> None:
    weights = {"device": "cpu", "quantize": "fp8-storage"}
    rounded = cogvid.load("tiny-i2v", **weights)(PROMPT, **RUN).frames
    adapted = cogvid.load("tiny-i2v", lora=[LORA], **weights)(PROMPT, **RUN).frames
    assert rel_rms(adapted, rounded) > 1e-3
    pipe = cogvid.load("tiny-i2v", lora=[LORA], **weights)
    with pytest.raises(ValueError, match=r"^fuse_lora: got .* want a plain linear$"):
        pipe.fuse_lora()
    assert pipe(PROMPT, **RUN).frames.equal(adapted)
