"""The CUDA kernel of norm_convolution, in the emulation of a GPU, against float64."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast.ops.norm_convolution_cuda import Call, Prepared
from tests.emulated import A100, H100, at_page_end, call, emulate, emulate_last_cluster_only
from tests.norm_convolution_calls import (
    DEVICES,
    MODEL,
    NAN,
    ZEROS,
    Case,
    Inputs,
    Results,
    check,
    check_statistics,
    convolution_kernels,
    convolve,
    expected,
    name_of,
    pack_filters,
)
from tests.tolerances import assert_within_contract

hypothesis = pytest.importorskip("hypothesis", reason="the shapes are drawn by hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16


# ---- the convolutions of the model --------------------------------------------------------------------


@pytest.mark.parametrize("case", MODEL, ids=name_of)
def test_the_convolutions_of_the_model(case: Case) -> None:
    emulate(convolution_kernels(), H100)
    check(case)


@pytest.mark.parametrize("case", [MODEL[0], MODEL[13], MODEL[18]], ids=name_of)
def test_zeros_on_all_sides(case: Case) -> None:
    """As in released models: (1, 1) where "same" pads less before than after; and in float16."""
    emulate(convolution_kernels(), H100, seed=7)
    check(replace(case, padding=ZEROS if case.kernel_size == 3 else case.padding, dtype=FLOAT16))


# ---- small and odd ones -------------------------------------------------------------------------------


@st.composite
def cases(draw: Any) -> Case:
    kernel_size, stride = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2]))
    sides = st.integers(0, kernel_size - 1)
    padding = draw(st.tuples(sides, sides, sides, sides))
    size = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    fits = size[0] + padding[0] + padding[1] >= 3 and size[1] + padding[2] + padding[3] >= 3
    hypothesis.assume(kernel_size == 1 or fits)
    channels = st.integers(1, 25).map(lambda n: 8 * n)
    case = Case(
        draw(st.integers(1, 4)), draw(channels), size, draw(channels), kernel_size, stride, padding,
        draw(st.sampled_from(["relu", "none", None])), draw(st.booleans()),
        draw(st.just(0) | channels), draw(st.sampled_from([0, 2, 4, 8])),
        draw(st.sampled_from([BFLOAT16, FLOAT16])),
    )  # fmt: skip
    hypothesis.assume(case.products <= 1e8)
    return case


@settings(max_examples=40)
@given(
    case=cases(),
    in_place=st.booleans(),
    mean=st.sampled_from([0.0, 100.0]),
    device=st.sampled_from(DEVICES),
    seed=st.integers(0, 1000),
)
def test_odd_cases(
    case: Case, in_place: bool, mean: float, device: tuple[int, int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    emulate(convolution_kernels(), device, seed)
    check(case, mean, in_place)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 16, (1, 3000), 24, 3, 1, ZEROS),
        Case(1, 16, (2, 1500), 24, 3, 2, (0, 1, 0, 1)),
        Case(1, 16, (3000, 1), 24, 3, 1, ZEROS),
        Case(2, 72, (1, 3000), 16),
        Case(3, 64, (1, 1), 64, 3, 1, ZEROS),
        Case(5, 64, (1, 1), 128, 1, 2, adds=True),
        Case(70, 8, (1, 1), 8),
        Case(3, 8, (2, 2), 8, 3, 2, (2, 2, 2, 2)),
    ],
    ids=name_of,
)
def test_wide_and_tiny_images(case: Case) -> None:
    emulate(convolution_kernels(), H100)
    check(case)


@pytest.mark.parametrize("mean", [-2.3, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_means_far_from_zero(mean: float, dtype: torch.dtype) -> None:
    """Of the result, by its residual; the statistics do not cancel."""
    emulate(convolution_kernels(), H100)
    for cell_channels in (2, 4, 8):
        case = Case(2, 64, (9, 9), 64, adds=True, cell_channels=cell_channels, dtype=dtype)
        check(case, mean, draws=2)
        check(replace(case, kernel_size=3, padding=ZEROS), mean)


# ---- numbers that are not ------------------------------------------------------------------------------


def assert_same_where_not_finite(actual: Tensor, exact: Tensor) -> None:
    for marks in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(marks(actual), marks(exact))
    finite = exact.isfinite()
    torch.testing.assert_close(actual[finite].double(), exact[finite], rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize(
    "case",
    [
        Case(3, 72, (11, 13), 40, 3, 1, ZEROS),
        Case(3, 72, (11, 13), 40, 3, 2, (0, 1, 0, 1)),
        Case(3, 72, (11, 13), 40, 3, 1, ZEROS, activation=None),
        Case(3, 136, (11, 13), 72, adds=True),
        Case(3, 64, (12, 14), 64, stride=2, activation="none"),
    ],
    ids=name_of,
)
def test_nan_and_infinity(case: Case, value: float) -> None:
    """They reach the pixels whose windows hold them, all channels of these, and that image's statistics."""
    emulate(convolution_kernels(), H100)
    inputs = Inputs.of(case)
    for row, column, channel in ((0, 0, 0), (4, 6, 70 % case.channels), (10, 12, 33)):
        inputs.x[1, channel, row, column] = value
    actual = convolve(case, inputs)
    exact, _ = expected(case, inputs, torch.float64)
    assert_same_where_not_finite(actual.result, exact)
    assert actual.partials is not None
    for image in (0, 2):
        check_statistics(actual.result[image : image + 1], actual.partials[image : image + 1], 8)
    reached = not exact[1].isfinite().all()
    assert actual.partials[1, :, 1:, 1].isnan().any() == reached


