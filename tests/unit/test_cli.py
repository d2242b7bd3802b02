"""The command line: what it makes, and one line and exit status 2 for whatever a user gets wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import cogvid
from cogvid.cli import main
from cogvid.media.image import load_image
from cogvid.media.video import read_metadata, read_video
from cogvid.weights.hub import find
from references import picture, save_pipeline, tiny_pipeline
from tests.unit.test_image_url import server  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[2]
QUICK = ["--height", "32", "--width", "48", "--num-frames", "9", "--num-inference-steps", "2", "--dtype", "float32"]


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers", reason="needs diffusers")
    return save_pipeline(*tiny_pipeline("5b"), tmp_path_factory.mktemp("t2v"))


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers", reason="needs diffusers")
    options = {"sample_height": 4, "sample_width": 6}
    return save_pipeline(*tiny_pipeline("5b-i2v", **options), tmp_path_factory.mktemp("i2v"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    picture(50, 70).save(path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The output, in a folder of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "video.mp4"


Refused = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], out: Path) -> Refused:
    """Run the command, check that it ends in one line with a status and leaves nothing behind; return the line."""

    def run(*arguments: object, status: int = 2) -> str:
        before = sorted(out.parent.iterdir())
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == status
        captured = capfd.readouterr()
        lines = captured.err.splitlines()
        assert captured.out == ""
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("cogvid: error: ")
        assert len(lines[0]) > len("cogvid: error: ")
        assert sorted(out.parent.iterdir()) == before
        return lines[0]

    return run


def test_image_to_video(i2v: Path, image: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["generate", "a red", "--image", str(image), "-o", str(out), "--model", str(i2v), *QUICK])
    captured = capsys.readouterr()
    assert status == 0
    assert captured.out.splitlines()[-1] == str(out)
    assert "denoise: 100%" in captured.err  # the progress bar
    assert sorted(out.parent.iterdir()) == [out]
    frames, fps = read_video(out)
    assert tuple(frames.shape) == (9, 32, 48, 3)
    assert fps == 8
    made = read_metadata(out)
    assert f"seed {made['seed']}" in captured.err
    assert made["task"] == "image-to-video"
    assert made["prompt"] == ["a red"]
    assert made["versions"]["cogvid"] == cogvid.__version__


def test_every_option_arrives(t2v: Path, out: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    cogvid.export_to_video([picture(32, 48, seed=i) for i in range(20)], clip)
    options = [
        "--model",
        t2v,
        "-o",
        out,
        "--video",
        clip,
        "--negative-prompt",
        "two dogs",
        "--height",
        48,
        "--width",
        64,
    ]
    options += [
        "--num-frames",
        8,
        "--num-inference-steps",
        4,
        "--guidance-scale",
        2.5,
        "--use-dynamic-cfg",
        "diffusers",
    ]
    options += ["--scheduler", "ddim", "--strength", 0.5, "--resize", "crop", "--vae-encode", "whole"]
    options += ["--seed", 7, "--fps", 12, "--device", "cpu", "--dtype", "bfloat16", "--ops", "torch"]
    assert main(["generate", "", *map(str, options)]) == 0
    frames, fps = read_video(out)
    assert tuple(frames.shape) == (8, 48, 64, 3)
    assert fps == 12
    made = read_metadata(out)
    expected = {
        "task": "video-to-video", "negative_prompt": ["two dogs"], "guidance_scale": 2.5,
        "use_dynamic_cfg": "diffusers",
        "scheduler": "ddim", "strength": 0.5, "resize": "crop", "vae_encode": "whole", "seed": 7,
        "dtype": "bfloat16", "device": "cpu", "ops": "torch", "num_inference_steps": 4, "source": t2v.name,
    }  # fmt: skip
    assert {name: made[name] for name in expected} == expected
    assert len(made["timesteps"]) == 2


def test_warnings_are_one_line_each(t2v: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(t2v), "-o", str(out), *QUICK, "--num-inference-steps", "3", "--guidance-scale", "1"]
    assert main(["generate", "a red", *arguments]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cogvid: warning: ")]
    assert len(warned) == 2
    assert "was not trained for 32x48 pixels (recommended: 64x96)" in warned[0]
    assert "num_inference_steps=3 does not divide 1000" in warned[1]


def test_the_shipped_packs_are_the_default(
    image: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cogvid.weights.hub.PACKS", tmp_path)  # empty, so that the name shows in the message
    assert "'tiny-i2v'" in refused("generate", "x", "--image", image, "-o", out)
    assert "'tiny-t2v'" in refused("generate", "x", "-o", out)


def test_inspect(t2v: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(t2v), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"] == ["text-to-video", "video-to-video"]
    reference, _ = tiny_pipeline("5b")
    for part in ("transformer", "vae", "text_encoder"):
        parameters = sum(p.numel() for p in getattr(reference, part).parameters())
        assert found["weights"][part]["parameters"] == parameters
        assert found["weights"][part]["bytes"] == 4 * parameters
        assert found["weights"][part]["dtype"] == "float32"
    assert found["config"]["transformer"]["num_layers"] == 2
    assert main(["inspect", str(t2v)]) == 0
    table = capsys.readouterr().out
    assert "64x96 pixels, 9 frames at 8 fps" in table
    assert "text-to-video, video-to-video" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--height", "100"], "height: got 100, want a multiple of 16; the nearest is 96 or 112"),
        (["--width", "8"], "width: got 8, want a multiple of 16; the nearest is 16"),
        (["--height", "0"], "height: got 0"),
        (["--width", "-16"], "width: got -16"),
        (["--height", "ten"], "--height: invalid int value: 'ten'"),
        (["--num-frames", "45"], "num_frames: got 45, want 8N or 8N + 1; the nearest are 41 and 48"),
        (["--num-frames", "0"], "num_frames: got 0"),
        (["--num-inference-steps", "0"], "num_inference_steps: got 0, want an integer, 1 to 1000"),
        (["--num-inference-steps", "1001"], "num_inference_steps: got 1001"),
        (["--guidance-scale", "nan"], "guidance_scale: got nan"),
        (["--guidance-scale", "inf"], "guidance_scale: got inf"),
        (["--guidance-scale", "-1"], "guidance_scale: got -1.0"),
        (["--strength", "0"], "strength: got 0.0"),
        (["--strength", "1.5"], "strength: got 1.5"),
        (["--strength", "nan"], "strength: got nan"),
        (["--seed", "-1"], "seed: got -1"),
        (["--seed", "99999999999999999999"], "seed: got 99999999999999999999"),
        (["--fps", "0"], "fps"),
        (["--scheduler", "euler"], "scheduler: got 'euler', want one of dpm, ddim"),
        (["--dtype", "float8"], "dtype: got 'float8'"),
        (["--device", "tpu"], "device: got 'tpu'"),
        (["--ops", "cuda"], "ops: got 'cuda'"),
        (["--resize", "squeeze"], "resize: got 'squeeze', want one of stretch, crop, pad"),
        (["--image-latent-scale", "half"], "image_latent_scale: got 'half'"),
        (["--model", "no-such-model"], "model: got 'no-such-model'"),
        (["--model", "/dev/null"], "model: got '/dev/null', which is a file, want"),
        (["--video", "/no/such/clip.mp4"], "/no/such/clip.mp4"),
        (["--image", "x.png", "--video", "x.mp4"], "image, video: got both"),
        (["--heigth", "32"], "unrecognized arguments: --heigth 32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(t2v: Path, out: Path, refused: Refused, options: list[str], message: str) -> None:
    assert message in refused("generate", "x", "-o", out, "--model", t2v, *options)


def test_a_bad_seed_is_refused_before_the_weights_are_read(
    t2v: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cogvid.run.load.load_checkpoint", None)
    assert "seed: got -1" in refused("generate", "x", "-o", out, "--model", t2v, "--seed", -1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(t2v: Path, out: Path, refused: Refused) -> None:
    assert "device: got 'cuda'" in refused("generate", "x", "-o", out, "--model", t2v, "--device", "cuda")


def test_kernels_that_are_not_there(t2v: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cogvid_kernels", None)
    assert "'triton'" in refused("generate", "x", "-o", out, "--model", t2v, "--ops", "triton")


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["generate"], ["generate", "x"], ["inspect"]], ids=lambda a: " ".join(a) or "none"
)
def test_incomplete_commands(refused: Refused, arguments: list[str]) -> None:
    refused(*arguments)


def test_a_model_that_cannot_do_it_names_those_that_can(
    t2v: Path, i2v: Path, image: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refused("generate", "x", "-o", out, "--model", t2v, "--image", image)
    assert "model: got custom-t2v, which takes no image and cannot do image-to-video, want one of zai-org/Cog" in line
    other = refused("generate", "x", "-o", out, "--model", i2v)
    assert "cannot do text-to-video, want one of zai-org/CogVideoX-2b, " in other
    monkeypatch.setattr("cogvid.weights.hub._fetch", lambda repo, *_: Path(repo))
    for message, takes_image in ((line, True), (other, False)):
        named = message.partition("want one of ")[2].split(", ")
        assert len(named) >= 3
        for name in named:
            assert find(name).name == name.rpartition("/")[2]
            known = next(m for m in cogvid.CONFIGS.values() if name in (m.repo, m.name))
            assert bool(known.conditions) == takes_image


@pytest.mark.parametrize(
    ("given", "taken"), [("image", "tiny-i2v"), ("video", "tiny-t2v"), ("words", ""), ("named", "")]
)
def test_a_picture_for_a_model_that_was_not_named_is_warned_of(
    given: str, taken: str, image: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tmp_path / "clip.mp4"
    cogvid.export_to_video([picture(64, 64, seed=i) for i in range(9)], clip)
    inputs = {
        "image": ["--image", image],
        "video": ["--video", clip],
        "words": [],
        "named": ["--image", image, "--model", "tiny-i2v"],
    }[given]
    options = ["--num-inference-steps", 2, "--num-frames", 9, "-o", out, *inputs]
    assert main(["generate", "the red circle moves right", *map(str, options)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "--model" in line]
    assert len(said) == bool(taken)
    for line in said:
        assert line.startswith(f"cogvid: warning: model: got none, so {taken} is taken, which knows flat circles")
        assert f"--model {'zai-org/CogVideoX-5b-I2V' if taken == 'tiny-i2v' else 'zai-org/CogVideoX-2b'}" in line


def test_the_defaults_of_diffusers_are_one_option(t2v: Path, out: Path, refused: Refused) -> None:
    options = ["-o", str(out), "--model", str(t2v), "--num-inference-steps", "2"]
    assert main(["generate", "a red", *options, "--defaults", "diffusers"]) == 0
    made = read_metadata(out)
    expected = {
        "defaults": "diffusers", "scheduler": "ddim", "use_dynamic_cfg": "constant", "guidance_scale": 6.0,
        "height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 226,
    }  # fmt: skip
    assert {name: made[name] for name in expected} == expected
    line = refused("generate", "x", *options, "--defaults", "theirs")
    assert line == "cogvid: error: defaults: got 'theirs', want one of recommended, diffusers, sat"


def _bomb() -> bytes:
    """A PNG whose header claims 50,000 x 50,000 pixels."""
    png = io.BytesIO()
    Image.new("1", (50_000, 8)).save(png, "PNG")
    data = bytearray(png.getvalue())
    data[20:24] = (50_000).to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


BAD_IMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path.unlink(missing_ok=True),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.with_name("picture.png").read_bytes()[:-500]),
    "no image": lambda path: path.write_text("These are words."),
    "bomb": lambda path: path.write_bytes(_bomb()),
    "directory": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images(i2v: Path, image: Path, out: Path, refused: Refused, kind: str) -> None:
    bad = image.with_name("bad.png")
    BAD_IMAGES[kind](bad)
    assert "bad.png" in refused("generate", "x", "--image", bad, "-o", out, "--model", i2v)


@pytest.mark.parametrize("path", ["/missing.png", "/html", "/endless", "/stall", "/loop", "/to?file:///etc/passwd"])
def test_bad_urls(
    i2v: Path,
    out: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    server: str,  # noqa: F811
    path: str,
) -> None:
    limits = load_image.__kwdefaults__
    monkeypatch.setitem(limits, "timeout", 1.0)
    monkeypatch.setitem(limits, "max_bytes", 1_000_000)
    assert server in refused("generate", "x", "--image", server + path, "-o", out, "--model", i2v)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/a.png", "data:image/png;base64,AAAA"])
def test_other_schemes(i2v: Path, out: Path, refused: Refused, url: str) -> None:
    assert "http" in refused("generate", "x", "--image", url, "-o", out, "--model", i2v)


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _drop_a_shard(root: Path) -> None:
    folder = root / "transformer"
    weights = folder / "diffusion_pytorch_model.safetensors"
    shard = "diffusion_pytorch_model-00001-of-00002.safetensors"
    index = {
        "weight_map": {"proj_out.weight": shard, "proj_out.bias": "diffusion_pytorch_model-00002-of-00002.safetensors"}
    }
    weights.rename(folder / shard)
    (folder / f"{weights.name}.index.json").write_text(json.dumps(index))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda root: (root / "model_index.json").unlink(), "model_index.json"),
    "broken index": (lambda root: (root / "model_index.json").write_text('{"_class_name": '), "want a JSON file"),
    "list index": (lambda root: (root / "model_index.json").write_text("[]"), "want a JSON object"),
    "wrong class": (lambda root: _edit(root / "model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
    "wrong part": (lambda root: _edit(root / "vae" / "config.json", _class_name="AutoencoderKL"), "AutoencoderKL"),
    "no vae": (lambda root: shutil.rmtree(root / "vae"), "vae"),
    "missing shard": (_drop_a_shard, "00002-of-00002.safetensors: got "),
    "truncated": (
        lambda root: _truncate(root / "vae" / "diffusion_pytorch_model.safetensors"),
        "want a whole safetensors file",
    ),
    "wrong shapes": (lambda root: _edit(root / "transformer" / "config.json", time_embed_dim=48), "of another shape"),
    "missing layers": (lambda root: _edit(root / "transformer" / "config.json", num_layers=3), "missing"),
    "no tokenizer": (lambda root: (root / "tokenizer" / "spiece.model").unlink(), "spiece.model"),
    "text width": (lambda root: _edit(root / "text_encoder" / "config.json", d_model=48), "text_embed_dim"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_bad_models(t2v: Path, tmp_path: Path, out: Path, refused: Refused, kind: str) -> None:
    broken = shutil.copytree(t2v, tmp_path / "broken")
    damage, message = BAD_MODELS[kind]
    damage(broken)
    assert message in refused("generate", "x", "-o", out, "--model", broken, *QUICK)
    if kind != "no tokenizer":  # `inspect` looks at weights and configs
        assert message in refused("inspect", broken)


@pytest.mark.parametrize("output", ["video", "video.avi", "none/video.mp4", "folder.mp4", "/proc/video.mp4", ""])
def test_outputs_that_cannot_be_written_are_refused_before_the_work(
    t2v: Path, out: Path, refused: Refused, output: str
) -> None:
    (out.parent / "folder.mp4").mkdir()
    assert "output" in refused("generate", "x", "-o", out.parent / output if output else "", "--model", t2v, *QUICK)


def test_too_little_memory_is_status_1(t2v: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beyond_any_address_space = ["--height", "16000000", "--width", "16000000"]
    assert main(["generate", "x", "-o", str(out), "--model", str(t2v), *QUICK, *beyond_any_address_space]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "warning" not in line] == lines[-1:]
    assert lines[-1].startswith("cogvid: error: out of memory: ")
    assert list(out.parent.iterdir()) == []


def test_a_full_disk_is_status_1_and_spares_what_was_there(
    t2v: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cogvid.VideoWriter, "write", _disk_full)
    out.write_bytes(b"what was there")
    assert main(["generate", "x", "-o", str(out), "--model", str(t2v), *QUICK]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "cogvid: error: No space left on device"
    assert out.read_bytes() == b"what was there"
    assert list(out.parent.iterdir()) == [out]


def _disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
def test_an_interrupt_is_130_and_leaves_nothing(t2v: Path, out: Path) -> None:
    command = ["generate", "x", "-o", str(out), "--model", str(t2v), *QUICK, "--num-inference-steps", "1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cogvid", *command],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    )
    assert process.stderr is not None
    seen = ""
    while "denoise" not in seen:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "cogvid: error: interrupted"
    assert "Traceback" not in rest
    assert list(out.parent.iterdir()) == []


def test_the_command_runs_as_a_process(t2v: Path, out: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "cogvid",
        "generate",
        "a red",
        "-o",
        str(out),
        "--model",
        str(t2v),
        "--height",
        "33",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "cogvid: error: height: got 33, want a multiple of 16; the nearest is 32 or 48\n"
