"""What every launcher checks before it launches: a wrong argument is a ValueError that names it.

Shapes, dtypes, devices and strides are also checked for tensors without memory (FakeTensor, meta); addresses are not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from cogvid_kernels._tiles import compute_capability

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
        shape: the sizes that it must have; None is any size above zero.
        device: where it must be; None is anywhere.
        contiguous: the tensor must be contiguous; otherwise only the last stride must be 1.
        any_strides: the caller checks the strides itself.
    """
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: got dtype {_short(tensor.dtype)}, want {' or '.join(map(_short, dtypes))}")
    if shape is not None:
        want = f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
        fits = len(shape) == tensor.ndim and all(
            size is None or size == got for size, got in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, want {want}")
    if tensor.numel() == 0:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, want no size to be zero")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}, want {device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {tensor.stride()}, want a contiguous tensor")
    if not any_strides and tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: got strides {tensor.stride()}, want a last stride of 1")


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
                f" want all of them to be multiples of {alignment or size} bytes"
            )


def check_runnable(name: str, tensor: Tensor, kernel: Any) -> None:
    """Raise ValueError unless the kernel can run where the tensor is.

    That is an NVIDIA GPU of compute capability 8.0 or later, or a CPU under Triton's interpreter. AMD's GPUs are "cuda"
    to PyTorch too; a build for them says so in `torch.version.hip`.
    """
    device = tensor.device
    if device.type == "meta":
        return
    if device.type == "cpu":
        if not is_interpreted(kernel):
            raise ValueError(f"{name}: got device cpu, want cuda, or TRITON_INTERPRET=1")
        return
    found = f"device {device}"
    if device.type == "cuda":
        capability = compute_capability(device)
        if torch.version.hip is not None:
            found += f" of ROCm {torch.version.hip}"
        elif capability is not None and capability < (8, 0):
            found += " of compute capability {}.{}".format(*capability)
        else:
            return
    raise ValueError(f"{name}: got {found}, want an NVIDIA GPU of compute capability 8.0 or later")


def is_interpreted(kernel: Any) -> bool:
    """Say whether the kernel was decorated under TRITON_INTERPRET=1."""
    return not isinstance(kernel, JITFunction)


def is_aligned(tensor: Tensor, alignment: int) -> bool:
    """Say whether the address and every stride but the last are multiples of so many bytes."""
    strides = (stride for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1)
    return tensor.data_ptr() % alignment == 0 and all(s * tensor.element_size() % alignment == 0 for s in strides)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
