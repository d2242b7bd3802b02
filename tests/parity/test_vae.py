"""The VAE against diffusers' `AutoencoderKLCogVideoX`: every stage, then videos of every kind of length."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn
from torch.nn import functional as F

import cogvid.models.vae
import cogvid.ops
from cogvid.config import VAEConfig
from cogvid.models.vae import VAE, ConvCache
from cogvid.weights.names import map_vae_state_dict
from measure import pooled_ratio, rel_rms
from references import tiny_vae
from tests.tolerances import VAE_BF16, VAE_FP32, VAE_FP64, VAE_GRADIENTS_FP32, VAE_STAGE_FP32

FRAMES = (1, 5, 8, 9, 16, 17, 25)
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "pack": {"block_out_channels": (16, 32, 32, 64), "latent_channels": 16, "norm_num_groups": 2},
    "deep": {"layers_per_block": 2, "norm_eps": 1e-3},
}


def build(**overrides: Any) -> tuple[AutoencoderKLCogVideoX, VAE]:
    """Return diffusers' VAE and ours with the same weights."""
    theirs = tiny_vae(**overrides)
    config = VAEConfig.from_dict(dict(theirs.config))
    ours = VAE(config)
    ours.load_state_dict(map_vae_state_dict(theirs.state_dict(), config))
    return theirs, ours.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pair() -> tuple[AutoencoderKLCogVideoX, VAE]:
    return build()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("frames", FRAMES)
def test_encode(pair: tuple[AutoencoderKLCogVideoX, VAE], frames: int) -> None:
    theirs, ours = pair
    x = randn(1, 3, frames, 32, 48).clamp(-1, 1)
    expected, actual = theirs.encode(x).latent_dist, ours.encode(x)
    assert rel_rms(actual.mean, expected.mean) <= VAE_FP32
    assert rel_rms(actual.logvar, expected.logvar) <= VAE_FP32
    assert rel_rms(actual.std, expected.std) <= VAE_FP32
    assert rel_rms(actual.sample(seeded()), expected.sample(seeded())) <= VAE_FP32


@pytest.mark.parametrize("frames", FRAMES)
def test_decode(pair: tuple[AutoencoderKLCogVideoX, VAE], frames: int) -> None:
    theirs, ours = pair
    z = randn(1, 4, (frames + 3) // 4, 4, 6)
    assert rel_rms(ours.decode(z), theirs.decode(z).sample) <= VAE_FP32


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str) -> None:
    theirs, ours = build(**CONFIGS[name])
    x = randn(2, 3, 17, 24, 40).clamp(-1, 1)
    z = theirs.encode(x).latent_dist.mean
    assert rel_rms(ours.encode(x).mean, z) <= VAE_FP32
    assert rel_rms(ours.decode(z), theirs.decode(z).sample) <= VAE_FP32


