"""What a run returns, and how decoded frames become it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from cogvid.media.pictures import save_frames
from cogvid.media.video import denormalize, to_uint8
from cogvid.models.vae import VAE
from cogvid.options import check_int
from cogvid.run.notebook import output_html, output_line

if TYPE_CHECKING:
    from PIL.Image import Image

OUTPUT_TYPES = ("pil", "np", "pt", "uint8", "latent", "stream")


@dataclass(frozen=True, repr=False)
class Output:
    """Hold what a run made.

    frames: by `output_type`: "pil" a list of PIL images per video; "np" float32 `[B, F, H, W, 3]` in [0, 1]; "pt"
    float32 `[B, F, 3, H, W]` in [0, 1]; "uint8" a tensor `[B, F, H, W, 3]`; "latent" `[B, T, C, h, w]`, padding of the
    1.5 models included; "stream" one iterator per video of uint8 `[f, H, W, 3]` on the CPU, decoded on demand.
    seed: that of the first video, or None if the caller gave generators; `provenance["seeds"]` lists them all.
    fps: frames per second that the model was trained at. provenance: the record of the run, ready for JSON: see
    `make_record`. skipped_steps: in which a step cache skipped something, from 0; None without one that tells.
    """

    frames: Any
    seed: int | None
    fps: int
    provenance: dict[str, Any]
    skipped_steps: list[int] | None = None

    def __repr__(self) -> str:
        return output_line(self)

    def _repr_html_(self) -> str | None:
        """A notebook shows the videos, and plays them."""
        return output_html(self)

    def save(self, path: str | os.PathLike[str], video: int | None = None) -> str:
        """Write a video as MP4, GIF, WebP or PNG, by the ending of the path, at the model's fps; return the path.

        An MP4 has the record of the run in it. `save_frames` says what the others are. Frames of "stream" are used up.

        Args:
            video: which of several videos, from 0; not needed for one.

        Raises:
            ValueError: latents; several videos and none named.
        """
        if isinstance(self.frames, Tensor) and self.frames.dtype != torch.uint8 and self.frames.shape[2] != 3:
            raise ValueError("frames: got latents, want those of another output_type")
        if video is None and len(self.frames) != 1:
            raise ValueError(f"video: got none of {len(self.frames)}, want which, from 0 to {len(self.frames) - 1}")
        check_int("video", video or 0, 0, len(self.frames) - 1)
        frames = self.frames[video or 0]
        chunks = isinstance(frames, Iterator)
        return save_frames(itertools.chain.from_iterable(frames) if chunks else frames, path, self.fps, self.provenance)


def decode_output(vae: VAE, x: Tensor, padding: int, output_type: str) -> Any:
    """Decode latents `[B, C, T, h, w]` to `Output.frames`. padding: latent frames to cut off in front."""
    if output_type == "latent":
        return rearrange(x, "b c t h w -> b t c h w")
    videos = [decode(vae, video) for video in x[:, :, padding:].split(1)]
    if output_type == "stream":
        return [(to_uint8(chunk).cpu() for chunk in video) for video in videos]
    if output_type in ("np", "pt"):
        pixels = torch.stack([torch.cat(list(video)) for video in videos])
        return pixels.cpu().numpy() if output_type == "np" else rearrange(pixels, "b f h w c -> b f c h w")
    pixels = torch.stack([torch.cat([to_uint8(chunk) for chunk in video]) for video in videos])
    return pixels if output_type == "uint8" else [_to_pil(video) for video in pixels]


@torch.no_grad()
def decode(vae: VAE, latents: Tensor) -> Iterator[Tensor]:
    """Decode the scaled latents `[1, C, T, h, w]` of one video; yield float32 `[f, H, W, 3]` in [0, 1] as ready."""
    for chunk in vae.decode_chunks(1 / vae.config.scaling_factor * latents):
        yield rearrange(denormalize(chunk[0]), "c f h w -> f h w c")


def _to_pil(pixels: Tensor) -> list[Image]:
    from PIL import Image as pil

    return [pil.fromarray(frame) for frame in pixels.cpu().numpy()]
