"""Last images, masks and control videos on the command line: record, replay, resume, noise, batch, plan, inspect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cogvid
from cogvid.cli import main
from cogvid.run.noise import load_noise
from cogvid.run.record import read_record
from references import picture
from tests.checkpoints import write_variant

QUICK = ["--num-inference-steps", "2", "--device", "cpu", "--seed", "3"]
RED = "a red circle moves right"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, a clip, pictures and a mask."""
    folder = tmp_path_factory.mktemp("conditions")
    write_variant(folder / "control", "tiny-t2v", "CogVideoXFunControlPipeline", 16)
    write_variant(folder / "inpaint", "tiny-t2v", "CogVideoXFunInpaintPipeline", 17)
    cogvid.export_to_video([picture(64, 64, seed=i) for i in range(17)], folder / "clip.mp4", fps=8)
    cogvid.export_to_video([picture(64, 64, seed=40 + i) for i in range(17)], folder / "other.mp4", fps=8)
    cogvid.export_to_video(
        np.repeat(np.tri(64, dtype=np.uint8)[None, ..., None] * 255, 3, 3).repeat(17, 0), folder / "mask.mp4"
    )
    picture(64, 64).save(folder / "first.png")
    picture(64, 64, seed=1).save(folder / "last.png")
    Image.fromarray(np.tri(64, dtype=np.uint8) * 255).save(folder / "mask.png")
    return folder


