"""Writing MP4 files and reading them back: count, size, rate, pixels, colours, atomicity, reproducibility."""

import itertools
import os
import stat
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from cogvid.media.video import (
    VideoWriter,
    check_output_path,
    denormalize,
    export_to_video,
    read_metadata,
    read_video,
    to_uint8,
)


def _clip(num_frames: int = 17, height: int = 64, width: int = 96) -> np.ndarray:
    """Smooth moving waves, `[F, H, W, 3]` uint8."""
    frame, y, x = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    waves = (np.sin((x + 3 * frame) / 25), np.cos((y - 2 * frame) / 30), 0.6 * np.sin((x + y + 4 * frame) / 40))
    return np.rint(128 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def _psnr(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor) -> float:
    return float(10 * np.log10(255**2 / np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)))


@pytest.mark.parametrize("num_frames", [1, 8, 17])
@pytest.mark.parametrize("size", [(64, 96), (98, 66)], ids=["64x96", "98x66"])
def test_round_trip(tmp_path: Path, num_frames: int, size: tuple[int, int]) -> None:
    clip = _clip(num_frames, *size)
    export_to_video(clip, tmp_path / "clip.mp4", fps=8)
    frames, fps = read_video(tmp_path / "clip.mp4")
    assert frames.dtype == torch.uint8
    assert frames.shape == clip.shape
    assert fps == 8
    assert _psnr(frames, clip) > 40
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_crf_and_preset_reach_the_encoder(tmp_path: Path) -> None:
    clip = _clip()
    sizes, quality = [], []
    for crf in (10, 40):
        export_to_video(clip, tmp_path / f"{crf}.mp4", crf=crf)
        sizes.append((tmp_path / f"{crf}.mp4").stat().st_size)
        quality.append(_psnr(read_video(tmp_path / f"{crf}.mp4")[0], clip))
    assert sizes[0] > 1.5 * sizes[1]
    assert quality[0] > quality[1] + 5
    export_to_video(clip, tmp_path / "fast.mp4", preset="ultrafast")
    assert b"cabac=0" in (tmp_path / "fast.mp4").read_bytes()  # only ultrafast turns CABAC off


def test_every_form_of_the_same_frames_gives_the_same_file(tmp_path: Path) -> None:
    clip = _clip(5)
    unit = clip.astype(np.float32) / 255
    channels_first = torch.from_numpy(unit).permute(0, 3, 1, 2)
    forms = {
        "uint8-array": clip,
        "float-array": unit,
        "float64-array": clip / 255,
        "uint8-tensor": torch.from_numpy(clip),
        "float-tensor": torch.from_numpy(unit),
        "pt": channels_first,
        "pt-double": channels_first.double(),
        "pil": [Image.fromarray(frame) for frame in clip],
        "list-of-arrays": list(unit),
        "list-of-tensors": list(channels_first),
        "generator": (frame for frame in clip),
        "reversed-strides": clip[::-1][::-1],
    }
    for name, frames in forms.items():
        export_to_video(frames, tmp_path / f"{name}.mp4")
    files = {name: (tmp_path / f"{name}.mp4").read_bytes() for name in forms}
    assert {name for name, file in files.items() if file != files["uint8-array"]} == set()


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 240, 368, 3), dtype=np.uint8)
    for clip in (_clip(25, 240, 368), noise):
        files = []
        for _ in range(4):
            export_to_video(clip, tmp_path / "clip.mp4", preset="fast")
            files.append((tmp_path / "clip.mp4").read_bytes())
        assert len(set(files)) == 1


def test_streaming_equals_whole(tmp_path: Path) -> None:
    clip = _clip()
    export_to_video(clip, tmp_path / "whole.mp4")
    with VideoWriter(tmp_path / "chunks.mp4", 64, 96) as writer:
        for start, stop in itertools.pairwise((0, 1, 1, 9, 17)):
            writer.write(torch.from_numpy(clip[start:stop]))
    assert (tmp_path / "chunks.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


@pytest.mark.parametrize("fps", [8, 16.0, 0.5, 12.5, 23.976, 24000 / 1001, Fraction(30000, 1001), np.float32(24), 1000])
def test_frame_rate_is_written(tmp_path: Path, fps: float | Fraction) -> None:
    export_to_video(_clip(5, 16, 16), tmp_path / "clip.mp4", fps=fps)
    assert read_video(tmp_path / "clip.mp4")[1] == pytest.approx(float(fps), rel=1e-9)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([i / float(fps) for i in range(5)], abs=2e-5)


def test_file_is_h264_with_bt709_tags_and_its_index_first(tmp_path: Path) -> None:
    export_to_video(_clip(3), tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)
        assert context.color_range == 1
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, 1)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    assert b"colrnclx\x00\x01\x00\x01\x00\x01\x00" in data  # also in the container


