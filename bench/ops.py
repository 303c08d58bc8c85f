"""The cases that are about single ops, beside plain PyTorch, which is what a user has without bitfast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bitfast.ops.group_norm_act import add_group_norm_act
from bitfast.ops.same_padding import same_pad
from bitfast.ops.weight_standardization import weight_standardization, weight_standardization_all

from .cases import Case, Problem, Results, name_of
from .op_problems import (
    BFLOAT,
    CHANNELS_LAST,
    FLOAT,
    GROUPS,
    HALF,
    LAYOUTS,
    NCHW,
    Family,
    Inputs,
    Shape,
    all_weights,
    case_of,
    dispatch_problem,
    images_and_filters,
    is_clear_of_the_kink,
    norm_convolution_problem,
    norm_dispatch_problem,
    our_norm,
    our_pool,
    our_stem,
    plain_norm,
    plain_pad,
    plain_pool,
    plain_residual_norm,
    plain_standardizations,
    plain_stem,
    pool_dispatch_problem,
    recompute_problem,
    statistics_problem,
    weight_dispatch_problem,
)  # fmt: skip

PAD = Family("same_padding", "pad", plain_pad, lambda x: same_pad(x, 3, 2))
POOL = Family(
    "same_padding", "max-pool",
    plain_pool, our_pool,
)  # fmt: skip
IMAGES_TO_POOL = Family("stem", "with max-pool", plain_stem, our_stem, images_and_filters)
POOL_TRAINING = replace(POOL, is_training=True, rereads_input=False)
NORM = Family("group_norm_act", "", plain_norm, our_norm, Inputs.with_norm)
NORM_TRAINING = replace(NORM, is_training=True, is_clear=is_clear_of_the_kink)
RESIDUAL_NORM = Family(
    "group_norm_act", "with residual",
    plain_residual_norm, partial(add_group_norm_act, num_groups=GROUPS), partial(Inputs.with_norm, batches=2),
)  # fmt: skip
RESIDUAL_NORM_TRAINING = replace(
    RESIDUAL_NORM,
    is_training=True,
    is_clear=lambda x, residual, *parameters: is_clear_of_the_kink(x + residual, *parameters),
)
WEIGHT = Family("weight_standardization", "", plain_standardizations, weight_standardization)
WEIGHT_TRAINING = replace(WEIGHT, is_training=True)


def weights_family(op: str, form: str, dtype: torch.dtype | None = None, **options: Any) -> Family:
    """Return a family of the standardization of all weights at once, to a dtype other than theirs if given."""

    def ours(*weights: Tensor) -> Results:
        return weight_standardization_all(weights, 1e-8, dtype, channels_last=dtype is not None)

    plain = partial(plain_standardizations, dtype=dtype)
    return Family(op, form, plain, ours, all_weights, **options)


WEIGHTS = weights_family("weight_standardization_all", "R50x1")
WEIGHTS_TRAINING = replace(WEIGHTS, is_training=True)

STEM = ((8, 64, 112, 112), (1, 64, 112, 112))
"""The stem's output of R50x1 at 224x224."""
STAGE = (8, 256, 56, 56)
STAGES = (
    (8, 64, 56, 56), STAGE, (8, 512, 28, 28), (8, 1024, 14, 14), (8, 2048, 7, 7), (1, 256, 56, 56),
    (1, 1024, 14, 14),
)  # fmt: skip
"""Feature maps in R50x1 at 224x224."""
FEW_STAGES = (STAGE, (8, 1024, 14, 14), (1, 256, 56, 56))
CONVOLUTIONS = (
    ((8, 256, 56, 56), 64, 1), ((8, 64, 56, 56), 64, 3), ((8, 64, 56, 56), 256, 1),
    ((8, 1024, 14, 14), 256, 1), ((8, 256, 14, 14), 256, 3), ((1, 256, 14, 14), 1024, 1),
)  # fmt: skip
"""Inputs of convolutions in R50x1 at 224x224, the output channels, and the size of the filters."""
LARGEST_WEIGHT = (512, 512, 3, 3)
ALL_WEIGHTS: Shape = ()
"""No single shape."""

CPU_FAMILIES: tuple[tuple[Family, tuple[Shape, ...], str], ...] = (
    (PAD, STEM[:1], ""),
    (POOL, STEM, "each"),
    (POOL_TRAINING, STEM[:1], "float32 NCHW"),
    (NORM, STAGES, "each"),
    (RESIDUAL_NORM, FEW_STAGES, "each"),
    (NORM_TRAINING, FEW_STAGES[:2], "float32 NCHW, float32 channels_last"),
    (WEIGHT, (LARGEST_WEIGHT, (1024, 256, 1, 1)), ""),
    (WEIGHT_TRAINING, (LARGEST_WEIGHT,), ""),
    (WEIGHTS, (ALL_WEIGHTS,), "float32 NCHW, bfloat16 NCHW"),
    (WEIGHTS_TRAINING, (ALL_WEIGHTS,), "float32 NCHW"),
)
"""Families, their shapes, and which dtypes and layouts of a shape stand for the rest: for the stem's output of
batch 8, for :data:`STAGE` and for all weights."""

GPU_NORMS = (
    (256, 56), (64, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14),
    (512, 14), (512, 7), (2048, 7),
)  # fmt: skip
"""Channels and height of what R50x1 normalizes at 224x224."""
FEW_GPU_NORMS = ((256, 56), (1024, 14), (2048, 7))


def cases(device: str, threads: int) -> Iterator[Case]:
    """Yield every row of a device."""
    yield from cpu_cases(threads) if device == "cpu" else gpu_cases()


