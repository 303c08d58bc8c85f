"""Convolution with standardized weights that are kept packed for oneDNN; for inference on the CPU.

oneDNN convolves fastest with weights laid out for the convolution at hand, and torch lays them out anew in
each call. The operators that Inductor uses for weights laid out once are private to torch; they are used
only where :func:`why_not_packed` has tried them, and everywhere else ``F.conv2d`` serves.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from bitfast.backends import select_backend
from bitfast.ops.common import LIBRARY, NATIVE_CPU_DTYPES
from bitfast.ops.weight_standardization import OP as STANDARDIZATION
from bitfast.ops.weight_standardization import weight_standardization
from bitfast.optimizer_steps import watch_optimizers

OP = "packed_convolution"

SIGNATURE = (
    "(Tensor x, Tensor weight, float eps, int[] stride, int[] padding, int[] dilation) -> Tensor"
)
ADD_SIGNATURE = (
    "(Tensor x, Tensor weight, Tensor(a!) total, float eps, int[] stride, int[] padding,"
    " int[] dilation) -> ()"
)

Pair = tuple[int, int]
Geometry = tuple[Pair, Pair, Pair]
"""Stride, padding and dilation, each as (height, width)."""


def packed_convolution(x: Tensor, weight: Tensor, eps: float, geometry: Geometry) -> Tensor:
    """Convolve x with the standardized weight, of which a packed copy is kept.

    Args:
        x: Shape (N, in, H, W), for which :func:`can_pack` is true.
        weight: Shape (out, in, height, width), not standardized.
        eps: As in ``weight_standardization``.
        geometry: Stride, padding and dilation.

    Returns:
        Shape (N, out, H', W'), channels_last, of the dtype of x.
    """
    if torch.compiler.is_compiling():
        return torch.ops.bitfast.packed_convolution.native(x, weight, eps, *geometry)
    return _convolve(x, weight, eps, *geometry)


def add_packed_convolution_(
    x: Tensor, weight: Tensor, total: Tensor, eps: float, geometry: Geometry
) -> Tensor:
    """Add the same convolution to ``total`` in place, rounded once; return ``total``.

    Args:
        total: Shape and dtype of the convolution, channels_last.
    """
    if torch.compiler.is_compiling():
        torch.ops.bitfast.packed_convolution_add_.native(x, weight, total, eps, *geometry)
    else:
        _add_convolution(x, weight, total, eps, *geometry)
    return total


def can_pack(x: Tensor, weight: Tensor) -> bool:
    """Say whether the two functions above can serve: in inference on the CPU, channels_last, with a parameter.

    Weights that are computed anew for each call are not worth packing, nor is anything once torch's oneDNN
    is switched off or the reference of ``weight_standardization`` is demanded.
    """
    return (
        not torch.is_grad_enabled()
        and type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype in NATIVE_CPU_DTYPES
        and x.is_contiguous(memory_format=torch.channels_last)
        and (torch.compiler.is_compiling() or not weight.is_inference())
        and packs(x.device.type, x.dtype)
    )


def packs(device_type: str, dtype: torch.dtype) -> bool:
    """Say whether convolutions of such tensors run with packed weights where no gradient is recorded."""
    return (
        device_type == "cpu"
        and _is_onednn_on()
        and why_not_packed(dtype) is None
        and select_backend(STANDARDIZATION, device_type, dtype) == "native"
        and not _is_exporting()
        and not torch.jit.is_tracing()
    )


def why_not_packed(dtype: torch.dtype) -> str | None:
    """Say why convolutions of this dtype cannot run with packed weights on this machine; None if they can."""
    return _why_not_packed(dtype)


def _is_onednn_on() -> bool:
    """Say whether nobody has switched torch's oneDNN off (``torch.backends.mkldnn.flags``)."""
    return torch._C._get_mkldnn_enabled()


def _is_exporting() -> bool:
    """Say whether ``torch.export`` traces; torch 2.11's own function, when traced, always says yes."""
    return torch.compiler.is_exporting()


# What torch.compiler.assume_constant_result does; calling it would import the compiler, and Triton.
why_not_packed._dynamo_marked_constant = True  # type: ignore[attr-defined]
_is_onednn_on._dynamo_marked_constant = True  # type: ignore[attr-defined]
_is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _why_not_packed(dtype: torch.dtype) -> str | None:
    if dtype not in NATIVE_CPU_DTYPES:
        return f"packed weights are float32 or bfloat16, not {dtype}"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU lacks the instructions for bfloat16 that oneDNN needs"
    # Whoever asks may be tracing, in autocast or in inference mode; the trial is none of these.
    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        return _try_out(dtype)


def _try_out(dtype: torch.dtype) -> str | None:
    """Say what is wrong with torch's packed convolutions of this dtype, None if nothing is."""
    geometry = (1, 1), (1, 1), (1, 1)
    x = torch.linspace(-1, 1, 2 * 16 * 5 * 5).view(2, 16, 5, 5).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.linspace(1, -1, 16 * 16 * 3 * 3).view(16, 16, 3, 3).to(dtype)
    try:
        packed = _pack(weight, x.shape, geometry)
        total = torch.zeros_like(x)
        _run_packed_add(x, packed, total, geometry)
        results = _run_packed(x, packed, geometry), total
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"this torch's packed convolutions cannot be used: {error}"
    expected = F.conv2d(x.float(), weight.float(), padding=1)
    if not all(torch.allclose(result.float(), expected, 1e-2, 1e-1) for result in results):
        return "this torch's packed convolutions give other results than its plain ones"
    return None


