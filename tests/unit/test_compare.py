"""What `compare` measures, against other ways to compute it, and what it shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cogvid
from cogvid.cli import main
from cogvid.media.video import read_video
from cogvid.run.compare import compare, psnr, ssim
from tests.unit.test_record import generate, picture

PLAIN = ["--model", "tiny-t2v", "--num-inference-steps", "3", "--previous-timestep", "next"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Videos and trajectories: a run, the same again, in bf16, and with a guidance that differs from step 1 on."""
    folder = tmp_path_factory.mktemp("runs")
    cogvid.GUIDANCE["late"] = lambda _scale, index, _schedule: 2.0 if index == 0 else 5.0
    try:
        options = {
            "a": ["--use-dynamic-cfg", "constant"],
            "same": ["--use-dynamic-cfg", "constant"],
            "bf16": ["--use-dynamic-cfg", "constant", "--dtype", "bfloat16"],
            "late": ["--use-dynamic-cfg", "late"],
        }
        return {
            name: generate(folder / f"{name}.mp4", *PLAIN, *more, "--save-trajectory", folder / f"{name}.safetensors")
            for name, more in options.items()
        }
    finally:
        del cogvid.GUIDANCE["late"]


def reference_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """As scikit-image computes it with `gaussian_weights`: filters of scipy, the border cut off."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="needs scipy")

    def smooth(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, sigma=1.5, truncate=3.5)

    means = []
    for a, b in zip(np.moveaxis(x.astype(float), -1, 0), np.moveaxis(y.astype(float), -1, 0), strict=True):
        ux, uy = smooth(a), smooth(b)
        vx, vy, vxy = smooth(a * a) - ux * ux, smooth(b * b) - uy * uy, smooth(a * b) - ux * uy
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        likeness = ((2 * ux * uy + c1) * (2 * vxy + c2)) / ((ux**2 + uy**2 + c1) * (vx + vy + c2))
        means.append(likeness[5:-5, 5:-5].mean())
    return float(np.mean(means))


@pytest.mark.parametrize("noise", [0, 3, 40, 255])
def test_ssim_is_that_of_scikit_image(noise: int) -> None:
    x = np.asarray(picture(32, 48).resize((48, 32)).reduce(2).resize((48, 32)))
    rng = np.random.default_rng(1)
    y = np.clip(x.astype(int) + rng.integers(-noise, noise + 1, x.shape), 0, 255).astype(np.uint8)
    assert ssim(torch.tensor(x), torch.tensor(y)) == pytest.approx(reference_ssim(x, y), abs=1e-9)


def test_measures_of_known_pictures() -> None:
    x = torch.full((16, 16, 3), 100, dtype=torch.uint8)
    assert psnr(x, x, 255) is None
    assert psnr(x, x + 5, 255) == pytest.approx(20 * np.log10(255 / 5))
    assert ssim(x, x) == pytest.approx(1)
    c1 = (0.01 * 255) ** 2  # of flat pictures only the means count
    assert ssim(x, x + 50) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    small = torch.randint(0, 256, (4, 6, 3), dtype=torch.uint8)
    assert ssim(small, small) == pytest.approx(1)
    assert ssim(small, 255 - small) < 0.5


def test_equal_runs_are_equal(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for suffix, kind in ((".mp4", "videos"), (".safetensors", "trajectories")):
        a, same = (str(runs[name].with_suffix(suffix)) for name in ("a", "same"))
        found = compare(a, same)
        assert found.kind == kind
        assert found.first is None
        assert found.record == []
        assert main(["compare", a, same]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"the {kind} are equal"


def test_the_first_step_that_differs_is_found(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, late, bf16 = (str(runs[name].with_suffix(".safetensors")) for name in ("a", "late", "bf16"))
    found = compare(a, late)
    assert found.first == 1
    assert [row["timestep"] for row in found.rows] == [999, 666, 332]
    assert found.rows[0]["latents max"] == found.rows[0]["x0 max"] == 0
    assert found.rows[1]["x0 max"] > 0
    assert "use_dynamic_cfg: 'constant' in the first, 'late' in the second" in found.record
    rounded = compare(a, bf16)
    assert rounded.first == 0
    assert 0 < rounded.rows[0]["x0 rms"] < 0.1
    assert main(["compare", a, bf16]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "dtype: 'float32' in the first, 'bfloat16' in the second" in lines
    assert lines[-1] == "the first step that differs is 0"


def test_videos_are_compared_frame_by_frame(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs["a"]), str(runs["late"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (a, _), (b, _) = read_video(runs["a"]), read_video(runs["late"])
    assert len(found["rows"]) == len(a) == 9
    for row, x, y in zip(found["rows"], a.double(), b.double(), strict=True):
        error = (x - y).square().mean().item()
        assert row["psnr"] == (None if error == 0 else pytest.approx(10 * np.log10(255**2 / error)))
        assert row["max_abs"] == (x - y).abs().max()
    assert found["mean"]["ssim"] == pytest.approx(sum(row["ssim"] for row in found["rows"]) / 9)
    unlike = [i for i, row in enumerate(found["rows"]) if row["max_abs"]]
    assert found["first"] == unlike[0]


def test_side_by_side(runs: dict[str, Path], tmp_path: Path) -> None:
    a, late = str(runs["a"]), str(runs["late"])
    (x, fps), (y, _) = read_video(a), read_video(late)
    for name in ("both.mp4", "both.png"):
        assert main(["compare", a, late, "--side-by-side", str(tmp_path / name)]) == 0
    difference = ((x.int() - y.int()).abs() * 8).clamp(max=255)
    shown, rate = read_video(tmp_path / "both.mp4")
    assert rate == fps
    expected = torch.cat([x.int(), y.int(), difference], dim=2)
    assert shown.shape == expected.shape
    assert (shown.int() - expected).abs().float().mean() < 8  # it is encoded with a loss
    pixels = torch.tensor(np.asarray(Image.open(tmp_path / "both.png"))).int()
    for row, frames in enumerate((x.int(), y.int(), difference)):
        for column, index in enumerate((0, 2, 3, 5, 6, 8)):
            part = pixels[64 * row : 64 * (row + 1), 64 * column : 64 * (column + 1)]
            assert torch.equal(part, frames[index])


def test_what_cannot_be_compared_is_one_line(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = str(runs["a"])
    path = runs["a"].with_suffix(".safetensors")
    cogvid.export_to_video([picture(32, 64)] * 2, tmp_path / "small.mp4")
    generate(tmp_path / "b.mp4", *PLAIN[:2], "--save-trajectory", tmp_path / "two.safetensors")
    for arguments, message in (
        ([a, tmp_path / "none.mp4"], "which does not exist"),
        ([a, path], "want two videos or two trajectories"),
        ([a, tmp_path / "small.mp4"], "compare: got 9 frames of 64x64 and 2 frames of 32x64, want videos of one size"),
        ([path, tmp_path / "two.safetensors"], "compare: got 3 steps of [1, 3, 16, 8, 8] and 2 steps of"),
        ([a, a, "--side-by-side", tmp_path / "both.gif"], "want a file name ending in .mp4 or .png"),
        ([path, path, "--side-by-side", tmp_path / "both.png"], "side_by_side: got trajectories, want two videos"),
        ([a, a, "--side-by-side", tmp_path / "none" / "both.png"], "side_by_side: got "),
    ):
        capsys.readouterr()
        assert main(["compare", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not list(tmp_path.glob("both*"))
