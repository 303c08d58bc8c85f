"""The launch shapes of group_norm_act: every element is worked on once, and the rules are as documented."""

from __future__ import annotations

from itertools import product

import pytest

from bench.inductor_norms import inductor_works
from bench.shapes import MODELS, shapes_of
from bitfast.kernels import group_norm_act_tiling as tilings
from bitfast.kernels.group_norm_act_tiling import (
    Problem,
    Tiling,
    choose_tiling,
    is_wide,
    predicted_seconds,
    works_of,
)
from bitfast.kernels.launch import H100, Device, ceil_div, next_power_of_two

hypothesis = pytest.importorskip("hypothesis", reason="the shapes are drawn by hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

A100 = Device(multiprocessors=108, l2_bytes=40 * 2**20)
shapes = st.tuples(
    st.integers(1, 300), st.integers(1, 5000), st.integers(1, 64), st.integers(1, 300)
)


@settings(max_examples=500)
@given(
    shape=shapes,
    itemsize=st.sampled_from([2, 4]),
    is_channels_last=st.booleans(),
    tensors=st.sampled_from([1, 2]),
    kept_vectors=st.sampled_from([None, 0, 8]),
    multiprocessors=st.sampled_from([1, 64, 108, 132, 148]),
    megabytes=st.sampled_from([1, 40, 50, 60, 126]),
)
def test_a_tiling_covers_everything_once(
    shape, itemsize, is_channels_last, tensors, kept_vectors, multiprocessors, megabytes
):
    batch, pixels, groups, per_group = shape
    channels = groups * per_group
    device = Device(multiprocessors, megabytes * 2**20)
    arguments = (batch, pixels, channels, groups, itemsize, is_channels_last, tensors, device)
    p = choose_tiling(*arguments, kept_vectors)
    chunk = p.block_pixels * p.block_groups * p.padded
    for n in (p.block_pixels, p.block_groups, p.padded, p.warps):
        assert n & (n - 1) == 0, f"{n} is no power of two"
    assert chunk >= 32 * p.warps, "two threads would load the same element"
    assert p.parts * p.padded >= per_group
    assert p.parts == 1 or p.block_groups == 1
    assert (p.splits - 1) * p.pixels_per_split < pixels <= p.splits * p.pixels_per_split
    blocks = ceil_div(groups, p.block_groups) * p.parts
    assert p.programs == batch * blocks * p.splits < 2**31
    if p.is_whole:
        assert (p.parts, p.splits) == (1, 1)
        assert (p.chunks - 1) * p.block_pixels < pixels <= p.chunks * p.block_pixels
        kept = p.chunks * chunk * itemsize * tensors / (32 * p.warps * tilings.VECTOR)
        assert kept <= (tilings.KEPT_VECTORS if kept_vectors is None else kept_vectors)
    else:
        assert p.splits == 1 or p.pixels_per_split % p.block_pixels == 0
        assert p.splits * p.parts <= max(tilings.MOST_PARTIALS, p.parts)
    assert p == choose_tiling(*arguments, kept_vectors)


def tiling_of(batch: int, side: int, channels: int, tensors: int = 1, itemsize: int = 2) -> Tiling:
    return choose_tiling(batch, side * side, channels, 32, itemsize, True, tensors, H100)


def test_the_tiling_for_the_tensors_of_a_network():
    for channels, side in ((64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)):
        for batch, tensors in product((1, 8, 128), (1, 2)):
            is_small = side <= 28 or tensors == 1
            assert tiling_of(batch, side, channels, tensors).is_whole or not is_small
    # An image of 120x120 does not stay in registers. Then programs read whole rows.
    large = tiling_of(128, 120, 256)
    assert not large.is_whole
    assert large.block_groups == 32
    assert large.programs >= 8 * H100.multiprocessors
    # Several programs fit into a multiprocessor, so that one computes while others load.
    assert tiling_of(128, 28, 512).warps <= 8
    assert tiling_of(128, 14, 1024).warps <= 4


@pytest.mark.parametrize("side", [7, 14, 28, 56])
def test_few_lanes_are_idle(side):
    """49 pixels are not rounded up to 64, nor 196 to 256, 784 to 1024, or 3136 to 4096."""
    for channels, tensors in product((256, 2048), (1, 2)):
        p = tiling_of(128, side, channels, tensors)
        if p.is_whole:
            lanes = p.chunks * p.block_pixels
            assert lanes - side * side <= lanes / 8
            assert lanes < next_power_of_two(side * side)


# ---- predictions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("image_size", [224, 480])
@pytest.mark.parametrize("device", [A100, H100], ids=["A100", "H100"])
def test_no_norm_is_predicted_to_take_longer_than_what_inductor_writes(model, image_size, device):
    """A prediction by one model for both; what it says of our shapes has not been measured.

    Where a group's channels are rounded up to a power of two, 24 to 32, up to 3 % more is borne.
    """
    norms = {(norm.channels, norm.pixels) for norm in shapes_of(model, image_size).norms}
    for (channels, pixels), batch, itemsize, tensors in product(
        sorted(norms), (1, 8, 128), (2, 4), (1, 2)
    ):
        problem = Problem(
            batch, pixels, channels, 32, itemsize, True, tensors, tilings.KEPT_VECTORS
        )
        shape = choose_tiling(*problem[:7], device)
        ours = predicted_seconds(works_of(problem, shape, device), device)
        theirs = predicted_seconds(inductor_works(problem, device), device)
        allowed = 1 if problem.padded == problem.per_group else 1.03
        assert ours <= allowed * theirs, (problem, shape, ours, theirs)


def test_both_forms_are_needed():
    """Neither is predicted to be the better one for all tensors of a network."""
    norms = shapes_of("R152x4", 224).norms
    forms = {choose_tiling(128, n.pixels, n.channels, 32, 2, True, 1, H100).is_whole for n in norms}
    assert forms == {True, False}


def test_the_model_agrees_roughly_with_what_was_measured():
    """torch.compile on an H100: 274 us for 256@56x56 and 77 us for 1024@14x14, batch 128, bfloat16."""
    for channels, side, measured in ((256, 56, 274e-6), (1024, 14, 77e-6)):
        problem = Problem(128, side * side, channels, 32, 2, True, 1, tilings.KEPT_VECTORS)
        predicted = predicted_seconds(inductor_works(problem, H100), H100)
        assert abs(predicted - measured) < measured / 3


def test_64_bit_offsets_are_chosen_where_32_bits_may_not_do():
    assert not is_wide(56 * 56, 256, 512, 64)
    assert is_wide(2**31 // 64, 64, 256, 64)
    assert is_wide(2**31 // 64 - 1, 64, 256, 64)  # the last tile reaches past the end
    assert not is_wide(2**31 // 64 - 1000, 32, 256, 32)
    assert choose_tiling(1, 2**25, 64, 32, 2, True, 1, H100).is_wide
    assert not choose_tiling(
        2**20, 64, 64, 32, 2, True, 1, H100
    ).is_wide  # many small images: 32 bits do
    last = choose_tiling(1, 8192 * 8192, 31, 31, 2, True, 1, H100)
    assert (8192 * 8192 + last.chunks * last.block_pixels) * 31 >= 2**31 - 2**28
    assert last.is_wide == ((8192 * 8192 + last.chunks * last.block_pixels) * (31 + 32) >= 2**31)