KINDS: dict[str, list[str]] = {
    "last image": ["--model", "tiny-i2v", "--image", "first.png", "--last-image", "last.png"],
    "control": ["--model", "control", "--control-video", "clip.mp4"],
    "inpainting": ["--model", "inpaint", "--video", "clip.mp4", "--mask", "mask.png"],
    "video mask": ["--model", "inpaint", "--video", "clip.mp4", "--mask", "mask.mp4", "--strength", "1"],
    "first frame of a masked model": ["--model", "inpaint", "--image", "first.png", "--noise-aug-strength", "0.05"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.every(3)
def test_a_run_is_recorded_and_replayed(kind: str, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    out, again, noise = (str(tmp_path / name) for name in ("out.mp4", "again.mp4", "noise.safetensors"))
    assert main(["generate", RED, *KINDS[kind], *QUICK, "-o", out, "--save-noise", noise, "--record-paths"]) == 0
    record = read_record(out)
    given = dict(zip(KINDS[kind][::2], KINDS[kind][1::2], strict=True))
    names = {"--image": "image", "--last-image": "last_image", "--video": "video", "--mask": "mask",
             "--control-video": "control_video"}  # fmt: skip
    assert {flag for flag, name in names.items() if record[name] is not None} == set(given) & set(names)
    before = [name for name in load_noise(noise) if not name.startswith("step.")]
    assert (
        before
        == {
            "last image": ["posterior", "posterior.1", "initial"],
            "control": ["initial"],
            "inpainting": ["posterior", "initial"],
            "video mask": ["posterior", "initial"],
            "first frame of a masked model": ["pixels", "initial"],
        }[kind]
    )
    inputs = [word for flag in names if flag in given and flag != "--image" for word in (flag, given[flag])]
    model = ["--model", given["--model"]]
    assert main(["replay", out, *inputs, *model, "-o", again]) == 0
    assert Path(again).read_bytes() == Path(out).read_bytes()
    for flag in [flag for flag in names if flag in given and flag != "--image"]:  # another input, or none
        other = {"--last-image": "first.png", "--mask": "first.png"}.get(flag, "other.mp4")
        changed = [other if inputs[i - 1] == flag else word for i, word in enumerate(inputs)]
        assert main(["replay", out, *changed, *model, "-o", again]) == 2
        at = inputs.index(flag)
        assert main(["replay", out, *inputs[:at], *inputs[at + 2 :], *model, "-o", again]) == 2


@pytest.mark.parametrize("kind", ["last image", "control", "inpainting"])
@pytest.mark.every(3)
def test_a_run_goes_on_where_it_stopped(kind: str, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    out, again, saved = (str(tmp_path / name) for name in ("out.mp4", "again.mp4", "saved"))
    assert main(["generate", RED, *KINDS[kind], *QUICK, "-o", out]) == 0
    assert main(["generate", RED, *KINDS[kind], *QUICK, "-o", again, "--checkpoint", saved]) == 0
    assert main(["generate", "--resume", saved, *KINDS[kind], "-o", again]) == 0
    assert Path(again).read_bytes() == Path(out).read_bytes()
    flag, path = KINDS[kind][-2:]
    other = "other.mp4" if path.endswith(".mp4") else "first.png"
    assert main(["generate", "--resume", saved, flag, other, "-o", again]) == 2


def test_jobs_of_a_batch_have_them(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    jobs = [
        {"prompt": RED, "model": "control", "control_video": name, "seed": 1, "num_inference_steps": 2}
        for name in ("clip.mp4", "other.mp4")
    ]
    jobs.append({"prompt": RED, "image": "first.png", "last_image": "last.png", "seed": 1, "num_inference_steps": 2,
                 "model": "tiny-i2v"})  # fmt: skip
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    assert main(["batch", str(tmp_path / "jobs.jsonl"), "-o", str(tmp_path / "out"), "--batch-size", "4"]) == 0
    records = [read_record(path) for path in sorted((tmp_path / "out").glob("*.mp4"))]
    assert len({record["control_video"] for record in records}) == 3
    assert [record["task"] for record in records] == ["control-to-video", "control-to-video", "first-and-last-frame"]


def test_plan_and_inspect_know_what_a_checkpoint_is(
    folder: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for kind, task in (("control", "control-to-video"), ("inpainting", "inpainting"), ("last image", "first-and-last")):
        assert main(["plan", *KINDS[kind]]) == 0
        assert task in capsys.readouterr().out
    encode = {}
    for kind in ("inpainting", "first frame of a masked model", "last image"):
        assert main(["plan", "--json", *KINDS[kind]]) == 0
        encode[kind] = json.loads(capsys.readouterr().out)["flops"]["encode"]
    assert encode["inpainting"] == encode["first frame of a masked model"] > 5 * encode["last image"] > 0
    for name, tasks in (("control", ["control-to-video"]), ("inpaint", ["text-to-video", "image-to-video"])):
        assert main(["inspect", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["tasks"][:2] == tasks


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--last-image", "last.png"], "last_image: got this alone or together, want nothing or one of: image; "),
        (["--mask", "mask.png"], "mask: got this alone or together, want nothing or one of: "),
        (["--control-video", "clip.mp4"], "model: got none for control-to-video, want one such as alibaba"),
        (["--model", "tiny-t2v", "--control-video", "clip.mp4"], "which takes no image and cannot do control-to-video"),
        (["--model", "tiny-t2v", "--noise-aug-strength", "0.1"], "noise_aug_strength: got 0.1 for text-to-video with"),
        (["--model", "control", "--control-video", "first.png"], "video: got 'first.png', which is no video"),
        (["--model", "inpaint", "--video", "clip.mp4", "--mask", "none.png"], "image: got 'none.png', which cannot"),
        (["--model", "inpaint", "--video", "clip.mp4", "--mask", "control"], "image: got 'control', which is a"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_a_line(
    line: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["generate", RED, *line, *QUICK, "-o", str(tmp_path / "out.mp4")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("cogvid: error: ")
    assert message in said[-1]
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_names_no_class_of_its_own_is_told_by_its_channels(folder: Path, tmp_path: Path) -> None:
    for name, task in (("control", "control-to-video"), ("inpaint", "inpainting")):
        copied = shutil.copytree(folder / name, tmp_path / name)
        index = copied / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "CogVideoXPipeline"}))
        assert task in cogvid.load(copied, device="cpu").model.tasks
