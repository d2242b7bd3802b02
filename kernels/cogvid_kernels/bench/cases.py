"""The shapes that are timed, and their inputs.

Inputs are what the models really pass: LayerNormed q and k, projections as they left their linears, channels-last
activations. Names that begin with "_" are no arguments of the operation; they serve providers that compute more
themselves, or attention with a context.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cogvid.ops import BlockContext, Shard

TEXT_LEN = 226
ZQ_CHANNELS = 16
LARGEST = 2**31 - 1  # of a number in a shape

Inputs = dict[str, Any]
Sizes = dict[str, int]

# Frames, height and width in patches, by the number of video tokens: 49 frames of 480x720, and 81 of 768x1360.
GRIDS = {17550: (13, 30, 45), 44880: (11, 48, 85)}


@dataclass(frozen=True)
class Case:
    """One shape of one op. flop, bytes: the least work. inputs: makes the arguments of `cogvid.ops`."""

    label: str
    flop: float
    bytes: float
    inputs: Callable[[torch.device, torch.dtype], Inputs]


@dataclass(frozen=True)
class Shapes:
    """The shapes of an op.

    Attributes:
        defaults: the numbers that `--shape` may name, with those of 5B.
        toy: the same for the interpreter.
        named: (size, sweep) -> labels and numbers of what is timed unless a shape is given.
        case: (label, numbers, dtype) -> the case.
    """

    defaults: Sizes
    toy: Sizes
    named: Callable[[str, bool], Iterator[tuple[str, Sizes]]]
    case: Callable[[str, Sizes, torch.dtype], Case]

    def cases(self, size: str, sweep: bool, dtype: torch.dtype) -> list[Case]:
        return [self.case(name, sizes, dtype) for name, sizes in self.named(size, sweep)]

    def given(self, words: Sequence[str], size: str, dtype: torch.dtype) -> Case:
        """Return the case of a `--shape`, such as `["tokens=4096", "heads=8"]`; what is not named is as in 5B.

        Raises:
            ValueError: a name or a number that this op does not have.
        """
        sizes = dict(self.toy if size == "toy" else self.defaults)
        for word in words:
            name, equals, text = word.partition("=")
            if name not in sizes or not equals:
                raise ValueError(f"shape: got {word!r:.60}, want NAME=NUMBER with a name of {', '.join(sizes)}")
            if not (text.isascii() and text.isdigit() and 0 < int(text[:20]) <= LARGEST):
                raise ValueError(f"shape: got {word!r:.60}, want {name}=NUMBER with a number from 1 to {LARGEST}")
            sizes[name] = int(text)
        check_sizes(sizes, [word.partition("=")[0] for word in words])
        return self.case("given", sizes, dtype)


def check_sizes(sizes: Sizes, given: Sequence[str]) -> None:
    """Raise unless the numbers go together; text tokens that were not given become fewer where they must."""
    if "tokens" in sizes:
        if "text" not in given:
            sizes["text"] = min(sizes["text"], sizes["tokens"] - 1)
        if sizes["text"] >= sizes["tokens"]:
            raise ValueError(f"shape: got text={sizes['text']}, want fewer than tokens={sizes['tokens']}")
        if sizes["head_dim"] % 2:
            raise ValueError(f"shape: got head_dim={sizes['head_dim']}, want an even number")
    if "channels" in sizes:
        groups = group_count(sizes["channels"])
        if groups == 0 or sizes["channels"] % groups:
            wanted = "a multiple of 32" if sizes["channels"] > 128 else "4 or a multiple of it"
            raise ValueError(f"shape: got channels={sizes['channels']}, want {wanted}")
    for name in ("frames", "height", "width"):
        latent = sizes.get(f"latent_{name}", 1)
        if latent > sizes.get(name, latent):
            raise ValueError(f"shape: got latent_{name}={latent}, want at most {name}={sizes[name]}")
    odd = sizes.get("frames", 1)
    if sizes.get("latent_frames") == 1 and odd > 1 and odd % 2:
        raise ValueError(f"shape: got latent_frames=1, want 2 or more with frames={odd}, whose first has its own")


def randn(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).mul_(scale)


def affine(width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = randn(width, device=device, dtype=dtype, scale=0.1).add_(1)
    return weight, randn(width, device=device, dtype=dtype, scale=0.1)


# Tokens of the transformer.


def sizes_of(batch: int, tokens: int, heads: int, text: int) -> Sizes:
    return {"batch": batch, "tokens": tokens, "heads": heads, "head_dim": 64, "text": text}


TOKENS, TOY_TOKENS = sizes_of(2, 17776, 48, TEXT_LEN), sizes_of(1, 67, 2, 16)


def token_shapes(size: str, sweep: bool) -> Iterator[tuple[str, Sizes]]:
    if size == "toy":
        yield "toy", TOY_TOKENS
        if sweep:
            yield "sweep", sizes_of(1, 35, 2, 16)
        return
    yield "2B", sizes_of(2, 17776, 30, TEXT_LEN)
    yield "5B", TOKENS
    yield "1.5", sizes_of(2, 45106, 48, TEXT_LEN)
    if sweep:
        for tokens in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
            yield "sweep", sizes_of(2, tokens, 48, TEXT_LEN)


def grid_of(video_tokens: int) -> tuple[int, int, int]:
    """Return frames, height and width in patches; for other shapes than the models' up to 13 frames, near a square."""
    if video_tokens in GRIDS:
        return GRIDS[video_tokens]
    frames = next(n for n in range(13, 0, -1) if video_tokens % n == 0)
    area = video_tokens // frames
    height = next(n for n in range(math.isqrt(area), 0, -1) if area % n == 0)
    return frames, height, area // height


