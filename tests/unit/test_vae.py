"""What the VAE promises by itself: causality, streaming, its cache, its errors, its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cogvid.config import VAEConfig
from cogvid.vae import LAYOUT, VAE, CausalConv3d, ConvCache, DiagonalGaussian, chunk_sizes
from measure import rel_rms
from references import perturb
from tests.tolerances import VAE_BATCH_FP32

CONFIG = VAEConfig(block_out_channels=(8, 16, 16, 24), latent_channels=4, layers_per_block=1, norm_num_groups=4)


@pytest.fixture(scope="module")
def vae() -> VAE:
    torch.manual_seed(0)
    return perturb(VAE(CONFIG)).eval().requires_grad_(False)


def pixels(frames: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(frames: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, frames, 2, 3, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("frames", "size", "expected"),
    [
        *((1, 8, [1]), (7, 8, [7]), (8, 8, [8]), (9, 8, [9]), (15, 8, [15]), (17, 8, [9, 8]), (25, 8, [9, 8, 8])),
        *((1, 2, [1]), (2, 2, [2]), (3, 2, [3]), (13, 2, [3, 2, 2, 2, 2, 2])),
    ],
)
def test_chunk_sizes(frames: int, size: int, expected: list[int]) -> None:
    assert chunk_sizes(frames, size) == expected


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 4, 5, 7])
def test_frame_counts(vae: VAE, latent_frames: int) -> None:
    """An odd number of latent frames is 4T - 3 pixel frames, an even one 4T; encoding is the way back."""
    frames = 4 * latent_frames - 3 if latent_frames % 2 else 4 * latent_frames
    decoded = vae.decode(latents(latent_frames))
    assert decoded.shape == (1, 3, frames, 16, 24)
    assert vae.encode(decoded).mean.shape == (1, 4, latent_frames, 2, 3)


def test_encoding_is_causal(vae: VAE) -> None:
    """A prefix of whole chunks gives a prefix of the latents, bit for bit, and the past does reach the next chunk."""
    x = pixels(25)
    whole = vae.encode(x).mean
    assert torch.equal(whole[:, :, :3], vae.encode(x[:, :, :9]).mean)
    assert torch.equal(whole[:, :, :5], vae.encode(x[:, :, :17]).mean)
    x[:, :, 8] += 1
    assert not torch.equal(whole[:, :, 3], vae.encode(x).mean[:, :, 3])


def test_decoding_is_causal(vae: VAE) -> None:
    z = latents(7)
    whole = vae.decode(z)
    assert torch.equal(whole[:, :, :9], vae.decode(z[:, :, :3]))
    assert torch.equal(whole[:, :, :17], vae.decode(z[:, :, :5]))
    z[:, :, 2] += 1
    assert not torch.equal(whole[:, :, 9], vae.decode(z)[:, :, 9])


@pytest.mark.parametrize(("latent_frames", "sizes"), [(1, [1]), (3, [9]), (4, [8, 8]), (7, [9, 8, 8])])
def test_a_stream_is_the_whole(vae: VAE, latent_frames: int, sizes: list[int]) -> None:
    z = latents(latent_frames)
    chunks = list(vae.decode_chunks(z))
    assert [c.shape[2] for c in chunks] == sizes
    assert torch.equal(torch.cat(chunks, dim=2), vae.decode(z))


def test_chunks_are_decoded_when_asked_for(vae: VAE) -> None:
    decoded: list[int] = []
    hook = vae.decoder.register_forward_hook(lambda *_: decoded.append(1))
    chunks = vae.decode_chunks(latents(5))
    assert len(decoded) == 0
    next(chunks)
    hook.remove()
    assert len(decoded) == 1


def test_batch_of_two_is_two_of_one(vae: VAE) -> None:
    x, z = pixels(9, batch=2), latents(3, batch=2)
    one_by_one = torch.cat([vae.encode(sample).mean for sample in x.split(1)])
    assert rel_rms(vae.encode(x).mean, one_by_one) <= VAE_BATCH_FP32
    one_by_one = torch.cat([vae.decode(sample) for sample in z.split(1)])
    assert rel_rms(vae.decode(z), one_by_one) <= VAE_BATCH_FP32


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_cache_holds_two_frames_of_each_causal_convolution(vae: VAE, part: str) -> None:
    """And nothing of the 1x1x1 ones, nor larger memory behind its tensors."""
    module = getattr(vae, part)
    expected: dict[nn.Module, int] = {}

    def measure(conv: nn.Module, args: tuple[Tensor, ConvCache]) -> None:
        expected[conv] = args[0].nbytes // args[0].shape[2] * 2

    convs = [m for m in module.modules() if isinstance(m, CausalConv3d)]
    hooks = [m.register_forward_pre_hook(measure) for m in convs]
    cache = ConvCache()
    for frames in (3, 2):
        module(latents(frames) if part == "decoder" else pixels(4 * frames), cache)
        assert set(cache.frames) == set(convs)
        assert {m: t.untyped_storage().nbytes() for m, t in cache.frames.items()} == expected
        assert cache.nbytes == sum(expected.values())
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_layout_is_kept(vae: VAE, part: str) -> None:
    """One layer that returns another layout makes all after it copy: right, but half as fast."""
    others: list[str] = []

    def check(name: str, out: Tensor) -> None:
        if not out.is_contiguous(memory_format=LAYOUT):
            others.append(name)

    hooks = [m.register_forward_hook(lambda _m, _i, out, n=n: check(n, out)) for n, m in vae.named_modules()]
    if part == "encoder":
        vae.encoder(pixels(9).contiguous(memory_format=LAYOUT), ConvCache())
    else:
        vae.decoder(latents(3).contiguous(memory_format=LAYOUT), ConvCache())
    for hook in hooks:
        hook.remove()
    assert others == []


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    vae = perturb(VAE(CONFIG))
    x = pixels(9)
    (vae.decode(vae.encode(x).sample()) - x).pow(2).mean().backward()
    assert [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_inputs_are_left_alone(vae: VAE) -> None:
    x, z = pixels(9), latents(3)
    vae.encode(x)
    vae.decode(z)
    assert torch.equal(x, pixels(9))
    assert torch.equal(z, latents(3))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 9, 16, 24), r"x has shape \[1, 4, 9, 16, 24\], wanted \[batch, 3, frames, height, width\]"),
        ((3, 9, 16, 24), r"x has shape \[3, 9, 16, 24\]"),
        ((1, 3, 0, 16, 24), r"x has shape \[1, 3, 0, 16, 24\]"),
        ((1, 3, 9, 20, 24), "x has height x width 20 x 24, wanted multiples of 8"),
        ((1, 3, 9, 16, 25), "x has height x width 16 x 25, wanted multiples of 8"),
    ],
)
def test_encode_refuses(vae: VAE, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 3, 2, 3), (4, 3, 2, 3), (1, 4, 0, 2, 3), (0, 4, 3, 2, 3)])
def test_decode_refuses_at_once(vae: VAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"z has shape .* wanted \[batch, 4, frames, height, width\]"):
        vae.decode_chunks(torch.zeros(shape))


def test_distribution() -> None:
    parameters = torch.cat([torch.zeros(1, 2, 1, 1, 1), torch.tensor([-99.0, 99.0]).view(1, 2, 1, 1, 1)], dim=1)
    distribution = DiagonalGaussian(parameters)
    assert distribution.logvar.flatten().tolist() == [-30.0, 20.0]
    assert torch.equal(distribution.std, torch.exp(0.5 * distribution.logvar))
    noise = torch.randn(1, 2, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    assert torch.equal(distribution.sample(torch.Generator().manual_seed(3)), distribution.std * noise)
    assert DiagonalGaussian(parameters.bfloat16()).sample().dtype == torch.bfloat16
