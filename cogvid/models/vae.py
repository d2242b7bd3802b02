"""The 3-D causal VAE of CogVideoX; equals diffusers' `AutoencoderKLCogVideoX`.

Letters: `F` pixel frames, `T` frames at any resolution, `H W` pixel and `h w` latent height and width, `z` a chunk of
latents. Every activation is `[B, C, T, height, width]`.

Frames are processed in chunks of 8 pixel frames or 2 latent frames; the remainder joins the first chunk. Convolutions
see the end of the previous chunk through a `ConvCache`. Group norms see only their own chunk, so the chunk sizes are
part of the model: other sizes give other pixels. If the number of frames is odd, the first frame is special: it stays
one frame at every temporal resolution, and the frames after it form pairs.

Parameter names follow diffusers' with the wrapper modules dropped:

    {conv}.conv.weight|bias               -> {conv}.weight|bias            every causal convolution but conv_shortcut
    {norm}.norm_layer.weight|bias         -> {norm}.weight|bias            decoder norms; the encoder's are equal
    {norm}.conv_y|conv_b.conv.weight|bias -> {norm}.scale|shift.weight|bias
    downsamplers.0.conv, upsamplers.0.conv -> downsample, upsample
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from cogvid.config import VAEConfig
from cogvid.ops import Ops, frames_at_once, map_frames

PIXEL_CHUNK = 8  # frames that the encoder takes at a time
LATENT_CHUNK = 2  # frames that the decoder takes at a time
FINAL_NORM_EPS = 1e-6  # of the decoder's norms and the encoder's last one, whatever the config says
MID_BLOCK_LAYERS = 2
# The memory format of all activations. Measured on a CPU: channels-last makes 16-bit convolutions 3 times faster and
# fp32 ones no slower, and neither needs reordered copies of its input and output.
LAYOUT = torch.channels_last_3d
# A convolution processes a larger input some frames at a time. This avoids a second copy of all of it (with the past
# frames in front, or upsampled) and keeps indices far below 2**31. On a CPU 2**22 elements cost no speed. A GPU needs
# more work at a time (a frame of 480x720 is 2**25 elements); the best number there was not measured.
CONV_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}


class VAE(nn.Module):
    """Encode videos to latents and back; `AutoencoderKLCogVideoX`. tiling.py has one that works on tiles.

    The scaling factor is not applied here: `encode` gives and `decode` takes unscaled latents.
    """

    def __init__(self, config: VAEConfig, ops: Ops | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.set_ops(ops or Ops.torch())

    @property
    def ops(self) -> Ops:
        """The operations that the VAE runs; `set_ops` changes them."""
        return self._ops

    def set_ops(self, ops: Ops) -> None:
        """Run these operations from now on."""
        self._ops = ops
        for module in self.modules():
            if isinstance(module, NormSiLU):
                module.ops = ops

    def encode(self, x: Tensor, *, whole: bool = False) -> DiagonalGaussian:
        """Encode pixels to the distribution of their latents.

        Args:
            x: `[B, 3, F, H, W]` in [-1, 1]; H and W multiples of 8.
            whole: take all frames at once, as the authors' own code does for 8N + 1 of them, and not in chunks.

        Returns:
            Distribution over `[B, 16, T, H / 8, W / 8]`; T is (F + 3) // 4 for F = 8N and F = 8N + 1.
        """
        stride = self.config.spatial_compression_ratio
        _check_video("x", x, self.config.in_channels)
        if x.shape[3] % stride or x.shape[4] % stride:
            raise ValueError(f"x: got height {x.shape[3]} and width {x.shape[4]}, want multiples of {stride}")
        size = x.shape[2] if whole else PIXEL_CHUNK
        return DiagonalGaussian(torch.cat(list(self._encode_chunks(x, size)), dim=2))

    def _encode_chunks(self, x: Tensor, size: int) -> Iterator[Tensor]:
        cache = ConvCache()
        for chunk in x.split(chunk_sizes(x.shape[2], size), dim=2):
            yield self.encoder(chunk.contiguous(memory_format=LAYOUT), cache)

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents to pixels.

        Args:
            z: `[B, 16, T, h, w]`, unscaled.

        Returns:
            `[B, 3, F, 8h, 8w]`, about [-1, 1] but not clamped; F is 4T - 3 for odd T and 4T for even T.
        """
        return torch.cat(list(self.decode_chunks(z)), dim=2)

    def decode_chunks(self, z: Tensor) -> Iterator[Tensor]:
        """Yield the frames of `decode(z)` as they are ready: 8 at a time, but first 9 (1 if T is 1) when T is odd."""
        _check_video("z", z, self.config.latent_channels)
        return self._decode_chunks(z)

    def _decode_chunks(self, z: Tensor) -> Iterator[Tensor]:
        cache = ConvCache()
        for chunk in z.split(chunk_sizes(z.shape[2], LATENT_CHUNK), dim=2):
            yield self.decoder(chunk.contiguous(memory_format=LAYOUT), cache).contiguous()


