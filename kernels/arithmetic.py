"""Arithmetic that the kernels of several ops share."""

import triton
import triton.language as tl


@triton.jit
def reciprocal_std(variance, eps):
    """Return 1 / sqrt(variance + eps), rounded correctly: once per group or filter, so that its cost is small.

    A launch passes ``eps`` as float32, the code that torch.compile generates as float64; the square root takes
    only the former.
    """
    return tl.div_rn(1.0, tl.sqrt_rn(variance + tl.cast(eps, tl.float32)))
