"""Which frames of a video file are read, by their times; and how they are turned upright.

A frame is shown from its time until that of the next one, so a video of a variable frame rate is read like any other.
Times are seconds from the first frame. Containers round them to ticks of a time base, which is 1 ms in Matroska and
10 ms in GIF, so a frame counts as shown half a tick early, and at most 5 ms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

MAX_SECONDS = 10**7
_ONE = 1 << 16  # a display matrix has 16.16 fixed point


@dataclass(frozen=True)
class Extent:
    """The times of a stream, without decoding: its first frame and the end of its last one, and how many are wanted.

    first: in ticks. tick: seconds. seconds: from the first frame to the end of the last.
    """

    first: int
    tick: Fraction
    seconds: Fraction
    wanted: int

    @property
    def early(self) -> Fraction:
        """How much earlier than its time a frame counts as shown, in seconds."""
        return _early(self.tick)


def check_selection(start: float | None, fps: float | None) -> tuple[Fraction, Fraction | None]:
    """Return `start`, 0 if None, and `fps` as fractions; raise if they are no times and rates."""
    begin = 0 if start is None else start
    if not 0 <= begin <= MAX_SECONDS:  # NaN fails too
        raise ValueError(f"video_start: got {start}, want 0 or more seconds, at most {MAX_SECONDS}")
    if fps is not None and not 0.01 <= fps <= 1000:
        raise ValueError(f"video_fps: got {fps}, want 0.01 to 1000 frames per second")
    rate = None if fps is None else Fraction(float(fps)).limit_denominator(1001)  # rates such as 24000/1001 stay exact
    return Fraction(float(begin)).limit_denominator(10**6), rate


def measure(stream: Any, packets: Iterable[Any], start: Fraction, fps: Fraction | None, name: str) -> Extent:
    """Look at the packets of a stream: at what times its frames are, and how many are wanted."""
    tick, begin, last, after_last = stream.time_base, None, None, 0
    for ticks, duration in _times(packets, name):
        begin = ticks if begin is None or ticks < begin else begin
        if last is None or ticks > last:
            last, after_last = ticks, duration
    if begin is None or last is None or not tick:
        raise ValueError(f"video: got {name}, which holds no frames, want at least one")
    rate = stream.average_rate or stream.guessed_rate
    length = after_last * tick if after_last else 1 / rate if rate else tick
    seconds = (last - begin) * tick + length
    if start >= seconds:
        raise ValueError(f"video_start: got {float(start):g} for {name}, want less than its {float(seconds):g} seconds")
    wanted = 0 if fps is None else max(1, math.ceil((seconds - start - _early(tick)) * fps))
    return Extent(begin, tick, seconds, wanted)


def count_from(packets: Iterable[Any], extent: Extent, start: Fraction, name: str) -> int:
    """Return how many frames there are from the one that is shown at `start` on."""
    come = [(ticks - extent.first) * extent.tick <= start + extent.early for ticks, _ in _times(packets, name)]
    return come.count(False) + 1


def select(
    frames: Iterable[VideoFrame], extent: Extent, start: Fraction, fps: Fraction | None, name: str
) -> Iterator[VideoFrame]:
    """Yield the frame that is shown at `start`, and those after it or, with `fps`, the one shown at each 1 / fps.

    frames: in the order in which they are shown.
    """
    target, index, shown = start, 0, None
    for frame in frames:
        if frame.pts is None:
            raise _untimed(name)
        time = (frame.pts - extent.first) * extent.tick
        while shown is not None and target + extent.early < time:
            yield shown
            index += 1
            if fps is None:  # from now on, each frame
                target = time
                break
            target = start + index / fps
        shown = frame
    if shown is not None:
        yield from itertools.repeat(shown, 1 if fps is None else extent.wanted - index)


def _times(packets: Iterable[Any], name: str) -> Iterator[tuple[int, int]]:
    """Yield time and duration of each frame, in ticks, in the order of the file."""
    for packet in packets:
        if not packet.size or packet.is_discard:
            continue
        if packet.pts is None:
            raise _untimed(name)
        yield packet.pts, packet.duration or 0


def _early(tick: Fraction) -> Fraction:
    return min(tick / 2, Fraction(1, 200))


def _untimed(name: str) -> ValueError:
    return ValueError(f"video: got {name}, whose frames have no times, want it without video_start and video_fps")


def upright(rgb: np.ndarray, frame: VideoFrame, name: str) -> np.ndarray:
    """Turn and mirror `[H, W, 3]` as the frame's display matrix says, which phones write.

    The matrix `a b u c d v x y w` takes a point (x, y), y down, to (a x + c y, b x + d y).

    Raises:
        ValueError: the matrix is not one of the eight that only turn by quarters and mirror.
    """
    from av.sidedata.sidedata import Type

    data: Any = frame.side_data.get(Type.DISPLAYMATRIX)  # pyright: ignore - the stub knows names alone
    if data is None:
        return rgb
    matrix = np.frombuffer(bytes(data), np.int32)[[0, 1, 3, 4]] / _ONE
    a, b, c, d = (round(value) for value in matrix)
    if np.abs(matrix - [a, b, c, d]).max() > 0.01 or (abs(a), abs(b)) != (abs(d), abs(c)) or abs(a) + abs(b) != 1:
        wanted = "a turn by quarters"
        raise ValueError(f"video: got {name}, which is to be turned by {frame.rotation} degrees, want {wanted}")
    if a:
        return rgb[::d, ::a]
    return rgb.transpose(1, 0, 2)[::b, ::c]
