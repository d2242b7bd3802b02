"""Linear and tanh-GELU against `cogvid.ops` and fp64."""

import pytest
import torch
from torch import Tensor

from cogvid import ops
from cogvid_kernels.linear_gelu import linear_gelu
from tests.kernels.accuracy import DTYPES, assert_accurate, assert_same_specials, randn

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make(shape: tuple[int, ...], width: int) -> list[Tensor]:
    return [randn(*shape), randn(width, shape[-1], seed=1) * shape[-1] ** -0.5, randn(width, seed=2)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("shape", "width"), [((1, 1), 1), ((3, 7, 40), 97), ((2, 130, 64), 256), ((33, 16), 9000)], ids=str
)
def test_sizes(shape: tuple[int, ...], width: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_accurate("linear_gelu", *make(shape, width), device=device, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("variant", ["epilogue", "kernel"])
def test_variants(variant: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_accurate("linear_gelu", *make((2, 130, 64), 256), device=device, dtype=dtype, variant=variant)


def test_extremes(device: torch.device) -> None:
    x, weight, bias = (t.to(device) for t in make((6, 8), 16))
    x[0], x[1] = 0, 1e4
    x[2, 3], x[3, 4], x[4, 5] = float("nan"), float("inf"), -1e20
    assert_same_specials([linear_gelu(x, weight, bias)], [ops.linear_gelu(x, weight, bias)])


def test_autocast_converts_as_it_does_for_a_linear(device: torch.device) -> None:
    x, weight, bias = (t.to(device) for t in make((6, 8), 16))
    with torch.autocast(device.type, torch.bfloat16):
        out = linear_gelu(x.bfloat16(), weight, bias)
    assert torch.equal(out, linear_gelu(*(t.bfloat16() for t in (x, weight, bias))))


def test_the_epilogue_is_refused_on_a_cpu() -> None:
    x, weight, bias = make((6, 8), 16)
    with pytest.raises(ValueError, match="variant: got 'epilogue' on cpu, want cuda"):
        linear_gelu(x, weight, bias, variant="epilogue")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, dtype=torch.float64)}, "x: got dtype float64"),
        ({"x": torch.zeros(2, 4, 3).transpose(1, 2)}, "x: got strides"),
        ({"x": torch.tensor(1.0)}, "x: got shape"),
        ({"weight": torch.zeros(5, 3)}, "weight: got shape"),
        ({"weight": torch.zeros(5, 4, dtype=torch.float16)}, "weight: got dtype float16"),
        ({"weight": torch.zeros(4, 5).T}, "weight: got strides"),
        ({"bias": torch.zeros(4)}, "bias: got shape"),
        ({"bias": torch.zeros(5, device="meta")}, "bias: got device meta"),
        ({"variant": "fast"}, "variant: got 'fast', want one of epilogue, kernel"),
    ],
)
def test_refusals(change: dict, message: str, device: torch.device) -> None:
    arguments = {"x": torch.zeros(2, 3, 4), "weight": torch.zeros(5, 4), "bias": torch.zeros(5)} | change
    arguments = {k: v.to(device) if isinstance(v, Tensor) and not v.is_meta else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        linear_gelu(**arguments)