def attention_context(batch: int, tokens: int, text: int, device: torch.device, dtype: torch.dtype) -> BlockContext:
    """Make the context that attention gets with random inputs: the first layer and step, and no rotary table."""
    temb = torch.zeros(batch, 512, device=device, dtype=dtype)
    return BlockContext(temb, None, text, grid_of(tokens - text), Shard(0, tokens, tokens), layer=0, step=0)


def attention_case(name: str, sizes: Sizes, dtype: torch.dtype) -> Case:
    batch, tokens, heads, head_dim, text = sizes.values()

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        # LayerNormed q and k with a gain, as a real spread of logits: zeros or tiny values change power and clocks.
        q, k, v = (randn(batch, tokens, heads, head_dim, device=device, dtype=dtype) for _ in range(3))
        q, k = (F.layer_norm(x, (head_dim,)) * 1.3 for x in (q, k))
        return {"q": q, "k": k, "v": v, "_context": attention_context(batch, tokens, text, device, dtype)}

    return measured_attention(f"{name} B{batch} H{heads} N{tokens} hd{head_dim}", sizes, dtype, inputs)


def measured_attention(
    label: str, sizes: Sizes, dtype: torch.dtype, inputs: Callable[[torch.device, torch.dtype], Inputs]
) -> Case:
    batch, tokens, heads, head_dim, _ = sizes.values()
    one = float(batch * tokens * heads * head_dim)
    return Case(label, 4 * one * tokens, 4 * one * dtype.itemsize, inputs)


def captured_cases(directory: str | os.PathLike[str], dtype: torch.dtype) -> list[Case]:
    """Return a case for each attention that `cogvid generate --capture` wrote; its tensors are cast to the dtype."""
    from cogvid.run.capture import read_capture

    made = []
    for each in read_capture(directory):

        def inputs(device: torch.device, dtype: torch.dtype, each: Any = each) -> Inputs:
            q, k, v, context = each.load(device, dtype)
            return {"q": q, "k": k, "v": v, "_context": context}

        batch, tokens, heads, head_dim = each.shape
        sizes = sizes_of(batch, tokens, heads, 0) | {"head_dim": head_dim}
        label = f"captured step {each.step} layer {each.layer} B{batch} H{heads} N{tokens} hd{head_dim}"
        made.append(measured_attention(label, sizes, dtype, inputs))
    return made


