"""The CUDA kernels of norm_convolution's statistics, in the emulation of a GPU, against float64."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.emulated import (
    A100,
    H100,
    at_page_end,
    call,
    emulate,
    emulate_last_cluster_only,
    untouched_memory,
)
from tests.norm_convolution_calls import (
    NAN,
    factors_call,
    factors_of,
    merged,
    partials_call,
    partials_of,
    statistics_kernels,
    strips_of,
)
from tests.plain_ops import exact_norm, plain_norm
from tests.tolerances import assert_draws_within_contract

hypothesis = pytest.importorskip("hypothesis", reason="the shapes are drawn by hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
ONE_MULTIPROCESSOR = (90, 1, 227 * 1024)
DEVICES = [H100, A100, ONE_MULTIPROCESSOR, (80, 3, 99 * 1024)]
MEANS = (0.0, -2.3, 100.0, 1000.0)
EPS = 1e-5


def make(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    """A channels_last map that ends where its memory does."""
    x = (torch.randn(shape) + mean).to(dtype)
    return at_page_end(x.contiguous(memory_format=torch.channels_last))


def parameters(
    channels: int,
    weight_dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    return at_page_end(weight.to(weight_dtype)), at_page_end(bias.to(bias_dtype))


def check_partials(x: Tensor, partials: Tensor, cell_channels: int) -> None:
    """Each strip's numbers, against float64."""
    pixels, strips = x[0, 0].numel(), partials.shape[1]
    values = x.permute(0, 2, 3, 1).reshape(x.shape[0], pixels, -1, cell_channels).double()
    size = math.ceil(pixels / strips)
    for strip in range(strips):
        part = values[:, strip * size : (strip + 1) * size]
        count = part.shape[1]
        assert torch.equal(partials[:, strip, 0], torch.tensor([count, 0.0]).expand(x.shape[0], 2))
        mean, squares = partials[:, strip, 1:].double().unbind(-1)
        if count == 0:
            assert not mean.any()
            assert not squares.any()
            continue
        exact_mean = part.mean((1, 3))
        deviation = part - exact_mean[:, None, :, None]
        exact_squares = deviation.square().sum((1, 3))
        scale = exact_mean.abs() + (exact_squares / (count * cell_channels)).sqrt()
        assert ((mean - exact_mean).abs() <= 3e-7 * scale).all()
        # Float32 means are merged, each with its rounding.
        rounding = (count * cell_channels) ** 0.5 * 1.2e-7 * exact_mean.abs()
        allowed = 1e-5 * exact_squares + 2 * rounding * exact_squares.sqrt() + rounding.square()
        assert ((squares - exact_squares).abs() <= allowed).all()


def apply(x: Tensor, factors: Tensor) -> Tensor:
    """As the convolution that reads x does."""
    scale, shift = factors.double()[:, :, :, None, None].unbind(1)
    return (x.double() * scale + shift).to(x.dtype)


def check(
    shape: tuple[int, ...],
    groups: int,
    cell_channels: int,
    dtype: torch.dtype = BFLOAT16,
    mean: float = 0.0,
    strips: int | None = None,
    parameter_dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    draws: int = 1,
) -> None:
    """Hold partials, and norms by factors from them, to float64 and to the contract."""

    def draw() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        x = make(shape, dtype, mean)
        weight, bias = parameters(shape[1], *parameter_dtypes)
        partials = partials_of(x, cell_channels, strips)
        check_partials(x, partials, cell_channels)
        actual = apply(x, factors_of(partials, weight, bias, groups))
        arguments = x, weight, bias, groups, "none"
        return {"norm": (actual, plain_norm(*arguments), exact_norm(*arguments))}

    assert_draws_within_contract(draw, draws)


# ---- shapes -----------------------------------------------------------------------------------------

MAPS = [
    (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14), (512, 14),
    (512, 7), (2048, 7),
]  # fmt: skip
"""Channels and side of the maps of R50x1."""