def test_colours_are_converted_with_the_bt709_matrix_and_rounded(tmp_path: Path) -> None:
    colours = list(itertools.product((0, 77, 128, 200, 255), repeat=3))
    clip = np.stack([np.full((16, 16, 3), colour, dtype=np.uint8) for colour in colours])
    export_to_video(clip, tmp_path / "colours.mp4", crf=0, preset="ultrafast")  # lossless after the conversion
    with av.open(str(tmp_path / "colours.mp4")) as container:
        planes = [frame.to_ndarray().reshape(-1) for frame in container.decode(video=0)]
    written = np.array([[plane[100], plane[256 + 30], plane[256 + 64 + 30]] for plane in planes], dtype=float)
    r, g, b = (np.array(colours) / 255).T  # ITU-R BT.709-6, items 3.2 to 3.5
    luma = 0.2126 * r + 0.7152 * g + 0.0722 * b
    exact = np.stack([16 + 219 * luma, 128 + 224 * (b - luma) / 1.8556, 128 + 224 * (r - luma) / 1.5748], axis=-1)
    assert np.abs(written - exact).max() < 0.51  # 0.5 is rounding; swscale's coefficients have 15 bits
    read = read_video(tmp_path / "colours.mp4")[0][:, 8, 8].numpy().astype(int)
    assert np.abs(read - np.array(colours)).max() <= 2  # 8-bit limited-range YCbCr cannot tell all colours apart


def test_floats_are_rounded_not_truncated(tmp_path: Path) -> None:
    level = np.full((3, 16, 16, 3), (200 - 0.4) / 255, dtype=np.float32)
    export_to_video(level, tmp_path / "float.mp4")
    export_to_video(np.full((3, 16, 16, 3), 200, dtype=np.uint8), tmp_path / "uint8.mp4")
    assert (tmp_path / "float.mp4").read_bytes() == (tmp_path / "uint8.mp4").read_bytes()


def test_to_uint8_rounds_every_level_and_keeps_the_shape() -> None:
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 255), levels.to(torch.uint8))
    assert torch.equal(to_uint8(((levels - 0.4) / 255).clamp(0, 1)), levels.to(torch.uint8))
    assert torch.equal(
        to_uint8(denormalize(torch.tensor([[-7.0, -1, 0, 1, 7]]))).long(), torch.tensor([[0, 0, 128, 255, 255]])
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.01, 1.01])
def test_to_uint8_refuses_what_is_not_a_pixel(bad: float) -> None:
    pixels = torch.full((2, 3, 4, 4), 0.5)
    pixels[1, 2, 3, 3] = bad
    with pytest.raises(ValueError, match=r"^pixels: got values from .* to .*, want \[0, 1\]$"):
        to_uint8(pixels)