def test_infinity_in_the_residual() -> None:
    emulate(convolution_kernels(), H100)
    case = Case(2, 64, (9, 9), 64, adds=True)
    inputs = Inputs.of(case)
    assert inputs.residual is not None
    inputs.residual[1, 5, 3, 3], inputs.residual[1, 6, 8, 8] = NAN, -math.inf
    actual = convolve(case, inputs)
    assert_same_where_not_finite(actual.result, expected(case, inputs, torch.float64)[0])
    assert actual.partials is not None
    check_statistics(actual.result[:1], actual.partials[:1], 8)


def test_factors_that_are_nan() -> None:
    """They spoil their image, and no other one. What is padded is zero whatever the factors are."""
    emulate(convolution_kernels(), H100)
    for kernel_size, stride in ((1, 1), (3, 1), (3, 2)):
        padding = ZEROS if kernel_size == 3 else (0, 0, 0, 0)
        case = Case(3, 40, (6, 5), 24, kernel_size, stride, padding)
        inputs = Inputs.of(case)
        assert inputs.factors is not None
        inputs.factors[1] = NAN
        inputs.factors[2, 1] = 50.0  # zeros would be seen if they were normalized
        actual = convolve(case, inputs)
        assert actual.result[1].isnan().all()
        plain, exact = (expected(case, inputs, dtype)[0] for dtype in (BFLOAT16, torch.float64))
        assert_within_contract(actual.result[::2], plain[::2], exact[::2])


# ---- scheduling, sizes, refusals ------------------------------------------------------------------------

SOME = [
    Case(2, 136, (9, 10), 72, adds=True, second_channels=80, cell_channels=2),
    Case(3, 72, (9, 10), 136, 3, 1, ZEROS, adds=True),
    Case(3, 72, (9, 10), 136, 3, 2, (0, 1, 0, 1), second_channels=64),
    Case(5, 256, (16, 16), 64),
]


def bits(results: Results) -> list[Tensor]:
    return [
        t.view(torch.int16 if t.itemsize == 2 else torch.int32) for t in results if t is not None
    ]


@pytest.mark.parametrize("case", SOME, ids=name_of)
def test_the_order_of_threads_makes_no_difference(case: Case) -> None:
    """Nor does it how many multiprocessors there are, but that tiles may be cut otherwise."""
    inputs = Inputs.of(case)
    first: Results | None = None
    by_tiling: dict[bytes, Tensor] = {}
    for multiprocessors, seed in ((132, 0), (132, 1), (1, 2), (1, 3), (3, 4)):
        emulate(convolution_kernels(), (90, multiprocessors, 227 * 1024), seed)
        actual = convolve(case, inputs)
        assert actual.partials is not None
        tiling = bytes(case.prepared().tiling)
        first = first or actual
        expected_bits = bits(first._replace(partials=None))
        for a, b in zip(expected_bits, bits(actual._replace(partials=None)), strict=True):
            assert torch.equal(a, b)
        partials = by_tiling.setdefault(tiling, actual.partials)
        assert torch.equal(partials, actual.partials)


