"""How q, k and v are given to the copy engine of Hopper and later (TMA)."""

from torch import Tensor


def heads_first(x: Tensor) -> tuple[Tensor, list[int]]:
    """Return `[B, N, H, hd]` as `[B, H, N, hd]`, and strides of it that a TMA descriptor takes.

    Tokens are next to channels then, so that a block is a plain matrix; a descriptor's strides may have any order. The
    stride of an axis of size 1 is never used and may be any number, but a descriptor wants 16 bytes of all of them.
    """
    view = x.transpose(1, 2)
    sizes, strides = view.shape[:3], view.stride()[:3]
    unused = 16 // x.element_size()
    return view, [*(stride if size > 1 else unused for size, stride in zip(sizes, strides, strict=True)), 1]