_FRAMES = np.zeros((3, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "^frames: got none, want at least one frame$"),
        (np.zeros((0, 16, 16, 3), np.uint8), "^frames: got none, want at least one frame$"),
        (np.zeros((2, 15, 16, 3), np.uint8), "^height: got 15, want a positive even number, because .*2x2 pixels$"),
        (np.zeros((2, 16, 17, 3), np.uint8), "^width: got 17, want a positive even number, because .*2x2 pixels$"),
        (
            [_FRAMES[0], np.zeros((16, 18, 3), np.uint8)],
            r"^frames: got \[1, 16, 18, 3\] uint8, want \[f, 16, 16, 3\] uint8$",
        ),
        (np.full((2, 16, 16, 3), np.nan), r"^frames\[0\]: got values from nan to nan, want \[0, 1\]$"),
        (np.full((2, 16, 16, 3), 255.0), r"^frames\[0\]: got values from 255 to 255, want \[0, 1\]$"),
        (torch.full((2, 3, 16, 16), -1.0), r"^frames\[0\]: got values from -1 to -1, want \[0, 1\]$"),
        (np.zeros((2, 16, 16, 3), np.int64), r"^frames\[0\]: got int64, want uint8"),
        (np.zeros((2, 16, 16, 4), np.uint8), r"^frames\[0\]: got shape \[16, 16, 4\], want \[H, W, 3\]"),
        (np.zeros((16, 16, 3), np.uint8), r"^frames\[0\]: got shape \[16, 3\], want"),
        (_FRAMES[None], r"^frames\[0\]: got shape .*, want .* of one video, such as frames\[0\]$"),
        ([[Image.new("RGB", (16, 16))]], r"^frames\[0\]: got list, want .* of one video, such as frames\[0\]$"),
        ([Image.new("RGBA", (16, 16))], r"^frames\[0\]: got a PIL image of mode RGBA, want RGB$"),
        (["a.png"], r"^frames\[0\]: got str, want"),
        ("a.png", "^frames: got str, want the frames of one video$"),
        (Image.new("RGB", (16, 16)), "^frames: got Image, want"),
    ],
    ids=lambda value: value.replace("\\", "") if isinstance(value, str) else type(value).__name__,
)
def test_bad_frames_are_refused(tmp_path: Path, frames: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_to_video(frames, tmp_path / "out.mp4")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"fps": 0}, "^fps: got 0, want 0.01 to 1000"),
        ({"fps": -16}, "^fps: got -16, want"),
        ({"fps": float("nan")}, "^fps: got nan, want"),
        ({"fps": float("inf")}, "^fps: got inf, want"),
        ({"crf": 52}, "^crf: got 52, want 0"),
        ({"crf": float("nan")}, "^crf: got nan, want"),
        ({"preset": "warp"}, "^preset: got 'warp', want one of ultrafast"),
    ],
    ids=str,
)
def test_bad_options_are_refused(tmp_path: Path, option: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_to_video(_FRAMES, tmp_path / "out.mp4", **option)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_bad_outputs_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, message in {
        "folder.mp4": "which is a directory, want a file name",
        "out.avi": "want a file name ending in .mp4",
        "out": "want a file name ending in .mp4",
        "missing/out.mp4": "whose directory does not exist, want",
        "pipe.mp4": "which exists and is not a writable file, want",
    }.items():
        with pytest.raises(ValueError, match=f"^output: got '.*{name}', {message}"):
            VideoWriter(tmp_path / name, 16, 16)
    assert sorted(os.listdir(tmp_path)) == ["folder.mp4", "pipe.mp4"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_unwritable_outputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "kept.mp4").touch(0o444)
    with pytest.raises(ValueError, match=r"^output: .* not a writable file, want"):
        check_output_path(tmp_path / "kept.mp4")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(ValueError, match=r"^output: .* not writable, want"):
            check_output_path(tmp_path / "out.mp4")
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("written", [0, 17])
def test_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException], written: int) -> None:
    target = tmp_path / "out.mp4"
    target.write_bytes(b"precious")

    def fail_after_writing() -> None:
        with VideoWriter(target, 64, 96) as writer:
            writer.write(_clip(written))
            assert target.read_bytes() == b"precious"
            raise error

    with pytest.raises(error):
        fail_after_writing()
    assert os.listdir(tmp_path) == ["out.mp4"]
    assert target.read_bytes() == b"precious"


def test_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    target = tmp_path / "out.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 96, 3), dtype=np.uint8)
    export_to_video(noise, target)
    before = target.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, len(before) // 2, len(before) - 100):  # fails at the start, in the data, while closing
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                export_to_video(noise, target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(tmp_path) == ["out.mp4"]
        assert target.read_bytes() == before


def test_nothing_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"^frames: got none, want at least one"),
        VideoWriter(tmp_path / "out.mp4", 16, 16),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_writer_refuses_other_frames_and_use_outside_its_block(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "out.mp4", 16, 16)
    with pytest.raises(RuntimeError, match=r"^write: got a call outside the `with` block, want it inside$"):
        writer.write(_FRAMES)
    with pytest.raises(ValueError, match=r"\[3, 16, 16, 3\] float64, want \[f, 16, 16, 3\] uint8"), writer:
        writer.write(_FRAMES.astype(float))
    assert os.listdir(tmp_path) == []


def test_an_existing_file_is_replaced_and_links_and_modes_are_kept(tmp_path: Path) -> None:
    (tmp_path / "real.mp4").write_bytes(b"old")
    (tmp_path / "real.mp4").chmod(0o600)
    (tmp_path / "link.mp4").symlink_to("real.mp4")
    previous = os.umask(0o027)
    try:
        export_to_video(_FRAMES, tmp_path / "link.mp4")
        export_to_video(_FRAMES, tmp_path / "new.mp4")
    finally:
        os.umask(previous)
    assert (tmp_path / "link.mp4").is_symlink()
    assert read_video(tmp_path / "real.mp4")[0].shape == (3, 16, 16, 3)
    assert stat.S_IMODE((tmp_path / "real.mp4").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "new.mp4").stat().st_mode) == 0o640


@pytest.mark.parametrize("name", ["pipe:1.mp4", "http:x.mp4", "a b'ü%d.mp4", "-o.mp4", ".mp4.mp4", "x" * 250 + ".mp4"])
def test_odd_file_names_are_only_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    export_to_video(_FRAMES, name)
    assert os.listdir() == [name]
    assert read_video(name)[0].shape == (3, 16, 16, 3)


