"""`compare --lpips`, with random weights of AlexNet: those of the paper must be downloaded, which no test does.

What needs torchmetrics and torchvision, the extra `metrics`, is skipped where one of them is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

import cogvid
from cogvid.cli import main
from cogvid.media.video import read_video
from cogvid.run.compare import compare
from tests.unit.test_record import picture

FILE = "alexnet-owt-7be5be79.pth"


def noisy(path: Path, level: int, size: int = 64) -> str:
    """Write a video of three frames; level: the standard deviation of its noise, of 255."""
    rng = np.random.default_rng(level)
    frame = np.asarray(picture(size, size)).astype(float)
    frames = np.stack([frame + level * rng.standard_normal(frame.shape) for _ in range(3)])
    cogvid.export_to_video(torch.tensor(frames.clip(0, 255).astype(np.uint8)), path)
    return str(path)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Four videos by the level of their noise."""
    folder = tmp_path_factory.mktemp("videos")
    return {level: noisy(folder / f"{level}.mp4", level) for level in (0, 4, 16, 64)}


@pytest.fixture(scope="module")
def packages() -> Iterator[None]:
    for name in ("torchmetrics", "torchvision"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}, of the extra metrics")
    operators = torch.library.Library("torchvision", "FRAGMENT")
    try:
        import torchvision
    except RuntimeError:
        # A torchvision for CUDA beside a torch for CPUs cannot load its compiled part. Its import then fails at these
        # two operators, of detection. AlexNet is plain PyTorch, so their names are enough here.
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
    yield
    del operators


@pytest.fixture
def home(packages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: ARG001
    """The folder in which torchvision looks for weights, and a network that cannot be reached."""

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def weights(home: Path) -> Path:
    """Random weights where torchvision looks for those of AlexNet."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    state = alexnet(weights=None).state_dict()
    for name, tensor in state.items():
        if name.startswith("classifier"):  # unused here, and 224 MiB: one number stands for all
            state[name] = torch.zeros(1).expand(tensor.shape)
    torch.save(state, home / FILE)
    return home / FILE


@pytest.mark.usefixtures("weights")
def test_it_is_the_value_of_the_library(videos: dict[int, str]) -> None:
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    found = compare(videos[0], videos[16], lpips=True)
    pixels = [read_video(videos[level])[0].permute(0, 3, 1, 2).float() / 127.5 - 1 for level in (0, 16)]
    expected = learned_perceptual_image_patch_similarity(*pixels, net_type="alex", reduction="none").tolist()
    assert [row["lpips"] for row in found.rows] == pytest.approx(expected, rel=1e-4)  # another batch: other rounding
    assert len(set(expected)) == 3
    assert min(expected) > 0
    assert found.to_dict()["mean"]["lpips"] == pytest.approx(sum(expected) / 3, rel=1e-4)


@pytest.mark.usefixtures("weights")
def test_it_is_0_for_equal_videos_and_grows_with_noise(
    videos: dict[int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    means = []
    for level in videos:
        assert main(["compare", videos[0], videos[level], "--lpips", "--local-files-only", "--json"]) == 0
        means.append(json.loads(capsys.readouterr().out)["mean"]["lpips"])
    assert means[0] == 0
    assert means == sorted(set(means))
    assert main(["compare", videos[0], videos[4], "--lpips"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["frame", "psnr", "ssim", "max_abs", "lpips"]


@pytest.mark.usefixtures("weights")
def test_the_smallest_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cogvid.run.lpips import SMALLEST, load_lpips

    measure = load_lpips()
    x, y = torch.randint(0, 256, (2, SMALLEST, SMALLEST, 3), dtype=torch.uint8)
    assert measure(x, y) > 0
    with pytest.raises(RuntimeError):
        measure(x[1:], y[1:])
    small = noisy(tmp_path / "small.mp4", 1, size=16)
    assert main(["compare", small, small, "--lpips"]) == 2
    assert capsys.readouterr().err == "cogvid: error: lpips: got frames of 16x16, want at least 31x31\n"


def test_weights_that_cannot_be_had(home: Path, videos: dict[int, str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", videos[0], videos[4], "--lpips"]
    assert main(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("cogvid: error: lpips: got no weights of AlexNet (<urlopen error no route to host>), want ")
    assert line.endswith(f"or the file of https://download.pytorch.org/models/{FILE} as {home / FILE}")
    assert main([*command, "--local-files-only"]) == 2
    assert "none may be downloaded, want " in capsys.readouterr().err
    for damaged in (b"", b"no weights", b"PK\x03\x04"):
        (home / FILE).write_bytes(damaged)
        assert main(command) == 2
        assert "lpips: got weights of AlexNet that are damaged, want another " in capsys.readouterr().err


def test_packages_that_are_missing_or_broken(
    videos: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", videos[0], videos[4], "--lpips"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.startswith("cogvid: error: lpips: got no torchvision")
    assert err.endswith("want torchmetrics and torchvision: pip install -c scripts/constraints.txt '.[metrics]'\n")
    # As one of another build than torch is.
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms: none')")
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.28.0\n")
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"cogvid: error: lpips: got torchvision 0.28.0, which torch {torch.__version__} cannot load ")
    assert err.endswith("(operator torchvision::nms: none), want the build for this torch, of the same index\n")
    # Without it nothing is imported.
    assert main(command[:-1]) == 0


def test_what_has_no_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["a.safetensors", "b.safetensors", "--lpips"], "lpips: got trajectories, want two videos"),
        (["a.mp4", "b.mp4", "--lpips", "--trace"], "lpips: got it with --trace, which compares no frames, want one of"),
        (["a.mp4", "b.mp4", "--side-by-side", "c.png", "--trace"], "side_by_side: got it with --trace, which compares"),
    ):
        assert main(["compare", *(str(tmp_path / each) if each[1] == "." else each for each in arguments)]) == 2
        assert message in capsys.readouterr().err
