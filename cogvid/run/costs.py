"""What a run costs, from configs alone: arithmetic of each part, and the memory that its activations take.

FLOPs are those of matrix products, convolutions and attention, a multiply-add counted as two; the rest of a run (norms,
activations, samplers) is less than 1 % of them. Memory is in bytes. Both follow the code of `models/` line by line:
what is counted is what is computed and kept there, so a change there is a change here, and a test compares the two.

Letters: N text and video tokens, L text tokens, S video tokens, D model width, T latent frames, h w latent size.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from cogvid.config import TransformerConfig, VAEConfig
from cogvid.models.tiling import STEP, TILE
from cogvid.models.vae import LATENT_CHUNK, MID_BLOCK_LAYERS, PIXEL_CHUNK, chunk_sizes
from cogvid.weights.text_config import TextConfig

FLOAT32 = 4  # bytes
UNFOLD_FLOAT32 = 20_480


@dataclass(frozen=True)
class Kernels:
    """What the operations of a device keep beside their results; it decides how much memory activations take.

    conv_elements: of the input that a convolution of the VAE takes at a time.
    fused_norms: norms keep nothing in fp32. fused_gelu: the MLP keeps nothing from before its GELU.
    unfold_below: a 3-D convolution is computed by unfolding its input, to 27 times its size, if channels x frames x
        height of one sample are at most as many. PyTorch decides so on a CPU: in fp32 at `UNFOLD_FLOAT32`, in bf16
        never or, where oneDNN has none, always.
    """

    conv_elements: int
    fused_norms: bool
    fused_gelu: bool
    unfold_below: float = 0


def t5_flops(config: TextConfig, prompts: int, length: int) -> int:
    """Return what encoding `prompts` of `length` tokens takes."""
    inner = config.num_heads * config.d_kv
    linears = 4 * inner + (3 if config.gated else 2) * config.d_ff
    return prompts * config.num_layers * (2 * length * config.d_model * linears + 4 * length**2 * inner)


def t5_parameters(config: TextConfig) -> int:
    """Return the number of parameters of the encoder."""
    buckets = config.relative_attention_num_buckets
    inner, width = config.num_heads * config.d_kv, config.d_model
    layer = 4 * width * inner + (3 if config.gated else 2) * width * config.d_ff + 2 * width
    return config.vocab_size * width + config.num_layers * layer + buckets * config.num_heads + width


def t5_activations(config: TextConfig, prompts: int, length: int, itemsize: int) -> int:
    """Return what encoding `prompts` at once keeps: attention's bias and scores, or the rows of the MLP."""
    scores = config.num_heads * length**2 * (2 * itemsize + FLOAT32)
    hidden = length * itemsize * (4 * config.d_model + 3 * config.d_ff)
    return prompts * max(scores, hidden)


def tokens(config: TransformerConfig, latents: tuple[int, int, int]) -> int:
    """Return the number of video tokens S of latents (frames, height, width)."""
    return math.prod(config.grid(*latents))


def transformer_flops(config: TransformerConfig, rows: int, length: int, latents: tuple[int, int, int]) -> int:
    """Return what one call takes: `rows` of the batch, `length` text tokens. 2 rows are a step with guidance."""
    width, time = config.hidden_size, config.time_embed_dim
    video, patch = tokens(config, latents), math.prod(config.patch)
    total = length + video
    embed = length * config.text_embed_dim * width + video * config.in_channels * patch * width
    embed += width * time + time**2  # the timestep's MLP
    block = 12 * total * width**2 + 12 * time * width + 2 * total**2 * width
    last = 2 * time * width + video * width * config.out_channels * patch
    ofs = 0 if config.ofs_embed_dim is None else 2 * config.ofs_embed_dim**2  # of one row, for all
    return 2 * (rows * (embed + config.num_layers * block + last) + ofs)


