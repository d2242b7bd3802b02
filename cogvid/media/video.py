"""Write frames to an H.264 MP4 and read them back with PyAV; round pixels to 8 bits.

`denormalize` and `to_uint8` must equal diffusers' `VideoProcessor.postprocess_video` in fp32. A file appears under its
name complete or not at all. Colours are converted to BT.709 in limited range, and the file is tagged so.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cogvid import versions
from cogvid.media.download import shown
from cogvid.media.frame_times import Extent, check_selection, count_from, measure, select, upright
from cogvid.media.whole_file import whole_file

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL.Image import Image

PRESETS = (
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo",
)  # fmt: skip
# What is read. Each is a name of FFmpeg's; those of one line are one of its readers.
FORMATS = (
    "mov", "mp4", "m4a", "3gp", "3g2", "mj2",
    "matroska", "webm",
    "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "gif", "ivf", "nut", "yuv4mpegpipe",
)  # fmt: skip
MAX_PIXELS = 2**25  # of a frame: 8K
MAX_FRAMES = 10_000
MAX_BYTES = 4 * 2**30  # of the frames that are wanted, decoded
_BT709 = 1  # the same number as matrix, as primaries and as transfer (ITU-T H.273), and in swscale
_BT601 = 5
_LIMITED, _FULL = 1, 2  # colour ranges, as FFmpeg numbers them
# The same frames must give the same bytes. x264's output depends on its number of threads, which by default follows
# the number of cores. With AVX-512 it also differed from run to run without `cpu-independent`.
_REPRODUCIBLE = {"threads": "4", "x264-params": "cpu-independent=1"}


class VideoWriter:
    """Write one H.264 MP4 (yuv420p, BT.709, index first) chunk by chunk, as a context manager.

    The file replaces the target when the `with` block ends without an exception; after one, the target stays as it was:
    see `whole_file`. The same frames give the same bytes, whatever the chunks.

    Args:
        path: `.mp4` file to write; its directory must exist.
        height, width: pixels of a frame; even, because yuv420p has one chroma sample for 2x2 pixels.
        fps: frames per second of the file, whole or fractional.
        crf: x264's constant rate factor, 0 (lossless) to 51 (worst); 18 is visually near-lossless.
        preset: x264's speed preset, one of `PRESETS`.
        metadata: JSON-serialisable values for the file's comment, which `read_metadata` returns.
        cover: a PNG for the file's cover picture, or several; players show the first, and `read_covers` returns all.
    Raises:
        ValueError: on construction, for arguments out of range; by `write`, for frames that are not `[f, H, W, 3]`.
        ImportError: on construction, for a PyAV that is too old or has no libx264.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        height: int,
        width: int,
        fps: float | Fraction = 16,
        crf: float = 18,
        preset: str = "medium",
        metadata: Mapping[str, Any] | None = None,
        cover: bytes | Sequence[bytes] | None = None,
    ) -> None:
        _check_encoder()
        self._target = check_output_path(path)
        for argument, size in (("height", height), ("width", width)):
            if size < 2 or size % 2:
                reason = "H.264 in yuv420p has one colour sample for 2x2 pixels"
                raise ValueError(f"{argument}: got {size}, want a positive even number, because {reason}")
        if not 0 <= crf <= 51:  # NaN fails too
            raise ValueError(f"crf: got {crf}, want 0 (lossless) to 51 (worst)")
        if preset not in PRESETS:
            raise ValueError(f"preset: got {preset!r}, want one of {', '.join(PRESETS)}")
        self.height, self.width = height, width
        self._rate = _frame_rate(fps)
        self._options = {"crf": f"{crf:g}", "preset": preset, **_REPRODUCIBLE}
        self._comment = None if metadata is None else json.dumps(dict(metadata), sort_keys=True, allow_nan=False)
        self._covers = [cover] if isinstance(cover, bytes) else list(cover or ())
        self._count = 0
        self._open = contextlib.ExitStack()
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None

    def __enter__(self) -> Self:
        import av

        with contextlib.ExitStack() as stack:
            path = stack.enter_context(whole_file(self._target))
            container = av.open(path, "w", format="mp4", options={"movflags": "+faststart"})
            self._container = container
            stack.push(self._close)
            if self._comment is not None:
                container.metadata["comment"] = self._comment
            stream = container.add_stream("libx264", rate=self._rate, options=self._options)
            stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED
            self._stream = stream
            _add_covers(container, self._covers)
            self._open = stack.pop_all()
        return self

    def write(self, frames: Tensor | np.ndarray) -> None:
        """Append frames: `[f, H, W, 3]` uint8 RGB, on any device."""
        import av

        if self._container is None or self._stream is None:
            raise RuntimeError("write: got a call outside the `with` block, want it inside")
        array = np.asarray(frames.detach().cpu() if isinstance(frames, Tensor) else frames)
        if array.shape[1:] != (self.height, self.width, 3) or array.dtype != np.uint8:
            wanted = f"[f, {self.height}, {self.width}, 3] uint8"
            raise ValueError(f"frames: got {list(array.shape)} {array.dtype}, want {wanted}")
        for pixels in array:
            frame = _rgb_to_yuv(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"))
            frame.pts, frame.time_base = self._count, 1 / self._rate
            self._container.mux(self._stream.encode(frame))
            self._count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, traceback)

    def _close(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write what the encoder holds back, unless there was an exception, and close the container."""
        container, stream = self._container, self._stream
        assert container is not None
        self._container = self._stream = None
        try:
            if kind is None:
                if self._count == 0:
                    raise ValueError("frames: got none, want at least one frame")
                assert stream is not None
                container.mux(stream.encode(None))
                container.close()
        finally:
            with contextlib.suppress(Exception):  # a container that failed may fail again; its file is dropped
                container.close()


def export_to_video(
    frames: Iterable[Image | np.ndarray | Tensor] | np.ndarray | Tensor,
    path: str | os.PathLike[str],
    fps: float | Fraction = 16,
    crf: float = 18,
    preset: str = "medium",
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Write the frames of one video to an MP4 file and return its path; see `VideoWriter` for the other arguments.

    Args:
        frames: PIL RGB images, or one array or tensor `[F, H, W, 3]` or `[F, 3, H, W]`, or a list of such frames;
            uint8 0-255, or floating point in [0, 1], which is rounded.
        fps: frames per second of the written file, not of the model.
    """
    if isinstance(frames, (str, bytes)) or not isinstance(frames, (Iterable, Tensor)):
        raise ValueError(f"frames: got {type(frames).__name__}, want the frames of one video")
    arrays = frames_to_uint8(frames)
    first = next(arrays, None)
    if first is None:
        raise ValueError("frames: got none, want at least one frame")
    with VideoWriter(path, first.shape[0], first.shape[1], fps, crf, preset, metadata) as writer:
        writer.write(first[None])
        for array in arrays:
            writer.write(array[None])
    return os.fspath(path)


def count_frames(path: str | os.PathLike[str], *, start: float | None = None, fps: float | None = None) -> int:
    """Return how many frames `read_video` would read, without decoding: by the file's index, or else by its packets.

    Errors as for `read_video`. Without `start` and `fps` the count ends at one more than `MAX_FRAMES`.
    """
    return _measured(path, start, fps)[0]


def _measured(path: str | os.PathLike[str], start: float | None, fps: float | None) -> tuple[int, Extent | None]:
    """Return how many frames are wanted; and, if they are chosen by their times, what these are."""
    name = shown(os.fspath(path))
    begin, rate = check_selection(start, fps)
    with _opened(path) as container:
        stream = _pictures(container, name)
        packets = container.demux(stream)
        if not begin and rate is None:
            count = stream.frames or sum(1 for _ in itertools.islice((p for p in packets if p.size), MAX_FRAMES + 1))
            return count, None
        extent = measure(stream, packets, begin, rate, name)
    if rate is not None:
        return extent.wanted, extent
    with _opened(path) as container:
        return count_from(container.demux(_pictures(container, name)), extent, begin, name), extent


def read_video(
    path: str | os.PathLike[str],
    max_frames: int | None = None,
    *,
    start: float | None = None,
    fps: float | None = None,
    num_frames: int | None = None,
) -> tuple[Tensor, float]:
    """Decode a video file, upright and with square pixels, as players show it.

    The file must be one of `FORMATS`. Frames have at most `MAX_PIXELS`, and those that are wanted are at most
    `MAX_FRAMES` and take at most `MAX_BYTES`, which is checked before they are decoded. Colours without a tag are read
    as BT.601, as FFmpeg does.

    Args:
        max_frames: frames after these are not decoded; at least 1.
        start: seconds from the first frame; the first that is read is the one shown then. None is 0.
        fps: frames per second that are read: at each time the frame that is shown then, so some are left out or read
            twice. Right for a variable frame rate too. None is all frames, whatever their times.
        num_frames: read exactly so many, in place of `max_frames`.
    Returns:
        `[F, H, W, 3]` uint8 RGB on the CPU, and their frames per second: `fps`, or the file's mean.
    Raises:
        ValueError: the file is not a complete video within these limits, or has fewer frames than `num_frames`;
            `max_frames` or `num_frames` is below 1.
    """
    name = shown(os.fspath(path))
    for argument, value in (("max_frames", max_frames), ("num_frames", num_frames)):
        if value is not None and value < 1:
            raise ValueError(f"{argument}: got {value}, want at least 1")
    max_frames = num_frames if max_frames is None else max_frames
    begin, chosen_rate = check_selection(start, fps)
    (room, extent), count, frames = _measured(path, start, fps), 0, torch.empty(0)
    room = room if max_frames is None else min(room, max_frames)
    with _opened(path) as container:
        stream = _pictures(container, name)
        rate = chosen_rate or stream.average_rate or stream.guessed_rate
        decoded = _decoded(container, stream, name)
        for frame in decoded if extent is None else select(decoded, extent, begin, chosen_rate, name):
            rgb = upright(_to_rgb(_square(frame, stream.sample_aspect_ratio, name)), frame, name)
            if count == 0 or count == room:  # the first one, or more than were counted
                room = room if count < room else min(2 * count + 1, max_frames or 2 * count + 1)
                _check_size(name, room, *rgb.shape[:2])
                frames = torch.cat([frames[:count].byte(), torch.empty(room - count, *rgb.shape, dtype=torch.uint8)])
            if rgb.shape != frames.shape[1:]:
                sizes = f"{frames.shape[2]}x{frames.shape[1]} and of {rgb.shape[1]}x{rgb.shape[0]} pixels"
                raise ValueError(f"video: got {name}, which has frames of {sizes}, want all of one size")
            frames[count] = torch.from_numpy(np.ascontiguousarray(rgb))
            count += 1
            if count == max_frames:
                break
        else:
            if extent is None and count < stream.frames:  # the index lists frames that the data does not hold
                held = f"holds {count} of the {stream.frames} frames that it lists"
                raise ValueError(f"video: got {name}, which {held}, want a whole video")
    if not count or not rate:
        raise ValueError(f"video: got {name}, which holds no frames, want at least one")
    if num_frames is not None and count < num_frames:
        raise ValueError(f"num_frames: got {num_frames} for {name}, which has {count}, want at most {count}")
    return frames[:count], float(rate)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the `metadata` that `VideoWriter` wrote into a file."""
    with _opened(path) as container:
        comment = container.metadata.get("comment", "")
    try:
        values = json.loads(comment)
    except (json.JSONDecodeError, RecursionError):
        values = None
    if not isinstance(values, dict):
        reason = "holds no record of how it was made"
        raise ValueError(f"video: got {shown(os.fspath(path))}, which {reason}, want a file made by cogvid")
    return values


def read_covers(path: str | os.PathLike[str]) -> list[bytes]:
    """Return the cover pictures of a video, encoded as they were stored."""
    from av.stream import Disposition

    with _opened(path) as container:
        streams = [each for each in container.streams.video if each.disposition & Disposition.attached_pic]
        packets = container.demux(streams) if streams else ()  # one of each stream, and an empty one at its end
        found = {packet.stream.index: bytes(packet) for packet in packets if packet.size}
    return [found[index] for index in sorted(found)]


def check_output_path(path: str | os.PathLike[str], suffixes: Sequence[str] = (".mp4",)) -> str:
    """Return the absolute path, links resolved, or raise `ValueError` if no such file can be written there."""
    wanted = f"a file name ending in {' or '.join(suffixes)}"
    target = os.path.realpath(path)
    directory = os.path.dirname(target)
    name = shown(os.fspath(path))
    if os.path.isdir(target):
        raise ValueError(f"output: got {name}, which is a directory, want {wanted}")
    if os.path.splitext(target)[1].lower() not in suffixes:
        raise ValueError(f"output: got {name}, want {wanted}")
    if not os.path.isdir(directory):
        raise ValueError(f"output: got {name}, whose directory does not exist, want one in an existing directory")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(f"output: got {name}, whose directory is not writable, want one in a writable directory")
    if os.path.exists(target) and not (os.path.isfile(target) and os.access(target, os.W_OK)):
        raise ValueError(f"output: got {name}, which exists and is not a writable file, want one that may be replaced")
    return target


def denormalize(video: Tensor) -> Tensor:
    """Map the VAE's pixels from [-1, 1] to float32 in [0, 1], same shape. Values outside are clamped.

    For fp32 input this equals diffusers bit for bit. For low-precision input diffusers computes in that precision and
    loses one bit; here the arithmetic is always fp32.
    """
    return (video.float() * 0.5 + 0.5).clamp(0, 1)


def to_uint8(pixels: Tensor) -> Tensor:
    """Round pixels in [0, 1] to uint8 0-255, same shape, ties to even as diffusers' `numpy_to_pil` does."""
    return _to_uint8(pixels, "pixels")


def _to_uint8(pixels: Tensor, name: str) -> Tensor:
    pixels = pixels.float()
    if pixels.numel():
        low, high = (bound.item() for bound in pixels.aminmax())
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(f"{name}: got values from {low:g} to {high:g}, want [0, 1]")
    return (pixels * 255).round().to(torch.uint8)


def frames_to_uint8(frames: Iterable[Any]) -> Iterator[np.ndarray]:
    """Yield each frame as `[H, W, 3]` uint8."""
    from PIL import Image as pil

    for index, frame in enumerate(frames):
        name = f"frames[{index}]"
        if isinstance(frame, pil.Image):
            if frame.mode != "RGB":
                raise ValueError(f"{name}: got a PIL image of mode {frame.mode}, want RGB")
            yield np.asarray(frame)
            continue
        if not isinstance(frame, (np.ndarray, Tensor)):
            hint = " of one video, such as frames[0]" if isinstance(frame, (list, tuple)) else ""
            raise ValueError(f"{name}: got {type(frame).__name__}, want a PIL image, an array or a tensor{hint}")
        shape, dtype = list(frame.shape), str(frame.dtype).removeprefix("torch.")
        if frame.ndim != 3 or 3 not in (shape[0], shape[2]):
            hint = " of one video, such as frames[0]" if frame.ndim == 4 else ""
            raise ValueError(f"{name}: got shape {shape}, want [H, W, 3] or [3, H, W]{hint}")
        if dtype != "uint8" and not dtype.startswith(("float", "bfloat")):
            raise ValueError(f"{name}: got {dtype}, want uint8 0-255 or floating point in [0, 1]")
        tensor = frame.detach().cpu() if isinstance(frame, Tensor) else torch.tensor(frame)
        if shape[2] != 3:  # if both are 3, the last axis is RGB: a frame of odd width is refused anyway
            tensor = rearrange(tensor, "c h w -> h w c")
        yield (tensor if dtype == "uint8" else _to_uint8(tensor, name)).numpy()


def _check_encoder() -> None:
    """Raise unless PyAV can encode H.264. Checked early, because encoding follows hours of work."""
    versions.check("av")
    from av.codec import Codec
    from av.codec.codec import UnknownCodecError

    try:
        Codec("libx264", "w")
    except UnknownCodecError:
        raise ImportError("av: got a PyAV without the encoder libx264, want one with it") from None


def _add_covers(container: OutputContainer, pictures: Sequence[bytes]) -> None:
    """Put PNGs into the file as its covers: for each a stream that consists of one packet."""
    import av
    from av.stream import Disposition

    streams: list[Any] = []
    for png in pictures:
        height, width = (int.from_bytes(png[at : at + 4]) for at in (20, 16))  # of the header that a PNG begins with
        stream: Any = container.add_stream("png")
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        stream.disposition = Disposition.attached_pic
        streams.append(stream)
    for stream, png in zip(streams, pictures, strict=True):  # after the last stream, for the first packet ends the head
        packet = av.Packet(png)
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, 0, 0, True
        container.mux(packet)


def _frame_rate(fps: float | Fraction) -> Fraction:
    if not 0.01 <= fps <= 1000:  # NaN fails too
        raise ValueError(f"fps: got {fps}, want 0.01 to 1000 frames per second")
    return Fraction(float(fps)).limit_denominator(1001)  # rates such as 24000/1001 stay exact


def _rgb_to_yuv(frame: VideoFrame) -> VideoFrame:
    return frame.reformat(
        format="yuv420p",
        src_color_range=_FULL,
        dst_color_range=_LIMITED,
        dst_colorspace=_BT709,  # swscale's own default is BT.601
        interpolation=_interpolation(),
    )


def _square(frame: VideoFrame, pixel_aspect: Fraction | None, name: str) -> VideoFrame:
    """Widen or narrow a frame whose pixels are not square, as players do; diffusers' `load_video` does not."""
    width = frame.width if not pixel_aspect else max(1, round(frame.width * pixel_aspect))
    _check_size(name, 1, frame.height, width)
    return frame if width == frame.width else frame.reformat(width, frame.height, interpolation=_interpolation())


def _to_rgb(frame: VideoFrame) -> np.ndarray:
    """Convert a decoded frame to `[H, W, 3]` uint8."""
    matrix = frame.colorspace if frame.colorspace in (_BT709, 7, 9) else _BT601  # 7: SMPTE 240M, 9: BT.2020
    full = frame.color_range == _FULL or frame.format.is_rgb
    return frame.reformat(
        format="rgb24",
        src_colorspace=matrix,
        dst_colorspace=matrix,
        src_color_range=_FULL if full else _LIMITED,
        dst_color_range=_FULL,
        interpolation=_interpolation(),
    ).to_ndarray()


def _interpolation() -> int:
    """Return swscale's flags for exact rounding, full chroma and the same bits with every instruction set."""
    from av.video.reformatter import Interpolation as Flag

    return int(Flag.BICUBIC | Flag.ACCURATE_RND | Flag.FULL_CHR_H_INT | Flag.FULL_CHR_H_INP | Flag.BITEXACT)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a video for reading. An error of FFmpeg becomes a `ValueError`."""
    versions.check("av")
    import av
    from av.error import FFmpegError

    name = shown(os.fspath(path))
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"video: got {name}, which does not exist, want a video file") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"video: got {name}, which cannot be read ({reason}), want a video file") from None
    if not stat.S_ISREG(mode):  # a read from a pipe or a device may never end
        what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise ValueError(f"video: got {name}, which is {what}, want a video file")
    # Other formats are playlists, which open other files and may never end, and texts that are shown as a terminal.
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
    try:
        # An absolute path, because FFmpeg would read the text before a colon as a network protocol.
        with av.open(os.path.abspath(path), options=options, metadata_errors="replace") as container:
            yield container
    except FFmpegError as error:
        if isinstance(error, MemoryError):
            raise MemoryError from error
        if error.errno == errno.EINVAL:
            reason = "is no video of a format that is read"
            raise ValueError(f"video: got {name}, which {reason}, want one of {', '.join(FORMATS)}") from error
        reason = f"cannot be read ({error.strerror})"
        raise ValueError(f"video: got {name}, which {reason}, want a whole video") from error


def _pictures(container: Any, name: str) -> Any:
    """Return the video stream of a file, after a look at its size."""
    if not container.streams.video:
        raise ValueError(f"video: got {name}, which holds no pictures, want a video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise ValueError(f"video: got {name}, whose codec is not known, want one that FFmpeg decodes")
    _check_size(name, 1, stream.codec_context.height, stream.codec_context.width)
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # of frames that are larger than the stream says
    return stream


def _decoded(container: Any, stream: Any, name: str) -> Iterator[VideoFrame]:
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise ValueError(f"video: got {name}, which is cut off or damaged, want a whole video")
        yield from packet.decode()


def _check_size(name: str, frames: int, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"video: got {name}, which has {width}x{height} pixels, want at most {MAX_PIXELS}")
    if frames > MAX_FRAMES or 3 * frames * height * width > MAX_BYTES:
        held, room = f"{frames} frames of {width}x{height} pixels", f"{MAX_FRAMES} frames and {MAX_BYTES} bytes"
        raise ValueError(f"video: got {name}, of which {held} are wanted, want at most {room}: give a num_frames")
