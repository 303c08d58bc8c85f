"""GroupNorm, activation and convolution in one pass on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitfast import reference
from bitfast.activations import ACTIVATIONS
from bitfast.backends import use_backend
from bitfast.ops.kept_weights import Geometry, kept_weights
from bitfast.ops.norm_convolution import (
    OP,
    SMALLEST_3X3,
    WIDEST_3X3,
    Norm,
    add_norm_convolution_,
    has_norm_convolution_kernel,
    norm_convolution,
    uses_norm_convolution,
    why_no_norm_convolution,
)
from tests.guarded import Guarded
from tests.operator_calls import calls_of
from tests.plain_ops import channel_moments
from tests.threads import torch_threads
from tests.tolerances import Triples, assert_draws_within_contract

operators = torch.ops.bitfast
EPS = 1e-8
DTYPES = (torch.float32, torch.bfloat16)
# Sizes of filters with strides.
KERNELS = {torch.float32: [(1, 1), (1, 2), (3, 1)], torch.bfloat16: [(1, 1), (1, 2)]}
NAMES = sorted(ACTIVATIONS)
NO_NORM = (None, None, 1, 0.0, "none")
SIZE = torch.Size((9, 9))
POINTWISE: Geometry = (1, 1), (0, 0), (1, 1)
PADDED: Geometry = (1, 1), (1, 1), (1, 1)

pytestmark = pytest.mark.usefixtures("no_gradient")


def needs_kernels(dtype: torch.dtype) -> None:
    if not uses_norm_convolution("cpu", dtype):
        pytest.skip(
            f"norms and convolutions of {dtype} are not fused: {why_no_norm_convolution(dtype)}"
        )


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    needs_kernels(request.param)
    return request.param


@pytest.fixture
def packings() -> Iterator[list[torch.dtype]]:
    """The dtypes for which weights were packed."""
    needs_kernels(torch.float32)
    dtypes = {True: torch.bfloat16, False: torch.float32}
    with calls_of("pack_norm_convolution", lambda arguments: dtypes[arguments[1]]) as calls:
        yield calls.noted


def images(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
    x = (torch.randn(shape) + mean).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.preserve_format)


def filters(out: int, channels: int, kernel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(out, channels, kernel, kernel) / (channels**0.5 * kernel)).to(dtype)


def norm_of(x: Tensor, groups: int, activation: str) -> Norm:
    weight, bias = torch.rand(x.shape[1]) + 0.5, torch.randn(x.shape[1])
    return Norm(weight.to(x.dtype), bias.to(x.dtype), groups, 1e-5, activation)


def pack(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return operators.pack_norm_convolution.native(weight.float(), dtype == torch.bfloat16)


def plain(x: Tensor, norm: Norm | None, weight: Tensor, stride: int, standardizes: bool) -> Tensor:
    """Norm, activation and convolution as three ops of torch, in the dtype of x."""
    weight = weight.to(x.dtype)
    if standardizes:
        weight = reference.weight_standardization_forward(weight, EPS, x.dtype)[0]
    if norm is not None:
        # NCHW: torch's own channels_last kernel cancels where the mean is large.
        scale, shift = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
        x = torch.group_norm(x.contiguous(), norm.num_groups, scale, shift, norm.eps)
        x = ACTIVATIONS[norm.activation](x).contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, None, stride, weight.shape[2] // 2)


def assert_are_moments(moments: Tensor | None, x: Tensor) -> None:
    """Hold them to float64's, within four times what the roundings of float32 sums should add up to.

    Those of n values wander off by the square root of n. What is added are differences from a value among
    them, which itself is off by the rounding of one tile's sum, and their squares.
    """
    assert moments is not None
    rounding, exact, values = 2.0**-24, channel_moments(x), x.double()
    assert (moments.dtype, moments.shape) == (torch.float64, exact.shape)
    spread = values.amax((2, 3)) - values.amin((2, 3))
    spread += 32 * rounding * values.abs().amax((2, 3))
    allowed = 4 * ((x.shape[2] * x.shape[3]) ** 0.5 + 1) * rounding
    assert ((moments - exact).abs() <= allowed * torch.stack([spread, spread.square()])).all()


# ---- the numbers and their moments ----------------------------------------------------------------


def draw(
    shape, out, kernel, stride, dtype, groups, activation, mean, knows_moments, standardizes
) -> Triples:
    """Call the functions that layers call, or the operators with the weight as it is; 0 groups: no norm."""
    x, last = images(*shape, dtype=dtype, mean=mean), (kernel, stride, True)
    norm = norm_of(x, groups, activation) if groups else None
    weight = nn.Parameter(filters(out, shape[1], kernel, dtype))
    given = (x, channel_moments(x) if knows_moments else None)
    expected = plain(x, norm, weight, stride, standardizes)
    exact = plain(x.double(), norm, weight, stride, standardizes)
    total = copy(before := images(*exact.shape, dtype=dtype))
    if standardizes:
        result, found = norm_convolution(*given, norm, weight, EPS, stride, True)
        found_total = add_norm_convolution_(*given, norm, weight, total, EPS, stride, True)
    else:
        given += (*(norm or NO_NORM), pack(weight, dtype))
        result, found = operators.norm_convolution.native(*given, out, *last)
        found_total = operators.norm_convolution_add_.native(*given, total, *last)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert_are_moments(found, result)
    assert_are_moments(found_total, total)
    return {
        "result": (result, expected, exact),
        "total": (total, before + expected, before.double() + exact),
    }


def check(count: int, *arguments: Any) -> None:
    assert_draws_within_contract(lambda: draw(*arguments), count)


@pytest.mark.parametrize("mean", [-2.3, 100.0])
@pytest.mark.parametrize("activation", NAMES)
def test_every_activation(activation, mean, dtype, poisoned):
    for size in KERNELS[dtype]:
        check(3, (2, 40, 9, 8), 50, *size, dtype, 4, activation, mean, False, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=50, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31 - 1))
def test_drawn_shapes(dtype, data, seed):
    """3x3 filters as the layers use them: not on smaller images."""
    needs_kernels(dtype)
    torch.manual_seed(seed)
    kernel, stride = data.draw(st.sampled_from(KERNELS[dtype]))
    channels = data.draw(st.sampled_from([1, 5, 16, 33, 40, 50, 64]) | st.integers(1, 70))
    sizes = (data.draw(st.integers(1 if kernel == 1 else SMALLEST_3X3, most)) for most in (15, 17))
    shape = (data.draw(st.integers(0, 3)), channels, *sizes)
    groups = st.sampled_from([0, *(n for n in range(1, channels + 1) if channels % n == 0)])
    means, names = st.sampled_from([0.0, -2.3, 100.0]), st.sampled_from(NAMES)
    out, *norm = data.draw(st.tuples(st.integers(1, 70), groups, names, means))
    switches = data.draw(st.tuples(st.booleans(), st.booleans()))
    # Few numbers are much a matter of luck.
    numbers = shape[0] * out * -(-shape[2] // stride) * -(-shape[3] // stride)
    count = 4 + 100 // max(numbers, 1)
    check(count, shape, out, kernel, stride, dtype, *norm, *switches)


@pytest.mark.parametrize("shape", [(2, 40, 9, 7), (1, 5, 41, 83), (3, 64, 1, 1), (0, 8, 1, 1)])
def test_moments_far_from_zero(shape, dtype, poisoned):
    for x in (images(*shape, dtype=dtype, mean=100.0), 5 + images(*shape, dtype=dtype) / 100):
        assert_are_moments(operators.channel_moments.native(x), x)


@pytest.mark.parametrize("shape", [(2, 40, 9, 7), (3, 64, 1, 1), (0, 8, 2, 2)])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_statistics_for_a_backward_pass(shape, mean):
    x = images(*shape, mean=mean)
    for groups in (1, 4, 8):
        moments = channel_moments(x)
        found = operators.group_statistics.native(moments, groups, EPS)
        grouped = x.double().reshape(shape[0], groups, math.prod(shape[1:]) // groups)
        center = grouped.mean(-1)
        variance = (grouped - center[..., None]).square().mean(-1)
        for actual, exact in zip(found, (center, (variance + EPS).rsqrt()), strict=True):
            # Rounded once, from float64.
            torch.testing.assert_close(actual, exact.float(), rtol=2**-23, atol=1e-9)
        torch.library.opcheck(operators.group_statistics.native, (moments, groups, EPS))


def test_moments_that_are_given_and_those_that_nobody_wants(dtype):
    x = images(2, 40, 9, 7, dtype=dtype, mean=3.0)
    norm, computed = norm_of(x, 5, "gelu"), operators.channel_moments.native(x)
    for kernel, stride in KERNELS[dtype]:
        weight = nn.Parameter(filters(24, 40, kernel))
        results = [
            norm_convolution(x, moments, norm, weight, EPS, stride, False)[0]
            for moments in (None, computed, channel_moments(x), computed + 1)
        ]
        assert torch.equal(results[0], results[1])
        close = 4 * torch.finfo(dtype).eps * float(results[0].abs().max())
        torch.testing.assert_close(results[2], results[0], rtol=0, atol=close)
        assert (results[3] - results[0]).abs().max() > 2 * close
        result, _ = norm_convolution(x, None, norm, weight, EPS, stride, True)
        assert torch.equal(result, results[0])
        assert norm_convolution(x, None, norm, weight, EPS, stride, False)[1] is None
        assert add_norm_convolution_(x, None, norm, weight, result, EPS, stride, False) is None


# ---- memory, threads, NaN and infinity ------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 40, 9, 7), (1, 5, 3, 3), (3, 1, 4, 5), (2, 33, 1, 1)])
@pytest.mark.parametrize("out", [1, 37, 64])
def test_writes_the_total_and_nothing_else(out, shape, dtype, poisoned):
    for kernel, stride in KERNELS[dtype]:
        x, packed = images(*shape, dtype=dtype), pack(filters(out, shape[1], kernel), dtype)
        norm, last = norm_of(x, 1, "relu"), (kernel, stride, True)
        given = (channel_moments(x), *norm, packed)
        inputs = (x, given[0], *norm[:2], packed)
        before = [copy(tensor) for tensor in inputs]
        result, moments = operators.norm_convolution.native(x, *given, out, *last)
        total, amid = Guarded(result), Guarded(x)
        total.tensor.zero_()
        found = operators.norm_convolution_add_.native(x, *given, total.tensor, *last)
        total.check()
        assert torch.equal(total.tensor, result)
        assert torch.equal(found, moments)
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
        amid.buffer.fill_(float("nan"))
        amid.tensor.copy_(x)
        again, _ = operators.norm_convolution.native(amid.tensor, *given, out, *last)
        assert torch.equal(again, result), "read what does not belong to x"


@pytest.mark.parametrize(
    ("shape", "out"), [((1, 256, 30, 30), 64), ((1, 64, 30, 29), 64), ((2, 320, 7, 7), 160)]
)
def test_the_division_of_the_work_changes_no_bit(shape, out, dtype):
    """Images are cut into pieces; where these are few, the output channels into blocks."""
    x = images(*shape, dtype=dtype, mean=1.0)
    norm, moments = norm_of(x, 32, "relu"), channel_moments(x)
    for kernel, stride in KERNELS[dtype]:
        weight = filters(out, shape[1], kernel)
        given, last = (x, moments, *norm, pack(weight, dtype)), (kernel, stride, True)
        results = []
        for threads in (1, 2, 3, 7):
            with torch_threads(threads):
                result, found = operators.norm_convolution.native(*given, out, *last)
                total = copy(result)
                found_total = operators.norm_convolution_add_.native(*given, total, *last)
            assert_are_moments(found, result)
            assert_are_moments(found_total, total)
            results.append(torch.stack([result, total]))
        assert all(torch.equal(other, results[0]) for other in results)
        close = 1e-4 if dtype == torch.float32 else 5e-2
        expected = plain(x.double(), norm, weight, stride, False).to(dtype)
        torch.testing.assert_close(results[0][0], expected, rtol=close, atol=close)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number_and_infinity_stay_where_they_are(value, dtype):
    x, weight = images(2, 40, 5, 7, dtype=dtype), filters(37, 40, 1, dtype)
    x[0, 3, 2, 4] = value
    last = (pack(weight, dtype), 37, 1, 1, True)
    result, moments = operators.norm_convolution.native(x, None, *NO_NORM, *last)
    expected = plain(x, None, weight, 1, False)
    assert all(torch.equal(f(result), f(expected)) for f in (torch.isnan, torch.isposinf))
    assert result.isfinite().logical_not().sum() == 37
    assert_are_moments(moments[:, 1:], result[1:])
    norm = norm_of(x, 1, "gelu")
    result, _ = operators.norm_convolution.native(x, None, *norm, *last)
    assert result[0].isnan().all()
    assert torch.equal(operators.norm_convolution.native(x[1:], None, *norm, *last)[0], result[1:])


def test_a_weight_is_packed_once_until_it_or_eps_or_the_dtype_changes(packings):
    weight = nn.Parameter(torch.randn(8, 16, 1, 1))

    def check(eps: float = EPS, dtype: torch.dtype = torch.float32, is_new: bool = True) -> None:
        packings.clear()
        x = images(2, 16, 9, 9, dtype=dtype)
        standardized = reference.weight_standardization_forward(weight, eps, dtype)[0]
        close = 1e-4 if dtype == torch.float32 else 5e-2
        for inputs in (x, images(3, 16, 5, 1, dtype=dtype)):
            result, _ = norm_convolution(inputs, None, None, weight, eps, 1, False)
            torch.testing.assert_close(
                result, F.conv2d(inputs, standardized), rtol=close, atol=close
            )
            add_norm_convolution_(inputs, None, norm_of(x, 2, "relu"), weight, result, eps, 1, True)
        assert packings == [dtype] * is_new, "packed once, whatever the shape and the norm"

    check()
    check(eps=0.5)
    check(is_new=False)  # both are kept
    check(eps=0.5, is_new=False)
    weight.mul_(torch.rand_like(weight))
    check()
    weight.data = torch.randn(8, 16, 1, 1)
    check()
    if why_no_norm_convolution(torch.bfloat16) is None:
        check(dtype=torch.bfloat16)


def test_weights_made_in_inference_mode_are_right_but_not_kept(packings):
    with torch.inference_mode():
        weight = nn.Parameter(torch.randn(8, 16, 1, 1), requires_grad=False)
        x = images(2, 16, 5, 5)
        assert not has_norm_convolution_kernel(weight, POINTWISE, torch.float32, SIZE)
        for _ in range(2):
            weight.mul_(torch.rand_like(weight))
            result, _ = norm_convolution(x, None, None, weight, EPS, 1, False)
            torch.testing.assert_close(
                result, plain(x, None, weight, 1, True), rtol=1e-4, atol=1e-4
            )
    assert id(weight) not in kept_weights._kept
    assert len(packings) == 2


# ---- where it can run, and how --------------------------------------------------------------------


def test_where_it_is_not_used(dtype):
    assert not uses_norm_convolution("cuda", dtype)
    for ops in (
        (),
        ("group_norm_act",),
        ("weight_standardization",),
        ("packed_convolution",),
        (OP,),
    ):
        with use_backend(None if ops else "reference", **dict.fromkeys(ops, "reference")):
            assert not uses_norm_convolution("cpu", dtype)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not uses_norm_convolution("cpu", dtype)


def test_which_dtypes_and_convolutions_fit():
    def of(kernel: int, out: int = 8, channels: int = 16, **options: Any) -> nn.Parameter:
        return nn.Parameter(torch.empty(out, channels, kernel, kernel, **options))

    for dtype in (torch.float64, torch.float16):
        assert str(dtype) in str(why_no_norm_convolution(dtype))
        assert not uses_norm_convolution("cpu", dtype)
        assert not has_norm_convolution_kernel(of(1, dtype=dtype), POINTWISE, torch.float32, SIZE)
    for dtype in DTYPES:
        assert has_norm_convolution_kernel(of(1, 4096, 1024), POINTWISE, dtype, SIZE)
        assert has_norm_convolution_kernel(
            of(1, dtype=torch.bfloat16), ((2, 2), (0, 0), (1, 1)), dtype, SIZE
        )
        assert not has_norm_convolution_kernel(of(1), ((1, 2), (0, 0), (1, 1)), dtype, SIZE)
        assert not has_norm_convolution_kernel(of(1), PADDED, dtype, SIZE)
        assert not has_norm_convolution_kernel(of(1).detach(), POINTWISE, dtype, SIZE)
        assert not has_norm_convolution_kernel(of(1, device="meta"), POINTWISE, dtype, SIZE)
        assert not has_norm_convolution_kernel(of(7), ((1, 1), (3, 3), (1, 1)), dtype, SIZE)
    assert has_norm_convolution_kernel(of(3), PADDED, torch.float32, SIZE)
    assert has_norm_convolution_kernel(of(3), PADDED, torch.float32, torch.Size((4, 9)))
    assert not has_norm_convolution_kernel(of(3), PADDED, torch.float32, torch.Size((9, 3)))
    assert not has_norm_convolution_kernel(of(3), PADDED, torch.bfloat16, SIZE)
    for geometry in (POINTWISE, ((2, 2), (1, 1), (1, 1)), ((1, 1), (2, 2), (2, 2))):
        assert not has_norm_convolution_kernel(of(3), geometry, torch.float32, SIZE)
    assert has_norm_convolution_kernel(of(3, WIDEST_3X3 // 64, 64), PADDED, torch.float32, SIZE)
    assert not has_norm_convolution_kernel(
        of(3, WIDEST_3X3 // 64 + 1, 64), PADDED, torch.float32, SIZE
    )


def test_the_operators_check_what_they_are_given():
    needs_kernels(torch.float32)
    x, ones, packed = images(2, 16, 6, 5), torch.ones(16), pack(filters(8, 16, 1))
    moments, total, packed_3x3 = channel_moments(x), images(2, 8, 6, 5), pack(filters(8, 16, 3))
    good = {"x": x, "moments": moments, "weight": ones, "bias": ones, "groups": 4, "eps": 1e-5}
    good |= {"activation": "relu", "packed": packed, "total": total, "kernel": 1, "stride": 1}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"x": x[0]}, "x must"),
        ({"x": x.contiguous()}, "x and the result must be channels_last"),
        ({"x": x.double(), "total": total.double()}, "float32 and bfloat16"),
        ({"groups": 3}, "num_groups must divide"),
        ({"bias": ones[1:]}, "weight and bias"),
        ({"activation": "tanh"}, "activation"),
        ({"moments": moments[:, :1]}, "moments"),
        ({"moments": moments.float()}, "moments"),
        ({"packed": pack(filters(33, 16, 1))}, "weight was packed for another"),
        ({"packed": pack(filters(8, 17, 1))}, "weight was packed for another"),
        ({"packed": packed.bfloat16()}, "weight was packed for another"),
        ({"kernel": 3, "packed": packed_3x3, "stride": 2}, "3x3 filters of stride 1"),
        ({"kernel": 3, "packed": packed_3x3, "x": x.bfloat16()}, "3x3 .* in float32"),
        ({"total": images(2, 8, 6, 6)}, "total"),
        ({"total": total.double()}, "total"),
        ({"total": images(2, 33, 6, 5)}, "weight was packed for another"),
        ({"total": total.contiguous()}, "the result must be channels_last"),
    ]
    for change, message in cases:
        *given, total, kernel, stride = (good | change).values()
        before = copy(total)
        with pytest.raises(RuntimeError, match=message):
            operators.norm_convolution_add_.native(*given, total, kernel, stride, True)
        assert torch.equal(total, before)
        if "total" not in change:
            with pytest.raises(RuntimeError, match=message):
                operators.norm_convolution.native(*given, 8, kernel, stride, True)
    with pytest.raises(RuntimeError, match="in float32 for 3x3"):
        pack(filters(8, 16, 3), torch.bfloat16)


@pytest.mark.parametrize("has_norm", [False, True])
def test_opcheck(has_norm, dtype):
    kernel, stride = KERNELS[dtype][-1]
    x, weight = images(2, 16, 5, 4, dtype=dtype), filters(8, 16, kernel, dtype)
    given = (x, channel_moments(x), *norm_of(x, 2, "gelu")) if has_norm else (x, None, *NO_NORM)
    total, packed = torch.zeros_like(plain(x, None, weight, stride, False)), pack(weight, dtype)
    for operator, rest in (
        (operators.norm_convolution.native, (packed, 8, kernel)),
        (operators.norm_convolution_add_.native, (packed, total, kernel)),
    ):
        torch.library.opcheck(operator, (*given, *rest, stride, has_norm))


# ---- mistakes that were made ----------------------------------------------------------------------


def test_3x3_filters_add_to_the_total():
    needs_kernels(torch.float32)
    weight, total = nn.Parameter(filters(4, 8, 3)), images(1, 4, 3, 3, mean=100.0)
    add_norm_convolution_(images(1, 8, 3, 3), None, None, weight, total, EPS, 1, False)
    assert total.min() > 50


def test_no_images(dtype):
    check(1, (0, 8, 3, 3), 4, 1, 1, dtype, 2, "relu", 0.0, False, True)


@pytest.mark.parametrize(("channels", "out"), [(10, 8), (12, 5)])
def test_weights_of_other_channels(channels, out):
    needs_kernels(torch.float32)
    weight, total = nn.Parameter(filters(8, 12, 1)), images(1, out, 3, 3)
    with pytest.raises(ValueError, match="channels"):
        add_norm_convolution_(images(1, channels, 3, 3), None, None, weight, total, EPS, 1, False)


def test_moments_where_the_first_pixels_are_unlike_the_others(dtype):
    x = images(8, 1, 62, 62, mean=100.0)
    x.flatten(2)[..., :14] = 0
    x, packed = x.to(dtype), pack(torch.ones(1, 1, 1, 1), dtype)
    result, moments = operators.norm_convolution.native(x, None, *NO_NORM, packed, 1, 1, 1, True)
    torch.testing.assert_close(moments[1], channel_moments(result)[1], rtol=2e-5, atol=0)
