"""Triton kernels for CogVideoX, one file per operation; they import torch and triton only.

A function and its file share a name: `cogvid_kernels.attention` is the function, and
`from cogvid_kernels.attention import VARIANTS` reaches into the file.
"""

from cogvid_kernels.attention import attention

__all__ = ["attention"]
