"""RMSNorm, and LayerNorm with modulation, gate and residual: against `cogvid.ops` and fp64."""

import pytest
import torch
from torch import Tensor

import cogvid_kernels
from cogvid import ops
from measure import rel_rms
from tests import tolerances
from tests.kernels.accuracy import DTYPES, assert_accurate, assert_same_specials, randn

# The interpreter is NumPy, which warns of the overflows that some of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

MODULATE = ("layer_norm_modulate", "gate_residual", "gate_residual_norm_modulate")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 47), (70, 64), (2, 9, 128), (5, 1000), (2, 3, 4096), (3, 4097)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, weight = randn(*shape) * 3 + 1, 1 + 0.3 * randn(shape[-1], seed=1)
    assert_accurate("rms_norm", x, weight, eps=1e-6, device=device, dtype=dtype)


def test_rms_norm_of_a_slice_of_packed_heads(device: torch.device) -> None:
    packed = randn(2, 11, 3, 5, 64).to(device)
    for part in range(3):
        x = packed[:, :, part]
        assert_accurate("rms_norm", x, randn(64, seed=1), eps=1e-6, device=device, dtype=torch.float32)


def test_rms_norm_with_weights_of_another_dtype(device: torch.device) -> None:
    x, weight = randn(6, 96).to(device), randn(96, seed=1).to(device, torch.float16)
    got = cogvid_kernels.rms_norm(x, weight, eps=1e-6)
    assert got.dtype == torch.float32
    assert rel_rms(got, ops.rms_norm(x, weight, eps=1e-6)) <= tolerances.KERNEL_FP32


def test_rms_norm_of_extremes(device: torch.device) -> None:
    x = randn(7, 100).to(device)
    x[0], x[1] = 0, 1e-20
    x[2, 3], x[3, 4], x[4, 5] = float("nan"), float("inf"), -float("inf")
    x[5] = 1e18
    weight = randn(100, seed=1).to(device)
    assert_same_specials([cogvid_kernels.rms_norm(x, weight, eps=1e-6)], [ops.rms_norm(x, weight, eps=1e-6)])


def modulate_arguments(name: str, batch: int, tokens: int, width: int, seed: int = 0) -> list[Tensor]:
    """Return the op's arguments; modulation as the model makes it, views of one linear's output."""
    x, y = (randn(batch, tokens, width, seed=seed + i) * 2 + 0.5 for i in range(2))
    weight, bias = 1 + 0.3 * randn(width, seed=seed + 2), randn(width, seed=seed + 3)
    shift, scale, gate = randn(batch, 2, 3, width, seed=seed + 4).unbind(2)
    return {
        "layer_norm_modulate": [x, weight, bias, shift, scale],
        "gate_residual": [x, y, gate],
        "gate_residual_norm_modulate": [x, y, gate, weight, bias, shift, scale],
    }[name]


