"""The operations that have a kernel: what each one computes, in plain PyTorch, and the `Ops` bundle that a model runs.

The functions of this file are the one reference: models run them where there is no kernel, kernel tests compare with
them, benchmarks time them. `cogvid_kernels` has a public function of the same name and signature for each (its
attention takes no context).

Letters: B batch, L text tokens, S video tokens, N = L + S with the text first, D model width, hd head width.
Tensors are in the model's dtype unless said otherwise. In fp16 and bf16 the arithmetic inside one operation is fp32
(fp64 stays fp64) and the result is rounded once. Every operation here is differentiable. Three of the kernels are
(gate_residual, linear_gelu, rms_norm); the others raise in a backward pass.

A model takes an `Ops`; `dataclasses.replace(Ops.torch(), attention=mine)` swaps one operation.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.nn.modules import module as _nn_module

from cogvid import versions
from cogvid.config import Grid

Rope = tuple[Tensor, Tensor]  # cos and sin, each fp32 `[S, hd / 2]`: one angle per pair of neighbouring channels
Branch = Literal["cond", "uncond", "both"]


@dataclass(frozen=True)
class Shard:
    """Which tokens of the joint sequence a tensor holds: `start` to `stop - 1` of `total`."""

    start: int
    stop: int
    total: int


@dataclass(frozen=True, eq=False)
class BlockContext:
    """What a block is told beside its input. Attention and step caches get it too.

    temb: `[B, time_embed_dim]`, the embedded timestep after its silu.
    rope: the rotary table of the video tokens that are held; None for a model without one.
    text_len: how many of the tokens held are text; they come first.
    grid: the frames, height and width of the whole video, in patches.
    shard: which tokens of the whole sequence are held.
    layer: index of the block. step: index of the sampler's step; None outside a run.
    branch: the rows of the batch. "cond" and "uncond" have the prompt or the negative prompt; in "both" the first half
        is unconditional and the second half conditional.
    emb: `temb` before its silu. around_attention: runs attention in each block; see `AroundAttention`.
    """

    temb: Tensor
    rope: Rope | None
    text_len: int
    grid: Grid
    shard: Shard
    layer: int = 0
    step: int | None = None
    branch: Branch = "cond"
    emb: Tensor | None = None
    around_attention: AroundAttention = lambda x, context, attention: attention(x, context)

    def at(self, layer: int) -> BlockContext:
        """Return the context of another block."""
        return dataclasses.replace(self, layer=layer)

    def part(self, start: int, stop: int) -> BlockContext:
        """Return the context of the tokens `start` to `stop - 1` of those held."""
        rope, held = self.rope, self.shard
        if rope is not None:
            video = slice(max(start - self.text_len, 0), max(stop - self.text_len, 0))
            rope = rope[0][video], rope[1][video]
        return dataclasses.replace(
            self,
            rope=rope,
            text_len=min(max(self.text_len - start, 0), stop - start),
            shard=Shard(held.start + start, held.start + stop, held.total),
        )


# (x, context, attention) -> attention(x, context), or a prediction of it: from the normed tokens `[B, N, D]`, through
# the projections of Q, K and V and attention, to the output projection `[B, N, D]`.
AroundAttention = Callable[[Tensor, BlockContext, Callable[[Tensor, BlockContext], Tensor]], Tensor]


class StepCache(Protocol):
    """Wrap the block loop, or attention in each block, to skip what can be predicted; make one per generation.

    state: what is carried from step to step, as tensors and plain values that can be saved and put back. What is kept
        inside `around_attention`, `[B, N, ...]` tensors of the rows and tokens held, lies in dicts under a key "held".
    skipped, if there is one: the steps, from 0, in which something was skipped; the run reports it.
    """

    state: dict[str, Any]

    def run(self, x: Tensor, context: BlockContext, blocks: Callable[..., Tensor]) -> Tensor:
        """Return the output of all blocks for x, or a prediction of it.

        x: `[B, N, D]`, the embedded text and video.
        blocks: `blocks(x, start=0, stop=None, **told)` runs the blocks start..stop-1 and returns `[B, N, D]`. told:
            fields of the context to change, such as `around_attention`.
        """
        ...


class AttentionOp(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: BlockContext, /) -> Tensor:
        """Attend from every token to every token, without a mask: `softmax(q k^T / sqrt(hd)) v`.

        q, k, v: `[B, N, heads, hd]`, any strides as long as the last one is 1. Returns `[B, N, heads * hd]`.
        """
        ...


class QKNormRopeOp(Protocol):
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        q_bias: Tensor,
        k_weight: Tensor,
        k_bias: Tensor,
        rope: Rope | None,
        *,
        text_len: int,
        eps: float,
        centred: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Norm q and k over the head width, then rotate the video tokens.

        q, k: `[B, N, heads, hd]`, any strides as long as the last one is 1. q_weight, q_bias, k_weight, k_bias: `[hd]`.
        rope: None, or the table for the tokens from `text_len` on.
        centred: False is LayerNorm. True says that q and k have mean zero over each head, because their projections
        were centred: the norm is then RMSNorm with this weight and bias.
        Returns q and k, each `[B, N, heads, hd]`.
        """
        ...


