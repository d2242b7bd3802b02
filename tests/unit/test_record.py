"""The record that a video carries, and what `replay` makes of it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cogvid
from cogvid.cli import main
from cogvid.media.image import resize_image
from cogvid.media.video import read_covers, read_metadata, read_video
from cogvid.run.record import ENVIRONMENT, embedded, read_embedded_image, read_record
from cogvid.weights.checkpoint import read_checkpoint
from cogvid.weights.hub import PACKS
from cogvid.weights.identity import weights_identity

PROMPT = "the red circle moves right"
QUICK = ["--num-inference-steps", "2", "--num-frames", "9", "--seed", "3", "--device", "cpu"]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def generate(output: Path, *options: object) -> Path:
    assert main(["generate", PROMPT, "-o", str(output), *QUICK, *map(str, options)]) == 0
    return output


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image, a video, and a checkpoint that is no pack."""
    folder = tmp_path_factory.mktemp("inputs")
    picture(50, 70).save(folder / "picture.png")
    cogvid.export_to_video([picture(40, 50, seed) for seed in range(12)], folder / "clip.mp4")
    shutil.copytree(PACKS / "tiny-t2v", folder / "own")
    return folder


@pytest.fixture(scope="module")
def made(inputs: Path) -> Path:
    """A video with an embedded image."""
    return generate(inputs / "made.mp4", "--model", "tiny-i2v", "--image", inputs / "picture.png", "--resize", "crop")


def test_the_same_command_gives_the_same_bytes(made: Path, inputs: Path, tmp_path: Path) -> None:
    image = inputs / "picture.png"
    options = ["--model", "tiny-i2v", "--image", image, "--resize", "crop", "--sidecar", tmp_path / "out.json"]
    again = generate(tmp_path / "again.mp4", *options)
    assert again.read_bytes() == made.read_bytes()
    side = json.loads((tmp_path / "out.json").read_text())
    assert side["record"] == read_record(made)
    assert set(side) == {"record", "seconds", "peak_memory"}
    assert min(side["seconds"].values()) > 0
    assert 2**26 < side["peak_memory"] < 2**36


