"""Frames as GIF, WebP and PNG, and `Output.save`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cogvid
from cogvid.media.pictures import durations, save_frames
from cogvid.run.replay import replay
from references import picture

PROMPT = "the red circle moves right"
QUICK: dict[str, Any] = {"num_inference_steps": 2, "num_frames": 9, "seed": 1, "progress": False}


@pytest.fixture(scope="module")
def pipe() -> cogvid.Pipeline:
    return cogvid.load("tiny-i2v", device="cpu")


@pytest.fixture(scope="module")
def out(pipe: cogvid.Pipeline) -> cogvid.Output:
    return pipe(PROMPT, image=picture(64, 64), output_type="uint8", **QUICK)


def read_animation(path: str) -> tuple[np.ndarray, list[int]]:
    with Image.open(path) as image:
        frames, lengths = [], []
        for index in range(image.n_frames):  # pyright: ignore[reportAttributeAccessIssue]
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
            lengths.append(image.info["duration"])
    return np.stack(frames), lengths


@pytest.mark.parametrize("fps", [8, 16, 24, 30000 / 1001])
@pytest.mark.parametrize("unit", [1, 10])
def test_the_whole_is_as_long_as_its_frames(fps: float, unit: int) -> None:
    lengths = durations(81, fps, unit)
    assert len(lengths) == 81
    assert abs(sum(lengths) - 81_000 / fps) <= unit / 2 + 1e-6
    assert max(lengths) - min(lengths) <= unit


def test_webp_is_lossless(out: cogvid.Output, tmp_path: Path) -> None:
    frames, lengths = read_animation(out.save(tmp_path / "x.webp"))
    assert np.array_equal(frames, out.frames[0].numpy())
    assert lengths == durations(9, out.fps, 1)


def test_gif_has_the_frames_in_256_colours(out: cogvid.Output, tmp_path: Path) -> None:
    frames, lengths = read_animation(out.save(tmp_path / "x.gif"))
    assert frames.shape == (9, 64, 64, 3)
    assert lengths == durations(9, out.fps, 10)
    error = np.abs(frames.astype(int) - out.frames[0].numpy()).mean(axis=(1, 2, 3))
    shifted = np.abs(frames[1:].astype(int) - out.frames[0][:-1].numpy()).mean()
    assert error.max() < 10, error  # of 255: what a fixed palette of 6 levels a channel is off by (measured 4.8)
    assert shifted > error.mean(), "frames are in another order"


def test_png_is_a_sheet_of_frames(out: cogvid.Output, tmp_path: Path) -> None:
    sheet = np.asarray(Image.open(out.save(tmp_path / "x.png")))
    assert sheet.shape == (3 * 64, 3 * 64, 3)
    tiles = sheet.reshape(3, 64, 3, 64, 3).swapaxes(1, 2).reshape(9, 64, 64, 3)
    assert np.array_equal(tiles, out.frames[0].numpy())


def test_a_long_video_gives_a_sheet_from_the_first_to_the_last_frame(tmp_path: Path) -> None:
    frames = np.zeros((49, 2, 2, 3), np.uint8)
    frames[:] = np.arange(49, dtype=np.uint8)[:, None, None, None]
    sheet = np.asarray(Image.open(save_frames(frames, tmp_path / "x.png", 8)))
    shown = sheet[::2, ::2, 0].flatten().tolist()
    assert len(shown) == 16
    assert (shown[0], shown[-1]) == (0, 48)
    assert shown == sorted(set(shown))


def test_a_name_with_a_field_gives_a_file_for_each_frame(out: cogvid.Output, tmp_path: Path) -> None:
    out.save(tmp_path / "f-%02d.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"f-{i:02d}.png" for i in range(9)]
    for index in range(9):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"f-{index:02d}.png")), out.frames[0][index].numpy())


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "uint8", "stream"])
def test_every_kind_of_pixels_can_be_saved(
    output_type: str, pipe: cogvid.Pipeline, out: cogvid.Output, tmp_path: Path
) -> None:
    found = pipe(PROMPT, image=picture(64, 64), output_type=output_type, **QUICK)
    frames, _ = read_animation(found.save(tmp_path / "x.webp"))
    assert np.array_equal(frames, out.frames[0].numpy())


def test_the_mp4_has_the_record_and_can_be_replayed(out: cogvid.Output, tmp_path: Path) -> None:
    path = out.save(tmp_path / "x.mp4")
    assert cogvid.read_record(path) == out.provenance
    assert cogvid.read_video(path)[1] == out.fps
    said: list[str] = []
    replay(path, tmp_path / "again.mp4", image=picture(64, 64), say=said.append)
    assert said[0].endswith("x.mp4'")
    assert " has the same bytes as " in said[0]
    assert len(said) == 1


def test_export_to_video_returns_the_path(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    assert cogvid.export_to_video(torch.zeros(1, 16, 16, 3, dtype=torch.uint8), path) == str(path)


def test_what_cannot_be_saved_is_one_line_and_writes_nothing(out: cogvid.Output, tmp_path: Path) -> None:
    two = dataclasses.replace(out, frames=out.frames.expand(2, -1, -1, -1, -1))
    latents = dataclasses.replace(out, frames=torch.zeros(1, 3, 16, 8, 8))
    with pytest.raises(ValueError, match=r"^video: got none of 2, want which, from 0 to 1$"):
        two.save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"^video: got 2, want an integer, 0 to 1$"):
        two.save(tmp_path / "x.png", video=2)
    with pytest.raises(ValueError, match=r"^frames: got latents, want those of another output_type$"):
        latents.save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.avi', want a file name ending in \.mp4 or \.gif or \.webp or \.png$"):
        out.save(tmp_path / "x.avi")
    with pytest.raises(ValueError, match=r"want one field for the frame's number, such as %03d$"):
        out.save(tmp_path / "x%%.png")
    with pytest.raises(ValueError, match=r"^fps: got 0, want more than 0 and at most 1000$"):
        save_frames(out.frames[0], tmp_path / "x.gif", 0)
    with pytest.raises(ValueError, match=r"^frames: got none, want at least one frame$"):
        save_frames([], tmp_path / "x.gif", 8)
    assert list(tmp_path.iterdir()) == []
    two.save(tmp_path / "x.png", video=1)
