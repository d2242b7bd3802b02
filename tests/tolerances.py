"""Every tolerance of the test suite: one line of reason and the largest measured value beside each.

`rel rms` is `tests.reference.rel_rms`. fp32 on a CPU unless said otherwise.
"""

# Sampler and text
SAMPLER_FP32 = 5e-7  # rel rms of every state against the diffusers schedulers; a few ulps (measured 0.0, the same bits)
SAMPLER_LOW_PRECISION = 0.5  # our error against fp64 over that of diffusers: our state stays fp32 (measured 0.40)
ADD_NOISE_FP32 = 6e-7  # rel rms; diffusers takes 1 - alpha in fp32, which loses digits near t = 0 (measured 1.8e-7)