def test_the_record_has_what_decided_the_video(made: Path) -> None:
    record = cogvid.read_record(made)
    assert record == read_metadata(made)
    expected = {
        "prompt": [PROMPT], "negative_prompt": [""], "seed": 3, "seeds": [3], "source": "tiny-i2v",
        "source_kind": "pack", "resize": "crop", "num_inference_steps": 2, "num_frames": 9, "video": None,
        "step_cache": None, "given": [], "fps": 8,
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert set(ENVIRONMENT) <= set(record)
    assert len(record["guidance_schedule"]) == 2
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == torch.get_num_threads()


def test_the_image_is_recorded_and_embedded_as_it_was_used(made: Path, inputs: Path, tmp_path: Path) -> None:
    used = resize_image(inputs / "picture.png", 64, 64, "crop")
    assert read_record(made)["image"] == [hashlib.sha256(np.asarray(used).tobytes()).hexdigest()]
    stored = read_embedded_image(made)
    assert stored is not None
    assert stored.size == (64, 64)
    assert np.array_equal(np.asarray(stored), np.asarray(used))
    bare = generate(
        tmp_path / "bare.mp4",
        *("--model", "tiny-i2v", "--image", inputs / "picture.png", "--resize", "crop", "--no-embed"),
    )
    assert read_embedded_image(bare) is None
    assert read_record(bare) == read_record(made)
    assert torch.equal(read_video(bare)[0], read_video(made)[0])


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_a_picture_of_the_size_is_not_changed(resize: str) -> None:
    source = picture(48, 80)
    assert np.array_equal(np.asarray(resize_image(source, 48, 80, resize)), np.asarray(source))


def test_large_covers_and_a_record_come_back(tmp_path: Path) -> None:
    """3 MB of picture, as large as one of 1360x768 can be, and 1 MB of record."""
    file = io.BytesIO()
    picture(768, 1360).save(file, "PNG")
    metadata = {"text": "x" * 10**6}
    frames = np.stack([np.asarray(picture(32, 32, seed)) for seed in range(3)])
    for name in ("plain.mp4", "cover.mp4"):
        cover = [file.getvalue(), embedded(picture(32, 32))] if name == "cover.mp4" else []
        with cogvid.VideoWriter(tmp_path / name, 32, 32, metadata=metadata, cover=cover) as writer:
            writer.write(frames)
        assert read_metadata(tmp_path / name) == metadata
        assert read_covers(tmp_path / name) == cover
    plain, fps = read_video(tmp_path / "plain.mp4")
    covered, same = read_video(tmp_path / "cover.mp4")
    assert torch.equal(plain, covered)
    assert fps == same == 16


def test_no_path_of_the_machine_is_recorded_unless_asked_for(inputs: Path, tmp_path: Path) -> None:
    options = ["--model", inputs / "own", "--video", inputs / "clip.mp4"]
    plain = generate(tmp_path / "plain.mp4", *options)
    assert str(inputs).encode() not in plain.read_bytes()
    assert (read_record(plain)["source"], read_record(plain)["source_kind"]) == ("own", "directory")
    asked = generate(tmp_path / "asked.mp4", *options, "--record-paths")
    assert read_record(asked)["source"] == str(inputs / "own")
    assert main(["replay", str(asked), "--video", str(inputs / "clip.mp4"), "-o", str(tmp_path / "again.mp4")]) == 0
    assert (tmp_path / "again.mp4").read_bytes() == asked.read_bytes()


def test_what_a_call_was_given_is_in_the_record() -> None:
    pipe = cogvid.load("tiny-t2v", device="cpu")

    class Cache:
        def run(self, x: torch.Tensor, _context: object, blocks: Callable[..., torch.Tensor]) -> torch.Tensor:
            return blocks(x)

    options = {"num_inference_steps": 1, "num_frames": 9, "output_type": "latent", "progress": False}
    out = pipe(PROMPT, seed=1, step_cache=Cache(), callback_on_step_end=lambda *_: None, **options)
    assert out.provenance["given"] == ["callback_on_step_end"]
    assert out.provenance["step_cache"].startswith("tests.unit.test_record.")
    assert out.provenance["step_cache"].endswith(".Cache")
    video = np.stack([np.asarray(picture(64, 64, seed)) for seed in range(9)])
    out = pipe(PROMPT, video=video, seed=1, strength=1.0, **options)
    assert out.provenance["video"] == hashlib.sha256(video.tobytes()).hexdigest()


REPLAYS: dict[str, tuple[list[str], list[str]]] = {  # options of generate, and of replay
    "words": (["--model", "tiny-t2v"], []),
    "image": (["--model", "tiny-i2v", "--image", "picture.png", "--fps", "12"], []),
    "image, hash alone": (
        ["--model", "tiny-i2v", "--image", "picture.png", "--no-embed", "--resize", "pad"],
        ["--image", "picture.png"],
    ),
    "video": (["--model", "tiny-t2v", "--video", "clip.mp4", "--strength", "0.5"], ["--video", "clip.mp4"]),
    "directory": (["--model", "own", "--dtype", "bfloat16", "--hash-weights"], ["--model", "own"]),
    "choices": (
        ["--model", "tiny-t2v", "--negative-prompt", "blue", "--scheduler", "ddim", "--use-dynamic-cfg", "cosine",
         "--previous-timestep", "next", "--qk-norm", "rms", "--defaults", "diffusers", "--num-inference-steps", "3"],
        [],
    ),
    "no guidance": (["--model", "tiny-t2v", "--guidance-scale", "1"], []),
}  # fmt: skip


@pytest.mark.parametrize("case", REPLAYS)
def test_a_replay_has_the_same_bytes(
    case: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(inputs)
    options, more = REPLAYS[case]
    first, second = generate(tmp_path / "first.mp4", *options), tmp_path / "second.mp4"
    capfd.readouterr()
    assert main(["replay", str(first), "-o", str(second), *more]) == 0
    said = capfd.readouterr()
    assert second.read_bytes() == first.read_bytes()
    lines = [line for line in said.err.splitlines() if "%|" not in line and line]
    assert [line for line in lines if "warning" not in line] == [f"'{second}' has the same bytes as '{first}'"]
    assert said.out == f"{second}\n"


def edited(video: Path, target: Path, /, **changes: Any) -> Path:
    """Write a video with the frames of another one and a changed record; "gone" removes a field."""
    record = {name: value for name, value in (read_record(video) | changes).items() if value != "gone"}
    frames, fps = read_video(video)
    with cogvid.VideoWriter(target, *frames.shape[1:3], fps, metadata=record, cover=read_covers(video)) as writer:
        writer.write(frames)
    return target


def test_a_replay_says_what_differs(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = read_record(made)
    other = edited(
        made,
        tmp_path / "other.mp4",
        versions=record["versions"] | {"torch": "1.0"},
        weights=record["weights"] | {"headers": "00"},
        machine=record["machine"] | {"name": "an abacus"},
        shard_weights=True,  # a run of several processes
    )
    assert main(["replay", str(other), "-o", str(tmp_path / "again.mp4"), "--dtype", "bfloat16"]) == 0
    lines = capfd.readouterr().err.splitlines()
    here = f"versions.torch: '1.0' in the record, {torch.__version__!r} in this run"
    assert here in lines
    assert lines.index(here) < next(i for i, line in enumerate(lines) if "denoise" in line)
    for start in (
        "dtype: 'float32' in the record, 'bfloat16' in",
        "weights.headers: ",
        "machine.name: ",
        "shard_weights: ",
    ):
        assert [line for line in lines if line.startswith(start)], start
    assert "has other bytes than" in lines[-1]
    assert "of 9 frames differ, the first is 0" in lines[-1]


@pytest.fixture(scope="module")
def batch_of_two(inputs: Path) -> Path:
    """A folder with two videos that were sampled together from pictures of their own, and a third that was alone."""
    picture(50, 70, seed=8).save(inputs / "other.png")
    jobs = [
        {"prompt": PROMPT, "seed": 9, "image": str(inputs / "picture.png"), "negative_prompt": "blue"},
        {"prompt": "a blue square", "seed": 4, "image": str(inputs / "other.png")},
        {"prompt": PROMPT, "seed": 3, "image": str(inputs / "other.png"), "guidance_scale": 2.5},
    ]
    (inputs / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    options = [*QUICK, "--model", "tiny-i2v", "--batch-size", "2", "--fps", "5", "--scheduler", "dpm"]
    del options[options.index("--seed") : options.index("--seed") + 2]
    assert main(["batch", str(inputs / "jobs.jsonl"), "-o", str(inputs / "batch"), *options]) == 0
    return inputs / "batch"


@pytest.mark.parametrize("name", ["0000-seed9.mp4", "0001-seed4.mp4", "0002-seed3.mp4"])
def test_a_video_that_was_sampled_with_others_is_replayed_with_them(
    batch_of_two: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    first, again = batch_of_two / name, tmp_path / "again.mp4"
    assert main(["replay", str(first), "-o", str(again)]) == 0
    assert again.read_bytes() == first.read_bytes()
    assert f"'{again}' has the same bytes as '{first}'" in capfd.readouterr().err
    own = resize_image(batch_of_two.parent / ("picture.png" if name[3] == "0" else "other.png"), 64, 64)
    stored = read_embedded_image(first)
    assert stored is not None
    assert np.array_equal(np.asarray(stored), np.asarray(own))
    assert read_record(first).get("batch_size") == (None if name[3] == "2" else 2)


def test_jobs_without_pictures_that_were_sampled_together_are_replayed(tmp_path: Path) -> None:
    """Four at once, without guidance, so that there are no negative prompts; the third is made again."""
    options = ["--sweep", "seed=5..8", "--batch-size", "4", "--guidance-scale", "1", "--model", "tiny-t2v"]
    steps = ["--num-inference-steps", "2", "--num-frames", "9", "--device", "cpu"]
    assert main(["batch", "--prompt", PROMPT, "-o", str(tmp_path / "out"), *options, *steps]) == 0
    assert main(["replay", str(tmp_path / "out" / "0002-seed7.mp4"), "-o", str(tmp_path / "again.mp4")]) == 0
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "out" / "0002-seed7.mp4").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_index": 2}, "batch_index: got 2 of 2 in the record of"),
        ({"batch_index": True}, "batch_index: got True of 2 in the record of"),
        ({"batch_size": "gone"}, "batch_index: got 0 of None in the record of"),
        ({"batch_size": 3}, "prompt: got ['the red circle moves right', 'a blue s in the record of"),
        ({"prompt": [PROMPT]}, "prompt: got ['the red circle moves right'] in the record of"),
        ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt: got ['a', 'b', 'c'] in the record of"),
        ({"seeds": [9]}, "seeds: got [9] in the record of"),
        ({"seed": 4}, "seed: got 4 in the record of"),
        ({"seeds": [9, "4"]}, "seed: got '4', want an integer"),
        ({"image": ["00"]}, "image: got 1 in the record of"),
        ({"image": [3, 3]}, "image: got [3, 3] in the record of"),
        ({"image": [None, "00"]}, "image: got [None, '00'] in the record of"),
        ({"video": "00"}, "video: got one in the record of"),
        ({"noise": "00"}, "noise: got one in the record of"),
    ],
    ids=str,
)
def test_a_record_of_several_videos_is_checked(
    changes: dict[str, Any],
    message: str,
    batch_of_two: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("cogvid.run.replay.load_checkpoint", None)
    (tmp_path / "out").mkdir()
    source = edited(batch_of_two / "0000-seed9.mp4", tmp_path / "edited.mp4", **changes)
    capfd.readouterr()
    assert main(["replay", str(source), "-o", str(tmp_path / "out" / "again.mp4")]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert message in line
    assert not list((tmp_path / "out").iterdir())


def test_a_picture_of_another_video_that_is_gone_is_one_line(
    batch_of_two: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    frames, fps = read_video(batch_of_two / "0000-seed9.mp4")
    record, covers = read_record(batch_of_two / "0000-seed9.mp4"), read_covers(batch_of_two / "0000-seed9.mp4")
    assert len(covers) == 2
    with cogvid.VideoWriter(tmp_path / "one.mp4", 64, 64, fps, metadata=record, cover=covers[0]) as writer:
        writer.write(frames)
    capfd.readouterr()
    assert main(["replay", str(tmp_path / "one.mp4"), "-o", str(tmp_path / "again.mp4")]) == 2
    assert "image: got a record with the hash of an image alone" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"given": ["prompt_embeds"], "prompt": None}, [], "prompt_embeds: got a run that was given prompt_embeds"),
        ({"prompt": ["a", "b"]}, [], "prompt: got a run of several videos in one batch, want one"),
        ({"num_videos_per_prompt": 2}, [], "prompt: got a run of several videos"),
        ({"step_cache": "mine.Cache"}, [], "step_cache: got a run with mine.Cache"),
        ({"source": "elsewhere", "source_kind": "directory"}, [], "want its path (--model)"),
        ({"source": "/no/such/place", "source_kind": "directory"}, [], "model: got '/no/such/place'"),
        ({"ops": "custom"}, [], "ops: got 'custom'"),
        ({"device": "tpu"}, [], "device: got 'tpu'"),
        ({"defaults": "a" * 2001}, [], f"defaults: got '{'a' * 39} in the record of"),
        ({"variant": "a" * 2001}, [], f"variant: got '{'a' * 39} in the record of"),
        ({"step_cache": "a" * 2001}, [], f"step_cache: got '{'a' * 39} in the record of"),
        ({"given": ["a" * 2001]}, [], f"{'a' * 40}: got a run that was given {'a' * 200}, which its"),
        ({"scheduler": "euler"}, [], "scheduler: got 'euler'"),
        ({"scheduler": "gone"}, [], "scheduler: got none in the record of"),
        ({"versions": "gone"}, [], "whose record lacks versions"),
        ({"dtype": 3}, [], "dtype: got 3 in the record of"),
        ({"weights": "00"}, [], "weights: got '00' in the record of"),
        ({"prompt": "words"}, [], "prompt: got 'words' in the record of"),
        ({"prompt": None}, [], "prompt: got a run of several videos in one batch, want one"),
        ({"prompt": [3]}, [], "prompt: got [3] in the record of"),
        ({"negative_prompt": [3]}, [], "negative_prompt: got [3] in the record of"),
        ({"fps": "8"}, [], "fps: got '8' in the record of"),
        ({"seed": [1]}, [], "seed: got [1] in the record of"),
        ({"revision": 3}, [], "revision: got 3 in the record of"),
        ({"height": [64]}, [], "height: got [64], want an integer"),
        ({"image": ["00"]}, [], "image: got other pixels than those of the record"),
        ({"image": None, "task": "text-to-video"}, ["--image", "picture.png"], "image: got one for a run without"),
        ({"video": "00"}, [], "video: got none for a run that was given one, want the file (--video)"),
        ({}, ["--image", "clip.mp4"], "which is not a picture"),
        ({}, ["--video", "clip.mp4"], "video: got one for a run without, want none"),
    ],
    ids=str,
)
def test_what_cannot_be_replayed_is_one_line(
    changes: dict[str, Any],
    options: list[str],
    message: str,
    made: Path,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(inputs)
    monkeypatch.setattr("cogvid.run.replay.load_checkpoint", None)  # all of it is known before the weights are loaded
    (tmp_path / "out").mkdir()
    source = edited(made, tmp_path / "edited.mp4", **changes)
    capfd.readouterr()
    assert main(["replay", str(source), "-o", str(tmp_path / "out" / "again.mp4"), *options]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("cogvid: error: ")
    assert message in line
    assert not list((tmp_path / "out").iterdir())


def test_an_image_that_is_not_embedded_is_asked_for(
    made: Path, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare.mp4"
    frames, fps = read_video(made)
    cogvid.export_to_video(frames, bare, fps, metadata=read_record(made))
    capfd.readouterr()
    out = tmp_path / "out.mp4"
    for options, reason in (
        ([], "image: got a record with the hash of an image alone, want the image (--image)"),
        (["--image", str(inputs / "clip.png")], "clip.png"),
        (["--image", str(inputs / "other.png")], "image: got other pixels than those of the record"),
        (["-o", str(bare)], "want another file"),
    ):
        picture(50, 70, seed=9).save(inputs / "other.png")
        assert main(["replay", str(bare), "-o", str(out), *options]) == 2
        assert reason in capfd.readouterr().err
    assert not out.exists()


def test_inspect_shows_the_record_of_a_video(made: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(made), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_record(made)
    assert main(["inspect", str(made)]) == 0
    table = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}
    assert table["prompt"] == f'["{PROMPT}"]'
    assert table["versions.torch"] == torch.__version__
    assert main(["inspect", str(inputs / "clip.mp4")]) == 2
    assert "holds no record of how it was made" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["none/side.json", ".", "out.mp4"])
def test_a_sidecar_that_cannot_be_written_is_refused_before_the_work(
    bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cogvid.run.load.load_checkpoint", None)
    command = ["generate", PROMPT, "--model", "tiny-t2v", "-o", str(tmp_path / "out.mp4"), *QUICK]
    assert main([*command, "--sidecar", str(tmp_path / bad)]) == 2
    assert "cogvid: error: sidecar: got " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


NO_VARIANT = {"transformer": None, "vae": None, "text_encoder": None}


def test_the_hash_of_the_headers_tells_checkpoints_apart(tmp_path: Path) -> None:
    own = shutil.copytree(PACKS / "tiny-t2v", tmp_path / "own")
    before = weights_identity(own, NO_VARIANT, full=True)
    assert before == weights_identity(PACKS / "tiny-t2v", NO_VARIANT, full=True)
    assert set(before) == {"headers", "sha256"}
    weights = own / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # a weight
    weights.write_bytes(data)
    changed = weights_identity(own, NO_VARIANT, full=True)
    assert changed["headers"] == before["headers"]
    assert changed["sha256"] != before["sha256"]
    for name, change in {
        "transformer/diffusion_pytorch_model.safetensors": lambda data: data + b"\0",  # the size
        "vae/diffusion_pytorch_model.safetensors": lambda data: data.replace(b"conv_in", b"conv_on", 1),  # the header
        "scheduler/scheduler_config.json": lambda data: data + b" ",
        "tokenizer/spiece.model": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    }.items():
        path = own / name
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        assert weights_identity(own, NO_VARIANT)["headers"] != before["headers"], name
        path.write_bytes(whole)


def test_weights_of_the_hub_are_named_by_commit_and_blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the hub: files of a snapshot are links to blobs, whose names come from their content."""
    repository = tmp_path / "models--me--mine"
    snapshot = repository / "snapshots" / ("c0ffee" + "0" * 34)
    (repository / "blobs").mkdir(parents=True)
    for path in (PACKS / "tiny-t2v").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            blob = repository / "blobs" / hashlib.sha256(data).hexdigest()
            blob.write_bytes(data)
            link = snapshot / path.relative_to(PACKS / "tiny-t2v")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    monkeypatch.setattr("cogvid.weights.hub._fetch", lambda *_: snapshot)
    checkpoint = read_checkpoint("me/mine", revision="main")
    assert checkpoint.source_kind == "hub"
    assert checkpoint.weights["commit"] == snapshot.name
    assert len(checkpoint.weights["blobs"]) == 3
    for name, blob in checkpoint.weights["blobs"].items():
        assert blob == hashlib.sha256((PACKS / "tiny-t2v" / name).read_bytes()).hexdigest()
    plain = read_checkpoint("tiny-t2v")
    assert plain.source_kind == "pack"
    assert plain.weights == {"headers": checkpoint.weights["headers"]}
