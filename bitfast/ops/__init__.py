"""The seam: the ops that the layers call, each with its checks, its contract and its dispatch."""

from bitfast.ops.flops import register_flop_formulas
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act, group_norm_act_into
from bitfast.ops.norm_convolution import add_norm_convolution_, norm_convolution
from bitfast.ops.packed_convolution import add_packed_convolution_, packed_convolution
from bitfast.ops.resize_normalize import resize_normalize
from bitfast.ops.same_padding import same_max_pool, same_pad
from bitfast.ops.weight_standardization import (
    weight_standardization,
    weight_standardization_all,
)

register_flop_formulas()

__all__ = [
    "add_group_norm_act",
    "add_norm_convolution_",
    "add_packed_convolution_",
    "group_norm_act",
    "group_norm_act_into",
    "norm_convolution",
    "packed_convolution",
    "resize_normalize",
    "same_max_pool",
    "same_pad",
    "weight_standardization",
    "weight_standardization_all",
]
