"""What a kernel must do differently in Triton's interpreter (3.6 to 3.9) to compute what the GPU computes.

The interpreter keeps bf16 as 16-bit integers: its dot multiplies those integers, and its conversion from fp32 truncates
instead of rounding. Kernels call these two functions; compiled, they are the plain operations.
"""

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction


@triton.jit
def _nothing():
    pass


# Whether these kernels were decorated under TRITON_INTERPRET=1.
INTERPRETED: tl.constexpr = tl.constexpr(not isinstance(_nothing, JITFunction))


@triton.jit
def dot(x, y, acc):
    """Return `x @ y + acc` in fp32 (not TF32); products of bf16 and fp16 are exact in fp32, so widening is safe."""
    if INTERPRETED:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Convert fp32 to dtype, to the nearest and ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        # Add half a unit (less one where the kept part is even), so that truncation rounds. NaN stays as it is: the sum
        # could carry into its exponent.
        nearest = bits + (0x7FFF + ((bits >> 16) & 1))
        return tl.where(x == x, nearest, bits).to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)
