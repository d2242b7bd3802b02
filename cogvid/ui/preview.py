"""What a run looks like before it is done: one latent frame of the predicted clean latents, decoded by the VAE."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from cogvid.media.video import to_uint8
from cogvid.run.output import decode

if TYPE_CHECKING:
    from cogvid.run.pipeline import Pipeline

_SHARE = 0.1  # of a run's time that previews may take
_MAX_SIDE = 480  # pixels


class Previewer:
    """Decode the frame in the middle after a step, if that took less than a tenth of the time since the last one.

    A pipeline whose weights leave the device has no previews: the VAE would take the place of the transformer. Then
    `look` returns None, as it does where it is too early for the next one.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe, self._cost, self._last = pipe, 0.0, -float("inf")

    @torch.no_grad()
    def look(self, x0: Tensor) -> bytes | None:
        """Return a JPEG. x0: `[1, T, C, h, w]`."""
        begun = time.perf_counter()
        if self._pipe.offload is not None or self._cost > _SHARE * (begun - self._last):
            return None
        middle = rearrange(x0[:1, x0.shape[1] // 2], "b c h w -> b c 1 h w")
        frames = next(decode(self._pipe.vae, middle.to(self._pipe.device, self._pipe.dtype)))
        picture = _jpeg(to_uint8(frames)[0].cpu())
        self._last = time.perf_counter()
        self._cost = self._last - begun
        return picture


def _jpeg(pixels: Tensor) -> bytes:
    from PIL import Image

    image = Image.fromarray(pixels.numpy())
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()
