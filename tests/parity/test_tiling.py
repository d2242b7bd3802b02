"""The VAE on tiles against diffusers' `enable_tiling()` with its defaults."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from cogvid.config import VAEConfig
from cogvid.models.tiling import STEP, TILE, TiledVAE, tile_places
from cogvid.models.vae import VAE
from cogvid.weights.names import map_vae_state_dict
from measure import rel_rms
from references import tiny_vae
from tests.tolerances import VAE_FP32


@pytest.fixture(scope="module")
def pair() -> tuple[AutoencoderKLCogVideoX, TiledVAE]:
    theirs = tiny_vae(sample_height=480, sample_width=720)
    theirs.enable_tiling()
    config = VAEConfig.from_dict(dict(theirs.config))
    ours = TiledVAE(config)
    ours.load_state_dict(map_vae_state_dict(theirs.state_dict(), config))
    return theirs, ours.eval().requires_grad_(False)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_sizes_are_the_defaults_of_diffusers() -> None:
    theirs = AutoencoderKLCogVideoX()
    theirs.enable_tiling()
    assert (theirs.tile_sample_min_height, theirs.tile_sample_min_width) == TILE
    factors = theirs.tile_overlap_factor_height, theirs.tile_overlap_factor_width
    assert tuple(int(size * (1 - factor)) for size, factor in zip(TILE, factors, strict=True)) == STEP
    assert VAEConfig().sample_height // 2, VAEConfig().sample_width // 2 == TILE


# The number of tiles by hand: ceil(h / 25) * ceil(w / 36) of latents. 31 x 10 is larger in height alone, 26 x 46 has a
# last row of one latent, 60 x 90 is the official size.
SIZES = [
    (31, 10, 2, 1),
    (31, 4, 2, 3),
    (31, 4, 2, 4),
    (4, 46, 2, 1),
    (26, 46, 4, 1),
    pytest.param(33, 75, 6, 4, marks=pytest.mark.slow),
    pytest.param(60, 90, 9, 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("height", "width", "tiles", "frames"), SIZES)
def test_decode(
    pair: tuple[AutoencoderKLCogVideoX, TiledVAE], height: int, width: int, tiles: int, frames: int
) -> None:
    theirs, ours = pair
    z, before = randn(2 if height == 31 else 1, theirs.config.latent_channels, frames, height, width), ours.tiles
    expected, actual = theirs.decode(z).sample, ours.decode(z)
    assert actual.shape == expected.shape
    assert rel_rms(actual, expected) <= VAE_FP32
    assert ours.tiles - before == tiles
    untiled = VAE.decode(plain(ours), z)
    assert rel_rms(actual, untiled) > 1e-3  # group norms of tiles are others


def plain(tiled: TiledVAE) -> VAE:
    vae = VAE(tiled.config)
    vae.load_state_dict(tiled.state_dict())
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("height", "width", "tiles", "frames"),
    [(256, 32, 2, 9), (32, 368, 2, 1), (208, 304, 0, 1), pytest.param(272, 400, 4, 9, marks=pytest.mark.slow)],
)
def test_encode(
    pair: tuple[AutoencoderKLCogVideoX, TiledVAE], height: int, width: int, tiles: int, frames: int
) -> None:
    theirs, ours = pair
    x, before = randn(1, 3, frames, height, width).clamp(-1, 1), ours.tiles
    expected, actual = theirs.encode(x).latent_dist, ours.encode(x)
    assert rel_rms(actual.mean, expected.mean) <= VAE_FP32
    assert rel_rms(actual.logvar, expected.logvar) <= VAE_FP32
    assert ours.tiles - before == tiles


def test_what_is_no_larger_than_a_tile_is_not_tiled(pair: tuple[AutoencoderKLCogVideoX, TiledVAE]) -> None:
    _, ours = pair
    z, before = randn(1, ours.config.latent_channels, 1, 30, 45), ours.tiles
    assert torch.equal(ours.decode(z), plain(ours).decode(z))
    assert ours.tiles == before
    assert tile_places(30, 45, 8) == tile_places(240, 360, 1) == []


@pytest.mark.slow
def test_chunks_are_those_of_the_untiled_vae(pair: tuple[AutoencoderKLCogVideoX, TiledVAE]) -> None:
    _, ours = pair
    z = randn(1, ours.config.latent_channels, 5, 31, 8)
    chunks = list(ours.decode_chunks(z))
    assert [chunk.shape[2] for chunk in chunks] == [9, 8]
    assert torch.equal(torch.cat(chunks, dim=2), ours.decode(z))


def test_tiles_that_are_no_whole_latents_are_refused() -> None:
    config = VAEConfig(block_out_channels=(32,) * 5, layers_per_block=1)
    with pytest.raises(ValueError, match=r"^vae_tiling: got a VAE that makes one latent of 16 pixels, want 8 or fewer"):
        TiledVAE(config)
    assert VAE(config).config.spatial_compression_ratio == 16
