"""Which frames of a file are read: by start, rate and number, with a variable frame rate; and how they are turned."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

import cogvid
from cogvid.media import video
from cogvid.media.video import count_frames, read_video
from cogvid.run.generate import prepare
from cogvid.run.record import read_record

STEP = 5  # grey levels from one frame to the next


def write(path: Path, times: Sequence[int], tick: Fraction, codec: str = "libx264", rate: int = 24) -> Path:
    """Write frames that are numbered by their grey, each at its time in ticks."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.codec_context.time_base = tick
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), STEP * index, np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = time, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(frames: torch.Tensor) -> list[int]:
    return [round(float(frame.float().mean()) / STEP) for frame in frames]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts", "flv"])  # ticks of 1/12288, 1/1000, 1/24 and 1/90000 s
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fps": 24}, list(range(48))),
        ({"fps": 8}, list(range(0, 48, 3))),
        ({"start": 1.0}, list(range(24, 48))),
        ({"start": 1.01}, list(range(24, 48))),  # the frame that is shown then
        ({"start": 0.5, "fps": 48}, [i // 2 for i in range(24, 96)]),
        ({"start": 0.51, "fps": 12}, list(range(12, 48, 2))),
        ({"start": 1.99}, [47]),
        ({"start": 1.99, "fps": 2}, [47]),
    ],
    ids=str,
)
def test_frames_are_chosen_by_time(tmp_path: Path, suffix: str, options: Any, expected: list[int]) -> None:
    path = write(tmp_path / f"clip.{suffix}", range(48), Fraction(1, 24))
    frames, fps = read_video(path, **options)
    assert numbers(frames) == expected
    assert fps == options.get("fps", pytest.approx(24, rel=0.01))
    assert count_frames(path, **options) == len(expected)
    assert numbers(read_video(path, num_frames=1, **options)[0]) == expected[:1]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_variable_frame_rate(tmp_path: Path, suffix: str) -> None:
    times = [0, 100, 900, 1000, 1010, 1020, 2000, 2500]  # ms
    path = write(tmp_path / f"clip.{suffix}", times, Fraction(1, 1000))
    assert numbers(read_video(path)[0]) == list(range(8))  # without fps, each frame once, as diffusers' load_video
    assert numbers(read_video(path, fps=2, num_frames=6)[0]) == [0, 1, 3, 5, 6, 7]
    assert numbers(read_video(path, start=0.9, fps=10, num_frames=3)[0]) == [2, 3, 5]
    assert numbers(read_video(path, start=1.005)[0]) == [3, 4, 5, 6, 7]
    shown = [max(i for i, time in enumerate(times) if time <= 40 * k) for k in range(62)]
    assert numbers(read_video(path, 62, fps=25)[0]) == shown


def test_what_cannot_be_chosen_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", range(48), Fraction(1, 24))
    for options, message in (
        ({"start": 2.0}, r"^video_start: got 2 for .*, want less than its 2 seconds$"),
        ({"start": -1}, r"^video_start: got -1, want 0 or more seconds"),
        ({"start": float("nan")}, r"^video_start: got nan, want 0 or more seconds"),
        ({"fps": 0}, r"^video_fps: got 0, want 0\.01 to 1000 frames per second$"),
        ({"num_frames": 49}, r"^num_frames: got 49 for .*, which has 48, want at most 48$"),
        ({"num_frames": 25, "start": 1}, r"^num_frames: got 25 for .*, which has 24, want at most 24$"),
        ({"num_frames": 0}, r"^num_frames: got 0, want at least 1$"),
    ):
        with pytest.raises(ValueError, match=message):
            read_video(path, **options)


def test_the_limits_hold_for_frames_that_are_read_several_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "clip.mp4", range(4), Fraction(1, 24))
    with pytest.raises(ValueError, match=r"of which 240042 frames of 32x16 pixels are wanted, want at most"):
        read_video(write(tmp_path / "long.mp4", [0, 240 * 24], Fraction(1, 24)), fps=1000)
    monkeypatch.setattr(video, "MAX_FRAMES", 7)
    assert len(read_video(path, fps=40)[0]) == 7
    with pytest.raises(ValueError, match=r"of which 9 frames of 32x16 pixels are wanted, want at most 7 frames"):
        read_video(path, fps=54)
    assert len(read_video(path, 7, fps=54)[0]) == 7  # what is not wanted does not count


