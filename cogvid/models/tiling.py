"""The VAE on tiles that overlap: less memory, other pixels; equals diffusers' `AutoencoderKLCogVideoX.enable_tiling()`.

A tile is encoded or decoded alone, all of its frames, and then the next one. So there is one `ConvCache` at a time, and
that of a whole frame is most of the memory of decoding. Frames come after the last tile. Where two tiles overlap, the
first fades into the second. Group norms see only their own tile, so a tiled video is not the untiled one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cogvid.config import VAEConfig
from cogvid.models.vae import VAE
from cogvid.ops import Ops

# Pixels. diffusers takes half of the config's sample size, which is this in every official checkpoint. A sixth of the
# height and a fifth of the width overlap.
TILE = (240, 360)
STEP = (200, 288)


class TiledVAE(VAE):
    """A VAE that encodes and decodes what is larger than `TILE`, in height or in width, in tiles.

    tiles: how many were made so far of what is larger.
    """

    def __init__(self, config: VAEConfig, ops: Ops | None = None) -> None:
        super().__init__(config, ops)
        if any(pixels % config.spatial_compression_ratio for pixels in (*TILE, *STEP)):
            raise ValueError(
                f"vae_tiling: got a VAE that makes one latent of {config.spatial_compression_ratio} pixels, want 8 or "
                "fewer, so that tiles are whole latents"
            )
        self.tiles = 0

    def _encode_chunks(self, x: Tensor, size: int) -> Iterator[Tensor]:
        encode = functools.partial(super()._encode_chunks, size=size)
        return self._tiled(encode, x, 1, self.config.spatial_compression_ratio)

    def _decode_chunks(self, z: Tensor) -> Iterator[Tensor]:
        return self._tiled(super()._decode_chunks, z, self.config.spatial_compression_ratio, 1)

    def _tiled(self, run: Callable[[Tensor], Iterator[Tensor]], x: Tensor, before: int, after: int) -> Iterator[Tensor]:
        """Yield the chunks of `run`, joined from those of tiles. before, after: pixels of one element of x and of them.

        x: `[B, C, T, height, width]`.
        """
        places = tile_places(x.shape[3], x.shape[4], before)
        if not places:
            yield from run(x)
            return
        rows: list[list[list[Tensor]]] = []
        for row in places:
            rows.append([list(run(x[..., height, width])) for height, width in row])
            self.tiles += len(row)
        overlap = [(tile - step) // after for tile, step in zip(TILE, STEP, strict=True)]
        keep = [step // after for step in STEP]
        for chunk in range(len(rows[0][0])):
            yield join([[tile[chunk] for tile in row] for row in rows], overlap, keep)


def tile_places(height: int, width: int, scale: int) -> list[list[tuple[slice, slice]]]:
    """Return where the tiles of an input lie, row by row; none if it is no larger. scale: pixels of an element."""
    sizes = [pixels // scale for pixels in TILE]
    if height <= sizes[0] and width <= sizes[1]:
        return []
    rows, columns = (
        [slice(start, start + size) for start in range(0, length, step // scale)]
        for length, size, step in zip((height, width), sizes, STEP, strict=True)
    )
    return [[(row, column) for column in columns] for row in rows]


def join(rows: list[list[Tensor]], overlap: list[int], keep: list[int]) -> Tensor:
    """Join tiles `[B, C, T, height, width]`.

    overlap: rows and columns that fade. keep: how many rows and columns a tile gives, its first ones.
    """
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            # Each neighbour is faded already, as in diffusers.
            if i:
                tile = _fade(rows[i - 1][j], tile, 3, overlap[0])
            if j:
                tile = _fade(row[j - 1], tile, 4, overlap[1])
            row[j] = tile
    return torch.cat([torch.cat([tile[..., : keep[0], : keep[1]] for tile in row], dim=4) for row in rows], dim=3)


def _fade(before: Tensor, after: Tensor, dim: int, overlap: int) -> Tensor:
    """Return `after`, whose beginning along `dim` is blended with the end of `before`."""
    overlap = min(before.shape[dim], after.shape[dim], overlap)
    wide = torch.promote_types(after.dtype, torch.float32)
    share = (torch.arange(overlap, device=after.device, dtype=torch.float64) / overlap).to(wide)
    share = share.view(-1, *[1] * (after.ndim - 1 - dim))
    end = before.narrow(dim, before.shape[dim] - overlap, overlap)
    start, rest = after.split([overlap, after.shape[dim] - overlap], dim)
    return torch.cat([(end * (1 - share) + start * share).to(after.dtype), rest], dim)