class DiagonalGaussian:
    """Normal distribution with diagonal covariance; diffusers' `DiagonalGaussianDistribution`.

    Args:
        parameters: `[B, 32, T, h, w]`: the mean, then the logarithm of the variance.
    """

    def __init__(self, parameters: Tensor) -> None:
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator: Generator | None = None) -> Tensor:
        """Draw `[B, 16, T, h, w]` in the mean's dtype; the noise is drawn on the generator's device, then moved."""
        device = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)


class ConvCache:
    """The last two input frames of every causal convolution, kept from one chunk for the next.

    One `encode` or `decode` uses one cache. Convolutions of temporal size 1 need no past frames and are not in it.
    """

    def __init__(self) -> None:
        self.frames: dict[nn.Module, Tensor] = {}  # [B, C, 2, height, width] each

    @property
    def nbytes(self) -> int:
        return sum(frames.nbytes for frames in self.frames.values())


class Encoder(nn.Module):
    """Pixels to the parameters of the latent distribution; `CogVideoXEncoder3D`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        groups, eps, depth = config.norm_num_groups, config.norm_eps, config.layers_per_block
        self.conv_in = CausalConv3d(config.in_channels, channels[0])
        self.down_blocks = nn.ModuleList()
        for i, (before, after) in enumerate(zip((channels[0], *channels), channels, strict=False)):
            block = nn.ModuleDict({"resnets": _resnets(before, after, depth, groups=groups, eps=eps)})
            if i < len(channels) - 1:
                block["downsample"] = Downsample(after, compress_time=2**i < config.temporal_compression_ratio)
            self.down_blocks.append(block)
        middle = _resnets(channels[-1], channels[-1], MID_BLOCK_LAYERS, groups=groups, eps=eps)
        self.mid_block = nn.ModuleDict({"resnets": middle})
        self.norm_out = NormSiLU(channels[-1], groups=groups, eps=FINAL_NORM_EPS)
        self.conv_out = CausalConv3d(channels[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor, cache: ConvCache) -> Tensor:
        """`[B, 3, T, H, W]` -> `[B, 32, ceil(T / 4), H / 8, W / 8]`, one chunk."""
        x = self.conv_in(x, cache)
        for layer in _layers(*self.down_blocks, self.mid_block):
            x = layer(x, None, cache)
        return self.conv_out(self.norm_out(x), cache)


class Decoder(nn.Module):
    """Latents to pixels; `CogVideoXDecoder3D`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[::-1]
        latent, groups, depth = config.latent_channels, config.norm_num_groups, config.layers_per_block + 1
        self.conv_in = CausalConv3d(latent, channels[0])
        middle = _resnets(channels[0], channels[0], MID_BLOCK_LAYERS, latent, groups=groups)
        self.mid_block = nn.ModuleDict({"resnets": middle})
        self.up_blocks = nn.ModuleList()
        for i, (before, after) in enumerate(zip((channels[0], *channels), channels, strict=False)):
            block = nn.ModuleDict({"resnets": _resnets(before, after, depth, latent, groups=groups)})
            if i < len(channels) - 1:
                block["upsample"] = Upsample(after, compress_time=2**i < config.temporal_compression_ratio)
            self.up_blocks.append(block)
        self.norm_out = NormSiLU(channels[-1], latent, groups=groups)
        self.conv_out = CausalConv3d(channels[-1], config.out_channels)

    def forward(self, z: Tensor, cache: ConvCache) -> Tensor:
        """`[B, 16, T, h, w]` -> `[B, 3, F, 8h, 8w]`, one chunk."""
        x = self.conv_in(z, cache)
        for layer in _layers(self.mid_block, *self.up_blocks):
            x = layer(x, z, cache)
        return self.conv_out(self.norm_out(x, z), cache)


