"""The VAE's norms against `cogvid.ops` and fp64: layouts, odd frame counts, statistics that cancel, refusals."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvid import ops
from cogvid_kernels import channel_statistics, group_norm_silu, norm_silu, spatial_norm_silu
from cogvid_kernels._tiles import INTERPRETER, TILES, Tile
from measure import rel_rms
from tests.kernels.accuracy import DTYPES, assert_accurate, assert_same_specials, randn
from tests.tolerances import KERNEL_FP32

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
EPS = 1e-6

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def make(
    shape: tuple[int, int, int, int, int], latent: tuple[int, int, int], layout: torch.memory_format
) -> list[Tensor]:
    """Return x, weight, bias, and scale and shift as the model makes them: channels-last views of a linear."""
    batch, channels = shape[:2]
    x = (randn(*shape) * 2 + 1).contiguous(memory_format=layout)
    scale, shift = (randn(batch, *latent, channels, seed=3 + i).movedim(-1, 1) for i in range(2))
    return [x, 1 + 0.3 * randn(channels, seed=1), randn(channels, seed=2), scale, shift]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@each_layout
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 4, 1, 1, 2), 2), ((3, 24, 3, 7, 5), 4), ((1, 8, 9, 24, 40), 8), ((2, 96, 2, 6, 10), 32)],
    ids=["one-pixel-pair", "B3-C24", "several-splits", "B2-C96"],
)
@pytest.mark.every(3)
def test_group_norm(
    shape: tuple[int, int, int, int, int], groups: int, layout: torch.memory_format, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    x, weight, bias, *_ = make(shape, (1, 1, 1), layout)
    assert_accurate("group_norm_silu", x, weight, bias, num_groups=groups, eps=EPS, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_layout
@pytest.mark.parametrize(
    ("frames", "latent_frames"),
    [(1, 1), (2, 2), (3, 3), (5, 3), (9, 3), (4, 2), (8, 2), (7, 4)],
    ids=lambda count: str(count),
)
def test_spatial_norm(
    frames: int, latent_frames: int, layout: torch.memory_format, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = make((2, 24, frames, 6, 10), (latent_frames, 3, 5), layout)
    assert_accurate("spatial_norm_silu", *arguments, num_groups=4, eps=EPS, device=device, dtype=dtype)


@pytest.mark.parametrize("up", [1, 2, 4, 8])
def test_every_upsampling(up: int, device: torch.device) -> None:
    arguments = make((1, 8, 5, 2 * up, 3 * up), (2, 2, 3), torch.channels_last_3d)
    assert_accurate("spatial_norm_silu", *arguments, num_groups=2, eps=EPS, device=device, dtype=torch.float32)


def test_latents_of_any_strides(device: torch.device) -> None:
    x, weight, bias, scale, shift = make((2, 8, 5, 6, 10), (3, 3, 5), torch.channels_last_3d)
    scale = scale.contiguous().to(device)
    shift = randn(2, 16, 6, 6, 10, seed=9)[:, ::2, ::2, ::2, ::2].to(device)
    arguments = [x, weight, bias, scale, shift]
    assert_accurate("spatial_norm_silu", *arguments, num_groups=2, eps=EPS, device=device, dtype=torch.float32)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")],
)
@each_layout
@pytest.mark.slow
def test_tiles_of_a_gpu(
    layout: torch.memory_format, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU takes one row of pixels a program, the interpreter many; here it takes one too."""
    for (operation, _), tiles in TILES.items():
        if operation.startswith("group_norm"):
            monkeypatch.setitem(tiles, INTERPRETER, tiles[90])
    assert TILES["group_norm/apply", "contiguous"][INTERPRETER].blocks["ROWS"] == 1
    arguments = make((2, 24, 5, 6, 10), (3, 3, 5), layout)
    options = {"num_groups": 4, "eps": EPS, "device": device, "dtype": dtype}
    assert_accurate("group_norm_silu", *arguments[:3], **options)
    assert_accurate("spatial_norm_silu", *arguments, **options)


