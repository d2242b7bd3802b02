"""Every tolerance of the test suite: one line of reason and the largest measured value beside each.

`rel rms` is `tests.reference.rel_rms`. fp32 on a CPU unless said otherwise.
"""