class LayerNormModulateOp(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, *, text_len: int, eps: float
    ) -> Tensor:
        """Compute `LayerNorm(x) * (1 + scale) + shift` with one shift and scale for text and one for video.

        x: `[B, N, D]`. weight, bias: `[D]`. shift, scale: `[B, 2, D]`, row 0 for the first `text_len` tokens and
        row 1 for the others. Returns `[B, N, D]`.
        """
        ...


class GateResidualOp(Protocol):
    def __call__(self, x: Tensor, y: Tensor, gate: Tensor, *, text_len: int) -> Tensor:
        """Compute `x + gate * y`. x, y: `[B, N, D]`. gate: `[B, 2, D]`, rows as in `LayerNormModulateOp`."""
        ...


class GateResidualNormModulateOp(Protocol):
    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        gate: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor,
        scale: Tensor,
        *,
        text_len: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Do `GateResidualOp`, then `LayerNormModulateOp` on its result; return both results."""
        ...


class LinearGeluOp(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Compute `gelu(x @ weight.T + bias)`, the tanh form. x: `[..., K]`, weight: `[M, K]`, bias: `[M]`."""
        ...


class RMSNormOp(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        """Compute `x / sqrt(mean(x^2) + eps) * weight` over the last axis (T5's norm). x: `[..., D]`, weight: `[D]`."""
        ...


class GroupNormSiluOp(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int, eps: float) -> Tensor:
        """Compute `silu(GroupNorm(x))`; statistics over all frames given. x: `[B, C, T, H, W]`, weight, bias: `[C]`."""
        ...


class SpatialNormSiluOp(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, *, num_groups: int, eps: float
    ) -> Tensor:
        """Compute `silu(GroupNorm(x) * up(scale) + up(shift))`, `up` is nearest upsampling to x's frames and size.

        x: `[B, C, T, H, W]`. weight, bias: `[C]`. scale, shift: `[B, C, t, h, w]` at latent resolution, t <= T.
        When T is odd and above 1, frame 0 takes latent frame 0 and the other frames are upsampled from the others:
        the first frame of a clip has no partner in time.
        """
        ...


@dataclass(frozen=True)
class Ops:
    """The operations a model runs; each field's Protocol says what it must compute."""

    attention: AttentionOp
    qk_norm_rope: QKNormRopeOp
    layer_norm_modulate: LayerNormModulateOp
    gate_residual: GateResidualOp
    gate_residual_norm_modulate: GateResidualNormModulateOp
    linear_gelu: LinearGeluOp
    rms_norm: RMSNormOp
    group_norm_silu: GroupNormSiluOp
    spatial_norm_silu: SpatialNormSiluOp

    @staticmethod
    def torch() -> Ops:
        """Return the plain-PyTorch operations of this file; they run on any device."""
        return _TORCH_OPS

    @staticmethod
    def triton() -> Ops:
        """Return the Triton kernels: for inference. A backward pass through most of them raises.

        Raises:
            ImportError: Triton is missing or too old, or a kernel cannot be imported; names which and why.
        """
        names = [field.name for field in dataclasses.fields(Ops)]
        versions.check_triton()
        found, name = {}, "cogvid_kernels"
        try:
            kernels = importlib.import_module(name)
            for name in names:
                found[name] = getattr(kernels, name)
        except (AttributeError, ImportError) as error:
            reason = f"{name} cannot be imported: {error}"
            raise ImportError(f"ops: got 'triton', but {reason}, want the kernels {', '.join(names)}") from error
        return Ops(**{**found, "attention": _without_context(found["attention"])})


@functools.cache  # so that a bundle equals itself
def _without_context(kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> AttentionOp:
    """Make an `AttentionOp` of a function that needs q, k and v alone."""

    def attention(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:  # noqa: ARG001
        return kernel(q, k, v)

    return attention


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN_WEIGHTS = (nn.Parameter, FakeTensor)  # torch.export replaces parameters by FakeTensors


def can_fuse(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Say whether an operation may take a module's weights in place of a call of the module.

    It may only if the module is exactly of `kind` and nothing changes what a call does: no hook, no `forward` set on
    the instance (as offloading does), no weight that is missing or of another tensor class (quantised, sharded).
    Otherwise the module is called, so that adapters, hooks and quantised layers take effect wherever they are put.
    """
    return (
        type(module) is kind
        and "forward" not in vars(module)
        and not any(getattr(module, hooks) or getattr(_nn_module, "_global" + hooks) for hooks in _HOOKS)
        and all(type(weight) in _PLAIN_WEIGHTS for weight in module._parameters.values())
    )


def attention(q: Tensor, k: Tensor, v: Tensor, context: BlockContext | None = None) -> Tensor:  # noqa: ARG001
    """Compute `AttentionOp` with PyTorch's own attention, which picks the best implementation it has."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    rope: Rope | None,
    *,
    text_len: int,
    eps: float,
    centred: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `QKNormRopeOp`: the q and k half of diffusers' `CogVideoXAttnProcessor2_0`."""
    return (
        _norm_rotate(q, q_weight, q_bias, rope, text_len, eps, centred),
        _norm_rotate(k, k_weight, k_bias, rope, text_len, eps, centred),
    )


def _norm_rotate(
    x: Tensor, weight: Tensor, bias: Tensor, rope: Rope | None, text_len: int, eps: float, centred: bool
) -> Tensor:
    if rope is None and not centred:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)  # fp32 inside, whatever the dtype
    wide = _wide_dtype(x)
    weight, bias = weight.to(wide), bias.to(wide)
    if centred:
        out = F.rms_norm(x.to(wide), x.shape[-1:], weight, eps) + bias
    else:
        out = F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
    return (out if rope is None else _rotate_(out, rope, text_len)).to(x.dtype)


def rotate(x: Tensor, rope: Rope | None, *, text_len: int) -> Tensor:
    """Rotate the video tokens of `[B, N, heads, hd]`: the part of `QKNormRopeOp` after the norm."""
    return x if rope is None else _rotate_(x.to(_wide_dtype(x), copy=True), rope, text_len).to(x.dtype)


def _rotate_(x: Tensor, rope: Rope, text_len: int) -> Tensor:
    # A pair of neighbouring channels is one complex number, and the rotation one product, written in place.
    cos, sin = (table.to(x.dtype) for table in rope)
    torch.view_as_complex(x[:, text_len:].unflatten(-1, (-1, 2))).mul_(torch.complex(cos, sin)[:, None])
    return x


def layer_norm_modulate(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, *, text_len: int, eps: float
) -> Tensor:
    """Compute `LayerNormModulateOp`: the norm half of diffusers' `CogVideoXLayerNormZero`.

    The modulation of a LayerNorm is a LayerNorm with another weight and bias, one pair per sample and stream.
    """
    wide = _wide_dtype(x)
    if torch.compiler.is_compiling():  # which fuses the two, and would unroll the loop below for each batch size
        y = F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
        return modulate(y, shift, scale, text_len=text_len).to(x.dtype)
    gain = 1 + scale.to(wide)
    weights, biases = weight.to(wide) * gain, bias.to(wide) * gain + shift.to(wide)  # [B, 2, D]
    # On a CPU, layer_norm takes low precision with fp32 weights; elsewhere both must have the same dtype.
    source = x if x.device.type == "cpu" else x.to(wide)
    streams = [
        F.layer_norm(stream, stream.shape[-1:], weights[b, row], biases[b, row], eps).to(x.dtype)
        for b, sample in enumerate(source)
        for row, stream in enumerate((sample[:text_len], sample[text_len:]))
    ]
    return torch.cat(streams).view(x.shape)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, *, text_len: int) -> Tensor:
    """Compute `x * (1 + scale) + shift`: the part of `LayerNormModulateOp` after the norm, same shapes."""
    wide = _wide_dtype(x)
    streams = (x[:, :text_len], x[:, text_len:])
    parts = [
        torch.addcmul(shift[:, i : i + 1].to(wide), part.to(wide), 1 + scale[:, i : i + 1].to(wide))
        for i, part in enumerate(streams)
    ]
    return torch.cat(parts, dim=1).to(x.dtype)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, text_len: int) -> Tensor:
    """Compute `GateResidualOp`; `addcmul` in low precision is fp32 inside and rounds once."""
    text = torch.addcmul(x[:, :text_len], y[:, :text_len], gate[:, :1])
    video = torch.addcmul(x[:, text_len:], y[:, text_len:], gate[:, 1:])
    return torch.cat([text, video], dim=1)


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    text_len: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute `GateResidualNormModulateOp`; the norm sees the rounded sum, which is what the next residual adds to."""
    x = gate_residual(x, y, gate, text_len=text_len)
    return x, layer_norm_modulate(x, weight, bias, shift, scale, text_len=text_len, eps=eps)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `LinearGeluOp`."""
    narrow = x.dtype == weight.dtype == torch.bfloat16  # under autocast the weight may be wider; F.linear casts it
    if narrow and x.device.type == "cpu" and not torch.is_grad_enabled() and _onednn_has_bf16():
        # oneDNN applies the gelu to the fp32 sums before it stores them, which saves a rounding. It has no backward.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _onednn_has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Compute `RMSNormOp`."""
    wide = _wide_dtype(x)
    return F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int, eps: float) -> Tensor:
    """Compute `GroupNormSiluOp`."""
    gain, offset = _group_norm_affine(x, weight, bias, num_groups, eps)

    def apply(frames: slice) -> Tensor:
        y = torch.addcmul(offset, x[:, :, frames].to(gain.dtype), gain)
        return F.silu(y, inplace=not torch.is_grad_enabled()).to(x.dtype)

    return map_frames(apply, x.shape[2], _frames_in_cache(x), layout_of(x))


