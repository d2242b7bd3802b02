"""Each reference operation against its formula, written out in fp64; the bundle and its choice."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cogvid import ops
from cogvid.ops import Ops
from cogvid.weights.placement import resolve_ops
from measure import rel_rms
from references import perturb
from tests.tolerances import OP_FP32, OP_LOW_PRECISION, SPATIAL_NORM_FP32

BATCH, TEXT, VIDEO, HEADS, HEAD_DIM, WIDTH, EPS = 2, 5, 12, 3, 16, 48, 1e-6

Result = Tensor | tuple[Tensor, ...]
Case = tuple[Callable[..., Result], Callable[..., Result], list[Tensor]]


def rope_tables() -> tuple[Tensor, Tensor]:
    angle = torch.rand(VIDEO, HEAD_DIM // 2, generator=torch.Generator().manual_seed(9)) * 6.28
    return angle.cos(), angle.sin()


def rows(modulation: Tensor) -> Tensor:
    """Spread `[B, 2, D]` over the tokens."""
    return torch.cat([modulation[:, :1].expand(-1, TEXT, -1), modulation[:, 1:].expand(-1, VIDEO, -1)], dim=1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    groups = x.reshape(x.shape[0], 4, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return normed.reshape(x.shape) * weight.view(-1, 1, 1, 1) + bias.view(-1, 1, 1, 1)


def true_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / HEAD_DIM**0.5
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v).flatten(2)


def true_qk_norm_rope(q: Tensor, k: Tensor, *affine: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    out = []
    for x, weight, bias in ((q, *affine[:2]), (k, *affine[2:])):
        x = layer_norm(x, weight, bias)
        if rope is not None:
            cos, sin = (table.double()[:, None] for table in rope)
            even, odd = x[:, TEXT:, :, 0::2], x[:, TEXT:, :, 1::2]
            turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
            x = torch.cat([x[:, :TEXT], turned], dim=1)
        out.append(x)
    return tuple(out)


def true_layer_norm_modulate(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(x, weight, bias) * (1 + rows(scale)) + rows(shift)


def true_gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + rows(gate) * y


def true_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = x @ weight.T + bias
    return 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))


def true_spatial_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    frame = torch.tensor([0, 1, 1, 2, 2])  # of the latent, for each of five frames: the first stands alone
    row, column = torch.arange(6) // 2, torch.arange(8) // 2
    scale, shift = (t[:, :, frame][:, :, :, row][..., column] for t in (scale, shift))
    return F.silu(group_norm(x, weight, bias) * scale + shift)


def case(name: str) -> Case:
    """Return the operation, its formula, and fp64 tensors to give to both."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens, modulation = (BATCH, TEXT + VIDEO, WIDTH), (BATCH, 2, WIDTH)
    heads = (BATCH, TEXT + VIDEO, HEADS, HEAD_DIM)
    video = (BATCH, 8, 5, 6, 8)
    streams = {"text_len": TEXT, "eps": EPS}
    groups = {"num_groups": 4, "eps": EPS}
    if name == "attention":
        return ops.attention, true_attention, [randn(*heads) for _ in range(3)]
    if name in ("qk_norm", "qk_norm_rope"):
        rope = rope_tables() if name == "qk_norm_rope" else None
        tensors = [randn(*heads), randn(*heads), *(randn(HEAD_DIM) for _ in range(4))]
        return partial(ops.qk_norm_rope, rope=rope, **streams), partial(true_qk_norm_rope, rope=rope), tensors
    if name == "layer_norm_modulate":
        tensors = [randn(*tokens), randn(WIDTH), randn(WIDTH), randn(*modulation), randn(*modulation)]
        return partial(ops.layer_norm_modulate, **streams), true_layer_norm_modulate, tensors
    if name == "gate_residual":
        tensors = [randn(*tokens), randn(*tokens), randn(*modulation)]
        return partial(ops.gate_residual, text_len=TEXT), true_gate_residual, tensors
    if name == "linear_gelu":
        return ops.linear_gelu, true_linear_gelu, [randn(*tokens), randn(40, WIDTH) / WIDTH**0.5, randn(40)]
    if name == "rms_norm":
        return (
            partial(ops.rms_norm, eps=EPS),
            lambda x, weight: x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight,
            [randn(*tokens), randn(WIDTH)],
        )
    if name == "group_norm_silu":
        return (
            partial(ops.group_norm_silu, **groups),
            lambda *tensors: F.silu(group_norm(*tensors)),
            [randn(*video), randn(8), randn(8)],
        )
    if name == "spatial_norm_silu":
        latent = (BATCH, 8, 3, 3, 4)
        tensors = [randn(*video), randn(8), randn(8), randn(*latent), randn(*latent)]
        return partial(ops.spatial_norm_silu, **groups), true_spatial_norm_silu, tensors
    raise KeyError(name)


