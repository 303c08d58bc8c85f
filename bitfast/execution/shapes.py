"""The shapes of a network's values, computed from the shape of the images; sizes may be symbolic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitfast.blocks import check_summands
from bitfast.execution.steps import CallModule, Convolve, Join, Pool, Step, ZeroPad
from bitfast.layers import DynamicPad2d, WeightStandardizedConv2d, pair_of
from bitfast.ops.same_padding import same_padding
from bitfast.pooling import MaxPool2d
from bitfast.reference import padded_size, pooled_size

Shape = tuple[Any, ...]
"""(N, C, H, W)."""

Size = tuple[Any, Any]
"""Height and width."""


def shape_after(step: Step, source: Shape) -> Shape:
    """Return the shape of a step's result, given the shape of its source.

    Raises:
        TypeError: the step calls a module, whose output shape is not known.
    """
    images, channels, height, width = source
    size = height, width
    if isinstance(step, Convolve):
        return (images, step.convolution.weight.shape[0], *_convolved(step.convolution, size))
    if isinstance(step, Pool):
        return (images, channels, *_pooled(step.pooler, step.zeros, size))
    if isinstance(step, ZeroPad):
        return (images, channels, *padded_size(size, (step.zeros,) * 4))
    if isinstance(step, CallModule):
        raise TypeError(
            f"what {type(step.module).__name__} returns is not known before it is called"
        )
    return source


def shapes_of(steps: Sequence[Step], source: int, shape: Shape) -> dict[int, Shape]:
    """Return the shapes of the values that steps compute from a source of this shape, by number.

    Raises:
        TypeError: A step calls a module.
        ValueError: A block cannot add its branch to its shortcut.
    """
    shapes = {source: shape}
    for step in steps:
        made = shape_after(step, shapes[step.source])
        if isinstance(step, (Convolve, Join)) and step.shortcut is not None:
            check_summands(made, shapes[step.shortcut])
            made = shapes[step.shortcut]
        shapes[step.result] = made
    return shapes


def _convolved(convolution: WeightStandardizedConv2d, size: Size) -> list[Any]:
    stride, padding, dilation = convolution.geometry
    padded = padded_by(convolution.pad, size)
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            padded, convolution.weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]


def _pooled(pooler: MaxPool2d, zeros: int, size: Size) -> list[Any]:
    size = padded_by(pooler.pad, padded_size(size, (zeros,) * 4))
    kernel_size, stride, dilation = map(
        pair_of, (pooler.kernel_size, pooler.stride, pooler.dilation)
    )
    return list(pooled_size(size, kernel_size, stride, dilation, (0, 0, 0, 0)))


def padded_by(pad: Any, size: Size) -> Size:
    """Return (height, width) after the padding of a module; only a :class:`DynamicPad2d` pads."""
    if not isinstance(pad, DynamicPad2d):
        return size
    return padded_size(size, padding_of(pad, size))


def padding_of(pad: DynamicPad2d, size: Size) -> list[Any]:
    """Return the (top, bottom, left, right) that the module pads an input of this height and width by."""
    if pad.kernel_size == (1, 1):
        return [0, 0, 0, 0]
    return same_padding(size, pad.kernel_size, pad.stride, pad.dilation)


__all__ = ["Shape", "padded_by", "padding_of", "shape_after", "shapes_of"]
