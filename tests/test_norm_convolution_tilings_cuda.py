"""How the CUDA kernel of norm_convolution is cut into tiles: each way is right, and the choice is sensible."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product

import pytest

from bitfast.ops.norm_convolution_cuda import Tiling
from tests.emulated import H100, emulate
from tests.norm_convolution_calls import (
    DEVICES,
    MODEL,
    ZEROS,
    Case,
    check,
    convolution_kernels,
    name_of,
)

TILINGS = [
    (columns, *rest, units)
    for columns, units in ((64, 1), (64, 2), (128, 2), (256, 1))
    for rest in ((1, 1, 1), (0, 1, 1), (0, 0, 1), (0, 0, 2))
]
"""(columns, takes_turns, keeps_weights, cluster, units)."""

CUT = [
    Case(3, 136, (9, 11), 200, adds=True, second_channels=72, cell_channels=4),
    Case(3, 64, (17, 20), 328, 3, 1, ZEROS, adds=True, cell_channels=2),
    Case(5, 40, (13, 12), 72, 3, 2, (0, 1, 0, 1), second_channels=264),
    Case(2, 200, (15, 9), 392, 1, 2, activation="none"),
]


@pytest.mark.parametrize("case", CUT, ids=name_of)
@pytest.mark.parametrize("tiling", TILINGS)
def test_every_tiling(tiling: tuple[int, ...], case: Case) -> None:
    """On a device where each block has many tiles. Those of the model have one or some on an H100."""
    emulate(convolution_kernels(), (90, 7, 227 * 1024), seed=sum(tiling))
    if can_be_cut(case, tiling):
        check(case, tiling=Tiling(*tiling))
    else:  # only the weights of 3x3 filters are too large to keep
        assert case.kernel_size == 3
        assert tiling[2] == 1


def can_be_cut(case: Case, tiling: tuple[int, ...]) -> bool:
    try:
        prepared = case.prepared(Tiling(*tiling))
    except RuntimeError as error:
        if "cannot be cut to fit" not in str(error):
            raise
        return False
    assert tuple(getattr(prepared.tiling, name) for name, _ in Tiling._fields_) == tiling
    return True


def test_the_table_has_a_use_for_each_number_of_columns() -> None:
    """And for both kinds of blocks, in the model, whatever the batch."""
    emulate(convolution_kernels(), H100)
    chosen = [
        replace(case, images=images).prepared().tiling
        for case, images in product(MODEL, (1, 2, 8, 32, 128, 1000))
    ]
    assert {tiling.columns for tiling in chosen} == {64, 128, 256}
    assert {(tiling.takes_turns, tiling.cluster) for tiling in chosen} >= {(1, 1), (0, 2)}


def test_small_batches_use_more_of_the_device() -> None:
    emulate(convolution_kernels(), H100)
    for case in MODEL:
        few, many = (replace(case, images=n).prepared() for n in (1, 128))
        assert few.tiling.columns <= many.tiling.columns or few.blocks >= 8, name_of(case)
        assert many.blocks >= 120, name_of(case)


def test_each_block_has_a_multiprocessor() -> None:
    for multiprocessors in (132, 7, 1):
        emulate(convolution_kernels(), (90, multiprocessors, 227 * 1024))
        for case, images in product(MODEL, (1, 8, 128)):
            assert replace(case, images=images).prepared().blocks <= multiprocessors, case


def test_wide_maps_are_cut_in_no_time() -> None:
    emulate(convolution_kernels(), H100)
    begin = time.process_time()
    Case(1, 64, (1, 10**7), 64, 3, 1, ZEROS).prepared()
    assert time.process_time() - begin < 0.1


@pytest.mark.parametrize("seed", range(8))
def test_a_group_waits_for_its_turn(seed: int) -> None:
    """Tiles have more stages than the ring: without turns a group would find its barrier two rounds ahead."""
    emulate(convolution_kernels(), (90, 1, 227 * 1024), seed)
    case = Case(6, 576, (8, 8), 64)
    check(case, tiling=Tiling(64, 1, 1, 1, 2))


@pytest.mark.parametrize("device", DEVICES)
def test_there_is_a_way_to_cut_any_size(device: tuple[int, int, int]) -> None:
    emulate(convolution_kernels(), device)
    sides = (1, 2, 5, 14, 20, 37, 56, 97, 224, 1000)
    for height, width, stride in product(sides, sides, (1, 2)):
        for channels, out_channels in ((8, 8), (64, 256), (2048, 512), (512, 2048)):
            case = Case(1, channels, (height, width), out_channels, 3, stride, ZEROS, adds=True)
            assert case.prepared().tiles >= 1, case