def spatial_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, *, num_groups: int, eps: float
) -> Tensor:
    """Compute `SpatialNormSiluOp`: diffusers' `CogVideoXSpatialNorm3D` after its convolutions, and its activation."""
    gain, offset = _group_norm_affine(x, weight, bias, num_groups, eps)
    # Join the gain and offset of the norm with those of the latents, still at latent resolution.
    scale, shift = scale.to(gain.dtype), shift.to(gain.dtype)
    gain, offset = gain * scale, torch.addcmul(shift, offset, scale)
    sources, layout = _latent_frames(x.shape[2], scale.shape[2]), layout_of(x)

    def apply(frames: slice) -> Tensor:
        part = x[:, :, frames].to(gain.dtype)
        # clone, not contiguous(): it would keep the strides after indexing, which later operations do not recognise.
        small = (t[:, :, sources[frames]].clone(memory_format=layout) for t in (gain, offset))
        g, o = (F.interpolate(t, size=part.shape[2:]) for t in small)
        return F.silu(torch.addcmul(o, part, g), inplace=not torch.is_grad_enabled()).to(x.dtype)

    return map_frames(apply, x.shape[2], _frames_in_cache(x), layout)


def layout_of(x: Tensor) -> torch.memory_format:
    """Return the memory format of a `[B, C, T, H, W]` tensor: channels-last, or else contiguous."""
    last = torch.channels_last_3d
    return last if x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format


