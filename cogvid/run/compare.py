"""How far two videos, or two trajectories, are apart."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvid.media.download import shown
from cogvid.media.video import VideoWriter, read_metadata, read_video
from cogvid.run.lpips import SMALLEST, load_lpips
from cogvid.run.record import differences
from cogvid.run.side_files import check_new_file
from cogvid.run.trajectory import Trajectory, load_trajectory
from cogvid.weights.files import write_whole

GAIN = 8  # of the difference in a picture: one level of 255 can hardly be seen
_NAMES = ("the first", "the second")
_COLUMNS = 6  # frames in a PNG
# https://doi.org/10.1109/TIP.2003.819861: the window and the two constants
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    kind: "videos" or "trajectories". rows: for each frame or step, numbers by the name of their measure; None stands
    for an infinite PSNR. first: index of the first row in which the two are not equal, or None. record: lines that say
    what differs in the two records.
    """

    kind: str
    rows: list[dict[str, Any]]
    first: int | None
    record: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return it ready for JSON, with the mean of each measure (None if one of its values is)."""
        return {"kind": self.kind, "first": self.first, "record": self.record, "rows": self.rows, "mean": self._mean()}

    def whole(self) -> dict[str, Any]:
        """Return what two videos are apart as wholes: psnr of all frames together (None if they are equal), the mean
        ssim, and the largest max_abs."""
        errors = [0.0 if row["psnr"] is None else 10 ** (-row["psnr"] / 10) for row in self.rows]
        error = sum(errors) / len(errors)
        return {
            "psnr": None if error == 0 else -10 * math.log10(error),
            "ssim": sum(row["ssim"] for row in self.rows) / len(self.rows),
            "max_abs": max(row["max_abs"] for row in self.rows),
        }

    def table(self) -> list[str]:
        """Return the lines of a table: a row for each frame or step, and the mean."""
        unit = "frame" if self.kind == "videos" else "step"
        names = list(self.rows[0])
        lines = [f"{unit:>6}" + "".join(f"{name:>14}" for name in names)]
        for index, row in enumerate(self.rows):
            lines.append(f"{index:>6}" + "".join(f"{_shown(row[name]):>14}" for name in names))
        lines.append(f"{'mean':>6}" + "".join(f"{_shown(self._mean()[name]):>14}" for name in names))
        equal = f"the {self.kind} are equal"
        lines.append(equal if self.first is None else f"the first {unit} that differs is {self.first}")
        return [*self.record, *lines]

    def _mean(self) -> dict[str, Any]:
        columns = {name: [row[name] for row in self.rows] for name in self.rows[0] if name != "timestep"}
        means = {name: None if None in column else sum(column) / len(column) for name, column in columns.items()}
        return {name: means.get(name) for name in self.rows[0]}


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    lpips: bool = False,
    local_files_only: bool = False,
) -> Comparison:
    """Compare two videos frame by frame, or two trajectories (`.safetensors`) step by step.

    Of frames: psnr and ssim over 8-bit RGB, and max_abs, the largest difference of a value, 0 to 255. Of steps: the
    relative RMS difference, PSNR, and the largest difference, of the latents and of the predicted clean latents; PSNR
    is over the range of the values of `first`.

    lpips: measure frames with LPIPS too. It needs the extra `metrics`, and weights that are downloaded unless
    local_files_only; `load_lpips` says what it raises.

    Raises:
        ValueError: a file that cannot be read; two of other sizes; LPIPS of trajectories or of small frames.
    """
    kinds = {os.fspath(path): _is_trajectory(path) for path in (first, second)}
    if len(set(kinds.values())) > 1:
        names = " and ".join(shown(os.fspath(path)) for path in (first, second))
        raise ValueError(f"compare: got {names}, want two videos or two trajectories")
    if _is_trajectory(first):
        if lpips:
            raise ValueError("lpips: got trajectories, want two videos")
        return _of_trajectories(load_trajectory(first), load_trajectory(second))
    a, b = _videos(first, second)
    measures: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "psnr": lambda x, y: psnr(x, y, 255),
        "ssim": ssim,
        "max_abs": lambda x, y: int((x.short() - y.short()).abs().max()),
    }
    if lpips:
        if min(a.shape[1:3]) < SMALLEST:
            got = f"frames of {a.shape[1]}x{a.shape[2]}"
            raise ValueError(f"lpips: got {got}, want at least {SMALLEST}x{SMALLEST}")
        measures["lpips"] = load_lpips(local_files_only=local_files_only)
    rows = [{name: measure(x, y) for name, measure in measures.items()} for x, y in zip(a, b, strict=True)]
    record = list(differences(_record_of(first), _record_of(second), _NAMES))
    return Comparison("videos", rows, _first(row["max_abs"] for row in rows), record)


def psnr(x: Tensor, y: Tensor, peak: float) -> float | None:
    """Return the peak signal-to-noise ratio in dB; None (infinite) for equal tensors. Same shape, any dtype."""
    error = (x.double() - y.double()).square().mean().item()
    return None if error == 0 else 10 * math.log10(peak**2 / error)


def ssim(x: Tensor, y: Tensor) -> float:
    """Return the structural similarity of two pictures `[H, W, C]` uint8: 1 for equal ones.

    Wang et al. 2004: a Gaussian window of 11x11 (sigma 1.5), whole windows alone, the mean over windows and channels. A
    picture that is smaller than the window has one window of its size.
    """
    taps = torch.exp(-((torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2) ** 2) / (2 * _SIGMA**2))
    size = [min(_WINDOW, side) for side in x.shape[:2]]
    rows, columns = (taps[(_WINDOW - n) // 2 :][:n] for n in size)
    height, width = (side - n + 1 for side, n in zip(x.shape[:2], size, strict=True))

    def local(values: Tensor) -> Tensor:  # [C, H, W] -> the weighted mean in each window, rows before columns
        zero = values.new_zeros(())
        down = sum((tap * values[:, i : i + height] for i, tap in enumerate(rows / rows.sum())), zero)
        return sum((tap * down[..., i : i + width] for i, tap in enumerate(columns / columns.sum())), zero)

    a, b = (picture.double().permute(2, 0, 1) for picture in (x, y))
    mean_a, mean_b = local(a), local(b)
    variance_a, variance_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (likeness / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))).mean().item()


def write_side_by_side(
    first: str | os.PathLike[str], second: str | os.PathLike[str], output: str | os.PathLike[str]
) -> None:
    """Write the frames of two videos beside each other, and their difference, 8 times as large.

    output: `.mp4`, with the three from left to right; or `.png`, with up to six frames from the first to the last, and
    the three from top to bottom.
    """
    if not os.fspath(output).lower().endswith((".mp4", ".png")):
        raise ValueError(f"side_by_side: got {shown(os.fspath(output))}, want a file name ending in .mp4 or .png")
    if _is_trajectory(first) or _is_trajectory(second):
        raise ValueError("side_by_side: got trajectories, want two videos")
    check_new_file("side_by_side", os.fspath(output))
    a, b = _videos(first, second)
    difference = ((a.short() - b.short()).abs() * GAIN).clamp(max=255).to(torch.uint8)
    if os.fspath(output).lower().endswith(".png"):
        from PIL import Image

        chosen = sorted({round(i * (len(a) - 1) / (_COLUMNS - 1)) for i in range(_COLUMNS)})
        rows = [np.concatenate(list(frames[chosen].numpy()), axis=1) for frames in (a, b, difference)]
        picture = Image.fromarray(np.concatenate(rows))
        write_whole(Path(output), lambda partial: picture.save(partial, "PNG"))
        return
    height, width = a.shape[1:3]
    with VideoWriter(output, height, 3 * width, read_video(first, max_frames=1)[1]) as writer:
        for frames in zip(a, b, difference, strict=True):
            writer.write(torch.cat(frames, dim=1)[None])


def _is_trajectory(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).endswith(".safetensors")


def _videos(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> tuple[Tensor, Tensor]:
    """Return the frames of two videos, `[F, H, W, 3]` uint8 each."""
    (a, _), (b, _) = read_video(first), read_video(second)
    if a.shape != b.shape:
        sizes = " and ".join(f"{len(frames)} frames of {frames.shape[1]}x{frames.shape[2]}" for frames in (a, b))
        raise ValueError(f"compare: got {sizes}, want videos of one size")
    return a, b


def _of_trajectories(a: Trajectory, b: Trajectory) -> Comparison:
    if a.latents[0].shape != b.latents[0].shape or a.timesteps != b.timesteps:
        sizes = " and ".join(f"{len(each.timesteps)} steps of {list(each.latents[0].shape)}" for each in (a, b))
        raise ValueError(f"compare: got {sizes}, want trajectories of one size and of the same timesteps")
    rows = []
    for index, timestep in enumerate(a.timesteps):
        row: dict[str, Any] = {"timestep": timestep}
        for name, (x, y) in (("latents", (a.latents[index], b.latents[index])), ("x0", (a.x0[index], b.x0[index]))):
            row |= {
                f"{name} rms": ((x - y).norm() / x.norm()).item(),
                f"{name} psnr": psnr(x, y, (x.max() - x.min()).item()),
                f"{name} max": (x - y).abs().max().item(),
            }
        rows.append(row)
    first = _first(max(row["latents max"], row["x0 max"]) for row in rows)
    return Comparison("trajectories", rows, first, list(differences(a.record, b.record, _NAMES)))


def _first(errors: Any) -> int | None:
    return next((index for index, error in enumerate(errors) if error != 0), None)


def _record_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a video's record; none for a video that was made by another program."""
    try:
        return read_metadata(path)
    except ValueError:
        return {}


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e-2 else f"{value:.4f}"
