"""The gradients of convolutions, and the convolutions of a training step, in plain functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfast.activations import ACTIVATIONS
from bitfast.backends import use_backend
from bitfast.ops.convolution_gradients import (
    FEWEST_CHANNELS,
    add_input_gradient_,
    input_gradient,
    norm_weight_gradient,
    weight_gradient,
)
from bitfast.ops.kept_weights import Geometry
from bitfast.ops.norm_convolution import SMALLEST_3X3, Norm, packed_weight
from bitfast.ops.norm_convolution_training import norm_convolve
from tests.guarded import Guarded
from tests.test_norm_convolution import (
    DTYPES,
    assert_are_moments,
    filters,
    images,
    needs_kernels,
    norm_of,
    plain,
)
from tests.threads import torch_threads
from tests.tolerances import Triples, assert_draws_within_contract

operators = torch.ops.bitfast
pytestmark = pytest.mark.usefixtures("no_gradient")

LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    needs_kernels(request.param)
    return request.param


def geometry_of(stride: int = 1, padding: int = 0, dilation: int = 1) -> Geometry:
    return (stride, stride), (padding, padding), (dilation, dilation)


def gradients(x: Tensor, weight: Tensor, grad: Tensor, geometry: Geometry) -> list[Tensor]:
    """Those of the input and of the weight, by torch."""
    wanted = (True, True, False)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, *geometry, False, (0, 0), 1, wanted
    )[:2]


def result_of(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return images(*F.conv2d(x, weight, None, *geometry).shape, dtype=x.dtype)


def draw(
    shape: Any, out: int, kernel: Any, geometry: Geometry, dtype: torch.dtype, layout: Any
) -> Triples:
    x, weight = images(*shape, dtype=dtype), (torch.randn(out, shape[1], *kernel) / 8).to(dtype)
    weight = weight.contiguous(memory_format=layout)
    grad = result_of(x, weight, geometry)
    plain = gradients(x, weight, grad, geometry)
    exact = gradients(x.double(), weight.double(), grad.double(), geometry)
    found = (
        input_gradient(grad, weight, x.shape, geometry),
        weight_gradient(x, grad, weight, geometry),
    )
    assert found[1].stride() == torch.empty_like(weight).stride()
    before = images(*shape, dtype=dtype)
    total = add_input_gradient_(before.clone(), grad, weight, geometry)
    return {
        "input": (found[0], plain[0], exact[0]),
        "weight": (found[1], plain[1], exact[1]),
        "total": (total, before + plain[0], before.double() + exact[0]),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=50, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31 - 1))
def test_drawn_shapes(dtype, data, seed):
    torch.manual_seed(seed)
    kernel = data.draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (2, 3), (1, 3)]))
    stride, dilation = data.draw(st.tuples(st.sampled_from([1, 1, 2]), st.sampled_from([1, 1, 2])))
    padding = data.draw(st.sampled_from([kernel[0] // 2, 0, 1, 2, 3]))
    channels = data.draw(st.sampled_from([1, 5, 16, 33, 40, 50, 64]) | st.integers(1, 70))
    out = data.draw(st.integers(1, 70))
    least = max(dilation * (k - 1) + 1 - 2 * padding for k in kernel)
    sizes = [data.draw(st.integers(max(1, least), most)) for most in (15, 17)]
    shape = (data.draw(st.integers(0, 3)), channels, *sizes)
    layout = data.draw(st.sampled_from(LAYOUTS))
    geometry = geometry_of(stride, padding, dilation)
    # Few numbers are much a matter of luck.
    count = 4 + 100 // max(1, min(shape[0] * channels * sizes[0] * sizes[1], channels * out))
    assert_draws_within_contract(lambda: draw(shape, out, kernel, geometry, dtype, layout), count)


@pytest.mark.parametrize(
    ("channels", "size", "out", "kernel", "geometry"),
    [
        (64, 41, 128, 1, geometry_of()),
        (40, 37, 72, 3, geometry_of(1, 1)),
        (96, 7, 160, 3, geometry_of(1, 1)),
        (320, 7, 264, 3, geometry_of(1, 1)),
        (48, 33, 64, 3, geometry_of(2, 1)),
        (64, 28, 96, 1, geometry_of(2)),
    ],
)
def test_many_pixels(channels, size, out, kernel, geometry, dtype, poisoned):
    """More than are summed, or packed, at once; with as many threads as share the work in other ways."""
    for threads in (1, 2, 7):
        with torch_threads(threads):
            assert_draws_within_contract(
                lambda: draw(
                    (4, channels, size, size - 1), out, (kernel, kernel), geometry, dtype, LAYOUTS[1]
                ),
                1,
            )  # fmt: skip


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_an_input_that_is_normalized_while_it_is_read(name, kernel, stride, dtype, poisoned):
    geometry = geometry_of(stride, kernel // 2)

    def drawn() -> Triples:
        x, weight = images(3, 40, 9, 8, dtype=dtype, mean=3.0), filters(33, 40, kernel, dtype)
        norm, grad = norm_of(x, 4, name), result_of(x, weight, geometry)
        grouped = x.double().reshape(3, 4, -1)
        mean, variance = grouped.mean(2), grouped.var(2, correction=0)
        statistics = mean.float(), (variance + norm.eps).rsqrt().float()
        found = norm_weight_gradient(x, *statistics, norm, grad, weight, geometry)
        of_plain, of_exact = (
            gradients(normalized(values, norm), weight.to(values), grad.to(values), geometry)[1]
            for values in (x, x.double())
        )
        return {"weight": (found, of_plain, of_exact)}

    assert_draws_within_contract(drawn, 3)


def normalized(x: Tensor, norm: Norm) -> Tensor:
    scale, shift = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    result = torch.group_norm(x.contiguous(), norm.num_groups, scale, shift, norm.eps)
    return ACTIVATIONS[norm.activation](result)


# ---- the forward pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("knows_moments", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolutions_of_one_normalized_input(layout, knows_moments, has_norm, dtype, poisoned):
    last = (3, geometry_of(1, 1)) if dtype == torch.float32 else (1, geometry_of(2))
    kernels = [(24, 1, geometry_of()), (33, 1, geometry_of(2)), (40, *last)]
    found: Any = None

    def drawn() -> Triples:
        nonlocal found
        x = images(3, 40, 9, 8, dtype=dtype, mean=2.0).contiguous(memory_format=layout)
        norm = norm_of(x, 4, "relu") if has_norm else None
        weights = [filters(out, 40, kernel, dtype) for out, kernel, _ in kernels]
        weights = [weight.contiguous(memory_format=layout) for weight in weights]
        residual = images(3, 24, 9, 8, dtype=dtype).contiguous(memory_format=layout)
        dense = x.contiguous(memory_format=torch.channels_last)
        moments = operators.channel_moments.native(dense) if knows_moments else None
        geometries = [geometry for *_, geometry in kernels]
        found = norm_convolve(x, moments, norm, weights, geometries, True, residual)
        assert found is not None
        for result, of_result in zip(found.results, found.moments, strict=True):
            assert_are_moments(of_result, result)
        if norm is not None:
            grouped = x.double().reshape(3, 4, -1)
            torch.testing.assert_close(found.mean, grouped.mean(2).float())
            rstd = (grouped.var(2, correction=0) + norm.eps).rsqrt().float()
            torch.testing.assert_close(found.rstd, rstd)
        triples = {}
        for number, (result, weight) in enumerate(zip(found.results, weights, strict=True)):
            stride = geometries[number][0][0]
            of_plain = plain(x, norm, weight, stride, False)
            exact = plain(x.double(), norm, weight, stride, False)
            if number == 0:
                of_plain, exact = of_plain + residual, exact + residual.double()
            triples[str(number)] = (result, of_plain, exact)
        return triples

    assert_draws_within_contract(drawn, 3)
    assert (found.mean is None) == (not has_norm)


def test_where_a_kernel_is_missing_nothing_is_returned(dtype):
    x, weight = images(2, 40, 9, 8, dtype=dtype), filters(24, 40, 1, dtype)
    given = (None, None, [weight], [geometry_of()], False)
    assert norm_convolve(x, *given) is not None
    assert norm_convolve(x.double(), None, None, [weight.double()], [geometry_of()], False) is None
    wide = filters(24, 40, 3, dtype)
    both = [weight, wide], [geometry_of(), geometry_of(2, 1)]
    assert norm_convolve(x, None, None, *both, False) is None
    with use_backend(group_norm_act="reference"):
        assert norm_convolve(x, *given) is None


# ---- what it takes --------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
def test_tensors_that_are_not_dense(kernel, dtype):
    geometry = geometry_of(1, kernel // 2)
    x, weight = images(2, 40, 9, 8, dtype=dtype), filters(24, 40, kernel, dtype)
    grad = result_of(x, weight, geometry)
    strided = [torch.stack([t, -t], dim=-1)[..., 0] for t in (x, grad, weight)]
    expected = weight_gradient(x, grad, weight, geometry)
    assert torch.equal(weight_gradient(*strided, geometry), expected)
    assert torch.equal(
        input_gradient(*strided[1:], x.shape, geometry),
        input_gradient(grad, weight, x.shape, geometry),
    )


@pytest.mark.parametrize("turned", [False, True])
def test_packed_weights_do_not_depend_on_their_layout(turned, dtype):
    for kernel in (1, 3) if dtype == torch.float32 else (1,):
        weight = filters(37, 50, kernel, dtype)
        packed = [
            packed_weight(w, turned)
            for w in (weight, weight.contiguous(memory_format=torch.channels_last))
        ]
        assert torch.equal(*packed)
        flipped = weight.transpose(0, 1).flip(2, 3) if turned else weight
        assert torch.equal(packed[0], packed_weight(flipped.contiguous()))


def test_writes_the_gradient_and_nothing_else(dtype, poisoned):
    for kernel, stride in ((1, 1), (3, 1), (3, 2)):
        geometry = geometry_of(stride, kernel // 2)
        x, weight = images(2, 40, 9, 7, dtype=dtype), filters(37, 40, kernel, dtype)
        grad, result = result_of(x, weight, geometry), Guarded(weight)
        last = (*geometry, dtype == torch.float32 and (kernel, stride) == (3, 1), result.tensor)
        none = (None,) * 4
        operators.convolution_weight_gradient.native(x, *none, 1, "none", grad, *last)
        result.check()
        assert torch.equal(result.tensor, weight_gradient(x, grad, weight, geometry))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_lost(value, dtype):
    for kernel, stride in ((1, 1), (1, 2), (3, 1), (3, 2)):
        geometry = geometry_of(stride, kernel // 2)
        x, weight = images(2, 40, 9, 7, dtype=dtype), filters(37, 40, kernel, dtype)
        grad = result_of(x, weight, geometry)
        x[1, 3, 4, 4] = value
        of_weight = weight_gradient(x, grad, weight, geometry)
        expected = gradients(x, weight, grad, geometry)[1].isfinite()
        assert torch.equal(
            of_weight.isfinite().all(0).all(-1).all(-1), expected.all(0).all(-1).all(-1)
        )
        assert of_weight[:, 3].isfinite().logical_not().any(-1).any(-1).all()
        grad[0, 5, 2, 2] = value
        of_input = input_gradient(grad, weight, x.shape, geometry)
        expected = gradients(x, weight, grad, geometry)[0]
        assert not of_input[expected.isfinite().logical_not()].isfinite().any()
        assert of_input[1].isfinite().all()


def test_few_channels_are_left_to_torch():
    x, weight = images(2, FEWEST_CHANNELS - 1, 9, 7), filters(37, FEWEST_CHANNELS - 1, 3)
    grad = result_of(x, weight, geometry_of())
    expected = gradients(x, weight, grad, geometry_of())[1]
    assert torch.equal(weight_gradient(x, grad, weight, geometry_of()), expected)
    assert SMALLEST_3X3 > 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_left_to_torch(dtype):
    x, weight = images(2, 16, 5, 5, dtype=dtype), filters(8, 16, 3, dtype)
    grad = result_of(x, weight, geometry_of())
    of_input, of_weight = gradients(x, weight, grad, geometry_of())
    assert torch.equal(input_gradient(grad, weight, x.shape, geometry_of()), of_input)
    assert torch.equal(weight_gradient(x, grad, weight, geometry_of()), of_weight)


def test_tensors_that_do_not_belong_together():
    x, weight, grad = images(2, 16, 5, 5), filters(8, 16, 1), images(2, 9, 5, 5)
    for call in (
        lambda: input_gradient(grad, weight, x.shape, geometry_of()),
        lambda: weight_gradient(x, grad, weight, geometry_of()),
    ):
        with pytest.raises(
            ValueError, match=r"weight must have 9 output channels.*got \(8, 16, 1, 1\)"
        ):
            call()


def test_the_operator_checks_what_it_is_given():
    needs_kernels(torch.float32)
    x, grad, ones = images(2, 16, 6, 5), images(2, 8, 6, 5), torch.ones(16)
    statistics = torch.zeros(2, 4)
    good = {"x": x, "mean": statistics, "rstd": statistics, "weight": ones, "bias": ones}
    good |= {"groups": 4, "activation": "relu", "grad": grad, "stride": [1, 1], "padding": [0, 0]}
    good |= {"dilation": [1, 1], "winograd": False, "result": filters(8, 16, 1)}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"x": x[0]}, "x must"),
        ({"x": x.contiguous()}, "x and grad must be channels_last"),
        ({"x": x.double()}, "dtype of x"),
        ({"grad": grad.double()}, "dtype of x"),
        ({"grad": images(3, 8, 6, 5)}, "as many images"),
        ({"grad": images(2, 8, 6, 4)}, "shape of the convolution"),
        ({"result": filters(9, 16, 1)}, "channels of grad and x"),
        ({"result": filters(8, 16, 7)}, "shape of the convolution"),
        ({"stride": [0, 1]}, "stride must"),
        ({"padding": [1]}, "padding must"),
        ({"winograd": True}, "3x3 filters"),
        ({"groups": 3}, "num_groups must divide"),
        ({"bias": None}, "a norm has"),
        ({"bias": ones[1:]}, "weight and bias"),
        ({"mean": statistics[1:]}, "mean and rstd"),
        ({"activation": "tanh"}, "activation"),
    ]
    operators.convolution_weight_gradient.native(*good.values())
    for change, message in cases:
        with pytest.raises(RuntimeError, match=message):
            operators.convolution_weight_gradient.native(*(good | change).values())
