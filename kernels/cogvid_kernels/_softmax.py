"""The arithmetic of the bounded softmax, which every attention kernel shares; Triton's interpreter runs it too.

Softmax is in base 2, with a shift per row; the docstring of `attention.py` says why any shift will do.
"""

import triton
import triton.language as tl

_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# The range of row sums in which the bounded form is right (the upper end keeps the accumulator finite).
_SAFE_LOW: tl.constexpr = tl.constexpr(2.0**-80)
_SAFE_HIGH: tl.constexpr = tl.constexpr(2.0**60)
# fp16 ends at 2**16 and loses bits below 2**-14. So weights are lifted to just under the top, and the mean weight must
# be at least 2**-13: its absolute rounding error of 2**-25 is then one unit of fp16's own relative rounding.
_FP16_LIFT: tl.constexpr = tl.constexpr(15.0)
_FP16_SAFE_MEAN: tl.constexpr = tl.constexpr(2.0**-13)


@triton.jit
def bounding_shift(b_q, key_norm, scale_log2):
    """Return per row an upper bound of its logits in base 2, `|q_i| * max_j |k_j| * scale_log2`: [rows] fp32."""
    b_q32 = b_q.to(tl.float32)
    b_shift = tl.sqrt(tl.sum(b_q32 * b_q32, 1)) * key_norm * scale_log2
    if b_q.dtype == tl.float16:
        b_shift -= _FP16_LIFT
    return b_shift


@triton.jit
def mask_keys(b_s, o_n, num_keys):
    """Give no weight to keys after the last one; o_n: [columns], the place of each column's key."""
    return tl.where((o_n < num_keys)[None, :], b_s, float("-inf"))


@triton.jit
def weights(b_s, b_shift, scale_log2):
    """Return `exp2(scale_log2 * s - shift)`: one FMA and one ex2 per score."""
    return tl.exp2(b_s * scale_log2 - b_shift[:, None])


@triton.jit
def rows_are_safe(b_sum, b_acc, num_keys, dtype: tl.constexpr):
    """Say for each row whether the bound was close enough; NaN is not.

    b_sum: [rows] fp32, the row's sum of weights. b_acc: [rows, hd] fp32, its weighted values. dtype: what the weights
    were rounded to.
    """
    safe_low = _SAFE_LOW
    if dtype == tl.float16:
        safe_low = num_keys * _FP16_SAFE_MEAN
    safe = (b_sum >= safe_low) & (b_sum <= _SAFE_HIGH)
    if dtype == tl.float16:
        # A bound that is too small by rounding may make a weight infinite in fp16 while the fp32 sum is not.
        safe = safe & (tl.sum(b_acc * 0.0, 1) == 0.0)
    return safe


@triton.jit
def log_sum_exp(b_shift, b_sum):
    """Return the natural logarithm of each row's sum of exp(logit)."""
    return (b_shift + tl.log2(b_sum)) * _LN2
