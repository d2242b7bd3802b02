"""What every launcher checks once, at its boundary: a wrong argument is a ValueError that names it.

Shapes, dtypes, devices and strides are also checked where there is no memory (FakeTensor, meta); addresses are not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    name: str,
    tensor: Tensor,
    *,
    shape: Sequence[int | None] | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
    contiguous: bool = False,
    any_strides: bool = False,
) -> None:
    """Raise ValueError unless the tensor is what a kernel can take.

    Args:
        name: the caller's name of the argument.
        shape: wanted sizes; None is any size above zero.
        device: wanted device; None is any.
        contiguous: want every stride packed; otherwise only the last stride must be 1.
        any_strides: the caller checks strides itself.
    """
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: got dtype {_short(tensor.dtype)}, wanted {' or '.join(map(_short, dtypes))}")
    if shape is not None:
        wanted = f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
        fits = len(shape) == tensor.ndim and all(
            size is None or size == got for size, got in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, wanted {wanted}")
    if tensor.numel() == 0:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, wanted no size to be zero")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}, wanted {device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {tensor.stride()}, wanted a contiguous tensor")
    if not any_strides and tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: got strides {tensor.stride()}, wanted a last stride of 1")


def check_alignment(alignment: int | None = None, **tensors: Tensor | None) -> None:
    """Raise ValueError unless addresses and all strides but the last are multiples of `alignment` bytes.

    alignment: None is the size of an element.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        size = tensor.element_size()
        if not is_aligned(tensor, alignment or size):
            raise ValueError(
                f"{name}: got address {tensor.data_ptr():#x} and strides {tensor.stride()} of {size}-byte elements,"
                f" wanted all of them to be multiples of {alignment or size} bytes"
            )


def check_runnable(name: str, tensor: Tensor, kernel: Any) -> None:
    """Raise ValueError where the kernel cannot reach the tensor: only Triton's interpreter runs on a CPU."""
    if tensor.device.type not in ("cuda", "meta") and not is_interpreted(kernel):
        raise ValueError(f"{name}: got device {tensor.device}, wanted cuda (a CPU tensor needs TRITON_INTERPRET=1)")


def is_interpreted(kernel: Any) -> bool:
    """Say whether the kernel was decorated under TRITON_INTERPRET=1."""
    return not isinstance(kernel, JITFunction)


def is_aligned(tensor: Tensor, alignment: int) -> bool:
    """Say whether the address and every stride but the last are multiples of so many bytes."""
    strides = (stride for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1)
    return tensor.data_ptr() % alignment == 0 and all(s * tensor.element_size() % alignment == 0 for s in strides)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
