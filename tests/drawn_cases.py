"""Shapes, dtypes and layouts of inputs, as hypothesis draws them; their numbers follow from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from bitfast.activations import ACTIVATIONS
from bitfast.ops.resize_normalize import RESAMPLE_NAMES
from tests.feature_maps import LAYOUTS

MEANS = (0.0, -2.3, 100.0)
SEEDS = st.integers(0, 2**31 - 1)


@dataclass(frozen=True)
class NormCase:
    """One call of a GroupNorm with activation."""

    batch: int
    groups: int
    channels_per_group: int
    height: int
    width: int
    dtype: torch.dtype
    layout: torch.memory_format
    activation: str
    mean: float
    seed: int

    @property
    def channels(self) -> int:
        return self.groups * self.channels_per_group

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.height, self.width

    @property
    def group_size(self) -> int:
        """How many values of an image are normalized together."""
        return self.channels_per_group * self.height * self.width


def norm_cases(
    dtypes: Sequence[torch.dtype], *, most_channels_per_group: int, largest_side: int
) -> st.SearchStrategy[NormCase]:
    return st.builds(
        NormCase,
        batch=st.integers(0, 3),
        groups=st.integers(1, 5),
        channels_per_group=st.integers(1, most_channels_per_group),
        height=st.integers(1, largest_side),
        width=st.integers(1, largest_side),
        dtype=st.sampled_from(dtypes),
        layout=st.sampled_from(LAYOUTS),
        activation=st.sampled_from(sorted(ACTIVATIONS)),
        mean=st.sampled_from(MEANS),
        seed=SEEDS,
    )


@dataclass(frozen=True)
class FilterCase:
    """One weight of a convolution."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: torch.memory_format
    mean: float
    seed: int

    @property
    def filter_size(self) -> int:
        """How many values are standardized together."""
        return self.shape[1] * self.shape[2] * self.shape[3]


def filter_cases(
    dtypes: Sequence[torch.dtype], *, most_filters: int, most_channels: int, largest_side: int
) -> st.SearchStrategy[FilterCase]:
    sides = st.integers(1, largest_side)
    return st.builds(
        FilterCase,
        shape=st.tuples(st.integers(1, most_filters), st.integers(1, most_channels), sides, sides),
        dtype=st.sampled_from(dtypes),
        layout=st.sampled_from(LAYOUTS),
        mean=st.sampled_from(MEANS),
        seed=SEEDS,
    )


@st.composite
def resize_arguments(
    draw: st.DrawFn,
    shapes: Sequence[tuple[int, int]],
    channels: int,
    edges: st.SearchStrategy[int],
    largest_offset: int,
) -> dict[str, Any]:
    """Return arguments of resize_normalize for images of these shapes."""
    offsets = st.tuples(*[st.integers(-20, largest_offset)] * 2)
    normalizes = draw(st.booleans())
    return {
        "sizes": [draw(st.tuples(edges, edges) | st.just(shape)) for shape in shapes],
        "crop": draw(st.tuples(edges, edges)),
        "offsets": draw(st.none() | st.just([draw(offsets) for _ in shapes])),
        "resample": draw(st.integers(0, len(RESAMPLE_NAMES) - 1)),
        "rescale_factor": draw(st.sampled_from([None, 1 / 255, (1 / 255, 3.7)])),
        "mean": [0.1 * c for c in range(channels)] if normalizes else None,
        "std": [0.3 + c for c in range(channels)] if normalizes else None,
        "dtype": draw(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
        ),
        "memory_format": draw(st.sampled_from(LAYOUTS)),
        "pillow_version": draw(st.sampled_from([(12, 1), (13, 0)])),
    }