def test_in_place() -> None:
    emulate(convolution_kernels(), H100, seed=5)
    for case in SOME[:2]:
        inputs = Inputs.of(case)
        results = [bits(convolve(case, inputs, in_place)) for in_place in (False, True)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_images() -> None:
    emulate(convolution_kernels(), H100)
    for case in SOME:
        empty = replace(case, images=0)
        assert convolve(empty, Inputs.of(empty)).result.shape[0] == 0


MANY = (90, 2**24, 227 * 1024)
"""A GPU on which each tile has its block."""


@pytest.mark.parametrize(
    "case",
    [
        Case(2**16 + 1, 128, (16, 16), 8, cell_channels=0),
        Case(2**16 + 1, 128, (16, 16), 8, 3, 2, (0, 1, 0, 1), cell_channels=0),
        Case(2**14 + 1, 8, (8, 8), 2048, adds=True, cell_channels=0),
    ],
    ids=name_of,
)
def test_offsets_past_two_billion(case: Case) -> None:
    """The last image lies beyond 2^31 numbers, in memory that takes none where nobody touches it."""
    emulate(convolution_kernels(), MANY)
    emulate_last_cluster_only(convolution_kernels())
    last = replace(case, images=1)
    inputs = Inputs.of(last)

    def at_the_end(of_last: Tensor) -> Tensor:
        channels, rows, columns = of_last.shape[1:]
        memory = torch.empty(case.images * of_last.numel(), dtype=case.dtype)
        maps = memory.view(case.images, rows, columns, channels).permute(0, 3, 1, 2)
        maps[-1:].copy_(of_last)
        return maps

    x = at_the_end(inputs.x)
    result = at_the_end(torch.full_like(expected(last, inputs, case.dtype)[0], NAN))
    residual = None if inputs.residual is None else at_the_end(inputs.residual)
    assert max(x[:-1].numel(), result[:-1].numel()) >= 2**31
    assert inputs.factors is not None
    factors = torch.empty(case.images, 2, case.channels)
    factors[-1:] = inputs.factors
    call(
        convolution_kernels().bitfast_norm_convolution, ctypes.byref(case.prepared()), None, x, factors,
        pack_filters(inputs.weight), residual, result, None, None, None,
    )  # fmt: skip
    exact = expected(last, inputs, torch.float64)[0]
    # The last tile has the last pixels, and the last of the channels.
    torch.testing.assert_close(
        result[-1, -8:, -1, -1].double(), exact[0, -8:, -1, -1], rtol=2**-7, atol=2**-5
    )


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": 0}, "bfloat16 or float16"),
        ({"activation": 2}, "relu or none"),
        ({"kernel_size": 2}, "kernel size must be 1 or 3"),
        ({"stride": 3}, "stride must be 1 or 2"),
        ({"top": 1}, "smaller than the kernel"),
        ({"left": -1}, "smaller than the kernel"),
        ({"height": 0}, "must not be empty"),
        ({"result_width": 0}, "must not be empty"),
        ({"images": -1}, "must not be empty"),
        ({"channels": 12}, "a multiple of 8"),
        ({"second_channels": 4}, "a multiple of 8"),
        ({"result_channels": 0}, "must have channels"),
        ({"cell_channels": 3}, "2, 4 or 8 channels"),
        ({"result_height": 5}, "larger than its input allows"),
        ({"images": 2**28}, "more pixels than one launch takes"),
        ({"images": 2**62}, "more pixels than one launch takes"),
        ({"result_width": 3}, "as large as its input"),
        ({"has_norm": 0}, "an activation needs a norm"),
    ],
)
def test_calls_that_are_refused(fields: dict[str, int], message: str) -> None:
    emulate(convolution_kernels(), H100)
    wanted, prepared = Call.of(Case(1, 16, (4, 4), 16).convolution), Prepared()
    for name, value in fields.items():
        setattr(wanted, name, value)
    entry = convolution_kernels().bitfast_norm_convolution_prepare
    with pytest.raises(RuntimeError, match=message):
        call(entry, ctypes.byref(wanted), ctypes.byref(prepared))


def test_addresses_and_devices_that_are_refused() -> None:
    case = Case(1, 16, (4, 4), 16)
    emulate(convolution_kernels(), A100)
    with pytest.raises(RuntimeError, match=r"capability 9\.0"):
        case.prepared()
    emulate(convolution_kernels(), H100)
    inputs = Inputs.of(case)
    shifted = torch.zeros(16 * 16 + 1, dtype=BFLOAT16)[1:]
    entry, prepared = convolution_kernels().bitfast_norm_convolution, ctypes.byref(case.prepared())
    results = at_page_end(inputs.x), torch.zeros(1000), None, None
    with pytest.raises(RuntimeError, match="not a multiple of 16"):
        call(
            entry, prepared, None, shifted, inputs.factors, pack_filters(inputs.weight), None, *results,
        )  # fmt: skip
    partials = torch.zeros(1001)[1:]
    with pytest.raises(RuntimeError, match="the partials is not a multiple of 8"):
        call(
            entry, prepared, None, inputs.x, inputs.factors, pack_filters(inputs.weight), None,
            results[0], partials, None, None,
        )  # fmt: skip
    missing = (inputs.x, None), (None, inputs.factors)
    for x, factors in missing:
        with pytest.raises(RuntimeError, match="an address is missing"):
            call(entry, prepared, None, x, factors, pack_filters(inputs.weight), None, *results)
    with pytest.raises(RuntimeError, match="not what the call was prepared for"):
        call(
            entry, prepared, None, inputs.x, inputs.factors, pack_filters(inputs.weight), inputs.x, *results,
        )  # fmt: skip
