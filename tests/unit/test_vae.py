"""The VAE without diffusers: causality, streaming, cache, ops, hooks, errors, gradients."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from cogvid.config import VAEConfig
from cogvid.models.vae import LAYOUT, VAE, CausalConv3d, ConvCache, DiagonalGaussian, NormSiLU, chunk_sizes
from cogvid.ops import Ops
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
    """T latent frames are 4T - 3 pixel frames if T is odd, 4T if T is even. Encoding gives T again."""
    frames = 4 * latent_frames - 3 if latent_frames % 2 else 4 * latent_frames
    decoded = vae.decode(latents(latent_frames))
    assert decoded.shape == (1, 3, frames, 16, 24)
    assert vae.encode(decoded).mean.shape == (1, 4, latent_frames, 2, 3)


def test_encoding_is_causal(vae: VAE) -> None:
    """A prefix of whole chunks gives a prefix of the latents, bit for bit. The past does reach the next chunk."""
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
    """It holds nothing of the 1x1x1 convolutions, and its tensors are not views of larger memory."""
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
    """If one layer returns another layout, all later layers copy: the result is right, but half as fast."""
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


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_hooks_fire_on_every_layer_and_keep_what_they_saw(vae: VAE, part: str) -> None:
    """A layer whose weights were read past its call would run without its hook."""
    layers = {
        name: module
        for name, module in getattr(vae, part).named_modules()
        if isinstance(module, (nn.Conv2d, nn.Conv3d, NormSiLU)) or not list(module.children())
    }
    owners = {name.rpartition(".")[0] for name, _ in getattr(vae, part).named_parameters()}
    assert owners == set(layers)  # all that has weights
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, out: Tensor) -> None:
        seen[name] = out, out.clone()

    hooks = [m.register_forward_hook(lambda _m, _i, out, n=n: keep(n, out)) for n, m in layers.items()]
    try:
        result = vae.encode(pixels(9)).mean if part == "encoder" else vae.decode(latents(3))
    finally:
        for hook in hooks:
            hook.remove()
    assert set(seen) == set(layers)
    assert [name for name, (kept, copied) in seen.items() if not torch.equal(kept, copied)] == []
    assert torch.equal(result, vae.encode(pixels(9)).mean if part == "encoder" else vae.decode(latents(3)))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_what_a_hook_returns_takes_effect(vae: VAE, part: str) -> None:
    def run() -> Tensor:
        return vae.encode(pixels(9)).mean if part == "encoder" else vae.decode(latents(3))

    plain = run()
    for name, module in getattr(vae, part).named_modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d, NormSiLU)):
            hook = module.register_forward_hook(lambda _m, _i, out: 1.5 * out)
            changed = run()
            hook.remove()
            assert not torch.equal(changed, plain), name


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


def test_ops_can_be_set_later(vae: VAE) -> None:
    """Every norm runs them, in both directions, and nothing else does."""
    calls: Counter[str] = Counter()

    def group_norm_silu(*args: Tensor, num_groups: int, eps: float) -> Tensor:
        calls["group"] += 1
        return Ops.torch().group_norm_silu(*args, num_groups=num_groups, eps=eps)

    def spatial_norm_silu(*args: Tensor, num_groups: int, eps: float) -> Tensor:
        calls["spatial"] += 1
        return Ops.torch().spatial_norm_silu(*args, num_groups=num_groups, eps=eps)

    x, z = pixels(9), latents(3)  # one chunk each
    encoded, decoded = vae.encode(x).mean, vae.decode(z)
    counting = dataclasses.replace(Ops.torch(), group_norm_silu=group_norm_silu, spatial_norm_silu=spatial_norm_silu)
    ours = copy.deepcopy(vae)
    ours.set_ops(counting)
    assert ours.ops is counting
    assert torch.equal(ours.encode(x).mean, encoded)
    assert calls == {"group": sum(isinstance(m, NormSiLU) for m in ours.encoder.modules())}
    calls.clear()
    assert torch.equal(ours.decode(z), decoded)
    assert calls == {"spatial": sum(isinstance(m, NormSiLU) for m in ours.decoder.modules())}
    assert VAE(CONFIG, counting).ops is counting


def test_ops_are_set_by_the_method_only(vae: VAE) -> None:
    """An attribute would be set and reach no norm."""
    with pytest.raises(AttributeError):
        vae.ops = Ops.torch()  # pyright: ignore[reportAttributeAccessIssue]
    assert vae.ops == Ops.torch()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 9, 16, 24), r"^x: got shape \[1, 4, 9, 16, 24\], want \[batch, 3, frames, height, width\]$"),
        ((3, 9, 16, 24), r"^x: got shape \[3, 9, 16, 24\], want"),
        ((1, 3, 0, 16, 24), r"^x: got shape \[1, 3, 0, 16, 24\], want"),
        ((1, 3, 9, 20, 24), "^x: got height 20 and width 24, want multiples of 8$"),
        ((1, 3, 9, 16, 25), "^x: got height 16 and width 25, want multiples of 8$"),
    ],
)
def test_encode_refuses(vae: VAE, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 3, 2, 3), (4, 3, 2, 3), (1, 4, 0, 2, 3), (0, 4, 3, 2, 3)])
def test_decode_refuses_at_once(vae: VAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^z: got shape .*, want \[batch, 4, frames, height, width\]$"):
        vae.decode_chunks(torch.zeros(shape))


def test_distribution() -> None:
    parameters = torch.cat([torch.zeros(1, 2, 1, 1, 1), torch.tensor([-99.0, 99.0]).view(1, 2, 1, 1, 1)], dim=1)
    distribution = DiagonalGaussian(parameters)
    assert distribution.logvar.flatten().tolist() == [-30.0, 20.0]
    assert torch.equal(distribution.std, torch.exp(0.5 * distribution.logvar))
    noise = torch.randn(1, 2, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    assert torch.equal(distribution.sample(torch.Generator().manual_seed(3)), distribution.std * noise)
    assert DiagonalGaussian(parameters.bfloat16()).sample().dtype == torch.bfloat16