# ---- the kept weights -----------------------------------------------------------------------------


class _Packed(NamedTuple):
    """A packed weight, and what it was made from and for."""

    weight: weakref.ref[Tensor]
    version: int
    storage: torch.UntypedStorage
    """Held so that no other tensor can come to lie at the same address."""
    address: int
    dtype: torch.dtype
    eps: float
    geometry: Geometry
    shapes: tuple[torch.Size, ...]
    """Of inputs for which oneDNN would pack it in the same way."""
    packed: Tensor

    def is_of(self, weight: Tensor, dtype: torch.dtype, eps: float, geometry: Geometry) -> bool:
        return (
            self.weight() is weight
            and self.version == weight._version
            and self.address == weight.data_ptr()
            and self.dtype == dtype
            and self.eps == eps
            and self.geometry == geometry
        )


MOST_SHAPES = 64
"""Input shapes that are remembered for one weight."""


class PackedWeights:
    """The packed weights of this process: one per parameter, as long as it lives and is not changed.

    How oneDNN packs a weight depends on the input's shape, and with weights packed otherwise it is many
    times slower. So at a new shape a weight is packed again, and the outcome is kept if it differs.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Packed] = {}

    def packed(self, weight: Tensor, x: Tensor, eps: float, geometry: Geometry) -> Tensor:
        """Return the standardized weight, in the dtype of x, packed for x."""
        if weight.is_inference():  # torch does not count its changes
            return _pack(weight_standardization(weight, eps, x.dtype), x.shape, geometry)
        entry = self._entries.get(id(weight))
        if entry is not None and entry.is_of(weight, x.dtype, eps, geometry):
            if x.shape in entry.shapes:
                return entry.packed
        else:
            entry = None
        return self._pack(weight, x, eps, geometry, entry)

    def _pack(
        self, weight: Tensor, x: Tensor, eps: float, geometry: Geometry, entry: _Packed | None
    ) -> Tensor:
        version, address = weight._version, weight.data_ptr()
        # Not as inference tensors, which later calls outside inference mode could not use.
        with torch.inference_mode(False), torch.no_grad():
            packed = _pack(weight_standardization(weight, eps, x.dtype), x.shape, geometry)
        shapes: tuple[torch.Size, ...] = (x.shape,)
        if entry is not None and _holds_the_same(packed, entry.packed):
            packed, shapes = entry.packed, (*entry.shapes[-MOST_SHAPES + 1 :], x.shape)
        key = id(weight)
        new = _Packed(
            weakref.ref(weight, lambda _: self._entries.pop(key, None)),
            version, weight.untyped_storage(), address, x.dtype, eps, geometry, shapes, packed,
        )  # fmt: skip
        # One that another thread changed meanwhile is not kept.
        if new.is_of(weight, x.dtype, eps, geometry):
            watch_optimizers(self)
            self._entries[key] = new
        return packed

    def drop(self, weights: list[Tensor]) -> None:
        """Forget what was made from these weights, and free its memory."""
        self.drop_if_from({id(weight) for weight in weights})

    def drop_if_from(self, weights: set[int]) -> None:
        """Forget what was made from the weights with these ids."""
        for key in weights:
            self._entries.pop(key, None)


packed_weights = PackedWeights()


def _holds_the_same(a: Tensor, b: Tensor) -> bool:
    """Say whether two packed weights are the same, byte for byte; no if this torch does not let us see."""
    operators = torch.ops.mkldnn
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


def _run_packed(x: Tensor, packed: Tensor, geometry: Geometry) -> Tensor:
    stride, padding, dilation = geometry
    return torch.ops.mkldnn._convolution_pointwise(
        x, packed, None, padding, stride, dilation, 1, "none", [], ""
    )


def _run_packed_add(x: Tensor, packed: Tensor, total: Tensor, geometry: Geometry) -> None:
    stride, padding, dilation = geometry
    torch.ops.mkldnn._convolution_pointwise_.binary(
        total, x, packed, None, padding, stride, dilation, 1, "add", 1.0, None, [], ""
    )


# ---- the operators --------------------------------------------------------------------------------


def _geometry(*pairs: Sequence[int]) -> Geometry:
    """Return what the dispatcher may have made lists of as it was."""
    stride, padding, dilation = ((first, second) for first, second in pairs)
    return stride, padding, dilation


def _convolve(
    x: Tensor, weight: Tensor, eps: float, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    geometry = _geometry(stride, padding, dilation)
    return _run_packed(x, packed_weights.packed(weight, x, eps, geometry), geometry)


def _add_convolution(
    x: Tensor,
    weight: Tensor,
    total: Tensor,
    eps: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> None:
    geometry = _geometry(stride, padding, dilation)
    _run_packed_add(x, packed_weights.packed(weight, x, eps, geometry), total, geometry)


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


def _fake_add(x: Tensor, weight: Tensor, total: Tensor, *_: object) -> None:
    return None


for _name, _signature, _function, _fake_function in (
    (OP, SIGNATURE, _convolve, _fake),
    (f"{OP}_add_", ADD_SIGNATURE, _add_convolution, _fake_add),
):
    LIBRARY.define(f"{_name}.native{_signature}")
    LIBRARY.impl(f"{_name}.native", _function, "CPU")
    torch.library.register_fake(f"bitfast::{_name}.native", _fake_function, lib=LIBRARY)

__all__ = [
    "add_packed_convolution_",
    "can_pack",
    "packed_convolution",
    "packed_weights",
    "packs",
    "why_not_packed",
]