def transformer_activations(
    config: TransformerConfig, rows: int, length: int, latents: tuple[int, int, int], itemsize: int, kernels: Kernels
) -> int:
    """Return the most that one call keeps at a time.

    One unit is a `[rows, N, D]`. Two of them are there through a block: the embedded input and the input of the block.
    Beside them there are those of `block_units`. The inputs and the table of positions are kept too.
    """
    unit = rows * (length + tokens(config, latents)) * config.hidden_size * itemsize
    return int(unit * (2 + block_units(itemsize, kernels))) + input_bytes(config, rows, length, latents, itemsize)


def block_units(itemsize: int, kernels: Kernels) -> float:
    """Return the most units that a block keeps beside its input, at one of three moments:

    - in the norm of K: Q, K and V, the input of the projections, the normed Q, and K in fp32 before and after (after
      alone where it was fp32 before; one of the dtype where a kernel does it);
    - in the MLP: the residual, its input, and its hidden layer, which has 4 units, and is there twice where the GELU
      is an operation of its own;
    - in the last residual: the first residual, the hidden layer, the MLP's result and the sum, in two parts that are
      then joined, but for a kernel.
    """
    wide = 1 if kernels.fused_norms else FLOAT32 / itemsize * (1 if itemsize == FLOAT32 else 2)
    return max(5 + wide, 2 + (4 if kernels.fused_gelu else 8), 6 + (1 if kernels.fused_norms else 2))


def input_bytes(config: TransformerConfig, rows: int, length: int, latents: tuple[int, int, int], itemsize: int) -> int:
    """Return the bytes of the inputs and of the table of positions: cos and sin of each video token, or a row of D."""
    width, video = config.hidden_size, tokens(config, latents)
    tables = video * config.attention_head_dim * FLOAT32 if config.use_rotary_positional_embeddings else 0
    tables += video * width * itemsize if config.adds_positions else 0
    return tables + rows * (length * config.text_embed_dim + config.in_channels * math.prod(latents)) * itemsize


@dataclass(frozen=True)
class Cost:
    """flops: of all chunks. activations: bytes at the worst moment."""

    flops: int
    activations: int


def vae_decode(
    config: VAEConfig, latents: tuple[int, int, int], itemsize: int, kernels: Kernels, *, tiling: bool = False
) -> Cost:
    """Return what decoding one video takes, a chunk at a time: latents (frames, height, width).

    tiling: the pixels of all tiles are kept until the last one is decoded; then those of a chunk are joined.
    """
    frames, height, width = latents
    scale, flops, peak = config.spatial_compression_ratio, 0, 0
    tiles = _tile_sizes(height, width, scale) if tiling else Counter({(height, width): 1})
    for size, count in tiles.items():
        walk = _Walk(itemsize, kernels)
        for chunk in chunk_sizes(frames, LATENT_CHUNK):
            walk.decode(config, chunk, *size)
        flops, peak = flops + count * walk.flops, max(peak, walk.peak)
    if tiles.total() > 1:
        area = sum(count * math.prod(size) for size, count in tiles.items()) * scale**2
        peak += config.out_channels * config.decoded_frames(frames) * area * itemsize
    return Cost(flops, peak)


def vae_encode(
    config: VAEConfig, pixels: tuple[int, int, int], itemsize: int, kernels: Kernels, *, tiling: bool = False
) -> Cost:
    """Return what encoding one video or image takes, a chunk at a time: pixels (frames, height, width)."""
    frames, height, width = pixels
    flops, peak = 0, 0
    tiles = _tile_sizes(height, width, 1) if tiling else Counter({(height, width): 1})
    for size, count in tiles.items():
        walk = _Walk(itemsize, kernels)
        for chunk in chunk_sizes(frames, PIXEL_CHUNK):
            walk.encode(config, chunk, *size)
        flops, peak = flops + count * walk.flops, max(peak, walk.peak)
    return Cost(flops, peak + config.in_channels * math.prod(pixels) * itemsize)