@pytest.mark.parametrize("elements", [1, 3000, 9000])
@pytest.mark.every(2)
def test_any_split_of_the_work_is_the_same(
    pair: tuple[AutoencoderKLCogVideoX, VAE], monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    """Convolutions and norms process large tensors some frames at a time; here these small ones too."""
    theirs, ours = pair
    monkeypatch.setitem(cogvid.models.vae.CONV_ELEMENTS, "cpu", elements)
    monkeypatch.setattr(cogvid.ops, "_frames_in_cache", lambda x: max(elements // x[:, :, 0].numel(), 1))
    x, z = randn(2, 3, 17, 32, 48).clamp(-1, 1), randn(2, 4, 5, 4, 6)
    assert rel_rms(ours.encode(x).mean, theirs.encode(x).latent_dist.mean) <= VAE_FP32
    assert rel_rms(ours.decode(z), theirs.decode(z).sample) <= VAE_FP32
    with torch.enable_grad():
        assert rel_rms(ours.decode(z.requires_grad_()), theirs.decode(z).sample) <= VAE_FP32


def test_bf16_is_no_worse() -> None:
    """Against fp64 with the same bf16 weights and inputs, over four seeds: only the arithmetic differs."""
    encoded, decoded = [], []
    for seed in range(4):
        theirs, ours = (m.to(torch.bfloat16) for m in build(seed=seed))
        exact = copy.deepcopy(theirs).double()
        x = randn(1, 3, 9, 48, 64, seed=seed).clamp(-1, 1).bfloat16()
        z = randn(1, 4, 3, 6, 8, seed=seed).bfloat16()
        truth = exact.encode(x.double()).latent_dist.mean
        encoded.append((rel_rms(ours.encode(x).mean, truth), rel_rms(theirs.encode(x).latent_dist.mean, truth)))
        truth = exact.decode(z.double()).sample
        decoded.append((rel_rms(ours.decode(z), truth), rel_rms(theirs.decode(z).sample, truth)))
    assert pooled_ratio(encoded) <= VAE_BF16
    assert pooled_ratio(decoded) <= VAE_BF16


def test_rewrites_are_exact(pair: tuple[AutoencoderKLCogVideoX, VAE]) -> None:
    """Norms at latent resolution, upsampling as 2x2 convolutions and the others are exact algebra: equal in fp64."""
    theirs, ours = (copy.deepcopy(m).double() for m in pair)
    x, z = randn(1, 3, 17, 16, 24).clamp(-1, 1).double(), randn(1, 4, 5, 2, 3).double()
    assert rel_rms(ours.encode(x).mean, theirs.encode(x).latent_dist.mean) <= VAE_FP64
    assert rel_rms(ours.decode(z), theirs.decode(z).sample) <= VAE_FP64


def test_gradients() -> None:
    theirs, ours = build()
    theirs.requires_grad_(True)
    ours.requires_grad_(True)
    x = randn(1, 3, 9, 16, 24).clamp(-1, 1)
    (theirs.decode(theirs.encode(x).latent_dist.sample(seeded())).sample - x).pow(2).mean().backward()
    (ours.decode(ours.encode(x).sample(seeded())) - x).pow(2).mean().backward()
    expected = map_vae_state_dict({k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}, ours.config)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert rel_rms(parameter.grad, expected[name]) <= VAE_GRADIENTS_FP32, name


Stage = Callable[[Tensor], Tensor]


def their_stage(module: nn.Module, *context: Tensor | None) -> Stage:
    """Call a diffusers module chunk after chunk with its own conv cache."""
    state: dict[str, Any] = {}

    def call(x: Tensor) -> Tensor:
        out, state["cache"] = module(x, *context, conv_cache=state.get("cache"))
        return out

    return call


def our_stage(*modules: nn.Module, z: Tensor | None = None) -> Stage:
    cache = ConvCache()

    def call(x: Tensor) -> Tensor:
        for module in modules:
            x = module(x, z, cache)
        return x

    return call


@pytest.mark.parametrize("chunks", [(1,), (4,), (5,), (5, 4), (3, 2, 2), (1, 1, 1)], ids=str)
def test_causal_conv(pair: tuple[AutoencoderKLCogVideoX, VAE], chunks: tuple[int, ...]) -> None:
    theirs, ours = pair
    expected, cache = their_stage(theirs.encoder.conv_in), ConvCache()
    for i, frames in enumerate(chunks):
        x = randn(2, 3, frames, 8, 10, seed=i)
        assert rel_rms(ours.encoder.conv_in(x, cache), expected(x)) <= VAE_STAGE_FP32


@pytest.mark.parametrize("index", [0, 1], ids=["equal-channels", "shortcut"])
def test_encoder_resnet(pair: tuple[AutoencoderKLCogVideoX, VAE], index: int) -> None:
    theirs, ours = (m.encoder.down_blocks[index] for m in pair)
    expected = their_stage(theirs.resnets[0], None, None)
    actual = our_stage(ours["resnets"][0])
    for i, frames in enumerate((5, 4)):
        x = randn(2, 8, frames, 8, 10, seed=i)
        assert rel_rms(actual(x), expected(x)) <= VAE_STAGE_FP32


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 8, 9])
def test_spatial_norm(pair: tuple[AutoencoderKLCogVideoX, VAE], frames: int) -> None:
    theirs, ours = pair
    x, z = randn(2, 8, frames, 8, 12), randn(2, 4, max(frames // 2, 1) + frames % 2 * (frames > 1), 4, 6, seed=1)
    assert rel_rms(ours.decoder.norm_out(x, z), F.silu(theirs.decoder.norm_out(x, z)[0])) <= VAE_STAGE_FP32


@pytest.mark.parametrize("index", [0, 1], ids=["shortcut-later", "shortcut"])
def test_decoder_resnet(pair: tuple[AutoencoderKLCogVideoX, VAE], index: int) -> None:
    theirs, ours = (m.decoder.up_blocks[index] for m in pair)
    z = randn(2, 4, 2, 4, 6, seed=5)
    expected = their_stage(theirs.resnets[0], None, z)
    actual = our_stage(ours["resnets"][0], z=z)
    for i, frames in enumerate((3, 4)):
        x = randn(2, 24, frames, 8, 12, seed=i)
        assert rel_rms(actual(x), expected(x)) <= VAE_STAGE_FP32


@pytest.mark.parametrize("index", [0, 2], ids=["time-and-space", "space"])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_resampling(pair: tuple[AutoencoderKLCogVideoX, VAE], frames: int, index: int) -> None:
    theirs, ours = pair
    down, up = theirs.encoder.down_blocks[index], theirs.decoder.up_blocks[index]
    x = randn(2, down.resnets[0].out_channels, frames, 8, 10)
    expected = down.downsamplers[0](x)
    assert rel_rms(our_stage(ours.encoder.down_blocks[index]["downsample"])(x), expected) <= VAE_STAGE_FP32
    x = randn(2, up.resnets[0].out_channels, frames, 8, 10)
    expected = up.upsamplers[0](x)
    assert rel_rms(our_stage(ours.decoder.up_blocks[index]["upsample"])(x), expected) <= VAE_STAGE_FP32


@pytest.mark.parametrize("index", range(4))
def test_blocks(pair: tuple[AutoencoderKLCogVideoX, VAE], index: int) -> None:
    theirs, ours = pair
    down, up = theirs.encoder.down_blocks[index], theirs.decoder.up_blocks[index]
    z = randn(1, 4, 3, 4, 6, seed=5)
    expected_down, expected_up = their_stage(down, None, None), their_stage(up, None, z)
    actual_down = our_stage(*cogvid.models.vae._layers(ours.encoder.down_blocks[index]))
    actual_up = our_stage(*cogvid.models.vae._layers(ours.decoder.up_blocks[index]), z=z)
    for i, frames in enumerate((5, 4)):
        x = randn(1, down.resnets[0].in_channels, frames, 8, 12, seed=i)
        assert rel_rms(actual_down(x), expected_down(x)) <= VAE_STAGE_FP32
        x = randn(1, up.resnets[0].in_channels, frames, 8, 12, seed=i)
        assert rel_rms(actual_up(x), expected_up(x)) <= VAE_STAGE_FP32


def test_encoder_and_decoder(pair: tuple[AutoencoderKLCogVideoX, VAE]) -> None:
    theirs, ours = pair
    expected, cache = their_stage(theirs.encoder, None), ConvCache()
    for i, frames in enumerate((9, 8)):
        x = randn(1, 3, frames, 16, 24, seed=i)
        assert rel_rms(ours.encoder(x, cache), expected(x)) <= VAE_FP32
    expected, cache = their_stage(theirs.decoder, None), ConvCache()
    for i, frames in enumerate((3, 2)):
        z = randn(1, 4, frames, 4, 6, seed=i)
        assert rel_rms(ours.decoder(z, cache), expected(z)) <= VAE_FP32
