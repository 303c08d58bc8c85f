"""The ops that the layers call, each with its checks, its contract and its dispatch to a backend.

Each is imported from its module, ``bitfast.ops.<op>``. Importing the package registers the kernels of all.
"""

from bitfast.ops import (  # noqa: F401
    convolution_gradients,
    group_norm_act,
    norm_convolution,
    norm_convolution_cuda,
    norm_convolution_fused,
    packed_convolution,
    resize_normalize,
    same_padding,
    stem,
    weight_standardization,
)
from bitfast.ops.flops import register_flop_formulas

register_flop_formulas()