CASES = (
    "attention",
    "qk_norm",
    "qk_norm_rope",
    "layer_norm_modulate",
    "gate_residual",
    "linear_gelu",
    "rms_norm",
    "group_norm_silu",
    "spatial_norm_silu",
)


def joined(result: Result) -> Tensor:
    return result if isinstance(result, Tensor) else torch.stack(result)


@pytest.mark.parametrize("name", CASES)
def test_fp32_equals_the_formula(name: str) -> None:
    op, formula, tensors = case(name)
    ours = joined(op(*(t.float() for t in tensors)))
    assert ours.dtype == torch.float32
    assert rel_rms(ours, joined(formula(*tensors))) < OP_FP32


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("attention", "linear_gelu")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_rounds_once(name: str, dtype: torch.dtype) -> None:
    """The error is that of rounding the exact result. The two products of attention and linears are not ours."""
    op, formula, tensors = case(name)
    low = [t.to(dtype) for t in tensors]
    exact = joined(formula(*(t.double() for t in low)))
    ours = joined(op(*low))
    assert ours.dtype == dtype
    assert rel_rms(ours, exact) < OP_LOW_PRECISION * rel_rms(exact.to(dtype), exact)


def test_bf16_gelu_without_gradients_is_the_better_one() -> None:
    op, formula, tensors = case("linear_gelu")
    low = [t.bfloat16() for t in tensors]
    exact = joined(formula(*(t.double() for t in low)))
    with_gradients = rel_rms(joined(op(*low)), exact)
    with torch.inference_mode():
        assert rel_rms(joined(op(*low)), exact) <= with_gradients


def test_linear_gelu_under_autocast_needs_no_gradients() -> None:
    op, _, tensors = case("linear_gelu")
    x, weight, bias = (t.float() for t in tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = op(x.bfloat16(), weight, bias)
        with torch.no_grad():
            assert torch.equal(op(x.bfloat16(), weight, bias), expected)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    op, _, tensors = case(name)
    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in tensors], fast_mode=True)


def test_gate_residual_norm_modulate_is_the_two_in_turn() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(BATCH, TEXT + VIDEO, WIDTH, generator=generator) for _ in range(2))
    gate, shift, scale = (torch.randn(BATCH, 2, WIDTH, generator=generator) for _ in range(3))
    weight, bias = (torch.randn(WIDTH, generator=generator) for _ in range(2))
    streams = {"text_len": TEXT, "eps": EPS}
    total, normed = ops.gate_residual_norm_modulate(x, y, gate, weight, bias, shift, scale, **streams)
    assert torch.equal(total, ops.gate_residual(x, y, gate, text_len=TEXT))
    assert torch.equal(normed, ops.layer_norm_modulate(total, weight, bias, shift, scale, **streams))


