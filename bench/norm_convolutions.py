"""The cases about convolutions that normalize what they read and measure what they write, on a GPU.

``norm_convolution_problems.py`` says who takes part in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch

from bitfast import extension

from .cases import Case, NotHereError, Problem, name_of
from .norm_convolution_problems import (
    Layer,
    convolution_problem,
    factors_problem,
    statistics_problem,
)
from .op_problems import BFLOAT, CHANNELS_LAST

TIME_LIMIT = 30.0
"""Seconds for a case; most take one or two."""

LAYERS = (
    Layer(64, 56, 256, adds=True), Layer(256, 56, 64), Layer(128, 28, 512, adds=True), Layer(512, 28, 128),
    Layer(256, 14, 1024, adds=True), Layer(1024, 14, 256), Layer(512, 7, 2048, adds=True), Layer(2048, 7, 512),
    Layer(64, 56, 64, 3), Layer(128, 28, 128, 3), Layer(256, 14, 256, 3), Layer(512, 7, 512, 3),
    Layer(128, 56, 128, 3, 2), Layer(256, 28, 256, 3, 2), Layer(512, 14, 512, 3, 2),
    *(Layer(c, size, 2 * c, 1, 2, measures=False) for c, size in ((256, 56), (512, 28), (1024, 14))),
    Layer(64, 56, 64, second_channels=256),
)  # fmt: skip
"""The convolutions of R50x1 at 224x224: those of its blocks, of its blocks that halve the resolution, their
shortcuts, and the first block's two that read the same."""
TELLING = (LAYERS[0], LAYERS[5], LAYERS[10])
"""One bound by memory, one by arithmetic, and a 3x3."""
SMALL_BATCH_LAYERS = (*TELLING, LAYERS[6])
PARTS: tuple[dict[str, bool], ...] = ({"has_norm": False}, {"measures": False}, {"adds": False})
"""What is left out to see what it costs."""
MEASURED_BEFORE = (64, 56)
"""Channels and size of the stem's pooled result, which no convolution of ours measures."""


def cases() -> Iterator[Case]:
    """Yield the cases, the most telling first."""
    for layer in LAYERS:
        yield convolution_case(layer, 128, is_quick=layer in TELLING)
    yield statistics_case(*MEASURED_BEFORE)
    for layer in (LAYERS[0], LAYERS[6]):
        yield factors_case(layer)


def further_cases() -> Iterator[Case]:
    """Yield those of small batches, and of what each part costs."""
    for images, layer in product((8, 1), SMALL_BATCH_LAYERS):
        yield convolution_case(layer, images)
    for layer, part in product(TELLING, PARTS):
        if (without := layer._replace(**part)) != layer:
            yield convolution_case(without, 128)


def convolution_case(layer: Layer, images: int, is_quick: bool = False) -> Case:
    make = partial(convolution_problem, layer, images, BFLOAT)
    return case_of(make, layer.words(images), is_quick=is_quick)


def statistics_case(channels: int, size: int) -> Case:
    make = partial(statistics_problem, (128, channels, size, size), BFLOAT)
    return case_of(make, f"128x{channels}x{size}x{size} statistics alone")


def factors_case(layer: Layer) -> Case:
    size = layer.result_size
    words = f"128x{layer.out_channels}x{size}x{size} factors from statistics"
    return case_of(partial(factors_problem, layer, 128, BFLOAT), words)


def case_of(make: Callable[[], Problem], words: str, **options: Any) -> Case:
    @contextmanager
    def opened() -> Iterator[Problem]:
        require_kernels()
        yield make()

    dtype = name_of(BFLOAT)
    return Case(
        "op", "norm_convolution", f"{words} {dtype} {CHANNELS_LAST}", dtype, opened, "cuda", 0, "kernels",
        time_limit=TIME_LIMIT, **options,
    )  # fmt: skip


def require_kernels() -> None:
    """Raise NotHereError where this machine has no such kernels."""
    if not torch.cuda.is_available():
        raise NotHereError("torch sees no CUDA device")
    from bitfast.ops.norm_convolution_cuda import CAPABILITY  # another commit may lack it

    found = torch.cuda.get_device_capability()
    if found != CAPABILITY:
        wanted, here = ("{}.{}".format(*capability) for capability in (CAPABILITY, found))
        raise NotHereError(f"its kernels are for GPUs of capability {wanted}, this one has {here}")
    if extension.CUDA.problem is not None:
        raise NotHereError(extension.CUDA.problem)
