"""The launch shapes of group_norm_act: every element is worked on once, and the rules are as documented."""

from __future__ import annotations

import pytest

from bitfast.kernels import group_norm_act as kernels
from bitfast.kernels.group_norm_act import Tiling, choose_tiling, is_wide
from bitfast.kernels.launch import H100, Device, ceil_div

hypothesis = pytest.importorskip("hypothesis", reason="the shapes are drawn by hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

shapes = st.tuples(
    st.integers(1, 300), st.integers(1, 5000), st.integers(1, 64), st.integers(1, 300)
)


@settings(max_examples=500)
@given(
    shape=shapes,
    itemsize=st.sampled_from([2, 4]),
    is_channels_last=st.booleans(),
    tensors=st.sampled_from([1, 2]),
    multiprocessors=st.sampled_from([1, 64, 108, 132, 148]),
    megabytes=st.sampled_from([1, 40, 50, 60, 126]),
)
def test_a_tiling_covers_everything_once(
    shape, itemsize, is_channels_last, tensors, multiprocessors, megabytes
):
    batch, pixels, groups, per_group = shape
    channels = groups * per_group
    device = Device(multiprocessors, megabytes * 2**20)
    p = choose_tiling(batch, pixels, channels, groups, itemsize, is_channels_last, tensors, device)
    tile = p.block_pixels * p.block_groups * p.padded
    for n in (p.block_pixels, p.block_groups, p.padded, p.warps):
        assert n & (n - 1) == 0, f"{n} is no power of two"
    assert p.parts * p.padded >= per_group
    assert p.parts == 1 or p.block_groups == 1
    assert (p.splits - 1) * p.pixels_per_split < pixels <= p.splits * p.pixels_per_split
    blocks = ceil_div(groups, p.block_groups) * p.parts
    assert p.programs <= batch * blocks * p.splits < 2**31
    if p.one_tile:
        assert p.is_whole
        assert p.block_pixels >= pixels
        assert tile * tensors <= kernels.TILE_IN_REGISTERS
    if p.is_whole:
        assert (p.parts, p.splits) == (1, 1)
    else:
        assert p.programs == batch * blocks * p.splits
        assert p.splits == 1 or p.pixels_per_split % p.block_pixels == 0
    assert p == choose_tiling(
        batch, pixels, channels, groups, itemsize, is_channels_last, tensors, device
    )


def tiling_of(batch: int, side: int, channels: int, tensors: int = 1, itemsize: int = 2) -> Tiling:
    return choose_tiling(batch, side * side, channels, 32, itemsize, True, tensors, H100)


def test_the_tiling_for_the_tensors_of_a_network():
    assert tiling_of(128, 7, 2048).one_tile
    assert tiling_of(128, 14, 1024).one_tile
    large = tiling_of(128, 56, 256)  # 205 MB: four times the L2 cache
    assert large.is_whole
    assert not large.one_tile
    at_work = large.programs * 56 * 56 * large.block_groups * large.padded * 2
    assert at_work <= H100.l2_bytes // 2
    assert large.programs >= H100.multiprocessors // 2
    small = tiling_of(1, 56, 256)
    assert not small.is_whole
    assert small.programs >= H100.multiprocessors // 2
    # Rows are whole sectors, and 128 bytes where the batch fills the device.
    for p in (large, small, tiling_of(128, 14, 1024)):
        assert p.block_groups * p.padded * 2 >= 32
    assert tiling_of(128, 14, 1024).block_groups * 32 * 2 == 128


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
    assert (8192 * 8192 + last.block_pixels) * 31 >= 2**31 - 2**28
    assert last.is_wide == ((8192 * 8192 + last.block_pixels) * (31 + 32) >= 2**31)
