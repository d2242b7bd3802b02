"""Norm and rotation of q and k, against `cogvid.ops` and fp64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvid import ops
from cogvid_kernels import qk_norm_rope
from measure import rel_rms
from tests import tolerances
from tests.kernels.accuracy import DTYPES, assert_accurate, assert_same_specials, randn

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EPS = 1e-6

each_form = pytest.mark.parametrize("centred", [False, True], ids=["layer", "rms"])


def make(batch: int, tokens: int, heads: int, head_dim: int, text_len: int) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Return q and k with the four affine vectors, and the rotary table."""
    q, k = (randn(batch, tokens, heads, head_dim, seed=seed) * 2 + 0.7 for seed in (0, 6))
    affine = [1 + 0.3 * randn(head_dim, seed=1), randn(head_dim, seed=2), 1 + 0.3 * randn(head_dim, seed=3)]
    angle = randn(tokens - text_len, head_dim // 2, seed=5) * 6
    return [q, k, *affine, randn(head_dim, seed=4)], (angle.cos(), angle.sin())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rotate", [True, False], ids=["rope", "plain"])
@each_form
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim", "text_len"),
    [(1, 1, 1, 64, 0), (3, 17, 5, 64, 4), (2, 23, 3, 30, 23), (1, 9, 2, 80, 2), (2, 5, 1, 128, 1)],
    ids=["B1-N1", "B3-N17-H5", "B2-all-text-hd30", "hd80", "hd128"],
)
def test_sizes(
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    text_len: int,
    centred: bool,
    rotate: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Rows here have a mean, so that the two forms differ and each is held against its own reference."""
    arguments, rope = make(batch, tokens, heads, head_dim, text_len)
    options = {"text_len": text_len, "eps": EPS, "centred": centred, "device": device, "dtype": dtype}
    assert_accurate("qk_norm_rope", *arguments, rope if rotate else None, **options)


def test_strides(device: torch.device) -> None:
    """q: every other token of a longer buffer, heads out of more of them. k: heads before tokens, then one for all."""
    (_, _, *affine), rope = make(2, 11, 3, 64, 4)
    q = randn(2, 22, 6, 70).to(device)[:, ::2, 1:4, 3:67]
    k = randn(2, 3, 11, 64, seed=7).to(device).transpose(1, 2)
    one_head = randn(2, 11, 1, 64, seed=8).to(device).expand(-1, -1, 3, -1)
    for keys in (k, one_head):
        assert_accurate("qk_norm_rope", q, keys, *affine, rope, text_len=4, eps=EPS, device=device, dtype=torch.float32)


def test_offsets_past_int32(device: torch.device) -> None:
    """Head 2 begins 2**31 elements in: a 32-bit offset would read elsewhere. Only the pages touched take memory."""
    if device.type == "cuda":
        storage = torch.zeros(2**31 + 2**20, dtype=torch.float16, device=device)
    else:
        storage = torch.from_numpy(np.zeros(2**31 + 2**20, dtype=np.float16))
    (q, k, *affine), rope = make(1, 5, 3, 64, 2)
    far = storage.as_strided((1, 5, 3, 64), (320, 64, 2**30, 1))
    for arguments in ((far.copy_(q), k), (q, far.copy_(k))):
        arguments = [*(x.to(torch.float16) for x in arguments), *affine]
        assert_accurate("qk_norm_rope", *arguments, rope, text_len=2, eps=EPS, device=device, dtype=torch.float16)


def test_text_is_not_rotated(device: torch.device) -> None:
    arguments, rope = make(1, 12, 2, 64, 5)
    arguments = [argument.to(device) for argument in arguments]
    turned = qk_norm_rope(*arguments, tuple(t.to(device) for t in rope), text_len=5, eps=EPS)
    plain = qk_norm_rope(*arguments, None, text_len=5, eps=EPS)
    for a, b in zip(turned, plain, strict=True):
        assert torch.equal(a[:, :5], b[:, :5])
        assert not torch.isclose(a[:, 5:], b[:, 5:]).all(-1).any()


@each_form
def test_extremes(centred: bool, device: torch.device) -> None:
    arguments, rope = make(2, 8, 2, 64, 3)
    q, k = arguments[:2]
    for x in (q, k):
        x[0, 0], x[0, 1], x[1, 4] = 0, 5.25, 1e-10
    q[1, 5, 0, 3], k[1, 6, 1, 2], k[0, 7, 0, 9] = float("nan"), float("inf"), -float("inf")
    arguments = [argument.to(device) for argument in arguments]
    rope = tuple(t.to(device) for t in rope)
    got, want = (f(*arguments, rope, text_len=3, eps=EPS, centred=centred) for f in (qk_norm_rope, ops.qk_norm_rope))
    assert_same_specials(got, want)


@pytest.mark.parametrize("rotate", [True, False], ids=["rope", "plain"])
def test_the_forms_agree_on_rows_without_a_mean(rotate: bool) -> None:
    """In fp64: LayerNorm of a row is RMSNorm of the row less its mean."""
    arguments, rope = make(2, 9, 3, 64, 4)
    q, k, *affine = (argument.double() for argument in arguments)
    table = rope if rotate else None
    layer = ops.qk_norm_rope(q, k, *affine, table, text_len=4, eps=EPS)
    q, k = (x - x.mean(-1, keepdim=True) for x in (q, k))
    rms = ops.qk_norm_rope(q, k, *affine, table, text_len=4, eps=EPS, centred=True)
    for got, want in zip(rms, layer, strict=True):
        assert got.dtype == torch.float64
        assert rel_rms(got, want) <= tolerances.QK_NORM_FP64


def test_the_centred_form_subtracts_no_mean(device: torch.device) -> None:
    arguments, _ = make(2, 9, 3, 64, 4)
    q, k, *affine = (argument.to(device) for argument in arguments)
    got = qk_norm_rope(q, k, *affine, None, text_len=4, eps=EPS, centred=True)
    for g, x, weight, bias in zip(got, (q, k), affine[::2], affine[1::2], strict=True):
        wide = x.double()
        want = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight + bias
        assert rel_rms(g, want) <= tolerances.KERNEL_FP32


def test_a_centred_projection_needs_no_mean(device: torch.device) -> None:
    """LayerNorm of a projection is RMSNorm of the projection whose rows are centred over each head."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(2 * 4 * 64, 32, generator=generator), torch.randn(2 * 4 * 64, generator=generator)
    x = torch.randn(2, 9, 32, generator=generator)
    arguments, rope = make(2, 9, 4, 64, 2)

    def centre(t: Tensor) -> Tensor:
        heads = t.unflatten(0, (8, 64))
        return (heads - heads.mean(1, keepdim=True)).flatten(0, 1)

    affine = [a.to(device) for a in arguments[2:]]
    rope = tuple(t.to(device) for t in rope)
    whole, centred = (
        torch.nn.functional.linear(x.double(), w.double(), b.double()).float().unflatten(-1, (2, 4, 64)).to(device)
        for w, b in ((weight, bias), (centre(weight), centre(bias)))
    )
    want = ops.qk_norm_rope(*whole.double().unbind(2), *(a.double() for a in affine), rope, text_len=2, eps=EPS)
    got = qk_norm_rope(*centred.unbind(2), *affine, rope, text_len=2, eps=EPS, centred=True)
    for g, w in zip(got, want, strict=True):
        assert rel_rms(g, w) <= tolerances.KERNEL_FP32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 6, 16)}, "q: got shape"),
        ({"q": torch.zeros(1, 6, 2, 8, dtype=torch.float64)}, "q: got dtype float64"),
        ({"q": torch.zeros(1, 6, 8, 2).transpose(2, 3)}, "q: got strides"),
        ({"k": torch.zeros(1, 7, 2, 8)}, "k: got shape"),
        ({"k": torch.zeros(1, 6, 2, 8, dtype=torch.float16)}, "k: got dtype float16"),
        ({"k": torch.zeros(1, 6, 8, 2).transpose(2, 3)}, "k: got strides"),
        ({"k": torch.zeros(1, 6, 2, 8, device="meta")}, "k: got device meta"),
        ({"q_weight": torch.zeros(9)}, "q_weight: got shape"),
        ({"q_bias": torch.zeros(8, device="meta")}, "q_bias: got device meta"),
        ({"k_weight": torch.zeros(8, dtype=torch.int64)}, "k_weight: got dtype int64"),
        ({"k_bias": torch.zeros(16)[::2]}, "k_bias: got strides"),
        ({"rope": (torch.zeros(4, 4), torch.zeros(5, 4))}, r"rope\[1\]: got shape"),
        ({"rope": (torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(4, 4))}, r"rope\[0\]: got dtype bfloat16"),
        ({"rope": (torch.zeros(4, 8)[:, ::2], torch.zeros(4, 4))}, r"rope\[0\]: got strides"),
        ({"text_len": -1}, "text_len: got -1"),
        ({"text_len": 7}, "text_len: got 7, want 0 to 6"),
    ],
)
def test_refusals(change: dict, message: str, device: torch.device) -> None:
    arguments = {
        **{name: torch.zeros(1, 6, 2, 8) for name in "qk"},
        **{name: torch.zeros(8) for name in ("q_weight", "q_bias", "k_weight", "k_bias")},
        "rope": (torch.zeros(4, 4), torch.zeros(4, 4)),
        "text_len": 2,
    } | change

    def place(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(place(item) for item in value)
        return value.to(device) if isinstance(value, Tensor) and not value.is_meta else value

    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**{name: place(value) for name, value in arguments.items()}, eps=EPS)


def test_odd_heads_cannot_be_rotated(device: torch.device) -> None:
    q, affine = torch.zeros(1, 2, 1, 7, device=device), torch.zeros(7, device=device)
    table = torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match="q: got head_dim 7 with rope, want an even one"):
        qk_norm_rope(q, q, affine, affine, affine, affine, (table, table), text_len=0, eps=EPS)