MARKED = np.zeros((16, 32, 3), np.uint8)
MARKED[:8, :16], MARKED[:8, 16:], MARKED[8:, :16] = 240, 160, 80  # four quarters, none equal to another


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirror", ["", "hflip", "vflip"])
def test_videos_are_turned_and_mirrored_as_they_say(tmp_path: Path, degrees: int, mirror: str) -> None:
    with av.open(str(tmp_path / "turned.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.set_display_rotation(degrees, **({mirror: True} if mirror else {}))
        container.mux(stream.encode(av.VideoFrame.from_ndarray(MARKED, format="rgb24")))
        container.mux(stream.encode(None))
    expected = np.rot90(MARKED, degrees // 90)  # counter-clockwise, and mirrored after it
    expected = {"": expected, "hflip": expected[:, ::-1], "vflip": expected[::-1]}[mirror]
    (frame,), _ = read_video(tmp_path / "turned.mp4")
    assert frame.shape == expected.shape
    assert np.abs(frame.numpy().astype(int) - expected).max() <= 3


def test_a_slanted_video_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "slanted.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.set_display_rotation(30)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(MARKED, format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"^video: got .*, which is to be turned by \d+ degrees, want a turn by quart"):
        read_video(tmp_path / "slanted.mp4")


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(2), 64), (Fraction(3, 4), 24)])
def test_pixels_that_are_not_square_are_made_so(tmp_path: Path, aspect: Fraction, width: int) -> None:
    with av.open(str(tmp_path / "wide.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        container.mux(stream.encode(av.VideoFrame.from_ndarray(MARKED, format="rgb24")))
        container.mux(stream.encode(None))
    (frame,), _ = read_video(tmp_path / "wide.mp4")
    assert frame.shape == (16, width, 3)
    for y, x in ((2, 3), (2, width - 4), (13, 3), (13, width - 4)):  # away from the edges between the quarters
        assert abs(int(frame[y, x, 0]) - int(MARKED[y, x * 32 // width, 0])) <= 3


def test_the_command_takes_a_part_and_the_record_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cogvid.cli import main

    path, out = write(tmp_path / "clip.mp4", range(48), Fraction(1, 24)), tmp_path / "out.mp4"
    given = ["--video", str(path), "--video-start", "0.5", "--video-fps", "12", "--num-frames", "9"]
    quick = ["--model", "tiny-t2v", "--num-inference-steps", "2", "--strength", "0.5", "--seed", "1", "--device", "cpu"]
    assert main(["generate", "a red circle moves right", *given, *quick, "-o", str(out)]) == 0
    record = read_record(out)
    assert (record["video_start"], record["video_fps"]) == (0.5, 12)
    assert record["video"] == _recorded_hash(path, start=0.5, fps=12)
    assert record["video"] != _recorded_hash(path)
    again = str(tmp_path / "again.mp4")
    assert main(["replay", str(out), "--video", str(path), "-o", again]) == 0
    assert Path(again).read_bytes() == out.read_bytes()
    assert main(["plan", *given, *quick]) == 0
    assert main(["generate", "x", "--video-fps", "3", *quick, "-o", str(out)]) == 2
    assert "video_fps: got 3.0 without a video, want it with one" in capsys.readouterr().err


def _recorded_hash(path: Path, **chosen: Any) -> str:
    from cogvid.run.given import resized
    from cogvid.run.record import pixel_hash

    job = prepare(cogvid.CONFIGS["tiny-t2v"], "x", path.parent / "other.mp4", video=read_video(path, 9, **chosen)[0])
    (resized_video,) = resized({"video": [job.inputs["video"]]}, job.settings)["video"]
    return pixel_hash(resized_video)