class ResnetBlock(nn.Module):
    """`CogVideoXResnetBlock3D`. With `latent_channels`, as in the decoder, its norms are spatial norms."""

    def __init__(
        self, in_channels: int, out_channels: int, latent_channels: int | None = None, *, groups: int, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = NormSiLU(in_channels, latent_channels, groups=groups, eps=eps)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = NormSiLU(out_channels, latent_channels, groups=groups, eps=eps)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = None if in_channels == out_channels else PointwiseConv3d(in_channels, out_channels)

    def forward(self, x: Tensor, z: Tensor | None, cache: ConvCache) -> Tensor:
        y = self.conv1(self.norm1(x, z), cache)
        y = self.conv2(self.norm2(y, z), cache)
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        # In place: nothing else uses the output of the convolution, unless a hook has kept it.
        return y + residual if self.conv2._forward_hooks else y.add_(residual)


class NormSiLU(nn.Module):
    """Group norm and SiLU; with `latent_channels`, scaled and shifted by the latents: `CogVideoXSpatialNorm3D`.

    diffusers upsamples the latents to the size of `x` and convolves them there. A convolution of size 1 commutes with
    nearest-neighbour upsampling, so here it runs at latent resolution and the op upsamples its result.
    """

    def __init__(
        self, channels: int, latent_channels: int | None = None, *, groups: int, eps: float = FINAL_NORM_EPS
    ) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.ops = Ops.torch()  # until `VAE.set_ops`
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.scale = None if latent_channels is None else PointwiseConv3d(latent_channels, channels)
        self.shift = None if latent_channels is None else PointwiseConv3d(latent_channels, channels)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        if self.scale is None or self.shift is None:
            return self.ops.group_norm_silu(x, self.weight, self.bias, num_groups=self.groups, eps=self.eps)
        return self.ops.spatial_norm_silu(
            x, self.weight, self.bias, self.scale(z), self.shift(z), num_groups=self.groups, eps=self.eps
        )


class CausalConv3d(nn.Conv3d):
    """3x3x3 convolution over the current frame and the two frames before it; `CogVideoXCausalConv3d`.

    The past frames come from the cache. At the start of a video, the first frame is used twice instead.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=(0, 1, 1))

    def forward(self, x: Tensor, cache: ConvCache) -> Tensor:
        past = cache.frames.pop(self, None)
        if past is None:
            past = torch.cat([x[:, :, :1], x[:, :, :1]], dim=2)
        # A copy, because a view would keep all of x in memory until the next chunk.
        cache.frames[self] = (x if x.shape[2] > 1 else torch.cat([past, x], dim=2))[:, :, -2:].clone()

        weight = self.weight.contiguous(memory_format=LAYOUT)  # once here, instead of in every call below

        def convolve(frames: slice) -> Tensor:
            if frames.start < 2:
                part = torch.cat([past[:, :, frames.start :], x[:, :, : frames.stop]], dim=2)
            else:
                part = x[:, :, frames.start - 2 : frames.stop]
            # For small inputs PyTorch picks a convolution that returns its own memory format.
            return F.conv3d(part, weight, self.bias, padding=self.padding).contiguous(memory_format=LAYOUT)

        return map_frames(convolve, x.shape[2], _frames_at_once(x), LAYOUT)


class PointwiseConv3d(nn.Conv3d):
    """1x1x1 convolution, computed as a matrix product: faster, and without a copy in a channels-last layout."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class Downsample(nn.Conv2d):
    """Average pairs of frames (if `compress_time`), then a 3x3 convolution of stride 2; `CogVideoXDownsample3D`."""

    def __init__(self, channels: int, *, compress_time: bool) -> None:
        super().__init__(channels, channels, kernel_size=3, stride=2)
        self.compress_time = compress_time

    def forward(self, x: Tensor, z: None, cache: ConvCache) -> Tensor:  # noqa: ARG002
        if self.compress_time and x.shape[2] > 1:
            odd = x.shape[2] % 2
            pairs = (x[:, :, odd::2] + x[:, :, odd + 1 :: 2]) / 2  # avg_pool3d has no bf16 on a CPU
            x = torch.cat([x[:, :, :odd], pairs], dim=2)
        images = F.pad(_as_images(x), (0, 1, 0, 1))
        return _as_videos(super().forward(images), len(x))


class Upsample(nn.Conv2d):
    """Repeat pixels (and frames, if `compress_time`), then a 3x3 convolution; `CogVideoXUpsample3D`.

    Nothing is repeated before the convolution. The convolution sees one frame at a time, so frames are repeated after
    it. In an image of repeated pixels its nine taps cover only four different pixels. So each of the four output
    positions of an input pixel is a 2x2 convolution of the input, with 4/9 of the multiplications.
    """

    def __init__(self, channels: int, *, compress_time: bool) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.compress_time = compress_time

    def forward(self, x: Tensor, z: Tensor, cache: ConvCache) -> Tensor:  # noqa: ARG002
        batch, channels, _, height, width = x.shape
        kernels = self.position_kernels()

        def convolve(frames: slice) -> Tensor:
            images = F.pad(_as_images(x[:, :, frames]), (1, 1, 1, 1))
            shape = (len(images), channels, 2 * height, 2 * width)
            y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
            for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
                window = images[..., row : row + height + 1, column : column + width + 1]
                y[..., row::2, column::2] = F.conv2d(window, kernels[row, column], self.bias)
            return _as_videos(y, batch)

        y = map_frames(convolve, x.shape[2], _frames_at_once(x, scale=4), LAYOUT)
        if self.compress_time and y.shape[2] > 1:
            odd = y.shape[2] % 2
            pairs = y[:, :, odd:].movedim(1, -1).repeat_interleave(2, dim=1).movedim(-1, 1)  # stays channels-last
            y = torch.cat([y[:, :, :odd], pairs], dim=2)
        return y

    def position_kernels(self) -> Tensor:
        """Return `[2, 2, C, C, 2, 2]`: entry `[a, b]` is the kernel of the output pixels (2i + a, 2j + b).

        Rows 2i see input rows i - 1, i, i; rows 2i + 1 see i, i, i + 1. Columns do the same.
        """
        taps = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=self.weight.device)
        wide = torch.promote_types(self.weight.dtype, torch.float32)  # so that sums of weights are rounded once
        weight, taps = self.weight.to(wide), taps.to(wide)
        return torch.einsum("oiyx,pay,qbx->pqoiab", weight, taps, taps).to(self.weight.dtype)


