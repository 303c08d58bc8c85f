"""The CUDA kernels of the pad and the pool, run on the CPU by the emulation: the bits of the reference."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench import host
from bitfast import reference
from bitfast.memory_format import is_channels_last, memory_format_of
from bitfast.ops import native_cuda, same_padding
from bitfast.ops import same_padding_cuda as cuda
from bitfast.ops.same_padding_cuda import NO_WINDOW, Window, new_call
from tests.drawn_cases import SEEDS
from tests.emulated import A100, H100, at_page_end, call, emulate, library
from tests.feature_maps import DTYPES, LAYOUTS, make

STEM: Window = ((3, 3), (2, 2), (1, 1))
SMALL = (80, 1, 163 * 1024)
"""A device that few threads fill, so that strips are tall."""


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return library("csrc/same_padding.cu")


# ---- the entries, on poisoned memory that ends at a guard page ----------------------------------


def run_pad(kernels: Any, x: Tensor, sides: list[int], value: float) -> Tensor:
    size = reference.padded_size(x.shape[2:], sides)
    result = poisoned(x, size, x.dtype)
    told = told_of(x, x.stride(), is_channels_last(x), size, NO_WINDOW, sides, value)
    call(kernels.bitfast_same_pad, told, None, x, result)
    return result


def run_pool(
    kernels: Any, x: Tensor, window: Window, sides: list[int], value: float, with_taps: bool
) -> tuple[Tensor, Tensor | None]:
    size = reference.pooled_size(x.shape[2:], *window, sides)
    result = poisoned(x, size, x.dtype)
    taps = poisoned(x, size, reference.dtype_of_taps(window[0])) if with_taps else None
    told = told_of(x, x.stride(), is_channels_last(x), size, window, sides, value)
    call(kernels.bitfast_same_max_pool, told, None, x, result, taps)
    return result, taps


def run_backward(
    kernels: Any, grad: Tensor, taps: Tensor, size: Any, window: Window, sides: list[int]
) -> Tensor:
    grad, taps = at_page_end(grad), at_page_end(taps)
    result = poisoned(taps, size, grad.dtype)
    told = told_of(
        result, result.stride(), is_channels_last(taps), taps.shape[2:], window, sides, 0.0
    )
    call(kernels.bitfast_same_max_pool_backward, told, None, grad, taps, result)
    return result


def told_of(x: Tensor, strides: Any, last: bool, *others: Any) -> Any:
    return ctypes.byref(new_call(x.shape, strides, x.dtype, last, *others))


def poisoned(like: Tensor, size: Any, dtype: torch.dtype) -> Tensor:
    shape = (*like.shape[:2], *size)
    result = torch.empty(shape, dtype=dtype, memory_format=memory_format_of(like))
    return at_page_end(result, math.nan if dtype.is_floating_point else 99)


def check(
    kernels: Any, x: Tensor, window: Window, sides: list[int], value: float, backward: bool = True
) -> None:
    """Compare all entries with the reference, bit by bit: sums of small integers are exact."""

    def same(actual: Tensor, expected: Tensor) -> None:
        assert actual.dtype == expected.dtype
        assert memory_format_of(actual) == memory_format_of(expected)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)

    same(run_pad(kernels, x, sides, value), reference.same_pad_forward(x, sides, value))
    expected, expected_taps = reference.same_max_pool_forward(x, *window, sides, value, True)
    result, taps = run_pool(kernels, x, window, sides, value, True)
    assert taps is not None
    same(result, expected)
    same(taps, expected_taps)
    same(run_pool(kernels, x, window, sides, value, False)[0], expected)
    if not backward:
        return
    grad = (
        torch.randint(-3, 4, taps.shape)
        .to(x.dtype)
        .contiguous(memory_format=memory_format_of(taps))
    )
    same(
        run_backward(kernels, grad, taps, x.shape[2:], window, sides),
        reference.same_max_pool_backward(grad, taps, x.shape[2:], *window, sides),
    )


@settings(max_examples=120, deadline=None)
@given(
    window=st.tuples(
        st.tuples(st.integers(1, 4), st.integers(1, 4)),
        st.tuples(st.integers(1, 4), st.integers(1, 4)),
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
    ),
    sides=st.one_of(st.none(), st.lists(st.integers(0, 3), min_size=4, max_size=4)),
    shape=st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    value=st.sampled_from([0.0, -0.5, math.nan, -math.inf]),
    seed=SEEDS,
)
def test_any_window(kernels, window, sides, shape, dtype, layout, value, seed) -> None:
    sides = sides or same_padding.same_padding(shape[2:], *window)
    assume_it_fits(shape, window, sides)
    emulate(kernels, seed=seed)
    check(kernels, at_page_end(make(shape, dtype, layout, seed)), window, sides, value)


@settings(max_examples=120, deadline=None)
@given(
    sides=st.lists(st.integers(0, 4), min_size=4, max_size=4),
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    images=st.integers(1, 3),
    vectors=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    value=st.sampled_from([0.0, -0.5, math.nan, -math.inf]),
    device=st.sampled_from([H100, A100, SMALL]),
    seed=SEEDS,
)
def test_the_pool_of_the_stem(
    kernels, sides, size, images, vectors, dtype, value, device, seed
) -> None:
    """Its own kernels: whole vectors of channels, whatever the padding."""
    channels = vectors * 16 // dtype.itemsize
    shape = (images, channels, *size)
    assume_it_fits(shape, STEM, sides)
    emulate(kernels, device, seed)
    x = at_page_end(make(shape, dtype, torch.channels_last, seed))
    check(kernels, x, STEM, sides, value)


def assume_it_fits(shape: Any, window: Window, sides: list[int]) -> None:
    for axis in (0, 1):
        padded = shape[2 + axis] + sides[2 * axis] + sides[2 * axis + 1]
        assume(padded > (window[0][axis] - 1) * window[2][axis])


@pytest.mark.parametrize("device", [H100, A100, SMALL])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shape_of_the_model(kernels, dtype, device) -> None:
    emulate(kernels, device)
    x = at_page_end(make((1, 64, 112, 112), dtype, torch.channels_last, 0))
    check(kernels, x, STEM, [1, 1, 1, 1], 0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sides", [[-1, 2, 0, -3], [3, 0, -2, 4], [-5, -4, 0, 0], [0, 0, -4, -2]])
def test_cropping(kernels, sides, layout) -> None:
    """As the gradient of a pad does."""
    x = at_page_end(make((2, 16, 10, 7), torch.bfloat16, layout, 0))
    actual = run_pad(kernels, x, sides, -1.0)
    assert torch.equal(actual, reference.same_pad_forward(x, sides, -1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [8, 5])
def test_nan_and_infinity(kernels, channels: int, dtype: torch.dtype) -> None:
    """The taps too: of equal numbers the first counts, of several NaN the last."""
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0])
    drawn = torch.randint(0, 5, (2, channels, 16, 14), generator=generator)
    x = at_page_end(special[drawn].to(dtype).contiguous(memory_format=torch.channels_last))
    for value in (0.0, -math.inf):
        check(kernels, x, STEM, [1, 1, 1, 1], value)


@pytest.mark.parametrize("channels", [8, 5])
def test_gradients_of_special_numbers(kernels, channels: int) -> None:
    """NaN and infinity reach the pixels that they belong to, and no others."""
    x = at_page_end(make((1, channels, 12, 12), torch.float32, torch.channels_last, 3))
    sides = [1, 1, 1, 1]
    _, taps = run_pool(kernels, x, STEM, sides, 0.0, True)
    grad = torch.ones(taps.shape).contiguous(memory_format=torch.channels_last)
    grad[0, 1, 2, 3], grad[0, 2, 3, 4] = math.nan, -math.inf
    actual = run_backward(kernels, grad, taps, (12, 12), STEM, sides)
    expected = reference.same_max_pool_backward(grad, taps, (12, 12), *STEM, sides)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_of_more_than_256_pixels(kernels, layout) -> None:
    """Their taps are int16."""
    x = at_page_end(make((1, 4, 21, 23), torch.float32, layout, 0))
    for window in (
        ((16, 16), (2, 2), (1, 1)),
        ((16, 17), (2, 2), (1, 1)),
        ((19, 20), (1, 3), (1, 1)),
    ):
        check(kernels, x, window, [0, 0, 0, 0], 0.0)


@pytest.mark.parametrize("view", ["sliced", "permuted", "expanded", "narrowed"])
def test_views_are_read_and_nothing_beside_them(kernels, view: str) -> None:
    whole = torch.full((4, 8, 12, 14), math.nan, dtype=torch.bfloat16)
    x = {
        "sliced": whole[1:3, 2:7, 1:10, 3:12],
        "permuted": whole.permute(0, 3, 1, 2)[:, 1:6],
        "expanded": whole[:, :1, :7, :7].expand(4, 3, 7, 7),
        "narrowed": whole.contiguous(memory_format=torch.channels_last)[:, :, 2:9, 1:8],
    }[view]
    (whole[:, :1, :7, :7] if view == "expanded" else x).copy_(make((1, 1, *x.shape[2:])))
    check(kernels, x, STEM, [1, 1, 1, 1], 0.0)


def test_memory_that_is_not_aligned(kernels) -> None:
    memory = make((1 + 2 * 8 * 9 * 7,), torch.bfloat16, seed=0)
    x = memory[1:].view(2, 9, 7, 8).permute(0, 3, 1, 2)
    assert is_channels_last(x)
    check(kernels, x, STEM, [1, 1, 1, 1], 0.0)


def test_numbers_that_need_64_bits(kernels) -> None:
    """Strides, steps and paddings past 2^31, of maps that are small themselves."""
    far = 2**33
    x = make((1, 3, 5, 6), torch.float32, seed=0)
    x = x.as_strided(x.shape, (far, *x.stride()[1:]))
    sides = [0, 0, 0, 0]
    check(kernels, x, STEM, sides, 0.0)
    result, taps = run_pool(kernels, x, ((1, 2), (far, 2), (far, 1)), sides, 0.0, True)
    expected = reference.same_max_pool_forward(x, (1, 2), (5, 2), (1, 1), sides, 0.0, True)
    assert torch.equal(result, expected[0])
    assert torch.equal(taps, expected[1])
    grad = make(taps.shape, torch.float32, seed=1)
    actual = run_backward(kernels, grad, taps, (5, 6), ((1, 2), (far, 2), (far, 1)), sides)
    right = reference.same_max_pool_backward(grad, taps, (5, 6), (1, 2), (5, 2), (1, 1), sides)
    assert torch.equal(actual, right)


@pytest.mark.parametrize("channels", [8, 5])
def test_the_order_of_threads_makes_no_difference(kernels, channels: int) -> None:
    x = make((2, channels, 20, 20), torch.bfloat16, torch.channels_last, 0)
    sides, results = [1, 1, 1, 1], []
    grad = torch.randn(2, channels, 10, 10).bfloat16().contiguous(memory_format=torch.channels_last)
    for seed, device in ((0, H100), (1, H100), (2, SMALL)):
        emulate(kernels, device, seed)
        _, taps = run_pool(kernels, x, STEM, sides, 0.0, True)
        results.append(run_backward(kernels, grad, taps, (20, 20), STEM, sides))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- calls past the dispatcher ------------------------------------------------------------------


@pytest.fixture
def on_the_cpu(kernels, monkeypatch) -> None:
    """Let the emulated kernels serve as the library of the CUDA kernels."""
    monkeypatch.setattr(native_cuda, "library", lambda: kernels)


def test_the_check_of_the_first_use(on_the_cpu, monkeypatch) -> None:
    assert cuda.check_first_use(torch.device("cpu")) is None
    right = reference.same_max_pool_backward
    monkeypatch.setattr(reference, "same_max_pool_backward", lambda *a: right(*a) + 0.25)
    assert "same_max_pool_backward" in str(cuda.check_first_use(torch.device("cpu")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prepared_calls(on_the_cpu, layout, dtype) -> None:
    x = make((2, 16, 9, 10), dtype, layout, 0)
    pool = cuda.PreparedMaxPool(x, STEM, [0, 1, 0, 1], 0.0)
    expected = reference.same_max_pool(x, *STEM, [0, 1, 0, 1], 0.0)
    assert torch.equal(pool(x), expected)
    assert pool(x).stride() == expected.stride()
    leaf = x.clone().requires_grad_()
    twin = x.double().requires_grad_()
    actual, theirs = pool(leaf), reference.same_max_pool(twin, *STEM, [0, 1, 0, 1], 0.0)
    grad = torch.randint(-3, 4, actual.shape).to(dtype)
    for g in (grad, grad.contiguous(memory_format=layout)):
        (ours,) = torch.autograd.grad(actual, leaf, g, retain_graph=True)
        (right,) = torch.autograd.grad(theirs, twin, g.double(), retain_graph=True)
        assert torch.equal(ours.double(), right)
        assert ours.is_contiguous(memory_format=layout)
    pad = cuda.PreparedPad(x, [0, 1, 2, 3], -1.0)
    assert torch.equal(pad(x), reference.same_pad_forward(x, [0, 1, 2, 3], -1.0))


def test_a_gradient_may_be_differentiated_again(on_the_cpu) -> None:
    x = make((1, 8, 6, 6), layout=torch.channels_last, seed=0).requires_grad_()
    pool = cuda.PreparedMaxPool(x, STEM, [1, 1, 1, 1], 0.0)
    plain = [reference.same_max_pool, pool]
    results = []
    for function in plain:
        pooled = function(x) if function is pool else function(x, *STEM, [1, 1, 1, 1], 0.0)
        (first,) = torch.autograd.grad(pooled.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.pow(3).sum(), x)[0])
    assert torch.equal(*results)


def test_eager_calls_and_prepared_ones_find_the_kernels(on_the_cpu, monkeypatch) -> None:
    """What is decided for CUDA tensors, tried with tensors of the CPU."""
    monkeypatch.setattr(same_padding, "may_launch", lambda op, x: True)
    monkeypatch.setattr(same_padding, "_calls", same_padding.BoundedCache(most=4))
    x = make((2, 8, 9, 9), layout=torch.channels_last, seed=0)
    expected = reference.same_max_pool(x, *STEM, [1, 1, 1, 1], 0.0)
    for _ in range(2):
        assert torch.equal(same_padding.same_max_pool(x, 3, 2), expected)
        assert torch.equal(
            same_padding.same_pad(x, 3, 2), reference.same_pad_forward(x, [1, 1, 1, 1], 0.0)
        )
        assert same_padding.same_pad(x, 1, 2) is x
    kinds = [type(call) for call in same_padding._calls.values()]
    assert kinds == [cuda.PreparedMaxPool, cuda.PreparedPad, type(None)]
    assert torch.equal(same_padding.same_max_pool(x, [3, 3], 2), expected), "lists go by operators"
    leaf = x.clone().requires_grad_()
    same_padding.same_pad(same_padding.same_max_pool(leaf, 3, 2), 3, 2).sum().backward()
    assert leaf.grad is not None
    with pytest.raises(ValueError, match="kernel_size must be"):
        same_padding.same_max_pool(x, 0, 2)


def test_plans_prepare_a_call_for_each_layout(on_the_cpu, monkeypatch) -> None:
    monkeypatch.setattr(same_padding, "select_backend", lambda *_: "native")
    shape = (2, 8, 9, 9)
    pool = same_padding.max_pool_for(shape, STEM, None, 0.0, "cuda", torch.float32)
    pad = same_padding.pad_for(shape, STEM, 0.5, "cuda", torch.float32)
    assert pad is not None
    for layout in LAYOUTS:
        x = make(shape, layout=layout, seed=0)
        for _ in range(2):
            assert torch.equal(pool(x), reference.same_max_pool(x, *STEM, [1, 1, 1, 1], 0.0))
            assert torch.equal(pad(x), reference.same_pad_forward(x, [1, 1, 1, 1], 0.5))


def test_what_calls_cost_the_host(on_the_cpu, monkeypatch) -> None:
    """Few Python functions, and torch's dispatcher for memory only."""
    monkeypatch.setattr(same_padding, "select_backend", lambda *_: "native")
    x = make((1, 8, 4, 4), layout=torch.channels_last, seed=0)
    pool = same_padding.max_pool_for(x.shape, STEM, None, 0.0, "cuda", x.dtype)
    with torch.no_grad():
        counted = host.calls_of(pool, x)
    assert counted["python_calls"] <= 6, counted["python_calls_most"]
    assert counted["operators_most"] == {"aten::empty_strided": 1}
