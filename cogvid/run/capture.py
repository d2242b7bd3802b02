"""The inputs of attention in a real run, in files.

A capture is a directory with a safetensors file for each step and layer that was asked for. A file has `q`, `k` and
`v`, `[1, N, heads, head_dim]` in the model's dtype, after norm and rotation, text first; and of the `BlockContext`,
`temb` `[1, time_embed_dim]` and, in a model with rotation, `rope_cos` and `rope_sin`, fp32 `[S, head_dim / 2]`. The
header has `step`, `layer`, `text_len` and `grid` as JSON under `attention`. Of a batch it is the last video, with its
prompt, not the negative one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cogvid.media.download import shown
from cogvid.media.whole_file import try_lock
from cogvid.ops import AttentionOp, BlockContext, Shard
from cogvid.options import check_int
from cogvid.parallel.transformer import SplitTransformer
from cogvid.run.settings import Settings, schedule_of
from cogvid.run.side_files import check_new_directory

if TYPE_CHECKING:
    from cogvid.run.pipeline import Pipeline

LARGEST = 8 * 2**30  # bytes of a capture


def first_middle_last(count: int) -> list[int]:
    """Return the first, the middle and the last of so many steps or layers."""
    return sorted({0, count // 2, count - 1})


@contextlib.contextmanager
def capture_attention(
    pipe: Pipeline, directory: str | os.PathLike[str], *, steps: Collection[int], layers: Collection[int] | None = None
) -> Iterator[None]:
    """Write what attention gets in one call of `pipe` in this block; the call and its result stay as they are.

    The operations of the transformer are replaced in the block and put back at its end. The directory appears when the
    block ends without an exception, with all files.

    Args:
        directory: one that does not exist, or is empty.
        steps: which steps of the sampler, from 0. layers: which blocks; the first, middle and last if not given.

    Raises:
        ValueError: the directory holds something; a model on several processes; a layer that the model does not have; a
            capture of more than `LARGEST` bytes; at the end, a step that did not run.
        OSError: no space for it.
    """
    transformer, own = pipe.transformer, pipe.transformer.ops
    if isinstance(transformer, SplitTransformer):
        split = transformer.mesh.split
        raise ValueError(f"parallel: got {split} with a capture, which needs all tokens and heads, want one process")
    blocks = len(transformer.blocks)
    layers = first_middle_last(blocks) if layers is None else layers
    for layer in layers:
        check_int("layers", layer, 0, blocks - 1)
    for step in steps:
        check_int("steps", step, 0)
    wanted = {(step, layer) for step in steps for layer in layers}
    if not wanted:
        raise ValueError("steps, layers: got none, want one of each or more")
    with _whole_directory(directory) as partial:
        recorder = _Recorder(own.attention, partial, wanted)
        transformer.set_ops(dataclasses.replace(own, attention=recorder))
        try:
            yield
        finally:
            transformer.set_ops(own)
        if recorder.wanted:
            step, layer = min(recorder.wanted)
            raise ValueError(f"steps: got a run without attention in step {step}, layer {layer}, want one that has it")


def captured_steps(pipe: Pipeline, settings: Settings) -> list[int]:
    """Return the first, middle and last step of a run."""
    return first_middle_last(len(schedule_of(pipe.model, settings)))


class _Recorder:
    """An `AttentionOp` that writes its inputs and calls another."""

    def __init__(self, attention: AttentionOp, directory: Path, wanted: set[tuple[int, int]]) -> None:
        self.wanted = wanted
        self._attention, self._directory, self._checked = attention, directory, False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: BlockContext, /) -> Tensor:
        place = (-1 if context.step is None else context.step, context.layer)
        if place in self.wanted and context.branch != "uncond":
            self._write(q, k, v, context)
            self.wanted.remove(place)
        return self._attention(q, k, v, context)

    def _write(self, q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> None:
        tensors = {"q": q[-1:], "k": k[-1:], "v": v[-1:], "temb": context.temb[-1:]}
        if context.rope is not None:
            tensors |= dict(zip(("rope_cos", "rope_sin"), context.rope, strict=True))
        if not self._checked:
            self._check(sum(x.numel() * x.element_size() for x in tensors.values()))
        tensors = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
        about = {name: getattr(context, name) for name in ("step", "layer", "text_len", "grid")}
        path = self._directory / f"step{context.step:04}-layer{context.layer:02}.safetensors"
        save_file(tensors, path, {"attention": json.dumps(about)})

    def _check(self, each: int) -> None:
        total = each * len(self.wanted)
        if total > LARGEST:
            gib = f"{total / 2**30:.1f} GiB in {len(self.wanted)} files"
            raise ValueError(f"capture: got {gib}, want at most {LARGEST / 2**30:.0f} GiB; fewer steps or layers fit")
        if total > shutil.disk_usage(self._directory).free:
            raise OSError(
                errno.ENOSPC, f"capture: got less than {-(-total // 2**20)} MiB of free space, want that much"
            )
        self._checked = True


@contextlib.contextmanager
def _whole_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden directory beside `path`, which gets its name when the block ends without an exception.

    One that a killed process left is removed by the next that writes the same directory.
    """
    check_new_directory("capture", path)
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.partial")
    with contextlib.suppress(FileExistsError):
        partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not try_lock(descriptor):
            raise ValueError(f"capture: got {shown(os.fspath(path))}, which another run is writing, want another")
        for left in partial.iterdir():
            left.unlink()
        try:
            yield partial
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Captured:
    """One file of a capture. shape: of q, k and v, `[1, N, heads, head_dim]`."""

    path: Path
    step: int
    layer: int
    text_len: int
    grid: tuple[int, int, int]
    shape: tuple[int, ...]

    def load(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, BlockContext]:
        """Return q, k, v and the context of the call, cast to the dtype; the rotary table stays fp32."""
        with safe_open(self.path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        q, k, v, temb = (tensors[name].to(device, dtype) for name in ("q", "k", "v", "temb"))
        rope = None
        if "rope_cos" in tensors:
            rope = tensors["rope_cos"].to(device), tensors["rope_sin"].to(device)
        tokens = self.shape[1]
        where: dict[str, Any] = {"layer": self.layer, "step": self.step, "branch": "cond"}
        return q, k, v, BlockContext(temb, rope, self.text_len, self.grid, Shard(0, tokens, tokens), **where)


def read_capture(directory: str | os.PathLike[str]) -> list[Captured]:
    """List the files of a capture, in the order of steps and layers.

    Raises:
        ValueError: it is no capture.
    """
    paths = sorted(Path(directory).glob("*.safetensors")) if os.path.isdir(directory) else []
    if not paths:
        raise ValueError(f"inputs: got {shown(os.fspath(directory))}, which holds no capture, want a --capture DIR")
    return [_read(path) for path in paths]


def _read(path: Path) -> Captured:
    name = shown(os.fspath(path))
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("attention", "null"))
            shapes = {each: tuple(file.get_slice(each).get_shape()) for each in file.keys()}  # noqa: SIM118
        step, layer, text_len = (about[each] for each in ("step", "layer", "text_len"))
        frames, height, width = about["grid"]
        q = shapes["q"]
        (_, tokens, _, head_dim), numbers = q, (step, layer, text_len, frames, height, width)
        table = (tokens - text_len, head_dim // 2)
        fits = (
            all(type(number) is int and number >= 0 for number in numbers)
            and shapes["k"] == shapes["v"] == q
            and len(shapes["temb"]) == 2
            and text_len + frames * height * width == tokens
            and {shapes.get("rope_cos"), shapes.get("rope_sin")} in ({None}, {table})
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"inputs: got {name}, which is no capture ({error}), want a --capture DIR") from error
    if not fits:
        raise ValueError(f"inputs: got {name} with tensors that do not go together, want a --capture DIR")
    return Captured(path, step, layer, text_len, (frames, height, width), q)
