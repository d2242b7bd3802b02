"""Fused attention against `cogvid.ops` and fp64: every variant, dtype, size, stride; infinities, NaN, loose bounds."""

import importlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvid.ops import Ops
from cogvid_kernels._key_norms import largest_key_norms
from cogvid_kernels.attention import VARIANTS, Variant, attention
from measure import rel_rms
from tests import tolerances

# The interpreter is NumPy, which warns of the overflows that these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_qkv(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Tensor:
    """Return `[B, N, 3, H, hd]` with layer-normed q and k, as the model makes them: a real spread of logits."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator)
    qkv[:, :, :2] = torch.nn.functional.layer_norm(qkv[:, :, :2], (head_dim,)) * 1.3
    return qkv.to(device, dtype)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attend in fp64; return `[B, N, H * hd]` and the log-sum-exp `[B, H, N]`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * scale
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v.double()).flatten(2), logits.logsumexp(-1)


def assert_accurate(got: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Hold the output against fp64: an absolute bound in fp32, below that twice the error of PyTorch's own op."""
    want, _ = exact(q, k, v)
    error = rel_rms(got, want)
    if q.dtype == torch.float32:
        assert error <= tolerances.ATTENTION_FP32, error
    else:
        ours_over_torch = error / max(rel_rms(Ops.torch().attention(q, k, v), want), 1e-9)
        assert ours_over_torch <= tolerances.ATTENTION_LOW_PRECISION, ours_over_torch
    assert got.dtype == q.dtype
    assert got.shape == (q.shape[0], q.shape[1], q.shape[2] * q.shape[3])
    assert got.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads"),
    [(1, 1, 2), (3, 17, 1), (2, 32, 3), (2, 63, 2), (1, 226, 1), (1, 300, 1)],
    ids=["B1-N1", "B3-N17", "B2-N32", "B2-N63", "B1-N226", "B1-N300"],
)
@pytest.mark.every(2)
def test_sizes(batch: int, tokens: int, heads: int, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = make_qkv(batch, tokens, heads, 64, dtype, device).unbind(2)
    assert_accurate(attention(q, k, v), q, k, v)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if VARIANTS[name].schedule != "ws"])