def map_frames(function: Callable[[slice], Tensor], frames: int, at_once: int, layout: torch.memory_format) -> Tensor:
    """Concatenate `function(slice)` over slices of `at_once` frames, along dimension 2, in memory format `layout`.

    Temporaries stay the size of a slice. Without gradients the parts go straight into the result, so that there are
    never two copies of it.
    """
    slices = [slice(start, min(start + at_once, frames)) for start in range(0, frames, at_once)]
    first = function(slices[0])
    if len(slices) == 1:
        return first
    if torch.is_grad_enabled():
        return torch.cat([first, *map(function, slices[1:])], dim=2)
    batch, channels, _, height, width = first.shape
    shape = (batch, channels, frames, height, width)
    result = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout)
    result[:, :, slices[0]] = first
    for part in slices[1:]:
        result[:, :, part] = function(part)
    return result


def frames_at_once(x: Tensor, limit: int) -> int:
    """Return how many frames of `[B, C, T, H, W]` have at most `limit` elements; at least one.

    All of them under torch.compile: it makes no temporaries where it fuses, and would unroll a loop for each size.
    """
    return x.shape[2] if torch.compiler.is_compiling() else max(limit // x[:, :, 0].numel(), 1)


def _group_norm_affine(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return gain and offset, `[B, C, 1, 1, 1]` in at least fp32, such that `GroupNorm(x) = x * gain + offset`.

    `F.group_norm` on a CPU takes E[x^2] - E[x]^2 in fp32 when x is channels-last: off by 2e-4 where the mean is ten
    standard deviations. Here the sums are of differences from each channel's mean in the first frame.
    """
    wide, count = _wide_dtype(x), x[0, 0].numel()
    center = x[:, :, :1].to(wide).mean(dim=(2, 3, 4), keepdim=True)  # [B, C, 1, 1, 1]
    total, square = torch.zeros_like(center, dtype=torch.float64), torch.zeros_like(center, dtype=torch.float64)
    for part in x.split(_frames_in_cache(x), dim=2):
        difference = part.to(wide) - center
        total = total + difference.sum(dim=(2, 3, 4), keepdim=True)
        square = square + (difference * difference).sum(dim=(2, 3, 4), keepdim=True)
    mean = center + total / count
    spread = square / count - (total / count) ** 2
    # The variance of a group is the mean of the variances of its channels plus the variance of their means.
    group_mean = mean.flatten(1).unflatten(1, (num_groups, -1))  # [B, groups, C / groups]
    between, group_mean = torch.var_mean(group_mean, dim=2, correction=0, keepdim=True)
    within = spread.flatten(1).unflatten(1, (num_groups, -1)).mean(dim=2, keepdim=True)
    inverse = (within + between + eps).rsqrt()
    gain = inverse * weight.unflatten(0, (num_groups, -1))
    offset = bias.unflatten(0, (num_groups, -1)) - group_mean * gain
    gain, offset = (t.flatten(1).to(wide)[:, :, None, None, None] for t in (gain, offset))
    return gain, offset


def _latent_frames(frames: int, latent_frames: int) -> list[int]:
    """Return the latent frame that each frame takes: see `SpatialNormSiluOp`."""
    if frames > 1 and frames % 2 == 1:
        return [0, *(1 + i * (latent_frames - 1) // (frames - 1) for i in range(frames - 1))]
    return [i * latent_frames // frames for i in range(frames)]


def _frames_in_cache(x: Tensor) -> int:
    """Return how many frames to work on at once so that their temporaries stay in a CPU's cache; at least one."""
    return frames_at_once(x, 2**20)


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


_TORCH_OPS = Ops(
    attention=attention,
    qk_norm_rope=qk_norm_rope,
    layer_norm_modulate=layer_norm_modulate,
    gate_residual=gate_residual,
    gate_residual_norm_modulate=gate_residual_norm_modulate,
    linear_gelu=linear_gelu,
    rms_norm=rms_norm,
    group_norm_silu=group_norm_silu,
    spatial_norm_silu=spatial_norm_silu,
)