def projected_case(
    names: str, work: Callable[[float, int], tuple[float, float]], name: str, sizes: Sizes, dtype: torch.dtype
) -> Case:
    """work: (elements of q, tokens) -> FLOP and elements that are read or written."""
    batch, tokens, heads, head_dim, text = sizes.values()
    rotate = name != "2B"

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        made: Inputs = {each: randn(batch, tokens, heads, head_dim, device=device, dtype=dtype) for each in names}
        for each in "qk":  # centred, so that the form without the mean computes the same
            made[each] -= made[each].mean(-1, keepdim=True)
        for each in "qk":
            made[f"{each}_weight"], made[f"{each}_bias"] = affine(head_dim, device, dtype)
        angle = torch.rand(tokens - text, head_dim // 2, device=device) * 6.28
        rope = (angle.cos(), angle.sin()) if rotate else None
        return {**made, "rope": rope, "text_len": text, "eps": 1e-6}

    flop, elements = work(float(batch * tokens * heads * head_dim), tokens)
    label = f"{name} B{batch} H{heads} N{tokens} hd{head_dim}{'' if rotate else ' no rope'}"
    return Case(label, flop, elements * dtype.itemsize, inputs)


def token_case(flop: int, passes: int, names: Sequence[str], name: str, sizes: Sizes, dtype: torch.dtype) -> Case:
    """Make a case of an op between the linears. flop: of an element. passes: tensors of all tokens read or written."""
    batch, tokens, heads, head_dim, text = sizes.values()
    width = heads * head_dim

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        weight, bias = affine(width, device, dtype)
        shift, scale, gate = randn(batch, 2, 3, width, device=device, dtype=dtype).unbind(2)
        made = {
            "x": randn(batch, tokens, width, device=device, dtype=dtype),
            "y": randn(batch, tokens, width, device=device, dtype=dtype),
            "gate": gate, "weight": weight, "bias": bias, "shift": shift, "scale": scale,
            "text_len": text, "eps": 1e-5,
        }  # fmt: skip
        return {each: made[each] for each in (*names, "text_len")}

    elements = float(batch * tokens * width)
    return Case(f"{name} {batch * tokens}x{width}", flop * elements, passes * elements * dtype.itemsize, inputs)


def linear_gelu_case(name: str, sizes: Sizes, dtype: torch.dtype) -> Case:
    batch, tokens, heads, head_dim, _ = sizes.values()
    width, rows = heads * head_dim, batch * tokens

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        weight = randn(4 * width, width, device=device, dtype=dtype, scale=width**-0.5)
        bias = affine(4 * width, device, dtype)[1]
        return {"x": randn(batch, tokens, width, device=device, dtype=dtype), "weight": weight, "bias": bias}

    moved = dtype.itemsize * (5.0 * rows * width + 4.0 * width * width)
    return Case(f"{name} {rows}x{width}x{4 * width}", 8.0 * rows * width * width, moved, inputs)


def tokens_of(case: Callable[..., Case], *given: Any) -> Shapes:
    return Shapes(TOKENS, TOY_TOKENS, token_shapes, functools.partial(case, *given))


# Rows of T5.


def row_shapes(size: str, sweep: bool) -> Iterator[tuple[str, Sizes]]:  # noqa: ARG001
    toy, full = [(7, 200), (12, 64)], [(226, 4096), (35552, 3072), (90212, 3072), (35552, 1920)]
    for rows, width in toy if size == "toy" else full:
        yield "", {"rows": rows, "width": width}


def rms_norm_case(name: str, sizes: Sizes, dtype: torch.dtype) -> Case:
    rows, width = sizes.values()

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        x = randn(rows, width, device=device, dtype=dtype)
        return {"x": x, "weight": affine(width, device, dtype)[0], "eps": 1e-6}

    label = f"{name} {rows}x{width}".strip()
    return Case(label, 4.0 * rows * width, 2.0 * rows * width * dtype.itemsize, inputs)


ROWS = Shapes({"rows": 226, "width": 4096}, {"rows": 7, "width": 200}, row_shapes, rms_norm_case)


# Activations of the VAE's decoder, of a first chunk (three latent frames): its widest stage, and its largest.


def activation(channels: int, frames: int, height: int, width: int, *latent: int) -> Sizes:
    sizes = {"channels": channels, "frames": frames, "height": height, "width": width}
    return sizes | dict(zip(("latent_frames", "latent_height", "latent_width"), latent, strict=True))


ACTIVATION, TOY_ACTIVATION = activation(128, 9, 480, 720, 3, 60, 90), activation(8, 5, 8, 12, 2, 2, 3)


def group_count(channels: int) -> int:
    return min(32, channels // 4)


def activation_shapes(size: str, sweep: bool) -> Iterator[tuple[str, Sizes]]:  # noqa: ARG001
    if size == "toy":
        yield "toy", TOY_ACTIVATION
        return
    yield "49 frames", activation(512, 3, 60, 90, 3, 60, 90)
    yield "49 frames", ACTIVATION
    yield "81 frames", activation(512, 3, 96, 170, 3, 96, 170)
    yield "81 frames", activation(256, 9, 768, 1360, 3, 96, 170)  # passes 2**31 elements


def activation_case(spatial: bool, name: str, sizes: Sizes, dtype: torch.dtype) -> Case:
    shape, latent = tuple(sizes.values())[:4], tuple(sizes.values())[4:]
    channels = sizes["channels"]

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        x = torch.randn(1, *shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
        weight, bias = affine(channels, device, dtype)
        made: Inputs = {"x": x, "weight": weight, "bias": bias, "num_groups": group_count(channels), "eps": 1e-6}
        if spatial:
            z = made["_z"] = torch.randn(1, ZQ_CHANNELS, *latent, device=device, dtype=dtype)
            for argument, layer in (("scale", "conv_y"), ("shift", "conv_b")):
                kernel = randn(channels, ZQ_CHANNELS, device=device, dtype=dtype, scale=0.25)
                offset = affine(channels, device, dtype)[0]
                made |= {f"_{layer}_weight": kernel[..., None, None, None], f"_{layer}_bias": offset}
                made[argument] = F.linear(z.movedim(1, -1), kernel, offset).movedim(-1, 1)
        return made

    elements = float(math.prod(shape))
    label = f"{name} {'x'.join(map(str, shape))}"
    return Case(label, (14 if spatial else 12) * elements, 3 * elements * dtype.itemsize, inputs)


def activations_of(spatial: bool) -> Shapes:
    defaults, toy = (dict(list(each.items())[: 7 if spatial else 4]) for each in (ACTIVATION, TOY_ACTIVATION))
    return Shapes(defaults, toy, activation_shapes, functools.partial(activation_case, spatial))
