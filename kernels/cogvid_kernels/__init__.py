"""Triton kernels for CogVideoX, one file per operation; they import torch and triton only.

They run on NVIDIA GPUs of compute capability 8.0 or later, and on a CPU in Triton's interpreter (TRITON_INTERPRET=1 set
before the import). On any other device a call raises ValueError before it launches anything.

A function and its file share a name: `cogvid_kernels.attention` is the function, and
`from cogvid_kernels.attention import VARIANTS` imports from the file.

Each function is also an operator of torch, `torch.ops.cogvid_kernels.attention`, so FakeTensor, torch.compile and
torch.export work with it; that costs the host about 8 us per call (kernels/RESULTS.md). gate_residual, linear_gelu and
rms_norm are differentiable; a backward pass through the others raises.

`cogvid_kernels.bench` is a program that checks and times them, and functions of one's own; it needs cogvid.
"""

from cogvid_kernels.attention import attention
from cogvid_kernels.group_norm_silu import channel_statistics, group_norm_silu, norm_silu, spatial_norm_silu
from cogvid_kernels.layer_norm_modulate import gate_residual, gate_residual_norm_modulate, layer_norm_modulate
from cogvid_kernels.linear_gelu import linear_gelu
from cogvid_kernels.qk_norm_rope import qk_norm_rope
from cogvid_kernels.rms_norm import rms_norm

__all__ = [
    "attention",
    "channel_statistics",
    "gate_residual",
    "gate_residual_norm_modulate",
    "group_norm_silu",
    "layer_norm_modulate",
    "linear_gelu",
    "norm_silu",
    "qk_norm_rope",
    "rms_norm",
    "spatial_norm_silu",
]