def options(name: str, text_len: int) -> dict[str, float]:
    return {"text_len": text_len} | ({} if name == "gate_residual" else {"eps": 1e-5})


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "text_len"),
    [(1, 1, 8, 0), (3, 37, 48, 5), (2, 20, 1920, 7), (2, 17, 3072, 17), (1, 5, 4100, 2)],
    ids=["B1-N1-D8", "B3-N37-D48", "B2-N20-D1920", "B2-N17-D3072-all-text", "B1-N5-D4100"],
)
@pytest.mark.parametrize("name", MODULATE)
def test_modulation(
    name: str, batch: int, tokens: int, width: int, text_len: int, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = modulate_arguments(name, batch, tokens, width)
    assert_accurate(name, *arguments, **options(name, text_len), device=device, dtype=dtype)


@pytest.mark.parametrize("name", MODULATE)
def test_modulation_of_strided_tensors(name: str, device: torch.device) -> None:
    """Tokens out of a longer buffer and of wider rows, one modulation row expanded over both streams."""
    arguments = modulate_arguments(name, 2, 30, 96)
    tokens = 2 if "gate" in name else 1
    arguments[:tokens] = [x[:, 3:20, 7:71] for x in arguments[:tokens]]
    arguments[tokens:] = [p[..., :64] for p in arguments[tokens:]]
    arguments[-1] = arguments[-1][:, :1].expand(-1, 2, -1)
    arguments = [argument.to(device) for argument in arguments]
    assert_accurate(name, *arguments, **options(name, 4), device=device, dtype=torch.float32)


def test_a_large_mean_does_not_cancel(device: torch.device) -> None:
    x = (randn(2, 9, 200) + 3000).to(device)
    _, *rest = (argument.to(device) for argument in modulate_arguments("layer_norm_modulate", 2, 9, 200))
    kwargs = options("layer_norm_modulate", 3)
    want = ops.layer_norm_modulate(x.double(), *(t.double() for t in rest), **kwargs)
    ours, theirs = (rel_rms(o.layer_norm_modulate(x, *rest, **kwargs), want) for o in (cogvid_kernels, ops))
    # The mean itself has only the bits of fp32, so that 1e-7 of 3000 is what can be asked for.
    assert ours <= max(2 * theirs, 1e-4), (ours, theirs)


@pytest.mark.parametrize("name", MODULATE)
def test_modulation_of_extremes(name: str, device: torch.device) -> None:
    arguments = [argument.to(device) for argument in modulate_arguments(name, 2, 12, 72)]
    x = arguments[0]
    x[0, 0], x[0, 1], x[1, 2] = 0, 7.5, 1e-12
    x[0, 4, 3], x[1, 5, 4], x[1, 6, 5] = float("nan"), float("inf"), -float("inf")
    x[1, 7] = 1e15
    kwargs = options(name, 5)
    got, want = (getattr(owner, name)(*arguments, **kwargs) for owner in (cogvid_kernels, ops))
    assert_same_specials(*([r] if isinstance(r, Tensor) else r for r in (got, want)))


def test_the_norm_sees_the_rounded_sum(device: torch.device) -> None:
    arguments = [t.to(device, torch.bfloat16) for t in modulate_arguments("gate_residual_norm_modulate", 2, 9, 64)]
    total, normed = cogvid_kernels.gate_residual_norm_modulate(*arguments, text_len=4, eps=1e-5)
    again = cogvid_kernels.layer_norm_modulate(total, *arguments[3:], text_len=4, eps=1e-5)
    assert torch.equal(normed, again)


def misaligned(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return an fp32 tensor whose address is odd."""
    size = torch.Size(shape).numel()
    data = torch.zeros(4 * size + 4, dtype=torch.uint8)
    return torch.frombuffer(data.numpy(), dtype=torch.float32, offset=1, count=size).view(shape).to(device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8, dtype=torch.float64)}, "x: got dtype float64"),
        ({"x": torch.zeros(8, 3).T}, "x: got strides"),
        ({"x": torch.zeros(0, 8)}, "x: got shape"),
        ({"x": torch.zeros(1, 20000)}, "x: got shape .* at most 16384"),
        ({"x": torch.zeros(4, 5, 6, 16)[::2, ::2, ::2, :8]}, "x: got strides .* at most two"),
        ({"x": "no"}, "x: got str"),
        ({"weight": torch.zeros(7)}, "weight: got shape"),
        ({"weight": torch.zeros(8, device="meta")}, "weight: got device meta"),
        ({"weight": torch.zeros(16)[::2]}, "weight: got strides"),
    ],
    ids=["dtype", "stride", "empty", "wide", "axes", "type", "weight-shape", "weight-device", "weight-stride"],
)
def test_rms_norm_refuses(change: dict, message: str, device: torch.device) -> None:
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(8)} | change
    arguments = {k: v.to(device) if isinstance(v, Tensor) and not v.is_meta else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        cogvid_kernels.rms_norm(**arguments, eps=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="an allocator of CUDA memory gives no odd addresses")
def test_odd_addresses_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="x: got address"):
        cogvid_kernels.rms_norm(misaligned((3, 8), device), torch.zeros(8), eps=1e-6)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("layer_norm_modulate", 0, torch.zeros(2, 6), "x: got shape"),
        ("layer_norm_modulate", 0, torch.zeros(2, 6, 8, dtype=torch.int32), "x: got dtype int32"),
        ("layer_norm_modulate", 0, torch.zeros(2, 8, 6).transpose(1, 2), "x: got strides"),
        ("layer_norm_modulate", 1, torch.zeros(9), "weight: got shape"),
        ("layer_norm_modulate", 2, torch.zeros(8, device="meta"), "bias: got device meta"),
        ("layer_norm_modulate", 3, torch.zeros(2, 8), "shift: got shape"),
        ("layer_norm_modulate", 4, torch.zeros(1, 2, 8), "scale: got shape"),
        ("gate_residual", 1, torch.zeros(2, 6, 8, dtype=torch.float16), "y: got dtype float16"),
        ("gate_residual", 1, torch.zeros(2, 7, 8), "y: got shape"),
        ("gate_residual", 2, torch.zeros(2, 8, 2).transpose(1, 2), "gate: got strides"),
        ("gate_residual_norm_modulate", 2, torch.zeros(2, 3, 8), "gate: got shape"),
    ],
)
def test_modulation_refuses(name: str, place: int, value: Tensor, message: str, device: torch.device) -> None:
    arguments = [argument.to(device) for argument in modulate_arguments(name, 2, 6, 8)]
    arguments[place] = value if value.is_meta else value.to(device)
    with pytest.raises(ValueError, match=message):
        getattr(cogvid_kernels, name)(*arguments, **options(name, 2))


@pytest.mark.parametrize("text_len", [-1, 7])
@pytest.mark.parametrize("name", MODULATE)
def test_text_len_must_fit(name: str, text_len: int, device: torch.device) -> None:
    arguments = [argument.to(device) for argument in modulate_arguments(name, 2, 6, 8)]
    with pytest.raises(ValueError, match=f"text_len: got {text_len}, want 0 to 6"):
        getattr(cogvid_kernels, name)(*arguments, **options(name, text_len))