def chunk_sizes(frames: int, size: int) -> list[int]:
    """Split `frames` into chunks of `size`; the remainder joins the first chunk: (13, 2) -> [3, 2, 2, 2, 2, 2]."""
    count = max(frames // size, 1)
    return [frames - size * (count - 1)] + [size] * (count - 1)


def _resnets(
    in_channels: int,
    out_channels: int,
    count: int,
    latent_channels: int | None = None,
    *,
    groups: int,
    eps: float = FINAL_NORM_EPS,
) -> nn.ModuleList:
    return nn.ModuleList(
        ResnetBlock(out_channels if i else in_channels, out_channels, latent_channels, groups=groups, eps=eps)
        for i in range(count)
    )


def _layers(*blocks: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of `blocks` in the order in which they run.

    The caller loops over layers, not over blocks. Calling a whole block would keep its input in memory until the block
    is done, and at full resolution that is the largest tensor.
    """
    for block in blocks:
        for child in block.children():
            yield from child if isinstance(child, nn.ModuleList) else [child]


def _as_images(x: Tensor) -> Tensor:
    return rearrange(x, "b c t h w -> (b t) c h w")  # a view in this memory format


def _as_videos(images: Tensor, batch: int) -> Tensor:
    return rearrange(images, "(b t) c h w -> b c t h w", b=batch).contiguous(memory_format=LAYOUT)


def _frames_at_once(x: Tensor, scale: int = 1) -> int:
    """Return how many frames of `x`, with `scale` times the pixels, have at most `CONV_ELEMENTS`; at least one."""
    return frames_at_once(x, CONV_ELEMENTS.get(x.device.type, CONV_ELEMENTS["cpu"]) // scale)


def _check_video(name: str, x: Tensor, channels: int) -> None:
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(f"{name}: got shape {list(x.shape)}, want [batch, {channels}, frames, height, width]")