def test_metadata_comes_back(tmp_path: Path) -> None:
    metadata = {
        "prompt": 'the "red" circle\nmoves → right;#=\\',
        "seed": 2**63,
        "guidance_scale": 6.0,
        "nested": {"a": [1]},
    }
    export_to_video(_FRAMES, tmp_path / "out.mp4", metadata=metadata)
    assert read_metadata(tmp_path / "out.mp4") == metadata
    export_to_video(_FRAMES, tmp_path / "plain.mp4")
    with pytest.raises(
        ValueError,
        match=r"^video: got .*plain\.mp4', which holds no record of how it was made, want a file made by cogvid$",
    ):
        read_metadata(tmp_path / "plain.mp4")


def test_reading_stops_after_max_frames(tmp_path: Path) -> None:
    export_to_video(_clip(), tmp_path / "clip.mp4")
    whole, _ = read_video(tmp_path / "clip.mp4")
    part, _ = read_video(tmp_path / "clip.mp4", max_frames=5)
    assert torch.equal(part, whole[:5])
    assert len(read_video(tmp_path / "clip.mp4", max_frames=99)[0]) == 17
    for count in (0, -1):
        with pytest.raises(ValueError, match=rf"^max_frames: got {count}, want at least 1$"):
            read_video(tmp_path / "clip.mp4", max_frames=count)


def test_secrets_of_urls_are_not_shown() -> None:
    url = "https://user:SECRET@host/clip.mp4?token=SECRET"
    for call in (read_video, read_metadata, check_output_path):
        with pytest.raises(ValueError, match=r"^(video|output): got 'https://host/clip\.mp4', .*want ") as caught:
            call(url)
        assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist, want a video file$"),
        (b"", "cannot be read"),
        (b"<html><body>no video</body></html>", "cannot be read"),
        (bytes(range(256)) * 20, "cannot be read"),
    ],
    ids=["missing", "empty", "html", "noise"],
)
def test_unreadable_videos_raise_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "bad.mp4").write_bytes(content)
    for read in (read_video, read_metadata):
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / "bad.mp4")
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"video: got '{tmp_path / 'bad.mp4'}', which ")
        assert ", want " in str(caught.value)


def test_directories_and_texts_are_not_videos(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^video: got .*, which is a directory, want a video file$"):
        read_video(tmp_path)
    (tmp_path / "words.txt").write_text("hello\n" * 100)
    with pytest.raises(ValueError, match=r"^video: got .*, which is no video of a format that is read, want one of"):
        read_video(tmp_path / "words.txt")


def test_truncated_videos_are_refused_wherever_they_end(tmp_path: Path) -> None:
    export_to_video(_clip(), tmp_path / "clip.mp4")
    data = (tmp_path / "clip.mp4").read_bytes()
    for size in (10, 100, 1000, len(data) // 2, len(data) - 500, len(data) - 1):
        (tmp_path / "cut.mp4").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"^video: got .*cut\.mp4', which .*, want a "):
            read_video(tmp_path / "cut.mp4")


@pytest.mark.parametrize("matrix", [1, 5], ids=["bt709", "bt601"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
def test_other_colour_tags_are_obeyed(tmp_path: Path, matrix: int, full: bool) -> None:
    colour = np.array([220, 40, 90])
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        kr, kb = (0.2126, 0.0722) if matrix == 1 else (0.299, 0.114)
        r, g, b = colour / 255
        luma = kr * r + (1 - kr - kb) * g + kb * b
        chroma = np.array([(b - luma) / (2 - 2 * kb), (r - luma) / (2 - 2 * kr)])
        yuv = np.rint([255 * luma, *(128 + 255 * chroma)] if full else [16 + 219 * luma, *(128 + 224 * chroma)])
        planes = np.ones((3, 16, 16), np.uint8) * yuv.astype(np.uint8)[:, None, None]
        container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv444p")))
        container.mux(stream.encode(None))
    assert np.abs(read_video(tmp_path / "clip.mp4")[0][0, 8, 8].numpy() - colour).max() <= 2


def test_rotated_videos_are_read_upright(tmp_path: Path) -> None:
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, :8] = 255  # a bright left edge, which a quarter turn counter-clockwise brings to the bottom
    with av.open(str(tmp_path / "turned.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.set_display_rotation(90)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(tmp_path / "turned.mp4")) as container:
        assert next(container.decode(video=0)).rotation == 90  # counter-clockwise
    frames, _ = read_video(tmp_path / "turned.mp4")
    assert frames.shape == (1, 32, 16, 3)
    assert frames[0, -7:].min() > 240
    assert frames[0, :23].max() < 15
