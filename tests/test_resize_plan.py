"""The plans that drive resize_normalize on a GPU, and the filters that are kept there."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfast.kernels import resize_normalize as kernels
from bitfast.ops import resize_filters
from bitfast.ops.resize_filters import FIELDS, FilterStore, filter_store
from tests.image_layouts import LAYOUTS, random_image
from tests.requirements import NEEDS_EXTENSION
from tests.resize_plans import Batch, expected_tables, known_filters, plan_with

pytestmark = NEEDS_EXTENSION

CPU = torch.device("cpu")
NOTHING = torch.empty((0, len(FIELDS)), dtype=torch.int64)

edges = st.integers(1, 40) | st.integers(1, 700)
offsets = st.integers(-60, 700)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    count, channels = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    pairs = st.tuples(edges, edges)
    images, sizes = [], []
    for i in range(count):
        height, width = draw(pairs)
        images.append(random_image(i, (height, width, channels), draw(st.sampled_from(LAYOUTS))))
        kept = st.sampled_from([(height, width), (height, 9), (9, width)])
        sizes.append(draw(pairs | kept))
    return Batch(
        images,
        sizes,
        draw(pairs),
        [draw(st.tuples(offsets, offsets) | st.just((0, 0))) for _ in images],
        [draw(st.integers(0, 1)) for _ in images],
    )


def flat(pairs: Any) -> list[int]:
    return [number for pair in pairs for number in pair]


@settings(max_examples=150)
@given(batches(), st.sampled_from(["HWC", "CHW"]))
def test_plans_are_those_of_plain_python(batch: Batch, layout: str) -> None:
    store = FilterStore(3, CPU)
    images = list(batch.images)
    if layout == "CHW":
        images = [image.permute(2, 0, 1) for image in images]
    numbers = (flat(batch.sizes), batch.window, flat(batch.offsets), batch.first_axes, layout)
    plan, _ = store.plan(lambda known: plan_with(known, images, *numbers))
    filters = known_filters(store._latest.table)
    assert set(filters) == batch.lines()
    expected = expected_tables(batch, filters, plan.between.data_ptr())
    first, second = kernels.tables_of(plan.tables, plan.places)
    assert first.segments.tolist() == expected.first_segments
    assert first.programs.tolist() == expected.first_programs
    assert second.segments.tolist() == expected.second_segments
    assert second.programs.tolist() == expected.second_programs
    assert plan.between.numel() == max(expected.buffer_size, 1)
    assert all(place % 16 == 0 for place in plan.places[:4])


def test_an_axis_that_stays_needs_no_pass() -> None:
    image = random_image(1, (20, 9, 3), "HWC")
    call = ([image], [7, 9], (7, 5), [0, 2])
    plan, _ = FilterStore(3, CPU).plan(lambda known: plan_with(known, *call))
    first, second = kernels.tables_of(plan.tables, plan.places)
    assert first.programs.numel() == 0
    assert not first.segments.any()
    assert plan.between.numel() == 1
    address, _, _, _, _, _, _, is_height, rows, columns, _, _ = second.segments[0].tolist()
    assert (address, is_height, rows, columns) == (image.data_ptr() + 2 * 3, 1, 7, 5)


# ---- filters -------------------------------------------------------------------------------------


def test_filters_are_those_of_the_reference(seed: int) -> None:
    from bitfast.reference import PRECISION_BITS, resampling_weights

    random = np.random.default_rng(seed)
    for _ in range(300):
        before, after = random.integers(1, 400, 2).tolist()
        resample = int(random.integers(1, 6))
        first = int(random.integers(0, after))
        count = int(random.integers(1, after - first + 1))
        line = [before, after, first, count]
        known, numbers = torch.ops.bitfast.resize_filters.native(NOTHING, line, resample, 0)
        ((_, _, _, _, begin, weights, taps, first_input, end),) = known.tolist()
        assert (begin, weights) == (0, count)
        assert numbers.numel() == count * (1 + taps)
        starts = numbers[:count].long()
        assert (int(starts[0]), int(starts[-1]) + taps) == (first_input, end)
        table = torch.zeros(count, before, dtype=torch.int64)
        places = starts[:, None] + torch.arange(taps)
        table.scatter_add_(1, places, numbers[count:].view(taps, count).T.long())
        if before == after:
            expected = torch.eye(before, dtype=torch.int64)[first : first + count] << PRECISION_BITS
        else:
            index, weight = resampling_weights(before, after, resample)
            scaled = weight * (1 << PRECISION_BITS)
            rounded = (scaled + torch.where(scaled < 0, -0.5, 0.5)).trunc().long()
            expected = torch.zeros(after, before, dtype=torch.int64)
            expected.scatter_add_(1, index.T, rounded.T)
            expected = expected[first : first + count]
        assert torch.equal(table, expected), line


@pytest.mark.parametrize(
    ("lines", "message"),
    [([3, 4, 0], "four numbers"), ([3, 4, 2, 3], "outputs that exist"), ([0, 4, 0, 1], "outputs that")],
)  # fmt: skip
def test_filters_of_lines_that_do_not_exist(lines: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bitfast.resize_filters.native(NOTHING, lines, 3, 0)


def call_for(heights: list[int]) -> tuple[list[Tensor], list[int], tuple[int, int]]:
    """Return what is planned for one column of pixels each."""
    images = [torch.zeros(height, 1, 1, dtype=torch.uint8) for height in heights]
    return images, [5, 1] * len(images), (5, 1)


def starts_of(store: FilterStore, height: int) -> Tensor:
    """Return the starts that a plan of the store leads to."""
    call = call_for([height])
    plan, numbers = store.plan(lambda known: plan_with(known, *call))
    _, second = kernels.tables_of(plan.tables, plan.places)
    place = int(second.segments[0, 4])
    return numbers[place : place + 5]


def expected_starts(height: int) -> Tensor:
    _, numbers = torch.ops.bitfast.resize_filters.native(NOTHING, [height, 5, 0, 5], 3, 0)
    return numbers[:5]


def test_lines_that_have_been_seen_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FilterStore(3, CPU)
    call = call_for([7, 8, 9])
    store.plan(lambda known: plan_with(known, *call))
    monkeypatch.setattr(store, "_with_more", None)
    monkeypatch.setattr(resize_filters, "upload", None)
    plans = 0

    def count(known: Tensor) -> Any:
        nonlocal plans
        plans += 1
        return plan_with(known, *call_for([9, 7, 7]))

    store.plan(count)
    assert plans == 1


def test_what_has_been_planned_stays_while_lines_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize_filters, "FEWEST_NUMBERS", 8)
    store = FilterStore(3, CPU)
    heights = [*range(6, 40), 400, 11]
    found = [(height, starts_of(store, height)) for height in heights]
    for height, starts in found:
        assert torch.equal(starts, expected_starts(height))
        assert torch.equal(starts_of(store, height), starts)
    table = store._latest.table
    assert table.tolist() == sorted(table.tolist())
    assert len(table) == len(set(heights)) + 1  # and the width
    assert store._latest.used <= store._latest.numbers.numel() < 2 * store._latest.used


def test_lines_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize_filters, "FEWEST_NUMBERS", 8)
    monkeypatch.setattr(resize_filters, "MOST_NUMBERS", 300)
    store = FilterStore(3, CPU)
    for height in range(6, 90):
        assert torch.equal(starts_of(store, height), expected_starts(height))
        assert len(store._latest.table) < 20
    # A batch of more than that at once.
    call = call_for([*range(100, 160), 89])
    for _ in range(2):
        plan, _ = store.plan(lambda known: plan_with(known, *call))
        assert not plan.missing
        assert len(store._latest.table) == 62
    assert torch.equal(starts_of(store, 150), expected_starts(150))


def test_threads_share_a_store() -> None:
    store = FilterStore(3, CPU)
    wrong = []

    def work(seed: int) -> None:
        for height in np.random.default_rng(seed).integers(6, 60, 40).tolist():
            if not torch.equal(starts_of(store, height), expected_starts(height)):
                wrong.append(height)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_each_stream_and_filter_has_its_store() -> None:
    assert filter_store(3, CPU, 0) is filter_store(3, CPU, 0)
    assert filter_store(3, CPU, 0) is not filter_store(2, CPU, 0)
    assert filter_store(3, CPU, 0) is not filter_store(3, CPU, 1)


def test_filters_outlive_inference_mode() -> None:
    store = FilterStore(3, CPU)
    with torch.inference_mode():
        starts_of(store, 20)
    starts_of(store, 21)
    assert not store._latest.numbers.is_inference()
