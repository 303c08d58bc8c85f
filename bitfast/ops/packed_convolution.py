"""Convolution with standardized weights that are kept packed for oneDNN; for inference on the CPU.

oneDNN convolves fastest with weights packed (laid out) for the convolution at hand, and torch packs them anew
in each call. Inductor's operators for weights that are packed once are private to torch. They are used only
where :func:`why_not_packed` has tried them out; elsewhere ``F.conv2d`` is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfast.backends import register_kernel, select_backend
from bitfast.ops.common import LIBRARY, NATIVE_CPU_DTYPES
from bitfast.ops.derivatives import refusing_derivatives
from bitfast.ops.kept_weights import Geometry, Pair, kept_weights
from bitfast.ops.weight_standardization import OP as STANDARDIZATION
from bitfast.ops.weight_standardization import weight_standardization
from bitfast.torch_state import (
    constant_when_compiled,
    is_dispatch_watched,
    is_exporting,
    unseen,
)

OP = "packed_convolution"

SIGNATURE = (
    "(Tensor x, Tensor weight, float eps, int[] stride, int[] padding, int[] dilation) -> Tensor"
)


def packed_convolution(x: Tensor, weight: Tensor, eps: float, geometry: Geometry) -> Tensor:
    """Convolve x with the standardized weight, of which a packed copy is kept.

    Args:
        x: Shape (N, in, H, W), for which :func:`can_use_packed_weight` is true.
        weight: Shape (out, in, height, width), not standardized.
        eps: As in ``weight_standardization``.
        geometry: Stride, padding and dilation.

    Returns:
        Shape (N, out, H', W'), channels_last, of the dtype of x.
    """
    if torch.compiler.is_compiling():
        return torch.ops.bitfast.packed_convolution.native(x, weight, eps, *geometry)
    return _convolve(x, weight, eps, *geometry)


def can_use_packed_weight(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`packed_convolution` can be used: x is channels_last on a CPU, and weight a parameter.

    Not where a gradient is recorded, torch's oneDNN is switched off, or the reference of
    ``weight_standardization`` is demanded. Weights that are computed anew in each call are not worth packing.
    """
    return (
        not torch.is_grad_enabled()
        and type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype in NATIVE_CPU_DTYPES
        and (torch.compiler.is_compiling() or not weight.is_inference())
        and uses_packed_weights(x.device.type, x.dtype)
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def uses_packed_weights(device_type: str, dtype: torch.dtype) -> bool:
    """Whether convolutions of such tensors use packed weights where no gradient is recorded.

    Not where a mode watches each operator, which would not know a packed convolution.
    """
    return (
        select_backend(OP, device_type, dtype) == "native"
        and select_backend(STANDARDIZATION, device_type, dtype) == "native"
        and _is_onednn_on()
        and not is_exporting()
        and not is_dispatch_watched()
    )


@constant_when_compiled
def why_not_packed(dtype: torch.dtype) -> str | None:
    """Return why convolutions of this dtype cannot use packed weights on this machine; None if they can."""
    return _why_not_packed(dtype)


@constant_when_compiled
def _is_onednn_on() -> bool:
    """Whether nobody has switched torch's oneDNN off (``torch.backends.mkldnn.flags``)."""
    return torch._C._get_mkldnn_enabled()


@lru_cache
def _why_not_packed(dtype: torch.dtype) -> str | None:
    if dtype not in NATIVE_CPU_DTYPES:
        return f"packed weights are float32 or bfloat16, not {dtype}"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    with unseen():
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this CPU lacks the instructions for bfloat16 that oneDNN needs"
        return _try_out(dtype)


def _try_out(dtype: torch.dtype) -> str | None:
    """Return what is wrong with torch's packed convolutions of this dtype; None if nothing is."""
    geometry = (1, 1), (1, 1), (1, 1)
    x = torch.linspace(-1, 1, 2 * 16 * 5 * 5).view(2, 16, 5, 5).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.linspace(1, -1, 16 * 16 * 3 * 3).view(16, 16, 3, 3).to(dtype)
    try:
        packed = _pack(weight, x.shape, geometry)
        total = torch.zeros_like(x)
        add_convolve_packed_(x, packed, total, geometry)
        results = convolve_packed(x, packed, geometry), total
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"this torch's packed convolutions cannot be used: {error}"
    expected = F.conv2d(x.float(), weight.float(), padding=1)
    if not all(torch.allclose(result.float(), expected, 1e-2, 1e-1) for result in results):
        return "this torch's packed convolutions give other results than its plain ones"
    return None


# ---- the kept weights -----------------------------------------------------------------------------


def packed_weight(
    weight: Tensor, eps: float, geometry: Geometry, dtype: torch.dtype, shape: torch.Size
) -> Tensor:
    """Return the standardized weight, packed for an input of this dtype and shape, from the kept weights.

    How oneDNN packs a weight depends on the input's shape, and with a weight packed for another shape it may be
    many times slower. So a weight is packed again for each new shape, and kept if the result differs.
    """

    def make() -> Tensor:
        return _pack(weight_standardization(weight, eps, dtype), shape, geometry)

    return kept_weights.get(weight, (OP, eps, geometry, dtype, shape), make, _hold_the_same)


def _hold_the_same(a: Tensor, b: Tensor) -> bool:
    """Whether two packed weights are equal, byte for byte; False if this torch does not show their bytes."""
    operators = torch.ops.mkldnn
    if not (a.is_mkldnn and b.is_mkldnn and a.dtype == b.dtype):
        return False
    if not hasattr(operators, "data_ptr") or not hasattr(operators, "_nbytes"):
        return False
    sizes = [operators._nbytes(t) for t in (a, b)]
    if sizes[0] != sizes[1]:
        return False
    views = [
        torch.frombuffer(
            (ctypes.c_char * size).from_address(operators.data_ptr(t)), dtype=torch.uint8
        )
        for t, size in zip((a, b), sizes, strict=True)
    ]
    return torch.equal(*views)


# ---- torch's private operators --------------------------------------------------------------------


def _pack(weight: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    stride, padding, dilation = geometry
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, 1, list(shape)
    )


def convolve_packed(x: Tensor, packed: Tensor, geometry: Geometry) -> Tensor:
    """Convolve x with a packed weight, in inference. Both x and the result are channels_last."""
    stride, padding, dilation = geometry
    return torch.ops.mkldnn._convolution_pointwise.default._op(
        x, packed, None, padding, stride, dilation, 1, "none", [], ""
    )


def add_convolve_packed_(x: Tensor, packed: Tensor, total: Tensor, geometry: Geometry) -> None:
    """Add :func:`convolve_packed` of x to ``total`` in place."""
    stride, padding, dilation = geometry
    torch.ops.mkldnn._convolution_pointwise_.binary._op(
        total, x, packed, None, padding, stride, dilation, 1, "add", 1.0, None, [], ""
    )


# ---- the operator ---------------------------------------------------------------------------------


def _geometry(*pairs: Sequence[int]) -> Geometry:
    """Return stride, padding and dilation as tuples, of which the dispatcher may have made lists."""
    stride, padding, dilation = ((first, second) for first, second in pairs)
    return stride, padding, dilation


def _convolve(
    x: Tensor, weight: Tensor, eps: float, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    geometry = _geometry(stride, padding, dilation)
    return convolve_packed(x, packed_weight(weight, eps, geometry, x.dtype, x.shape), geometry)


def _fake(
    x: Tensor, weight: Tensor, eps: float, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    shape = (x.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


LIBRARY.define(f"{OP}.native{SIGNATURE}")
LIBRARY.impl(f"{OP}.native", refusing_derivatives(OP, "native", _convolve), "CPU")
torch.library.register_fake(f"bitfast::{OP}.native", _fake, lib=LIBRARY)
register_kernel(
    OP, "native", "cpu", NATIVE_CPU_DTYPES, lambda: why_not_packed(torch.float32), unsuitable=why_not_packed
)  # fmt: skip

__all__ = [
    "add_convolve_packed_",
    "can_use_packed_weight",
    "convolve_packed",
    "packed_convolution",
    "packed_weight",
    "uses_packed_weights",
    "why_not_packed",
]
