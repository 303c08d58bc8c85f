"""FLOP formulas of bitfast's convolution operators for torch's FlopCounterMode, which counts as for its own.

Norms, activations, pools and the standardization of weights count as zero there, as torch's own do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from bitfast import reference

COUNTER = "torch.utils.flop_counter"


def register_flop_formulas() -> None:
    """Register the formulas with torch's FLOP counter, if that is loaded.

    Loading it would load Triton. Models are counted right in any case: where a mode watches operators, they
    use torch's own convolutions.
    """
    counter: Any = sys.modules.get(COUNTER)
    if counter is None:
        return
    for name, formula in FORMULAS.items():
        packet = getattr(torch.ops.bitfast, name, None)
        if packet is not None and packet not in counter.flop_registry:
            counter.register_flop_formula(packet, get_raw=True)(formula)


def _products(result: Tensor, filters: Sequence[int]) -> int:
    """Count two operations for each product of a filter's element with a pixel, as torch does."""
    return 2 * result.shape[0] * prod(result.shape[2:]) * prod(filters)


def _norm_convolution(x: Tensor, *arguments: Any, out_val: tuple[Tensor, Tensor], **_: Any) -> int:
    out_channels, kernel_size = arguments[7:9]
    return _products(out_val[0], (out_channels, x.shape[1], kernel_size, kernel_size))


def _norm_convolution_add(x: Tensor, *arguments: Any, **_: Any) -> int:
    total, kernel_size = arguments[7:9]
    return _products(total, (total.shape[1], x.shape[1], kernel_size, kernel_size))


def _packed_convolution(x: Tensor, weight: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return _products(out_val, weight.shape)


def _stem(images: Tensor, filters: Tensor, padding: list[int], *_: Any, **__: Any) -> int:
    size = reference.stem_size(images.shape[2:], padding, None)
    return 2 * images.shape[0] * prod(size) * filters.shape[0] * 3 * reference.STEM_KERNEL**2


FORMULAS: dict[str, Callable[..., int]] = {
    "norm_convolution": _norm_convolution,
    "norm_convolution_add_": _norm_convolution_add,
    "packed_convolution": _packed_convolution,
    "stem": _stem,
}
"""By the operator's name."""

__all__ = ["register_flop_formulas"]
