"""Triton kernels for CogVideoX, one file per operation; they import torch and triton only.

A function and its file share a name: `cogvid_kernels.attention` is the function, and
`from cogvid_kernels.attention import VARIANTS` reaches into the file.

Each function is also an operator of torch, `torch.ops.cogvid_kernels.attention`, which FakeTensor, torch.compile and
torch.export see through; that costs the host about 8 us a call (kernels/RESULTS.md). gate_residual, linear_gelu and
rms_norm are differentiable; a backward pass through the others raises.
"""

from cogvid_kernels.attention import attention
from cogvid_kernels.group_norm_silu import group_norm_silu, spatial_norm_silu
from cogvid_kernels.layer_norm_modulate import gate_residual, gate_residual_norm_modulate, layer_norm_modulate
from cogvid_kernels.linear_gelu import linear_gelu
from cogvid_kernels.qk_norm_rope import qk_norm_rope
from cogvid_kernels.rms_norm import rms_norm

__all__ = [
    "attention",
    "gate_residual",
    "gate_residual_norm_modulate",
    "group_norm_silu",
    "layer_norm_modulate",
    "linear_gelu",
    "qk_norm_rope",
    "rms_norm",
    "spatial_norm_silu",
]
