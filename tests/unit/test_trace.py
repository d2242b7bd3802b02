"""`compare --trace`: rounding is not reported, and a module or operation that is wrong is named."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cogvid
from cogvid.cli import main
from cogvid.run.trace import trace, trace_pipelines
from tests.unit.test_record import edited, generate, picture

PROMPT = "the red circle moves right"
OPTIONS: dict[str, Any] = {"negative_prompt": "", "seed": 1, "num_frames": 9, "num_inference_steps": 2}


def pipeline(model: str = "tiny-t2v", dtype: str = "float32") -> cogvid.Pipeline:
    return cogvid.load(model, device="cpu", dtype=dtype)


@pytest.mark.parametrize(("first", "second"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_rounding_is_not_reported(first: str, second: str) -> None:
    a, b = pipeline("tiny-i2v", first), pipeline("tiny-i2v", second)
    found = trace_pipelines(a, b, PROMPT, image=picture(64, 64), **OPTIONS)
    assert found.first is None, found.lines()
    names = {call.name for call in found.calls}
    operations = {name.rpartition(": ")[2] for name in names if ": " in name}
    assert operations == set(vars(a.placement.ops))
    parts = ("text_encoder.shared", "vae.encoder.conv_out", "vae.decoder.conv_out")
    for part in (*parts, "transformer.blocks.5.mlp_out", "transformer.proj_out"):
        steps = [call.step for call in found.calls if call.name.startswith(part)]
        assert set(steps) == ({None} if part in parts else {0, 1}), part
    assert max(call.error for call in found.calls) > 1e-4  # bf16 was computed
    # The pipeline is as before.
    assert a.ops == "torch"
    assert not [module for module in a.transformer.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_the_trace_runs_what_a_run_runs() -> None:
    """With the same on both sides all is equal to the bit; stateful convolutions too."""
    found = trace_pipelines(pipeline(), pipeline(), PROMPT, **OPTIONS)
    assert {call.error for call in found.calls} == {0.0}


def test_an_operation_that_is_wrong_is_named() -> None:
    a, b = pipeline(), pipeline()
    ops = b.placement.ops

    def wrong(q: Any, k: Any, v: Any, context: Any) -> Any:
        return ops.attention(q * (1.001 if context.layer >= 3 else 1), k, v, context)

    b.set_ops(dataclasses.replace(ops, attention=wrong))
    found = trace_pipelines(a, b, PROMPT, **OPTIONS)
    assert [(call.step, call.name) for call in found.calls if call.departs] == [
        (step, f"transformer.blocks.{i}: attention") for step in (0, 1) for i in (3, 4, 5)
    ]
    assert "the first: step 0, transformer.blocks.3: attention, error" in found.lines()[-1]


@pytest.mark.parametrize(("first", "second"), [("float32", "float32"), ("float32", "bfloat16")])
def test_a_layer_that_is_wrong_at_a_later_step_is_named(first: str, second: str) -> None:
    """Steps before it do not depart, and neither do those after it: they get the inputs of the first run."""
    a, b = pipeline(dtype=first), pipeline(dtype=second)
    ops = b.placement.ops

    def wrong(q: Any, k: Any, v: Any, context: Any) -> Any:
        return ops.attention(q, k, v * (1.5 if (context.step, context.layer) == (2, 3) else 1), context)

    b.set_ops(dataclasses.replace(ops, attention=wrong))
    found = trace_pipelines(a, b, PROMPT, **{**OPTIONS, "num_inference_steps": 4})
    assert [(call.step, call.name) for call in found.calls if call.departs] == [(2, "transformer.blocks.3: attention")]
    assert {call.step for call in found.calls} == {None, 0, 1, 2, 3}
    assert "the first: step 2, transformer.blocks.3: attention, error" in found.lines()[-1]
    assert found.to_dict()["first"]["step"] == 2


def test_a_run_that_breaks_down_at_a_later_step_is_named() -> None:
    """The run itself stops there."""
    a, b = pipeline(), pipeline()
    ops = a.placement.ops

    def broken(q: Any, k: Any, v: Any, context: Any) -> Any:
        return ops.attention(q, k, v, context) * (float("nan") if (context.step, context.layer) == (1, 3) else 1)

    a.set_ops(dataclasses.replace(ops, attention=broken))
    found = trace_pipelines(a, b, PROMPT, **OPTIONS)
    assert found.first is not None
    assert (found.first.step, found.first.name) == (1, "transformer.blocks.3: attention")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps() -> None:
    """Of each call three numbers are kept, and no tensor."""
    a, b = pipeline(), pipeline()
    held: list[int] = []

    def count(*_: object) -> None:
        gc.collect()
        held.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))

    trace_pipelines(a, b, PROMPT, callback_on_step_end=count, **{**OPTIONS, "num_inference_steps": 4})
    assert len(held) == 4
    assert held[-1] - held[1] < 10, held  # a step has over 100 calls, each with two outputs and more inputs


@pytest.mark.parametrize(
    "name",
    [
        "transformer.blocks.2.out",
        "transformer.time_embed.linear_in",
        "text_encoder.encoder.block.1.layer.0.SelfAttention.v",
        "vae.encoder.conv_in",
        "vae.decoder.conv_in",
    ],
)
@pytest.mark.every(2)
def test_a_module_that_is_wrong_is_named(name: str) -> None:
    a, b = pipeline("tiny-i2v"), pipeline("tiny-i2v", "bfloat16")
    part, _, inner = name.partition(".")
    module = (b.text_encoder.t5 if part == "text_encoder" else getattr(b, part)).get_submodule(inner)
    for parameter in module.parameters():
        parameter.data *= 1.2
    found = trace_pipelines(a, b, PROMPT, image=picture(64, 64), **OPTIONS)
    assert found.first is not None
    assert found.first.name.removesuffix(".conv") == name
    assert found.first.step == (0 if part == "transformer" else None)
    assert {call.name for call in found.calls if call.departs} == {found.first.name}


def test_a_result_that_is_no_number_departs() -> None:
    a, b = pipeline(), pipeline()
    b.set_ops(dataclasses.replace(b.placement.ops, gate_residual=lambda x, *_, **__: x * float("nan")))
    found = trace_pipelines(a, b, PROMPT, **OPTIONS)
    assert found.first is not None
    assert found.first.name == "transformer.blocks.0: gate_residual"
    assert found.to_dict()["first"]["error"] is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_two_videos_are_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = generate(tmp_path / "a.mp4", "--model", "tiny-t2v")
    b = generate(tmp_path / "b.mp4", "--model", "tiny-t2v", "--dtype", "bfloat16")
    capsys.readouterr()
    assert main(["compare", str(a), str(b), "--trace"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("none departs beyond rounding; the largest: ")
    assert main(["compare", str(a), str(b), "--trace", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first"] is None
    assert len(found["calls"]) > 200
    for changes, message in (
        ({"seed": 4}, "trace: got records that differ in seed, want device, dtype or ops alone"),
        ({"given": ["latents"]}, "latents: got a run that was given latents"),
        ({"ops": "custom"}, "ops: got 'custom'"),
    ):
        with pytest.raises(ValueError, match=r".") as error:
            trace(a, edited(b, tmp_path / "edited.mp4", **changes))
        assert str(error.value).startswith(message)
    twice = [edited(path, tmp_path / f"video-{path.name}", video="00") for path in (a, b)]
    with pytest.raises(ValueError, match=r"^trace: got a run with a video of its own"):
        trace(*twice)