def cpu_cases(threads: int) -> Iterator[Case]:
    makers = {"same_pad of one pixel": dispatch_problem}
    yield from dispatch_cases(makers, threads, is_quick=True)
    for (maps, out_channels, size), dtype in product(CONVOLUTIONS, (FLOAT, BFLOAT)):
        words = f"{'x'.join(map(str, maps))} {size}x{size} to {out_channels} channels"
        inputs = Inputs(maps, dtype, CHANNELS_LAST)
        yield case_of(
            partial(norm_convolution_problem, inputs, out_channels, size),
            "norm_convolution", f"{words} {name_of(dtype)} channels_last", dtype, threads,
            is_quick=maps[0] == 8 and maps[-1] == 14,
        )  # fmt: skip
    yield recompute_case(Inputs((8, 1024, 14, 14), FLOAT, CHANNELS_LAST), threads)
    name = "statistics of 8x256 channels"
    yield case_of(statistics_problem, "norm_convolution", name, FLOAT, threads, is_quick=True)
    for family, shapes, quick in CPU_FAMILIES:
        for shape, dtype, layout in product(shapes, (FLOAT, BFLOAT), LAYOUTS):
            is_chosen = quick == "each" or f"{name_of(dtype)} {layout}" in quick
            is_quick = is_chosen and shape in (STEM[0], STAGE, ALL_WEIGHTS)
            yield family.case(Inputs(shape, dtype, layout), threads, is_quick=is_quick)


def recompute_case(inputs: Inputs, threads: int, **options: Any) -> Case:
    """Return the row of a norm's backward pass that gives the result of the forward pass again."""
    words = f"{'x'.join(map(str, inputs.shape))} backward with the result {name_of(inputs.dtype)}"
    return case_of(
        partial(recompute_problem, inputs), NORM.op, f"{words} {inputs.layout}", inputs.dtype, threads,
        is_quick=True, is_training=True, **options,
    )  # fmt: skip


def dispatch_cases(
    makers: Mapping[str, Callable[[bool], Problem]], threads: int, **options: Any
) -> Iterator[Case]:
    for is_recorded, (what, make) in product((False, True), makers.items()):
        name = what + ", recorded by autograd" * is_recorded
        options["is_training"] = is_recorded
        yield case_of(partial(make, is_recorded), "dispatch", name, FLOAT, threads, **options)


def gpu_cases() -> Iterator[Case]:
    """Yield the rows of a GPU, the most telling first: what comes last may fall to a time limit."""
    telling = FLOAT, BFLOAT, False
    bfloat_alone = (BFLOAT, BFLOAT, True), (BFLOAT, BFLOAT, False)
    for row in (telling, *bfloat_alone, (FLOAT, BFLOAT, True), (FLOAT, FLOAT, False)):
        source, dtype, is_training = row
        options = {"source": source, "is_training": is_training}
        family = weights_family(WEIGHTS.op, WEIGHTS.form, dtype, **options)
        inputs = Inputs(ALL_WEIGHTS, dtype, NCHW, "cuda")
        yield family.case(inputs, 0, is_quick=row == telling, is_compiled=row == telling)
    others = (RESIDUAL_NORM, NORM_TRAINING, RESIDUAL_NORM_TRAINING)
    yield from gpu_norms((NORM,), (128,), GPU_NORMS)
    yield from gpu_norms(others, (128,), GPU_NORMS[:1])
    maps = Inputs((128, *STAGE[1:]), BFLOAT, CHANNELS_LAST, "cuda")
    yield recompute_case(maps, 0, device="cuda", clock="kernels")
    for layout, dtype in product((CHANNELS_LAST, NCHW), (BFLOAT, FLOAT)):
        inputs = Inputs((128, *STEM[0][1:]), dtype, layout, "cuda")
        yield POOL.case(inputs, 0, is_quick=dtype is BFLOAT)
        if layout == CHANNELS_LAST:
            yield POOL_TRAINING.case(inputs, 0, is_quick=dtype is BFLOAT)
            yield PAD.case(inputs, 0)
    for batch, layout in product((128, 1), (CHANNELS_LAST, NCHW)):
        inputs = Inputs((batch, 3, 224, 224), BFLOAT, layout, "cuda")
        is_telling = (batch, layout) == (128, CHANNELS_LAST)
        yield IMAGES_TO_POOL.case(inputs, 0, is_quick=is_telling, is_compiled=is_telling)
    makers = {
        "group_norm_act of 4 pixels": norm_dispatch_problem,
        "weight_standardization of 32 filters": weight_dispatch_problem,
        "max-pool of 16 pixels": pool_dispatch_problem,
    }
    yield from dispatch_cases(makers, 0, device="cuda")
    yield from gpu_norms((NORM,), (1, 8), GPU_NORMS)
    yield from gpu_norms(others, (128,), GPU_NORMS[1:])
    yield from gpu_norms((NORM,), (128,), FEW_GPU_NORMS, (HALF, FLOAT))
    yield from gpu_norms(others, (1, 8), FEW_GPU_NORMS)
    yield from gpu_norms(others, (128,), FEW_GPU_NORMS, (HALF, FLOAT))


def gpu_norms(
    families: Sequence[Family],
    batches: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype] = (BFLOAT,),
) -> Iterator[Case]:
    """Yield the rows of norms of these (channels, height)."""
    for batch, dtype, family, shape in product(batches, dtypes, families, shapes):
        channels, size = shape
        inputs = Inputs((batch, channels, size, size), dtype, CHANNELS_LAST, "cuda")
        telling_shapes = FEW_GPU_NORMS if family is NORM else FEW_GPU_NORMS[:1]
        is_telling = (batch, dtype) == (128, BFLOAT) and shape in telling_shapes
        yield family.case(inputs, 0, is_quick=is_telling, is_compiled=is_telling)