def test_attention_takes_strided_views() -> None:
    qkv = torch.randn(BATCH, 17, 3, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    views = qkv.unbind(2)
    assert rel_rms(ops.attention(*views), ops.attention(*(v.contiguous() for v in views))) < OP_FP32


def test_rotation_is_that_of_diffusers() -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings", reason="needs diffusers")
    generator = torch.Generator().manual_seed(4)
    q, k = (torch.randn(BATCH, TEXT + VIDEO, HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    one, zero = torch.ones(HEAD_DIM), torch.zeros(HEAD_DIM)
    affine = (one, zero, one, zero)
    plain = ops.qk_norm_rope(q, k, *affine, None, text_len=TEXT, eps=EPS)
    turned = ops.qk_norm_rope(q, k, *affine, rope_tables(), text_len=TEXT, eps=EPS)
    tables = [t.repeat_interleave(2, dim=1) for t in rope_tables()]
    for before, after in zip(plain, turned, strict=True):
        assert torch.equal(before[:, :TEXT], after[:, :TEXT])
        theirs = embeddings.apply_rotary_emb(before[:, TEXT:], tables, sequence_dim=1)
        assert rel_rms(after[:, TEXT:], theirs) < OP_FP32


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 8, 9, 17])
def test_spatial_norm_is_that_of_diffusers(frames: int) -> None:
    """The 1x1x1 convolutions commute with the upsampling, so that ours convolve the small latent."""
    pytest.importorskip("diffusers", reason="needs diffusers")
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D

    torch.manual_seed(5)
    norm = perturb(CogVideoXSpatialNorm3D(f_channels=8, zq_channels=4, groups=4), 5)
    latent_frames = {1: 1, 2: 1, 4: 2, 5: 3, 8: 2, 9: 3, 17: 5}[frames]
    x, z = torch.randn(2, 8, frames, 6, 8), torch.randn(2, 4, latent_frames, 3, 4)
    theirs = F.silu(norm(x, z)[0])
    scale, shift = (F.conv3d(z, c.conv.weight, c.conv.bias) for c in (norm.conv_y, norm.conv_b))
    group = norm.norm_layer
    ours = ops.spatial_norm_silu(x, group.weight, group.bias, scale, shift, num_groups=4, eps=group.eps)
    assert rel_rms(ours, theirs) < SPATIAL_NORM_FP32


def test_layer_norm_of_a_projection_is_rms_norm_of_the_centred_projection() -> None:
    """Centring the weight and bias of a projection over the rows of each head takes the mean out of QK norm."""
    generator = torch.Generator().manual_seed(6)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, bias, gain, offset = randn(7, 40), randn(WIDTH, 40), randn(WIDTH), randn(HEAD_DIM), randn(HEAD_DIM)
    projected = F.linear(x, weight, bias).unflatten(-1, (HEADS, HEAD_DIM))
    layer = F.layer_norm(projected, (HEAD_DIM,), gain, offset, EPS)

    by_head, bias_by_head = weight.unflatten(0, (HEADS, HEAD_DIM)), bias.unflatten(0, (HEADS, HEAD_DIM))
    centred_weight = (by_head - by_head.mean(1, keepdim=True)).flatten(0, 1)
    centred_bias = (bias_by_head - bias_by_head.mean(1, keepdim=True)).flatten(0, 1)
    centred = F.linear(x, centred_weight, centred_bias).unflatten(-1, (HEADS, HEAD_DIM))
    torch.testing.assert_close(ops.rms_norm(centred, gain, eps=EPS) + offset, layer, rtol=1e-13, atol=1e-13)


def test_auto_is_torch_on_a_cpu() -> None:
    assert resolve_ops("auto", "cpu") == (Ops.torch(), "torch")


def test_a_swapped_operation_is_recorded_as_custom() -> None:
    mine = dataclasses.replace(Ops.torch(), attention=true_attention)
    assert resolve_ops(mine, "cpu") == (mine, "custom")
    assert resolve_ops(Ops.torch(), "cpu")[1] == "torch"


def test_an_unknown_name_raises() -> None:
    with pytest.raises(ValueError, match="ops: got 'cuda', want 'auto', 'torch', 'triton' or an Ops"):
        resolve_ops("cuda", "cpu")


def test_triton_on_a_cpu_wants_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ops, "triton", Ops.torch)  # there or not, and interpreted or not, in the process of the tests
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="ops: got 'triton' on a CPU, want cuda"):
        resolve_ops("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_ops("triton", "cpu")[1] == "triton"


def test_missing_kernels_raise_naming_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cogvid_kernels", None)  # what import does where it is not installed
    with pytest.raises(
        ImportError,
        match=r"^ops: got 'triton', but cogvid_kernels cannot be imported: .*, want the kernels attention, ",
    ):
        resolve_ops("triton", "cpu")


def test_a_missing_kernel_raises_naming_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = type(sys)("cogvid_kernels")
    kernels.attention = ops.attention
    monkeypatch.setitem(sys.modules, "cogvid_kernels", kernels)
    with pytest.raises(ImportError, match=r"^ops: got 'triton', but qk_norm_rope cannot be imported: "):
        Ops.triton()
