"""How the kernels of this directory are judged: against `cogvid.ops` in fp64, and in low precision beside it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import cogvid_kernels
from cogvid import ops
from measure import rel_rms
from tests import tolerances

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moved(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Move tensors, also those in tuples; the dtype is the wanted one, or what it was."""
    if isinstance(value, tuple):
        return tuple(moved(item, device, dtype) for item in value)
    return value.to(device, dtype or value.dtype) if isinstance(value, Tensor) else value


def results(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else value


def assert_accurate(name: str, *arguments: Any, device: torch.device, dtype: torch.dtype, **options: Any) -> None:
    """Run the kernel and the reference of that name on the same arguments and hold the kernel against fp64.

    Tensors keep their strides; those in tuples (the rotary table) stay fp32, as the op wants them.
    """
    arguments = tuple(v.to(device, dtype) if isinstance(v, Tensor) else moved(v, device) for v in arguments)
    reference: Callable[..., Any] = getattr(ops, name)
    got = results(getattr(cogvid_kernels, name)(*arguments, **options))
    own = results(reference(*arguments, **options))
    want = results(reference(*moved(arguments, device, torch.float64), **options))
    assert len(got) == len(want)
    for g, o, w in zip(got, own, want, strict=True):
        assert (g.dtype, g.shape) == (o.dtype, o.shape)
        error = rel_rms(g, w)
        if dtype == torch.float32:
            assert error <= tolerances.KERNEL_FP32, error
        else:
            ratio = error / rel_rms(o, w)
            assert ratio <= tolerances.KERNEL_LOW_PRECISION, ratio


def assert_same_specials(got: Iterable[Tensor], want: Iterable[Tensor]) -> None:
    """Assert NaN where the reference has NaN, the same infinities, and closeness everywhere else."""
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5, equal_nan=True)
