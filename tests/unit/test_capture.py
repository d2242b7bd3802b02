"""Captured inputs of attention: what is in the files, that the run stays as it is, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import cogvid
from cogvid.cli import main
from cogvid.media.whole_file import try_lock
from cogvid.ops import BlockContext, Ops
from cogvid.run import capture
from cogvid.run.capture import capture_attention, first_middle_last, read_capture
from cogvid.run.record import read_record
from cogvid_kernels.bench.cases import captured_cases

PROMPT = "the red circle moves right"
OPTIONS: dict[str, Any] = {
    "seed": 3, "num_frames": 9, "num_inference_steps": 4, "output_type": "latent", "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> cogvid.Pipeline:
    return cogvid.load("tiny-t2v", device="cpu", dtype="float32")


def generate(output: Path, *options: str) -> int:
    command = ["generate", PROMPT, "-o", str(output), "--model", "tiny-t2v", "--device", "cpu", "--seed", "1"]
    return main([*command, "--num-frames", "9", "--num-inference-steps", "4", *options])


def test_the_first_middle_and_last() -> None:
    assert [first_middle_last(count) for count in (1, 2, 3, 50)] == [[0], [0, 1], [0, 1, 2], [0, 25, 49]]


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_what_is_written_is_what_attention_got(guidance: float, pipe: cogvid.Pipeline, tmp_path: Path) -> None:
    seen: dict[tuple[int | None, int], tuple[Tensor, Tensor, Tensor, BlockContext]] = {}
    own = pipe.transformer.ops

    def watch(q: Tensor, k: Tensor, v: Tensor, context: BlockContext, /) -> Tensor:
        seen[context.step, context.layer] = (q.clone(), k.clone(), v.clone(), context)
        return own.attention(q, k, v, context)

    plain = pipe(PROMPT, guidance_scale=guidance, **OPTIONS)
    pipe.transformer.set_ops(dataclasses.replace(own, attention=watch))
    watched = pipe.transformer.ops
    with capture_attention(pipe, tmp_path / "cap", steps=[3, 0], layers=[1, 5]):
        out = pipe(PROMPT, guidance_scale=guidance, **OPTIONS)
        assert not (tmp_path / "cap").exists()
    assert pipe.transformer.ops is watched
    pipe.transformer.set_ops(own)
    assert torch.equal(out.frames, plain.frames)
    assert out.provenance == plain.provenance
    files = read_capture(tmp_path / "cap")
    assert [(each.step, each.layer) for each in files] == [(0, 1), (0, 5), (3, 1), (3, 5)]
    for each in files:
        q, k, v, context = each.load(torch.device("cpu"), torch.float32)
        *tensors, given = seen[each.step, each.layer]
        assert len(tensors[0]) == (2 if guidance > 1 else 1)
        for got, expected in zip((q, k, v, context.temb), (*tensors, given.temb), strict=True):
            assert torch.equal(got, expected[-1:])
        assert each.shape == q.shape
        same = ("text_len", "grid", "shard", "layer", "step")
        assert [getattr(context, name) for name in same] == [getattr(given, name) for name in same]
        assert context.branch == "cond"
        assert given.rope is not None
        assert context.rope is not None
        for got, expected in zip(context.rope, given.rope, strict=True):
            assert torch.equal(got, expected)


def test_the_command_captures_and_the_video_is_the_same(tmp_path: Path) -> None:
    assert generate(tmp_path / "a.mp4") == 0
    (tmp_path / "cap").mkdir()  # empty
    assert generate(tmp_path / "b.mp4", "--capture", str(tmp_path / "cap")) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert "capture" not in read_record(tmp_path / "b.mp4")
    files = read_capture(tmp_path / "cap")
    layers = len(cogvid.load("tiny-t2v").transformer.blocks)
    assert {each.step for each in files} == {0, 2, 3}
    assert {each.layer for each in files} == {0, layers // 2, layers - 1}
    assert len(files) == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "cap"]


def test_a_video_to_video_run_captures_the_steps_that_run(tmp_path: Path) -> None:
    assert generate(tmp_path / "a.mp4") == 0
    options = ("--video", str(tmp_path / "a.mp4"), "--strength", "0.5", "--capture", str(tmp_path / "cap"))
    assert generate(tmp_path / "b.mp4", *options) == 0
    assert {each.step for each in read_capture(tmp_path / "cap")} == {0, 1}


def test_the_benchmark_takes_them(pipe: cogvid.Pipeline, tmp_path: Path) -> None:
    with capture_attention(pipe, tmp_path / "cap", steps=[1], layers=[0]):
        pipe(PROMPT, **OPTIONS)
    [case] = captured_cases(tmp_path / "cap", torch.bfloat16)
    inputs = case.inputs(torch.device("cpu"), torch.bfloat16)
    batch, tokens, heads, head_dim = inputs["q"].shape
    assert case.label == f"captured step 1 layer 0 B{batch} H{heads} N{tokens} hd{head_dim}"
    assert case.flop == 4 * batch * heads * tokens**2 * head_dim
    stored = load_file(next((tmp_path / "cap").iterdir()))
    for name in "qkv":
        assert torch.equal(inputs[name], stored[name].bfloat16())
    assert inputs["_context"].step == 1


def test_a_run_that_fails_leaves_nothing(pipe: cogvid.Pipeline, tmp_path: Path) -> None:
    own = pipe.transformer.ops

    def stop(_pipe: object, _index: int, _timestep: int, _tensors: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1  # a hidden directory
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), capture_attention(pipe, tmp_path / "cap", steps=[0]):
        pipe(PROMPT, callback_on_step_end=stop, **OPTIONS)
    wrong = pytest.raises(ValueError, match=r"^steps: got a run without attention in step 4, layer 0, want")
    with wrong, capture_attention(pipe, tmp_path / "cap", steps=[0, 4]):
        pipe(PROMPT, **OPTIONS)
    assert not list(tmp_path.iterdir())
    assert pipe.transformer.ops is own


def test_what_cannot_be_captured_is_refused(
    pipe: cogvid.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = len(pipe.transformer.blocks)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for directory, options, message in (
        ("full", {"steps": [0]}, "capture: got .*full', which is not empty, want a new or empty directory"),
        ("no/cap", {"steps": [0]}, "capture: got .*cap', which cannot be made, want a new or empty directory"),
        ("cap", {"steps": [0], "layers": [blocks]}, f"layers: got {blocks}, want an integer, 0 to {blocks - 1}"),
        ("cap", {"steps": [-1]}, "steps: got -1, want an integer, 0 or more"),
        ("cap", {"steps": []}, "steps, layers: got none, want one of each or more"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"), capture_attention(pipe, tmp_path / directory, **options):
            pytest.fail("the block began")
    monkeypatch.setattr(capture, "LARGEST", 1000)
    large = pytest.raises(ValueError, match=r"^capture: got .* GiB in 3 files, want at most")
    with large, capture_attention(pipe, tmp_path / "cap", steps=[0]):
        pipe(PROMPT, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    full = pytest.raises(OSError, match=r"capture: got less than 1 MiB of free space, want that much")
    with full as caught, capture_attention(pipe, tmp_path / "cap", steps=[0]):
        pipe(PROMPT, **OPTIONS)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_command_refuses_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    saved = str(tmp_path / "saved")
    for options, message in (
        (("--capture", str(tmp_path / "full")), "error: capture: got "),
        (("--capture", str(tmp_path / "a.mp4")), "which is the output too, want another"),
        (("--capture", str(tmp_path / "cap"), "--checkpoint", saved), "or capture, want it without them"),
    ):
        assert generate(tmp_path / "a.mp4", *options) == 2
        err = capsys.readouterr().err
        assert message in err
        assert "denoise" not in err
        assert not (tmp_path / "a.mp4").exists()


def test_what_a_killed_run_left_is_removed_and_a_running_one_is_not(pipe: cogvid.Pipeline, tmp_path: Path) -> None:
    left = tmp_path / ".cap.partial"
    left.mkdir()
    (left / "step0000-layer00.safetensors").write_text("half")
    descriptor = os.open(left, os.O_RDONLY)
    try:
        assert try_lock(descriptor)  # as a run does that goes on
        taken = pytest.raises(ValueError, match="which another run is writing")
        with taken, capture_attention(pipe, tmp_path / "cap", steps=[0]):
            pytest.fail("the block began")
    finally:
        os.close(descriptor)
    with capture_attention(pipe, tmp_path / "cap", steps=[2], layers=[3]):
        pipe(PROMPT, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["cap"]
    assert [(each.step, each.layer) for each in read_capture(tmp_path / "cap")] == [(2, 3)]


def test_damaged_captures_are_refused(pipe: cogvid.Pipeline, tmp_path: Path) -> None:
    with capture_attention(pipe, tmp_path / "cap", steps=[0], layers=[0]):
        pipe(PROMPT, **OPTIONS)
    [path] = (tmp_path / "cap").iterdir()
    whole, tensors = path.read_bytes(), {name: x.clone() for name, x in load_file(path).items()}  # the file changes
    [about] = read_capture(tmp_path / "cap")
    values = {"step": 0, "layer": 0, "text_len": about.text_len, "grid": about.grid}

    def write(changed: dict[str, Any], header: Any) -> None:
        kept = {name: x for name, x in (tensors | changed).items() if x is not None}
        save_file(kept, path, {"attention": json.dumps(header)})

    for damage in (
        lambda: path.write_bytes(whole[:100]),
        lambda: path.write_text("words"),
        lambda: save_file(tensors, path),
        lambda: write({}, [1]),
        lambda: write({}, values | {"grid": [1, 2]}),
        lambda: write({}, values | {"text_len": -1}),
        lambda: write({}, values | {"text_len": about.text_len + 1}),
        lambda: write({}, values | {"step": "0"}),
        lambda: write({"k": None}, values),
        lambda: write({"k": tensors["k"][:, 1:].contiguous()}, values),
        lambda: write({"q": tensors["q"][0].contiguous()}, values),
        lambda: write({"temb": None}, values),
        lambda: write({"rope_sin": None}, values),
        lambda: write({"rope_cos": tensors["rope_cos"][1:].contiguous()}, values),
    ):
        damage()
        with pytest.raises(ValueError, match=r"^inputs: got .*, want a --capture DIR$"):
            read_capture(tmp_path / "cap")
    path.write_bytes(whole)
    assert read_capture(tmp_path / "cap") == [about]
    for directory in (path, tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"^inputs: got .*, which holds no capture, want a --capture DIR$"):
            read_capture(directory)


def test_triton_operations_are_put_back_too(pipe: cogvid.Pipeline, tmp_path: Path) -> None:
    own = pipe.transformer.ops
    assert own == Ops.torch()
    assert pipe.ops == "torch"
    with capture_attention(pipe, tmp_path / "cap", steps=[0]):
        assert pipe.ops == "torch"  # what the record says
        assert pipe.transformer.ops != own
        pipe(PROMPT, **OPTIONS)
    assert all(block.ops is own for block in pipe.transformer.blocks)
