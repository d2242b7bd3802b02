"""The noise of a run in a file: the same noise on another device, with other operations, or in diffusers.

A file is safetensors with one tensor per draw, `[B, T, C, h, w]` in the dtype in which it was drawn:

    pixels           of Fun-InP: the noise that is added to the known pixels, `[B, F, 3, H, W]`
    posterior        of image-to-video and video-to-video: the draw that samples the encoded image or video
    posterior.1      the same of a last image
    initial          the noise that the run starts from
    step.0003.0      the first draw of the sampler in step 3, from 0; .1 is the second. "ddim" draws none; "dpm" draws
                     once in the first and the last step and twice in the others, where it drops the first draw

Both libraries draw with `torch.randn` and in the same order. So a file is recorded and put back by a mode that sees
these calls, and `ReplayedNoise` works around a call of diffusers too.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cogvid.media.download import shown
from cogvid.weights.files import DTYPES, write_whole

Noise = dict[str, Tensor]
_STEP = re.compile(r"step\.\d{4}\.\d")
_BEFORE = ("pixels", "posterior", "posterior.1")


class RecordedNoise(TorchFunctionMode):
    """Keep all noise that is drawn in a `with` block, for a run of one video. `draws` has it, by name.

    has_posterior: whether an image or a video is encoded, or the names of all draws before the initial noise. `step`
    is counted up by whoever runs the sampler.
    """

    def __init__(self, has_posterior: bool | Sequence[str]) -> None:
        super().__init__()
        self.step = 0
        self.draws: Noise = {}
        before = ["posterior"] * has_posterior if isinstance(has_posterior, bool) else has_posterior
        self._names = [*before, "initial"]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = func(*args, **(kwargs or {}))
        if func in (torch.randn, torch.randn_like):
            name = self._names.pop(0) if self._names else self._of_step()
            self.draws[name] = _swapped(drawn.detach().cpu().clone(), name).contiguous()
        return drawn

    def _of_step(self) -> str:
        count = sum(name.startswith(f"step.{self.step:04}.") for name in self.draws)
        return f"step.{self.step:04}.{count}"


class ReplayedNoise(TorchFunctionMode):
    """Answer each draw in a `with` block with the next one of a file, whatever the generator.

    Draws are cast to the dtype that is asked for. At the end a warning says how many were not used.

    Raises:
        ValueError: in the block, for a draw of another shape, or for more draws than the file has.
    """

    def __init__(self, noise: Noise) -> None:
        super().__init__()
        self._left = list(in_order(noise))
        self._noise = noise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn_like:
            shape, defaults = args[0].shape, {"dtype": args[0].dtype, "device": args[0].device}
        elif func is torch.randn:
            shape = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            defaults = {"dtype": None, "device": None}
        else:
            return func(*args, **kwargs)
        options = {name: kwargs.get(name) or default for name, default in defaults.items()}
        return self._next(tuple(shape)).to(
            device=options["device"] or "cpu", dtype=options["dtype"] or torch.get_default_dtype(), copy=True
        )

    def _next(self, shape: tuple[int, ...]) -> Tensor:
        if not self._left:
            raise ValueError(f"noise: got a file of {len(self._noise)} draws, want one of a run that draws as often")
        name = self._left.pop(0)
        draw = _swapped(self._noise[name], name)
        if tuple(draw.shape) != shape:
            got, wanted = list(self._noise[name].shape), list(_swapped(torch.empty(shape, device="meta"), name).shape)
            raise ValueError(f"noise: got {name} of shape {got}, want [B, T, C, h, w] = {wanted}")
        return draw

    def __exit__(self, kind: Any, *rest: Any) -> None:
        super().__exit__(kind, *rest)
        if kind is None and self._left:
            warnings.warn(f"noise: {len(self._left)} of {len(self._noise)} draws were not used", stacklevel=2)


def save_noise(path: str | os.PathLike[str], noise: Noise) -> None:
    """Write a noise file, whole or not at all."""
    write_whole(Path(path), lambda partial: save_file(noise, partial))


def load_noise(path: str | os.PathLike[str]) -> Noise:
    """Map the draws of a noise file, in their order.

    Raises:
        ValueError: the file is not a noise file.
    """
    name, wanted = shown(os.fspath(path)), "want a file of --save-noise"
    if not os.path.isfile(path):
        raise ValueError(f"noise: got {name}, which is no file, {wanted}")
    try:
        with safe_open(path, framework="pt") as file:
            noise = {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"noise: got {name}, which is no safetensors file ({error}), {wanted}") from error
    for each, draw in noise.items():
        if each not in (*_BEFORE, "initial") and not _STEP.fullmatch(each):
            raise ValueError(f"noise: got {name} with a tensor {each[:40]!r}, {wanted}")
        if draw.ndim != 5 or draw.dtype not in DTYPES.values():
            raise ValueError(
                f"noise: got {each} {list(draw.shape)} {draw.dtype}, want [B, T, C, h, w] in a float dtype"
            )
    if "initial" not in noise:
        raise ValueError(f"noise: got {name} without the tensor initial, {wanted}")
    return {each: noise[each] for each in in_order(noise)}


def in_order(noise: Noise) -> list[str]:
    """Return the names of the draws in the order in which they are drawn."""
    return sorted(noise, key=lambda name: (name.startswith("step."), name not in _BEFORE, name))


def noise_hash(noise: Noise) -> str:
    """Return SHA-256 over names, dtypes, shapes and bytes, which tells one noise from another."""
    digest = hashlib.sha256()
    for name in in_order(noise):
        draw = noise[name].contiguous()
        digest.update(f"{name} {draw.dtype} {list(draw.shape)}\n".encode())
        digest.update(draw.view(torch.uint8).numpy().tobytes() if math.prod(draw.shape) else b"")
    return digest.hexdigest()


def _swapped(draw: Tensor, name: str) -> Tensor:
    """Swap channels and frames of what is drawn as `[B, C, T, h, w]`."""
    return rearrange(draw, "b c t h w -> b t c h w") if name in _BEFORE else draw
