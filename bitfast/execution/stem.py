"""Which steps of a network's stem the op ``stem`` does in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from bitfast.execution.program import ProgramBuilder
from bitfast.execution.setting import Setting
from bitfast.execution.shapes import Shape, Size, padding_of
from bitfast.execution.steps import IMAGES, Convolve, Pool, Step
from bitfast.execution.weights import kept_stem_filters
from bitfast.layers import DynamicPad2d, WeightStandardizedConv2d, pair_of
from bitfast.ops.stem import (
    MOST_PADDING,
    MOST_POOL_PADDING,
    Sides,
    prepare_filters,
    stem_for,
    suits_stem,
    uses_stem,
)
from bitfast.reference import STEM_POOL, padded_size, stem_size


class FusedStem(NamedTuple):
    """The first steps of a network, as the op ``stem`` does them.

    Attributes:
        steps: The convolution, and the pool (with its zeros) if nothing stands between.
        shape: Of the images.
        padding: Of the images.
        pool_padding: Of what is pooled; None if nothing is.
    """

    steps: tuple[Step, ...]
    shape: Shape
    padding: Sides
    pool_padding: Sides | None

    @property
    def convolution(self) -> WeightStandardizedConv2d:
        """The module whose weight it reads."""
        (first, *_) = self.steps
        assert isinstance(first, Convolve)
        return first.convolution

    def kept_filters(self, setting: Setting) -> Tensor:
        """Return the filters, from the kept weights."""
        return kept_stem_filters(self.convolution, setting.compute_dtype, self.padding)

    def prepared(self, standardized: Tensor) -> Tensor:
        """Return the filters made of the standardized weight."""
        return prepare_filters(standardized, self.padding)

    def function(self, setting: Setting) -> Callable[[int, Tensor, Tensor], Tensor]:
        """Return a function of a stream, the images and the filters."""
        channels = self.convolution.weight.shape[0]
        dtypes = setting.dtype, setting.compute_dtype
        return stem_for(self.shape, *dtypes, channels, self.padding, self.pool_padding)


def fused_stem(
    steps: Sequence[Step], builder: ProgramBuilder, setting: Setting
) -> FusedStem | None:
    """Return the first of some steps that the op ``stem`` can do, and may as torch is set now; or None.

    Args:
        steps: Of a program.
        builder: Of the program.
        setting: What the program is made for.
    """
    first, following = steps[0], steps[1] if len(steps) > 1 else None
    if not isinstance(first, Convolve) or first.source != IMAGES or first.shortcut is not None:
        return None
    convolution, dtype = first.convolution, setting.compute_dtype
    is_suitable = suits_stem(convolution.weight, convolution.geometry, dtype, setting.dtype)
    if not is_suitable or not uses_stem(setting.device.type, dtype):
        return None
    shape = builder.shapes[first.source]
    padding = _padding(convolution, shape[2:])
    if max(padding) > MOST_PADDING or min(stem_size(shape[2:], padding, None)) < 1:
        return None
    if isinstance(following, Pool) and following.source == first.result:
        pool_padding = _pool_padding(following, stem_size(shape[2:], padding, None))
        if pool_padding is not None and builder.is_last_read(following, first.result):
            return FusedStem((first, following), shape, padding, pool_padding)
    return FusedStem((first,), shape, padding, None)


def _padding(convolution: WeightStandardizedConv2d, size: Size) -> Sides:
    height, width = convolution.geometry[1]
    zeros = height, height, width, width
    pad = convolution.pad
    if isinstance(pad, DynamicPad2d):
        zeros = _sum(zeros, padding_of(pad, size))
    return zeros


def _pool_padding(step: Pool, size: tuple[int, int]) -> Sides | None:
    """Return the padding of a pool of a map of this size; None if the op cannot do what the pool does."""
    pooler, pad = step.pooler, step.pooler.pad
    window = map(pair_of, (pooler.kernel_size, pooler.stride, pooler.dilation))
    if list(window) != [(STEM_POOL, STEM_POOL), (2, 2), (1, 1)]:
        return None
    zeros = (step.zeros,) * 4
    if isinstance(pad, DynamicPad2d):
        if pad.value != 0:
            return None
        zeros = _sum(zeros, padding_of(pad, padded_size(size, zeros)))
    fits = max(zeros) <= MOST_POOL_PADDING and min(padded_size(size, zeros)) >= STEM_POOL
    return zeros if fits else None


def _sum(zeros: Sides, more: Sequence[int]) -> Sides:
    top, bottom, left, right = (a + b for a, b in zip(zeros, more, strict=True))
    return top, bottom, left, right


__all__ = ["FusedStem", "fused_stem"]