def far_apart(x: Tensor, stride_c: int, stride_p: int, file: Path) -> Tensor:
    """Return x `[1, C, T, H, W]` with such strides, in a sparse file: only the pages touched take room."""
    _, channels, frames, height, width = x.shape
    size = (channels - 1) * stride_c + (frames * height * width - 1) * stride_p + 1
    storage = torch.from_file(str(file), shared=True, size=size, dtype=torch.float16)
    strides = (0, stride_c, height * width * stride_p, width * stride_p, stride_p)
    return storage.as_strided(x.shape, strides).copy_(x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU cannot reach a file")
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("spatial", [False, True], ids=["group", "spatial"])
@pytest.mark.parametrize(
    ("stride_c", "stride_p"), [(1, 2**29), (2**30 + 1, 1), (2**30 + 1, 2**28)], ids=["positions", "channels", "both"]
)
def test_offsets_past_int32(
    stride_c: int, stride_p: int, spatial: bool, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor small enough for a test has such strides and a layout that is taken: the kernels are launched here."""
    kernels = importlib.import_module("cogvid_kernels.group_norm_silu")
    x, weight, bias, *latents = make((1, 4, 1, 2, 4), (1, 1, 2), torch.contiguous_format)
    x = x.half()
    scale, shift = None, None
    if spatial:
        files = (tmp_path / "scale", tmp_path / "shift")
        scale, shift = (far_apart(t.half(), 2**30 + 3, 2**30 + 1, file) for t, file in zip(latents, files, strict=True))
        want = ops.spatial_norm_silu(x.double(), weight, bias, scale, shift, num_groups=2, eps=EPS)
    else:
        want = ops.group_norm_silu(x.double(), weight, bias, num_groups=2, eps=EPS)
    far = far_apart(x, stride_c, stride_p, tmp_path / "x")
    strides = {"stride_c": stride_c, "stride_p": stride_p}
    tile = Tile({"BLOCK_P": 4, "BLOCK_C": 4, "ROWS": rows})
    monkeypatch.setitem(TILES["group_norm/apply", "contiguous"], INTERPRETER, tile)

    statistics = kernels._statistics_arguments(x, INTERPRETER) | strides | {"x": far}
    means, squares = (torch.full((1, 1, 4), torch.nan) for _ in range(2))
    kernels._statistics_kernel[1, 1, 1](means=means, squares=squares, **statistics)
    groups = [torch.full((1, 2), torch.nan) for _ in range(2)]
    merge = kernels._merge_arguments(means, squares, *groups, x, statistics["span"], EPS)
    kernels._merge_kernel[2, 1](**merge)
    apply = kernels._apply_arguments(x, x, *groups, weight, bias, scale, shift, INTERPRETER)
    programs = -(-apply["num_rows"] // rows) * -(-apply["width"] // 4)
    kernels._apply_kernel[programs, 1, 1](**apply | strides | {"x": far, "out": far})
    assert rel_rms(far, want) <= 1e-3  # one rounding to fp16


def test_statistics_are_fp32_whatever_the_default(device: torch.device) -> None:
    x, weight, bias, *_ = (t.to(device) for t in make((1, 8, 3, 24, 40), (1, 1, 1), torch.channels_last_3d))
    want = group_norm_silu(x, weight, bias, num_groups=4, eps=EPS)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = group_norm_silu(x, weight, bias, num_groups=4, eps=EPS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


@each_layout
def test_the_layout_is_kept(layout: torch.memory_format, device: torch.device) -> None:
    arguments = [t.to(device) for t in make((2, 8, 3, 4, 6), (2, 2, 3), layout)]
    assert group_norm_silu(*arguments[:3], num_groups=2, eps=EPS).stride() == arguments[0].stride()
    assert spatial_norm_silu(*arguments, num_groups=2, eps=EPS).stride() == arguments[0].stride()


@each_layout
@pytest.mark.parametrize("mean", [100.0, 10000.0])
@pytest.mark.every(2)
def test_a_large_mean_does_not_cancel(mean: float, layout: torch.memory_format, device: torch.device) -> None:
    """A naive E[x^2] - E[x]^2 in fp32 has no correct digit at a mean of 10,000."""
    x, weight, bias, *_ = make((1, 8, 9, 24, 40), (1, 1, 1), layout)
    x = (x + mean).to(device)
    weight, bias = weight.to(device), bias.to(device)
    got = group_norm_silu(x, weight, bias, num_groups=4, eps=EPS)
    want = ops.group_norm_silu(x.double(), weight.double(), bias.double(), num_groups=4, eps=EPS)
    # The mean is one fp32 number: half a unit in its last place is 6e-8 of it, whatever the spread.
    assert rel_rms(got, want) <= 1e-7 * mean


@each_layout
@pytest.mark.parametrize("mean", [0.0, 10.0])
@pytest.mark.every(3)
def test_the_two_halves(mean: float, layout: torch.memory_format, device: torch.device) -> None:
    """The statistics are those of the reference, and a norm from them is the whole one."""
    arguments = make((2, 8, 9, 24, 40), (3, 12, 20), layout)
    arguments[0] += mean
    want = ops.channel_statistics(arguments[0].double())
    x, weight, bias, scale, shift = (t.to(device) for t in arguments)
    found = channel_statistics(x)
    assert rel_rms(found.cpu(), want) <= KERNEL_FP32
    options: Any = {"num_groups": 4, "eps": EPS}
    whole = group_norm_silu(x, weight, bias, **options)
    assert rel_rms(norm_silu(x, found, weight, bias, **options), whole) <= KERNEL_FP32
    whole = spatial_norm_silu(x, weight, bias, scale, shift, **options)
    assert rel_rms(norm_silu(x, found, weight, bias, scale, shift, **options), whole) <= KERNEL_FP32


def test_what_is_no_statistics_is_refused(device: torch.device) -> None:
    x, weight, bias, scale, _ = (t.to(device) for t in make((1, 8, 2, 6, 10), (1, 3, 5), torch.channels_last_3d))
    options: Any = {"num_groups": 4, "eps": EPS}
    with pytest.raises(ValueError, match=r"^statistics: got torch.float32 on .*, want float64 on "):
        norm_silu(x, channel_statistics(x).float(), weight, bias, **options)
    with pytest.raises(ValueError, match=r"^statistics: got shape \[2, 1, 4\], want \[2, 1, 8\]"):
        norm_silu(x, channel_statistics(x)[..., :4], weight, bias, **options)
    with pytest.raises(ValueError, match=r"^modulation: got 1 tensors, want scale and shift or none"):
        norm_silu(x, channel_statistics(x), weight, bias, scale, **options)


def test_channels_of_a_group_with_different_means(device: torch.device) -> None:
    x, weight, bias, *_ = make((1, 8, 2, 24, 40), (1, 1, 1), torch.channels_last_3d)
    x = x + torch.arange(8).view(8, 1, 1, 1) * 30
    assert_accurate("group_norm_silu", x, weight, bias, num_groups=2, eps=EPS, device=device, dtype=torch.float32)


@each_layout
def test_extremes(layout: torch.memory_format, device: torch.device) -> None:
    x, weight, bias, scale, shift = (t.to(device) for t in make((2, 12, 3, 8, 6), (2, 4, 3), layout))
    x[0, :3], x[0, 3:6] = 0, 4.5  # zero variance
    x[0, 7, 1, 2, 3], x[1, 1, 2, 3, 4], x[1, 4, 0, 0, 0] = float("nan"), float("inf"), -float("inf")
    x[1, 6:9] *= 1e12
    got, want = (
        [
            owner[0](*(t.to(dtype) for t in (x, weight, bias)), num_groups=4, eps=EPS),
            owner[1](*(t.to(dtype) for t in (x, weight, bias, scale, shift)), num_groups=4, eps=EPS),
        ]
        # In fp64, because x * gain - mean * gain of the fp32 reference cancels where the variance is zero.
        for owner, dtype in (
            ((group_norm_silu, spatial_norm_silu), torch.float32),
            ((ops.group_norm_silu, ops.spatial_norm_silu), torch.float64),
        )
    )
    assert_same_specials(got, [w.float() for w in want])


def test_silu_of_large_values(device: torch.device) -> None:
    x, weight, bias, *_ = make((1, 4, 1, 4, 4), (1, 1, 1), torch.contiguous_format)
    assert_accurate("group_norm_silu", x, weight * 200, bias, num_groups=2, eps=EPS, device=device, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 4, 3, 4)}, "x: got"),
        ({"x": torch.zeros(1, 4, 3, 4, 4, dtype=torch.float64)}, "x: got dtype float64"),
        ({"x": torch.zeros(1, 4, 3, 4, 8)[..., ::2]}, "x: got strides .* contiguous or channels-last"),
        ({"x": torch.zeros(1, 4, 0, 4, 4)}, "x: got shape"),
        ({"weight": torch.zeros(5)}, "weight: got shape"),
        ({"bias": torch.zeros(4, device="meta")}, "bias: got device meta"),
        ({"num_groups": 3}, "num_groups: got 3, want a divisor of 4"),
        ({"num_groups": 0}, "num_groups: got 0"),
        ({"scale": torch.zeros(1, 5, 2, 2, 2)}, "scale: got shape"),
        ({"scale": torch.zeros(1, 4, 2, 2, 2, dtype=torch.int64)}, "scale: got dtype"),
        ({"shift": torch.zeros(1, 4, 2, 2, 2, device="meta")}, "shift: got device meta"),
        ({"shift": torch.zeros(1, 4, 2, 1, 2)}, "shift: got shape .* that of scale"),
        ({"scale": torch.zeros(1, 4, 2, 3, 2)}, "scale: got t, h, w = 2, 3, 2 .* divisors of H and W"),
        ({"scale": torch.zeros(1, 4, 4, 2, 2)}, "scale: got t, h, w = 4, 2, 2"),
        ({"scale": torch.zeros(1, 4, 1, 2, 2)}, "scale: got t, h, w = 1, 2, 2 .* want t from 2"),
    ],
)
def test_refusals(change: dict, message: str, device: torch.device) -> None:
    arguments = {
        "x": torch.zeros(1, 4, 3, 4, 4),
        "weight": torch.zeros(4),
        "bias": torch.zeros(4),
        "scale": torch.zeros(1, 4, 2, 2, 2),
        "shift": torch.zeros(1, 4, 2, 2, 2),
        "num_groups": 2,
    } | change
    arguments = {k: v.to(device) if isinstance(v, Tensor) and not v.is_meta else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        spatial_norm_silu(**arguments, eps=EPS)