@pytest.mark.parametrize(("channels", "side"), MAPS)
def test_the_maps_of_the_model(channels: int, side: int) -> None:
    emulate(statistics_kernels(), H100)
    cell_channels = min(channels // 32, 8)
    check((1 if side > 14 else 2, channels, side, side), 32, cell_channels)


def test_how_many_strips_there_are() -> None:
    """A large batch fills the GPU evenly, few images as well as they can; partials stay small."""
    emulate(statistics_kernels(), H100)
    for channels, side in MAPS:
        cell_channels = min(channels // 32, 8)
        for images in (1, 8, 128, 1000):
            x = torch.empty(1, channels, side, side, dtype=BFLOAT16).expand(images, -1, -1, -1)
            strips = strips_of(x, cell_channels)
            assert 1 <= strips <= math.ceil(side * side / 16)
            numbers = strips * (1 + channels // cell_channels) * 2
            assert 4 * numbers <= 0.13 * 2 * channels * side * side
    single = torch.empty(1, 64, 56, 56, dtype=BFLOAT16)
    assert strips_of(single, 2) == 25
    assert strips_of(single.expand(128, -1, -1, -1), 2) == 8, "as many blocks as work at once"
    assert strips_of(single.expand(2000, -1, -1, -1), 2) == 1


@st.composite
def cases(draw: Any) -> tuple[tuple[int, ...], int, int, int | None]:
    cell_channels = draw(st.sampled_from([2, 4, 8]))
    channels = 8 * draw(st.integers(1, 40) | st.sampled_from([64, 65, 129, 200]))
    cells = channels // cell_channels
    groups = draw(st.sampled_from([n for n in range(1, cells + 1) if cells % n == 0]))
    size = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    strips = draw(st.none() | st.integers(1, size[0] * size[1] + 3))
    return (draw(st.integers(1, 4)), channels, *size), groups, cell_channels, strips


DTYPES = st.sampled_from([torch.float32, BFLOAT16, FLOAT16])


@settings(max_examples=60)
@given(
    case=cases(),
    dtype=st.sampled_from([BFLOAT16, FLOAT16]),
    mean=st.sampled_from(MEANS),
    parameter_dtypes=st.tuples(DTYPES, DTYPES),
    device=st.sampled_from(DEVICES),
    seed=st.integers(0, 1000),
)
def test_odd_cases(
    case: Any, dtype: Any, mean: float, parameter_dtypes: Any, device: Any, seed: int
) -> None:
    shape, groups, cell_channels, strips = case
    torch.manual_seed(seed)
    emulate(statistics_kernels(), device, seed)
    check(shape, groups, cell_channels, dtype, mean, strips, parameter_dtypes)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_means_far_from_zero(dtype: torch.dtype, mean: float) -> None:
    emulate(statistics_kernels(), H100)
    check((2, 48, 31, 17), 3, 8, dtype, mean, draws=3)


def test_channels_whose_means_differ() -> None:
    """The variance of a group is that between its cells, but for a millionth."""
    emulate(statistics_kernels(), H100)
    x = make((2, 64, 9, 9), FLOAT16)
    x += 8 * torch.arange(64).view(1, 64, 1, 1)
    weight, bias = parameters(64)
    for cell_channels in (2, 4, 8):
        partials = partials_of(x, cell_channels, 7)
        check_partials(x, partials, cell_channels)
        check_factors(factors_of(partials, weight, bias, 2), x, weight, bias, 2)


def check_factors(factors: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    scale, shift = factors.double().unbind(1)
    values = x.double().reshape(x.shape[0], groups, -1)
    mean, std = values.mean(-1), (values.var(-1, correction=0) + EPS).sqrt()
    mean, std = (v.repeat_interleave(x.shape[1] // groups, 1) for v in (mean, std))
    exact_scale = weight.double() / std
    exact_shift = bias.double() - mean * exact_scale
    torch.testing.assert_close(scale, exact_scale, rtol=5e-6, atol=0)
    size = bias.double().abs() + (mean * exact_scale).abs()
    assert ((shift - exact_shift).abs() <= 5e-6 * size).all()


# ---- partials that another kernel wrote --------------------------------------------------------------


def cut(x: Tensor, cell_channels: int, counts: list[int]) -> Tensor:
    """Partials of strips of so many pixels, by plain PyTorch."""
    values = x.permute(0, 2, 3, 1).reshape(
        x.shape[0], -1, x.shape[1] // cell_channels, cell_channels
    )
    partials = torch.zeros(x.shape[0], len(counts), 1 + values.shape[2], 2)
    begin = 0
    for strip, count in enumerate(counts):
        if count > 0:
            part = values[:, begin : begin + count].double()
            mean = part.mean((1, 3))
            squares = (part - mean[:, None, :, None]).square().sum((1, 3))
            partials[:, strip, 0, 0] = count
            partials[:, strip, 1:] = torch.stack([mean, squares], -1).float()
        begin += count
    return at_page_end(partials)


@pytest.mark.parametrize("counts", [[20, 0, 15], [0, 0, 1, 30, 4, 0], [0] * 300 + [1] * 35, [35]])
@pytest.mark.parametrize("groups", [1, 2, 3, 8, 24])
def test_strips_of_any_size(counts: list[int], groups: int) -> None:
    """Some have no pixels and count nothing."""
    emulate(statistics_kernels(), H100)
    x = make((2, 48, 5, 7), BFLOAT16, mean=3.0)
    weight, bias = parameters(48)
    partials = cut(x, 2, counts)
    assert torch.equal(merged(partials, 2)[0], torch.tensor([35.0, 35.0]).double())
    factors = factors_of(partials, weight, bias, groups)
    check_factors(factors, x, weight, bias, groups)


@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (64, 32), (6000, 1), (2048, 32), (40, 4)])
@pytest.mark.parametrize("strips", [1, 13, 49, 700])
def test_many_strips_and_channels(channels: int, groups: int, strips: int) -> None:
    emulate(statistics_kernels(), H100, seed=3)
    cell_channels = next(n for n in (8, 4, 2) if channels // groups % n == 0)
    x = make((1, channels, 1, 700), BFLOAT16, mean=-5.0)
    weight, bias = parameters(channels)
    partials = cut(
        x, cell_channels, [700 // strips] * (strips - 1) + [700 // strips + 700 % strips]
    )
    factors = factors_of(partials, weight, bias, groups)
    check_factors(factors, x, weight, bias, groups)


# ---- numbers that are not ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("pixel", [0, 1, 70, 143])
def test_nan_and_infinity(value: float, pixel: int) -> None:
    """They make the factors of their group NaN, in their image."""
    emulate(statistics_kernels(), H100)
    weight, bias = parameters(48)
    for channel, groups, cell_channels in ((0, 6, 8), (17, 6, 2), (47, 3, 4)):
        x = make((3, 48, 12, 12), BFLOAT16)
        x[1, channel, pixel // 12, pixel % 12] = value
        for strips in (None, 1, 5):
            factors = factors_of(partials_of(x, cell_channels, strips), weight, bias, groups)
            normalized = plain_norm(x.float(), weight, bias, groups, "none")
            reached = normalized.isnan().all((2, 3))
            assert int(reached.sum()) == 48 // groups
            assert torch.equal(factors[:, 1].isnan(), reached)
            assert torch.equal((factors[:, 0] * x[:, :, 0, 0] + factors[:, 1]).isnan(), reached)


def test_a_constant_map() -> None:
    emulate(statistics_kernels(), H100)
    for value in (0.0, 3.140625, -800.0):
        x = make((2, 16, 30, 7), BFLOAT16).fill_(value)
        weight, bias = parameters(16)
        partials = partials_of(x, 8)
        factors = factors_of(partials, weight, bias, 2)
        torch.testing.assert_close(
            factors[:, 0], (weight / EPS**0.5).expand(2, 16), rtol=1e-3, atol=0
        )
        assert (partials[:, :, 1:, 0] - value).abs().max() <= 2e-7 * abs(value)


# ---- scheduling, sizes, refusals ----------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_the_order_of_threads_makes_no_difference(device: tuple[int, int, int]) -> None:
    for channels, groups, cell_channels in ((64, 32, 2), (536, 67, 4), (8, 1, 8)):
        x = make((3, channels, 13, 11), BFLOAT16)
        weight, bias = parameters(channels)
        results = []
        for seed in range(3):
            emulate(statistics_kernels(), device, seed)
            partials = partials_of(x, cell_channels)
            results.append((partials, factors_of(partials, weight, bias, groups)))
        for partials, factors in results[1:]:
            assert torch.equal(partials, results[0][0])
            assert torch.equal(factors, results[0][1])


def test_no_images() -> None:
    x = torch.empty(0, 16, 3, 3, dtype=BFLOAT16)
    weight, bias = parameters(16)
    assert strips_of(x, 8) >= 1
    assert factors_of(partials_of(x, 8), weight, bias, 2).shape == (0, 2, 16)


def test_offsets_past_two_billion() -> None:
    """The last image begins beyond 2^31 numbers, in memory that takes none where nobody touches it."""
    emulate(statistics_kernels(), H100)
    emulate_last_cluster_only(statistics_kernels())
    images, pixels, channels = 2**15 + 1, 2**10, 64
    x = untouched_memory(images, pixels, 1, channels, dtype=BFLOAT16).permute(0, 3, 1, 2)
    assert x[:-1].numel() == 2**31
    x[-1].copy_(torch.randn(x.shape[1:]))
    partials = partials_of(x, 8, strips=1)
    check_partials(x[-1:], partials[-1:], 8)

    huge = untouched_memory(2**18 + 1, 2**12, 2, 2, dtype=torch.float32)
    assert huge[:-1].numel() == 2**32
    huge[-1, 0] = torch.tensor([[35.0, 0.0], [2.0, 280.0]])
    weight, bias = parameters(8)
    factors = factors_of(huge, weight, bias, 1)[-1]
    torch.testing.assert_close(factors[0], weight / (1 + EPS) ** 0.5)
    torch.testing.assert_close(factors[1], bias - 2 * weight / (1 + EPS) ** 0.5)


def test_parameters_need_no_alignment() -> None:
    emulate(statistics_kernels(), H100)
    x = make((2, 24, 5, 5), FLOAT16)
    partials = partials_of(x, 4)
    for dtype in (torch.float32, BFLOAT16, FLOAT16):
        weight, bias = parameters(24, dtype, dtype)
        shifted = torch.empty(25, dtype=dtype)[1:].copy_(weight)
        expected = factors_of(partials, weight, bias, 3)
        assert torch.equal(factors_of(partials, shifted, bias, 3), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": 0}, "must be bfloat16 or float16"),
        ({"channels": 12}, "a multiple of 8"),
        ({"channels": 0}, "a multiple of 8"),
        ({"cell_channels": 3}, "2, 4 or 8 channels"),
        ({"pixels": 0}, "must not be empty"),
        ({"images": -1}, "must not be empty"),
        ({"strips": 0}, "too few or too many"),
        ({"pixels": 2**30}, "too few or too many"),
        ({"pixels": 2**50}, "too many pixels"),
    ],
)
def test_partials_that_are_refused(fields: dict[str, int], message: str) -> None:
    emulate(statistics_kernels(), H100)
    x, partials = make((1, 16, 3, 3), BFLOAT16), torch.full((1, 1, 3, 2), 7.0)
    prepared = partials_call(x, 8, 1)
    for name, value in fields.items():
        setattr(prepared, name, value)
    entry = statistics_kernels().bitfast_norm_convolution_partials
    with pytest.raises(RuntimeError, match=message):
        call(entry, ctypes.byref(prepared), None, x, partials)
    assert (partials == 7).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 20}, "a multiple of 8"),
        ({"groups": 3}, "must divide the channels"),
        ({"groups": 0}, "must divide the channels"),
        ({"groups": 4}, "a multiple of those of a cell"),
        ({"cell_channels": 1}, "2, 4 or 8 channels"),
        ({"strips": 0}, "must have a strip"),
        ({"strips": 2**25}, "too many strips"),
        ({"weight_dtype": 3}, "float32, bfloat16 or float16"),
        ({"bias_dtype": -1}, "float32, bfloat16 or float16"),
    ],
)
def test_factors_that_are_refused(fields: dict[str, int], message: str) -> None:
    emulate(statistics_kernels(), H100)
    weight, bias = parameters(16)
    partials, factors = torch.zeros(1, 1, 3, 2), torch.full((1, 2, 16), 7.0)
    prepared = factors_call(partials, weight, bias, 2, EPS)
    for name, value in fields.items():
        setattr(prepared, name, value)
    entry = statistics_kernels().bitfast_norm_convolution_factors
    with pytest.raises(RuntimeError, match=message):
        call(entry, ctypes.byref(prepared), None, partials, weight, bias, factors)
    assert (factors == 7).all()


def test_addresses_that_are_refused() -> None:
    emulate(statistics_kernels(), H100)
    memory = torch.zeros(1 + 16 * 9, dtype=BFLOAT16)
    x = memory[1:].view(1, 3, 3, 16).permute(0, 3, 1, 2)
    with pytest.raises(RuntimeError, match="not aligned"):
        partials_of(x, 8, 1)
    weight, bias = parameters(16)
    partials = torch.zeros(7)[1:].view(1, 1, 3, 2)
    with pytest.raises(RuntimeError, match="not aligned"):
        factors_of(partials, weight, bias, 2)