def _tile_sizes(height: int, width: int, scale: int) -> Counter[tuple[int, int]]:
    """Return how many tiles there are of each size, as `tiling.tile_places` makes them. scale: pixels of an element."""
    rows, columns = (
        _tile_lengths(length, tile // scale, step // scale)
        for length, tile, step in zip((height, width), TILE, STEP, strict=True)
    )
    if height <= TILE[0] // scale and width <= TILE[1] // scale:
        return Counter({(height, width): 1})
    return Counter({(row, column): n * m for row, n in rows.items() for column, m in columns.items()})


def _tile_lengths(length: int, tile: int, step: int) -> Counter[int]:
    """Return how many tiles there are of each length along one axis: whole ones, and one or two at the end."""
    whole = max((length - tile) // step + 1, 0)
    lengths = Counter(length - start for start in range(whole * step, length, step))
    return lengths + Counter({tile: whole})


@dataclass(frozen=True)
class Shape:
    """The weights of a part, in numbers of parameters. block: of one; the others are `total` - `blocks` x `block`.

    quantized: of the linears that `quantize` takes, in all blocks. widest: of the largest linear.
    """

    total: int
    blocks: int
    block: int
    quantized: int
    widest: int


def transformer_shape(config: TransformerConfig, total: int) -> Shape:
    """Return the shape of a transformer with `total` parameters."""
    width, time, layers = config.hidden_size, config.time_embed_dim, config.num_layers
    linears = 12 * width**2
    return Shape(total, layers, linears + 12 * time * width, layers * linears, max(4 * width**2, 6 * time * width))


def t5_shape(config: TextConfig, total: int) -> Shape:
    """Return the shape of a T5 encoder with `total` parameters; all linears are quantised, its embedding is not."""
    inner, width = config.num_heads * config.d_kv, config.d_model
    block = 4 * width * inner + (3 if config.gated else 2) * width * config.d_ff
    return Shape(total, config.num_layers, block, config.num_layers * block, max(width * inner, width * config.d_ff))


@dataclass
class _Walk:
    """Go through the layers of the VAE as `models/vae.py` does, and add up what they compute and keep.

    The worst moment is one of those that `_at` is told of. Beside what it is told, the cache is kept: the last two
    input frames of every causal convolution that ran.
    """

    itemsize: int
    kernels: Kernels
    flops: int = 0
    peak: int = 0
    cache: dict[int, int] = field(default_factory=dict)  # bytes, by the order of the convolutions in a chunk
    _conv: int = 0
    latent: tuple[int, int, int, int] | None = None

    def decode(self, config: VAEConfig, frames: int, height: int, width: int) -> None:
        self._conv, self.latent = 0, (config.latent_channels, frames, height, width)
        channels = config.block_out_channels[::-1]
        self._causal(config.latent_channels, channels[0], frames, height, width, held=0)
        for _ in range(MID_BLOCK_LAYERS):
            self._resnet(channels[0], channels[0], frames, height, width)
        for i, (before, after) in enumerate(zip((channels[0], *channels), channels, strict=False)):
            for layer in range(config.layers_per_block + 1):
                self._resnet(after if layer else before, after, frames, height, width)
            if i < len(channels) - 1:
                compress = 2**i < config.temporal_compression_ratio and frames > 1
                self._upsample(after, frames, height, width, compress)
                frames = 2 * frames - frames % 2 if compress else frames
                height, width = 2 * height, 2 * width
        self._norm(channels[-1], frames, height, width)
        held = 2 * channels[-1] * frames * height * width
        self._causal(channels[-1], config.out_channels, frames, height, width, held)

    def encode(self, config: VAEConfig, frames: int, height: int, width: int) -> None:
        self._conv, self.latent = 0, None
        channels = config.block_out_channels
        self._causal(config.in_channels, channels[0], frames, height, width, held=0)
        for i, (before, after) in enumerate(zip((channels[0], *channels), channels, strict=False)):
            for layer in range(config.layers_per_block):
                self._resnet(after if layer else before, after, frames, height, width)
            if i < len(channels) - 1:
                compress = 2**i < config.temporal_compression_ratio and frames > 1
                frames = self._downsample(after, frames, height, width, compress)
                height, width = height // 2, width // 2
        for _ in range(MID_BLOCK_LAYERS):
            self._resnet(channels[-1], channels[-1], frames, height, width)
        self._norm(channels[-1], frames, height, width)
        held = 2 * channels[-1] * frames * height * width
        self._causal(channels[-1], 2 * config.latent_channels, frames, height, width, held)

    def _at(self, elements: float, wide: float = 0) -> None:
        """Note a moment at which so many elements of the dtype, and in fp32, are kept beside the cache."""
        now = int(elements * self.itemsize + wide * FLOAT32) + sum(self.cache.values())
        self.peak = max(self.peak, now)

    def _resnet(self, before: int, after: int, frames: int, height: int, width: int) -> None:
        size = frames * height * width
        x, y = before * size, after * size
        self._norm(before, frames, height, width)
        self._causal(before, after, frames, height, width, held=2 * x)
        self._norm(after, frames, height, width, held=x)
        self._causal(after, after, frames, height, width, held=x + 2 * y)
        if before != after:
            self.flops += 2 * before * after * size
            self._at(x + 2 * y)

    def _causal(self, before: int, after: int, frames: int, height: int, width: int, held: float) -> None:
        """Count a 3x3x3 convolution. held: elements of its input, and of what its caller keeps."""
        area = height * width
        self.flops += 2 * 27 * before * after * frames * area
        self.cache[self._conv] = 2 * before * area * self.itemsize
        self._conv += 1
        at_once = min(frames, max(self.kernels.conv_elements // (before * area), 1))
        past, weight = 2 * before * area, 27 * before * after
        part = before * (at_once + 2) * area + (after * at_once * area if at_once < frames else 0)
        if before * (at_once + 2) * height <= self.kernels.unfold_below:
            part += (27 * before * at_once + before * (at_once + 2)) * area
        self._at(held + past + weight + after * frames * area + part)

    def _norm(self, channels: int, frames: int, height: int, width: int, held: float = 0) -> None:
        """Count a norm with SiLU of `channels`, beside what the caller keeps; some frames at a time are in fp32."""
        area = height * width
        if self.latent is not None:
            count, *sizes = self.latent
            self.flops += 2 * 2 * count * channels * math.prod(sizes)
        at_once = min(frames, max(2**20 // (channels * area), 1))
        part = channels * at_once * area
        kept = 2 if self.latent is None else 4
        wide = 0 if self.kernels.fused_norms else part * kept
        self._at(held + 2 * channels * frames * area, wide)

    def _upsample(self, channels: int, frames: int, height: int, width: int, compress: bool) -> None:
        area = height * width
        self.flops += 2 * 4 * 4 * channels**2 * frames * area
        x, y = channels * frames * area, 4 * channels * frames * area
        at_once = min(frames, max(self.kernels.conv_elements // (4 * channels * area), 1))
        part = channels * at_once * area * (2 + (4 if at_once < frames else 0))
        kernels = 16 * channels**2
        self._at(x + y + part + kernels, wide=kernels)
        if compress:
            self._at(x + y + 2 * 4 * channels * area * (2 * frames - frames % 2))  # the pairs, and all frames joined

    def _downsample(self, channels: int, frames: int, height: int, width: int, compress: bool) -> int:
        area = height * width
        x = channels * frames * area
        if compress:
            after = frames // 2 + frames % 2
            self._at(x + 3 * channels * after * area)
            frames = after
        small = channels * frames * (height // 2) * (width // 2)
        self.flops += 2 * 9 * channels * small
        shrunk = channels * frames * area
        self._at(x + (shrunk if compress else 0) + shrunk + 2 * small)
        return frames
