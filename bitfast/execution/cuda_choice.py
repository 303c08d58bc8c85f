"""Which convolutions of a network are fused with the norms around them on a GPU, and why.

A fused one normalizes what it reads and measures what it writes; the others are cuDNN's, between norms. All
that is asked is arithmetic on shapes, so that the choices for a GPU can be seen without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from bitfast.execution.program import Choice
from bitfast.execution.shapes import Shape, padding_of, shape_after
from bitfast.execution.steps import IMAGES, Block, Convolve, Step
from bitfast.layers import DynamicPad2d, GroupNormActivation
from bitfast.ops import native_cuda
from bitfast.ops.common import autocast_dtype
from bitfast.ops.norm_convolution_cuda import (
    Convolution,
    cell_channels_of,
    why_no_factors,
    why_unsuited,
)

# ---- the table ------------------------------------------------------------------------------------------

TILE = 64
"""Pixels of a tile, all of one image."""

FEWEST_TILES = 66
"""Half as many as an H100 has multiprocessors."""

MOST_FLOPS_PER_BYTE = 150
"""Up to here a fused kernel is bound by memory: 450 TFLOP/s, which it is meant to reach (not measured yet),
over 3.0 TB/s, which an H100 was seen to copy. R50's blocks at 224x224 are below in stages 1 and 2 (maps of
56x56 and 28x28), above in stages 3 and 4."""


class Facts(NamedTuple):
    """What the table asks about a convolution.

    Attributes:
        problem: Why no kernel can do it; None if one can.
        is_demanded: Whether :func:`~bitfast.use_backend` demands the kernels.
        tiles: Of the result, the fewest that a convolution of the same block has.
        intensity: FLOPs of all convolutions of the block, by bytes that they read and write.
    """

    problem: str | None
    is_demanded: bool
    tiles: int
    intensity: float


class Row(NamedTuple):
    """A row of the table."""

    holds: Callable[[Facts], bool]
    fuses: bool
    reason: str


TABLE: tuple[Row, ...] = (
    Row(lambda facts: facts.problem is not None, False, "{problem}"),
    Row(lambda facts: facts.is_demanded, True, "use_backend demands it"),
    Row(
        lambda facts: facts.tiles < FEWEST_TILES,
        False,
        f"too few tiles of {TILE} pixels for 132 multiprocessors: a map of its block has {{tiles}}",
    ),
    # cuDNN's products were seen at 410 to 670 TFLOP/s there.
    Row(
        lambda facts: facts.intensity > MOST_FLOPS_PER_BYTE,
        False,
        "its block is bound by the tensor cores, at {intensity:.0f} FLOPs a byte: cuDNN is known to use them"
        " well",
    ),
    Row(
        lambda facts: True,
        True,
        "its block is bound by memory, at {intensity:.0f} FLOPs a byte: norms of their own would cross it twice"
        " more",
    ),
)
"""The first row that holds decides. A block is judged as a whole, since next to a fused convolution one that is
not has to be measured or normalized by a launch of its own."""

SHARED = "in one launch with {other}, so that what both read is read once"
"""Why two convolutions of the same map, filters and steps share a launch, always where a kernel can."""


class Choices(NamedTuple):
    """How the convolutions of some steps are computed.

    Attributes:
        by_result: The choice for each convolution, by the value that it computes.
        norms: The norms that fused convolutions apply as they read, by the value that they are applied to.
        partners: By the value that a fused convolution computes: a later one whose result the same launch
            computes.
        launches: What the kernels are told of each fused convolution, by the value that it computes; of a pair
            under that of the later one.
    """

    by_result: dict[int, Choice]
    norms: dict[int, GroupNormActivation]
    partners: dict[int, Convolve]
    launches: dict[int, Convolution]

    def fuses(self, step: Convolve) -> bool:
        """Whether a convolution is fused."""
        return self.by_result[step.result].fuses


# ---- choosing ---------------------------------------------------------------------------------------------

WhyRefused = Callable[[Convolution], "str | None"]
"""Returns why there is no kernel for a convolution, or None."""


def choose(
    blocks: Sequence[Block],
    shapes: Mapping[int, Shape],
    dtype: torch.dtype,
    is_demanded: bool,
    why_refused: WhyRefused = why_unsuited,
) -> Choices:
    """Choose how the convolutions of some blocks are computed.

    Args:
        blocks: In order; none calls a module.
        shapes: Of all values.
        dtype: Of all feature maps.
        is_demanded: Whether every convolution is to be fused that a kernel can do.
        why_refused: Asked about every launch that is chosen. A device may refuse more than others do.
    """
    steps = [step for block in blocks for step in block]
    refused: dict[int, str] = {}
    while True:
        by_result = _fused_or_not(blocks, shapes, dtype, is_demanded, refused)
        norms = _norms_applied_in_reading(steps, by_result, shapes)
        launches = {
            step.result: _launch(step, shapes, dtype, norms)
            for step in steps
            if isinstance(step, Convolve) and by_result[step.result].fuses
        }
        problems = {
            value: problem
            for value, convolution in launches.items()
            if (problem := why_refused(convolution)) is not None
        }
        if not problems:
            break
        # What is next to a refused convolution has other norms to apply, or none: all is chosen anew.
        refused |= problems
    partners = _pair(blocks, by_result, norms, launches, why_refused)
    return Choices(by_result, norms, partners, launches)


def _fused_or_not(
    blocks: Sequence[Block],
    shapes: Mapping[int, Shape],
    dtype: torch.dtype,
    is_demanded: bool,
    refused: Mapping[int, str],
) -> dict[int, Choice]:
    """Return the choice for each convolution, by the value that it computes."""
    by_result: dict[int, Choice] = {}
    for block in blocks:
        members = [step for step in block if isinstance(step, Convolve)]
        tiles = min((_tiles(shapes[step.result]) for step in members), default=0)
        intensity = _intensity(members, shapes, dtype)
        for step in members:
            problem = refused.get(step.result) or _why_no_kernel(step, shapes, dtype)
            by_result[step.result] = _look_up(Facts(problem, is_demanded, tiles, intensity))
    return by_result


def _look_up(facts: Facts) -> Choice:
    row = next(row for row in TABLE if row.holds(facts))
    return Choice(row.fuses, row.reason.format(**facts._asdict()))


def _tiles(shape: Shape) -> int:
    images, _, height, width = shape
    return images * -(-height * width // TILE)


def _intensity(
    members: Sequence[Convolve], shapes: Mapping[int, Shape], dtype: torch.dtype
) -> float:
    """Return FLOPs by bytes of some convolutions, the weights left out."""
    flops = numbers = 0
    for step in members:
        _, channels, height, width = shapes[step.source]
        images, results, *size = shapes[step.result]
        pixels = size[0] * size[1]
        taps = step.convolution.weight.shape[2] * step.convolution.weight.shape[3]
        flops += 2 * images * pixels * taps * channels * results
        read = min(height * width, pixels * taps) * channels
        numbers += images * (read + pixels * results * (1 + (step.shortcut is not None)))
    return flops / max(1, numbers * dtype.itemsize)


# ---- what a kernel can do -----------------------------------------------------------------------------------


def _described(step: Convolve, shapes: Mapping[int, Shape], dtype: torch.dtype) -> Convolution:
    """Return a convolution as the kernels know it; it must be square, and not dilated."""
    convolution, shape = step.convolution, shapes[step.source]
    (stride, _), (vertical, horizontal), _ = convolution.geometry
    more = [0, 0, 0, 0]
    if isinstance(convolution.pad, DynamicPad2d):
        more = padding_of(convolution.pad, shape[2:])
    top, bottom, left, right = more
    return Convolution(
        shape=tuple(shape),
        dtype=dtype,
        kernel_size=convolution.weight.shape[2],
        stride=stride,
        padding=(vertical + top, vertical + bottom, horizontal + left, horizontal + right),
        out_channels=convolution.weight.shape[0],
        activation=None if step.norm is None else step.norm.op_parameters().activation,
        adds=step.shortcut is not None,
    )


def _launch(
    step: Convolve,
    shapes: Mapping[int, Shape],
    dtype: torch.dtype,
    norms: Mapping[int, GroupNormActivation],
) -> Convolution:
    """Return what the kernels are told: without the norm if a launch has applied it, and with statistics of the
    result if they are needed."""
    convolution = _described(step, shapes, dtype)
    if step.source not in norms:
        convolution = convolution._replace(activation=None)
    following = norms.get(step.result)
    if following is None:
        return convolution
    return convolution._replace(cell_channels=cells_of(following, shapes[step.result]))


def cells_of(norm: GroupNormActivation, shape: Shape) -> int:
    """Return how many channels a cell of the statistics for a norm has."""
    return cell_channels_of(shape[1], norm.num_groups)


def _why_no_kernel(step: Convolve, shapes: Mapping[int, Shape], dtype: torch.dtype) -> str | None:
    """Return why no kernel can do a convolution as it is between its neighbours; None if one can."""
    problem = _why_not_described(step, shapes, dtype)
    return why_unsuited(_described(step, shapes, dtype)) if problem is None else problem


def _why_not_described(
    step: Convolve, shapes: Mapping[int, Shape], dtype: torch.dtype
) -> str | None:
    """Return why the kernels cannot be told what a convolution is, or what its norm is."""
    convolution = step.convolution
    stride, _, dilation = convolution.geometry
    height, width = convolution.weight.shape[2:]
    if step.source == IMAGES:
        return "it reads the images"
    if height != width or stride[0] != stride[1]:
        return "its filters or its steps are not square"
    if dilation != (1, 1) and (height, width) != (1, 1):
        return "its filters are dilated"
    if isinstance(convolution.pad, DynamicPad2d) and convolution.pad.value != 0:
        return "it is not padded with zeros"
    weight_dtype = autocast_dtype(convolution.weight) or convolution.weight.dtype
    if weight_dtype != dtype:
        return f"its weight is of {weight_dtype}, and what it reads of {dtype}"
    if (
        step.shortcut is not None
        and shape_after(step, shapes[step.source]) != shapes[step.shortcut]
    ):
        return "its result is not of the shape of its shortcut"
    return None if step.norm is None else _why_not_in_reading(step.norm, shapes[step.source])


def _why_not_in_reading(norm: GroupNormActivation, shape: Shape) -> str | None:
    """Return why convolutions cannot apply a norm as they read."""
    weight, bias, groups, *_ = norm.op_parameters()
    problem = why_no_factors(shape[1], groups)
    if problem is not None:
        return problem
    if weight.dtype not in native_cuda.DTYPES or bias.dtype not in native_cuda.DTYPES:
        return f"its norm's parameters are of {weight.dtype} and {bias.dtype}"
    if not weight.is_contiguous() or not bias.is_contiguous():
        return "its norm's parameters are not contiguous"
    return None


# ---- norms and pairs ----------------------------------------------------------------------------------


def _norms_applied_in_reading(
    steps: Sequence[Step], by_result: Mapping[int, Choice], shapes: Mapping[int, Shape]
) -> dict[int, GroupNormActivation]:
    """Return the norms that no launch applies, by the value that they are applied to.

    All that read the normalized value are fused, then. Else one launch normalizes it for all.
    """
    # A step that adds and is not fused normalizes the sum in the same launch.
    normalized_by_maker = {
        step.result
        for step in steps
        if isinstance(step, Convolve)
        and step.shortcut is not None
        and step.then is not None
        and not by_result[step.result].fuses
        and shape_after(step, shapes[step.source]) == shapes[step.result]
    }
    norms: dict[int, GroupNormActivation] = {}
    others: set[int] = set(normalized_by_maker)
    for step in steps:
        norm = getattr(step, "norm", None)
        if norm is None:
            continue
        if isinstance(step, Convolve) and by_result[step.result].fuses:
            norms[step.source] = norm
        else:
            others.add(step.source)
    return {value: norm for value, norm in norms.items() if value not in others}


def _pair(
    blocks: Sequence[Block],
    by_result: dict[int, Choice],
    norms: Mapping[int, GroupNormActivation],
    launches: dict[int, Convolution],
    why_refused: WhyRefused,
) -> dict[int, Convolve]:
    """Let one launch compute two convolutions where it can; note that in their choices, and in the launches.

    The earlier one is the downsample of a block's shortcut, whose result is not measured; the later one is the
    block's first.

    Returns:
        The later ones, by the values that the earlier ones compute.
    """
    partners: dict[int, Convolve] = {}
    for block in blocks:
        members = [s for s in block if isinstance(s, Convolve) and by_result[s.result].fuses]
        for earlier, later in pairwise(members):
            first, second = launches[later.result], launches[earlier.result]
            alike = second._replace(
                out_channels=first.out_channels, cell_channels=first.cell_channels
            )
            both = first._replace(second_channels=second.out_channels)
            if (
                earlier.source == later.source
                and earlier.shortcut is None
                and earlier.result not in norms
                and alike == first
                and why_refused(both) is None
            ):
                partners[earlier.result] = later
                launches[later.result] = both
                del launches[earlier.result]
                for step, other in ((earlier, "the block's first"), (later, "the shortcut's")):
                    choice = by_result[step.result]
                    by_result[step.result] = choice._replace(shared=SHARED.format(other=other))
    return partners


__all__ = ["TABLE", "Choices", "Facts", "Row", "cells_of", "choose"]