@pytest.mark.every(2)
def test_variants(variant: str, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = make_qkv(2, 77, 2, 64, dtype, device).unbind(2)
    if dtype == torch.float32 and VARIANTS[variant].load == "tma":
        with pytest.raises(ValueError, match=r"variant: got .* with torch.float32"):
            attention(q, k, v, variant=variant)
        return
    got, lse = attention(q, k, v, variant=variant, return_lse=True)
    assert_accurate(got, q, k, v)
    want = exact(q, k, v)[1]
    assert rel_rms(lse, want) <= tolerances.ATTENTION_FP32
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("head_dim", [8, 32, 80, 96, 128])
@pytest.mark.parametrize(
    ("variant", "dtype"), [("pointer", torch.float32), ("tma", torch.bfloat16)], ids=["fp32", "bf16"]
)
def test_head_dims(head_dim: int, variant: str, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = make_qkv(1, 45, 2, head_dim, dtype, device).unbind(2)
    assert_accurate(attention(q, k, v, variant=variant), q, k, v)


@pytest.mark.parametrize("variant", ["pointer", "tma"])
def test_strides(variant: str, device: torch.device) -> None:
    dtype = torch.float32 if variant == "pointer" else torch.bfloat16
    heads_first = make_qkv(2, 40, 3, 64, dtype, device)[:, :, 0].transpose(1, 2).contiguous()
    q = heads_first.transpose(1, 2)  # strides of [B, H, N, hd]
    k = make_qkv(2, 80, 6, 64, dtype, device, seed=1)[:, ::2, 1, ::2]  # every other token and head of a packed tensor
    v = make_qkv(1, 40, 3, 64, dtype, device, seed=2)[:, :, 2].expand(2, -1, -1, -1)  # batch stride 0
    assert_accurate(attention(q, k, v, variant=variant), q, k, v)


def test_other_key_count_and_scale(device: torch.device) -> None:
    q = make_qkv(2, 19, 2, 64, torch.float32, device)[:, :, 0]
    k, v = make_qkv(2, 50, 2, 64, torch.float32, device, seed=1).unbind(2)[1:]
    got, lse = attention(q, k, v, scale=0.3, return_lse=True)
    want, want_lse = exact(q, k, v, scale=0.3)
    assert rel_rms(got, want) <= tolerances.ATTENTION_FP32
    assert rel_rms(lse, want_lse) <= tolerances.ATTENTION_FP32


def test_two_halves_merge_by_log_sum_exp(device: torch.device) -> None:
    q, k, v = make_qkv(1, 50, 2, 64, torch.float32, device).unbind(2)
    parts = [attention(q, k[:, half], v[:, half], return_lse=True) for half in (slice(0, 21), slice(21, None))]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)  # [2, B, H, N]
    merged = sum(
        out.unflatten(2, (2, 64)) * weight.transpose(1, 2)[..., None]
        for (out, _), weight in zip(parts, weights, strict=True)
    )
    assert rel_rms(merged.flatten(2), exact(q, k, v)[0]) <= tolerances.ATTENTION_FP32


def test_offsets_past_int32(device: torch.device) -> None:
    """Batch 2 begins 2**31 elements in: a 32-bit offset would read elsewhere. Only the pages touched take memory."""
    if device.type == "cuda":
        storage = torch.zeros(2**31 + 2**20, dtype=torch.float16, device=device)
    else:
        storage = torch.from_numpy(np.zeros(2**31 + 2**20, dtype=np.float16))
    qkv = storage.as_strided((3, 17, 3, 1, 64), (2**30, 192, 64, 64, 1))
    qkv.copy_(make_qkv(3, 17, 1, 64, torch.float16, device))
    q, k, v = qkv.unbind(2)
    assert_accurate(attention(q, k, v), q, k, v)


@pytest.mark.parametrize("variant", ["pointer", "pointer_bounded"])
@pytest.mark.parametrize("case", ["equal", "far-apart", "all-low"])
def test_extreme_logits(case: str, variant: str, device: torch.device) -> None:
    q, k, v = make_qkv(1, 70, 1, 64, torch.float32, device).unbind(2)
    if case == "equal":
        k = k[:, :1].expand(-1, 70, -1, -1)  # every logit of a row is the same: the mean of v
    else:
        # q along the first channel: logit = 8 * k[..., 0] / 8, here +-80, or -80 for all but rounding.
        q, k = torch.zeros_like(q), torch.zeros_like(k)
        q[..., 0] = 8.0
        k[..., 0] = -80.0 if case == "all-low" else torch.linspace(-80, 80, 70, device=device)[:, None]
    assert_accurate(attention(q, k, v, variant=variant), q, k, v)


@pytest.mark.parametrize("variant", ["pointer", "pointer_bounded"])
@pytest.mark.parametrize(
    "case",
    [
        "nan-q",
        "nan-k",
        "nan-v",
        "inf-q",
        "inf-k",
        "inf-v",
        "first-keys-minus-inf",
        "last-keys-minus-inf",
        "all-minus-inf",
    ],
)
@pytest.mark.every(3)
def test_infinity_and_nan_as_in_the_reference(case: str, variant: str, device: torch.device) -> None:
    q, k, v = (x.clone() for x in make_qkv(2, 70, 1, 64, torch.float32, device).unbind(2))
    if case.endswith("minus-inf"):
        q[..., 0], q[..., 1:] = 1.0, 0.0
        k[..., 1:] = 0.0
        start, stop = {"first": (0, 40), "last": (40, 70), "all": (0, 70)}[case.split("-")[0]]
        k[0, start:stop, :, 0] = -torch.inf
        q[..., 1:] = 0.0
    else:
        value, name = case.split("-")
        {"q": q, "k": k, "v": v}[name][0, 41, 0, 5] = float(value)
    want, _ = exact(q, k, v)
    got = attention(q, k, v, variant=variant)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite()
    assert rel_rms(got[finite], want[finite]) <= tolerances.ATTENTION_FP32


def scale_the_bound(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Let the bounded variants get a bound that is wrong by this factor."""
    module = importlib.import_module("cogvid_kernels.attention")
    monkeypatch.setattr(module, "largest_key_norms", lambda k: largest_key_norms(k) * factor)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("factor", [0.0, 1e-3, 30.0, 1e30, float("inf"), float("nan")])
def test_any_bound_is_safe(
    factor: float, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound far too loose, too small, infinite or NaN must give the online form's bits."""
    q, k, v = make_qkv(1, 40, 1, 64, dtype, device).unbind(2)
    q = q * 30  # so that the wrong bound is wrong by hundreds in log2
    scale_the_bound(monkeypatch, factor)
    got, lse = attention(q, k, v, variant="pointer_bounded", return_lse=True)
    want, want_lse = attention(q, k, v, variant="pointer", return_lse=True)
    assert torch.equal(got, want)
    assert torch.equal(lse, want_lse)


@pytest.mark.parametrize("factor", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
def test_a_bound_a_little_too_small_in_fp16(
    factor: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that overflow fp16 but not the fp32 row sum must not come out as infinity."""
    q, k, v = make_qkv(1, 40, 1, 64, torch.float16, device).unbind(2)
    q = q * 8
    scale_the_bound(monkeypatch, factor)
    assert_accurate(attention(q, k, v, variant="pointer_bounded"), q, k, v)


def test_bounded_falls_back_by_tile(device: torch.device) -> None:
    """Queries opposite to every key leave the range; their tile alone takes the online form, the others do not."""
    q, k, v = (x.clone() for x in make_qkv(1, 96, 1, 64, torch.float32, device).unbind(2))
    k[:] = k[:, :1] + 0.1 * k
    q[:, 32:64] = -20 * k[:, :1]  # true maximum about -|q||k|: twice the bound below the bound
    bounded, online = (attention(q, k, v, variant=name) for name in ("pointer_bounded", "pointer"))
    assert_accurate(bounded[:, :32], q[:, :32], k, v)
    assert torch.equal(bounded[:, 32:64], online[:, 32:64])
    assert not torch.equal(bounded[:, :32], online[:, :32])  # another shift: other bits


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 64), (300, 64), (129, 80), (40, 8)])
def test_largest_key_norms(tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    k = make_qkv(2, tokens, 3, head_dim, dtype, device)[:, :, 2]
    want = k.double().norm(dim=-1).amax(1)
    assert rel_rms(largest_key_norms(k), want) <= tolerances.KERNEL_FP32


def test_names_of_variants() -> None:
    """Benchmarks and `variant=` take these names."""
    assert list(VARIANTS) == [
        "pointer", "pointer_bounded", "tma", "tma_bounded", "tma_persistent", "tma_persistent_bounded", "tma_ahead",
        "tma_ahead_bounded", "tma_ws_bounded",
    ]  # fmt: skip
    assert VARIANTS["tma_persistent_bounded"] == Variant("tma", "persistent", bounded=True)


def test_bounded_softmax_in_fp64() -> None:
    """Softmax with the Cauchy-Schwarz shift in base 2 is the softmax; the bound holds; little weight is lost."""
    q, k, v = make_qkv(1, 200, 2, 64, torch.float64, torch.device("cpu")).unbind(2)
    scale_log2 = 64**-0.5 * math.log2(math.e)
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale_log2
    bound = q.norm(dim=-1).transpose(1, 2) * k.norm(dim=-1).amax(1)[..., None] * scale_log2  # [B, H, N]
    assert (logits <= bound[..., None]).all()
    weights = torch.exp2(logits - bound[..., None])
    out = torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), v).flatten(2)
    assert rel_rms(out, exact(q, k, v)[0]) <= tolerances.ATTENTION_FP64

    # Rows whose sum is just safe, with every weight below 2**-126 flushed to zero as fp32 does.
    shift = logits.amax(-1) + 79.0
    weights = torch.exp2(logits * 4 - shift[..., None] - 3 * logits.amax(-1, keepdim=True))
    kept = torch.where(weights < 2.0**-126, 0, weights)
    assert (kept.sum(-1) >= 2.0**-80).all()
    assert (1 - kept.sum(-1) / weights.sum(-1)).max() <= 200 * 2.0**-46


def test_folded_scale_in_fp64() -> None:
    """`softmax(scale * s)` is base-2 softmax of `s` with `scale * log2(e)` folded into q, or left as one factor."""
    q, k, v = make_qkv(1, 50, 2, 64, torch.float64, torch.device("cpu")).unbind(2)
    folded = torch.einsum("bnhd,bmhd->bhnm", q * (64**-0.5 * math.log2(math.e)), k)
    weights = torch.exp2(folded - folded.amax(-1, keepdim=True))
    out = torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), v).flatten(2)
    assert rel_rms(out, exact(q, k, v)[0]) <= tolerances.ATTENTION_FP64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 64)}, r"q: got shape \[2, 4, 64\], want \[any, any, any, any\]"),
        ({"q": torch.zeros(1, 4, 2, 64, dtype=torch.float64)}, "q: got dtype float64, want float32"),
        ({"q": torch.zeros(1, 0, 2, 64)}, "q: got shape .* want no size to be zero"),
        ({"q": torch.zeros(1, 4, 64, 2).transpose(2, 3)}, "q: got strides .* want a last stride of 1"),
        ({"k": torch.zeros(1, 4, 2, 32)}, r"k: got shape \[1, 4, 2, 32\], want \[1, any, 2, 64\]"),
        ({"k": torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)}, "k: got dtype bfloat16, want float32"),
        ({"k": torch.zeros(1, 4, 2, 64, device="meta")}, "k: got device meta, want"),
        ({"v": torch.zeros(1, 5, 2, 64)}, r"v: got shape \[1, 5, 2, 64\], want \[1, 4, 2, 64\]"),
        ({"scale": 0.0}, "scale: got 0.0, want a finite number above 0"),
        ({"scale": math.nan}, "scale: got nan"),
        ({"variant": "fastest"}, "variant: got 'fastest', want one of pointer"),
        ({"variant": "tma"}, "variant: got 'tma' with torch.float32"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str, device: torch.device) -> None:
    arguments = {name: torch.zeros(1, 4, 2, 64) for name in "qkv"} | change
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) and value.device.type != "meta" else value
        for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_tma_wants_alignment(device: torch.device) -> None:
    q, k, v = make_qkv(1, 9, 2, 60, torch.bfloat16, device).unbind(2)
    with pytest.raises(ValueError, match=r"q: got address .* multiples of 16 bytes"):
        attention(q, k, v, variant="tma")


def test_tma_takes_axes_of_one_with_any_stride(device: torch.device) -> None:
    """The stride of an axis of size 1 says nothing; a descriptor wants even that to be a multiple of 16 bytes."""
    q, k, v = (x.contiguous() for x in make_qkv(1, 9, 1, 64, torch.bfloat16, device).unbind(2))
    odd = [x.as_strided(x.shape, (3, 64, 5, 1)) for x in (q, k, v)]
    assert torch.equal(attention(*odd, variant="tma"), attention(q, k, v, variant="tma"))
    one_token = [x[:, :1].as_strided((1, 1, 1, 64), (3, 7, 5, 1)) for x in (q, k, v)]
    assert_accurate(attention(*one_token, variant="tma"), *one_token)


def test_wide_heads_are_refused(device: torch.device) -> None:
    q = torch.zeros(1, 4, 1, 192, device=device)
    with pytest.raises(ValueError, match="q: got head_dim 192, want at most 128"):
        attention(q, q, q)
