"""The emulation of a GPU finds the faults that its header names, and none where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.emulated import DTYPES, at_page_end, call, emulate, library

SOURCE = "tests/host/gpu_emulation_faults.cpp"
FAULTS = [
    "none",
    "no_barrier_before_read",
    "no_barrier_before_overwrite",
    "no_cluster_barrier",
    "shared_past_the_end",
    "global_past_the_end",
    "misaligned_bulk_copy",
    "odd_bulk_copy",
    "uninitialised_barrier",
    "barrier_without_arrival",
    "too_many_arrivals",
    "no_wait_for_copy",
    "no_fence_before_bulk_store",
    "store_left_behind",
    "barrier_that_some_skip",
    "wrong_row_step",
    "misaligned_matrix",
    "matrix_past_the_end",
    "different_matrices",
    "no_fence_before_product",
    "product_not_begun",
    "no_wait_for_product",
    "matrix_overwritten_too_early",
    "different_matrices_of_warps",
    "one_warp_does_not_multiply",
    "sums_read_too_early",
    "product_before_its_matrices",
    "moved_too_far",
    "moved_by_half_a_row",
    "registers_of_three_warps",
    "different_registers",
    "matrices_of_the_wrong_lane",
    "too_many_registers",
    "copy_to_the_other_block_only",
    "the_other_block_is_not_told",
    "no_wait_for_launch_before",
    "load_that_need_not_wait",
    "no_fence_of_new_barriers",
    "no_barrier_at_the_end",
    "no_fence_after_barrier",
]
SEEDS = range(8)


def run(entry: str, fault: str, seed: int) -> bool:
    """Run a kernel; return whether its result is right."""
    kernels = library(SOURCE)
    emulate(kernels, seed=seed)
    if entry == "multiply":
        return run_product(fault)
    if entry == "multiply_copied":
        return run_product_of_copied(fault)
    if entry == "multiply_handed_over":
        return run_product_of_copied(fault, library(SOURCE).multiply_handed_over)
    if entry == "transport":
        return run_transport(fault)
    x = at_page_end(torch.arange(1.0, 257))
    y = at_page_end(x, float("nan"))
    call(getattr(kernels, entry), x, y, FAULTS.index(fault))
    blocks = x.view(4, 64)
    if entry == "reverse":
        blocks = blocks.flip(1)
    if entry in ("swap_blocks", "send_blocks"):
        blocks = blocks.view(2, 2, 64).flip(1).reshape(4, 64)
    return torch.equal(y.view(4, 64), 2 * blocks)


def run_product(
    fault: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    columns: int = 64,
    adds: bool = True,
) -> bool:
    a, b = (at_page_end(torch.randint(-8, 9, (n, 64)).to(dtype)) for n in (64, columns))
    c = at_page_end(torch.full((64, columns), 3.0 if adds else float("nan")))
    expected = a.float() @ b.float().mT + (3 if adds else 0)
    multiply = library(SOURCE).multiply
    call(multiply, a, b, c, DTYPES[dtype], columns, int(adds), FAULTS.index(fault))
    return torch.equal(c, expected)


def run_product_of_copied(fault: str, function: Any = None) -> bool:
    rows = at_page_end(torch.randint(-8, 9, (64, 16)).bfloat16())
    b = at_page_end(rows.view(64, 2, 8).transpose(0, 1).contiguous())
    c = at_page_end(torch.empty(64, 64), float("nan"))
    call(function or library(SOURCE).multiply_copied, b, c, FAULTS.index(fault))
    return torch.equal(c, rows.float() @ rows.float().mT)


def run_transport(fault: str) -> bool:
    x = at_page_end(torch.arange(8.0 * 16 * 8))
    y = at_page_end(x, float("nan"))
    call(library(SOURCE).transport, x, y, FAULTS.index(fault))
    return torch.equal(x, y)


KERNELS = [
    "reverse",
    "swap_blocks",
    "send_blocks",
    "double_in_bulk",
    "double_own",
    "multiply",
    "multiply_copied",
    "transport",
    "share",
    "multiply_handed_over",
]


@pytest.mark.parametrize("entry", KERNELS)
def test_right_kernels(entry: str) -> None:
    assert all(run(entry, "none", seed) for seed in SEEDS)


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ("reverse", "no_barrier_before_read"),
        ("reverse", "no_barrier_before_overwrite"),
        ("swap_blocks", "no_cluster_barrier"),
        ("send_blocks", "no_wait_for_copy"),
        ("double_in_bulk", "no_wait_for_copy"),
        ("multiply", "wrong_row_step"),
        ("multiply", "matrix_overwritten_too_early"),
        ("multiply", "sums_read_too_early"),
        ("multiply_copied", "product_before_its_matrices"),
        ("transport", "matrices_of_the_wrong_lane"),
    ],
)
def test_a_missing_wait_or_a_wrong_step_gives_wrong_results(entry: str, fault: str) -> None:
    right = [is_right(entry, fault, seed) for seed in SEEDS]
    assert right.count(False) >= len(SEEDS) // 2


def is_right(entry: str, fault: str, seed: int) -> bool:
    """Whether the result is, unless other blocks or copies have met a block that has ended already."""
    try:
        return run(entry, fault, seed)
    except RuntimeError as error:
        if "a block that has ended" not in str(error):
            raise
        return False


@pytest.mark.parametrize(
    ("entry", "fault", "message"),
    [
        ("reverse", "shared_past_the_end", "a store is outside of shared memory"),
        ("reverse", "global_past_the_end", "an access outside of memory"),
        ("reverse", "barrier_that_some_skip", "threads wait for ever"),
        ("send_blocks", "no_cluster_barrier", "a barrier is not initialised"),
        ("send_blocks", "barrier_without_arrival", "threads wait for ever"),
        ("double_in_bulk", "misaligned_bulk_copy", "a bulk copy is not aligned to 16 bytes"),
        ("double_in_bulk", "odd_bulk_copy", "a bulk copy of 252 bytes"),
        ("double_in_bulk", "uninitialised_barrier", "a barrier is not initialised"),
        ("double_in_bulk", "barrier_without_arrival", "threads wait for ever"),
        ("double_in_bulk", "too_many_arrivals", "a barrier is arrived at too often"),
        ("double_in_bulk", "no_fence_before_bulk_store", "without fence_async_proxy"),
        ("double_in_bulk", "store_left_behind", "without waiting for its asynchronous work"),
        ("double_own", "no_wait_for_copy", "without waiting for its asynchronous work"),
        ("multiply", "misaligned_matrix", "a matrix is not aligned to 16 bytes"),
        ("multiply", "matrix_past_the_end", "a matrix is outside of shared memory"),
        ("multiply", "different_matrices", "of a warpgroup multiply different matrices"),
        ("multiply", "different_matrices_of_warps", "of a warpgroup multiply different matrices"),
        (
            "multiply",
            "one_warp_does_not_multiply",
            "only some warps of a warpgroup have multiplied",
        ),
        ("multiply", "moved_too_far", "a matrix is moved out of shared memory"),
        ("multiply", "moved_by_half_a_row", "a matrix cannot be moved by 8 bytes"),
        ("multiply", "no_fence_before_product", "a product meets shared memory that was written"),
        ("multiply", "product_not_begun", "a product without begin_products"),
        ("multiply", "no_wait_for_product", "without waiting for its asynchronous work"),
        ("transport", "no_fence_before_bulk_store", "without fence_async_proxy"),
        ("transport", "registers_of_three_warps", "change their registers"),
        ("transport", "different_registers", "change their registers differently"),
        ("transport", "no_wait_for_launch_before", "before the launch before has ended"),
        ("transport", "load_that_need_not_wait", "need not wait for the launch before"),
        ("share", "no_fence_of_new_barriers", "used without fence_barrier_init"),
        ("share", "no_barrier_at_the_end", "a block that has ended is written to"),
        ("multiply_handed_over", "no_fence_after_barrier", "without fence_async_proxy"),
        ("share", "too_many_registers", "wait for ever for registers"),
        ("share", "copy_to_the_other_block_only", "wait for ever"),
        ("share", "the_other_block_is_not_told", "wait for ever"),
    ],
)
def test_a_fault_ends_the_launch(entry: str, fault: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(entry, fault, 0)
    assert run(entry, "none", 0), "the next launch is not affected"


def test_products_of_shared_memory_are_for_one_generation_only() -> None:
    emulate(library(SOURCE), (100, 148, 227 * 1024))
    with pytest.raises(RuntimeError, match="this GPU has no products of shared memory"):
        run_product()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [64, 128, 256])
@pytest.mark.parametrize("adds", [False, True])
def test_products_of_shared_memory(dtype: torch.dtype, columns: int, adds: bool) -> None:
    for seed in SEEDS:
        emulate(library(SOURCE), seed=seed)
        assert run_product("none", dtype, columns, adds)
