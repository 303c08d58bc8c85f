from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bitfast.backends import BackendUnavailableError, use_backend
from bitfast.ops.weight_standardization import weight_standardization
from tests.drawn_cases import filter_cases
from tests.feature_maps import DTYPES, LAYOUTS
from tests.plain_ops import exact_standardization, plain_standardization
from tests.tolerances import assert_draws_within_contract


@settings(max_examples=60)
@given(
    case=filter_cases(DTYPES, most_filters=9, most_channels=9, largest_side=7),
    std=st.sampled_from([1.0, 1e-2]),
)
def test_matches_the_oracle(case, std):
    assume(case.filter_size > 1)  # batch_norm refuses a single value
    torch.manual_seed(case.seed)

    def draw():
        weight = (std * (torch.randn(case.shape) + case.mean)).to(case.dtype)
        weight = weight.contiguous(memory_format=case.layout)
        actual = weight_standardization(weight)
        return {"result": (actual, plain_standardization(weight), exact_standardization(weight))}

    assert_draws_within_contract(draw, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_dtype_is_rounded_once_from_float32(dtype):
    weight = torch.randn(5, 4, 3, 3)
    actual = weight_standardization(weight, dtype=dtype)
    assert torch.equal(actual, weight_standardization(weight).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_the_memory_format(layout):
    weight = torch.randn(5, 4, 3, 3).contiguous(memory_format=layout)
    assert weight_standardization(weight).is_contiguous(memory_format=layout)


def test_constant_filters():
    assert torch.equal(weight_standardization(torch.ones(2, 3, 1, 1)), torch.zeros(2, 3, 1, 1))


def test_reads_views_and_nothing_beside_them():
    whole = torch.full((6, 10, 7, 5), float("nan"))
    weight = whole[1:5, 1:9:2, 2:5, 1:4]
    weight.copy_(torch.randn(weight.shape))
    expected = weight_standardization(weight.contiguous())
    torch.testing.assert_close(weight_standardization(weight), expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_float64(layout):
    weight = torch.randn(3, 2, 3, 2, dtype=torch.float64).contiguous(memory_format=layout)
    weight.requires_grad_()
    assert torch.autograd.gradcheck(weight_standardization, (weight,))
    contract = torch.ops.bitfast.weight_standardization.reference
    assert torch.autograd.gradcheck(lambda w: contract(w, 1e-8, None)[0], (weight,))


@pytest.mark.parametrize("op", ["public", "contract"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_within_the_contract(dtype, op):
    def ours(weight):
        if op == "public":
            return weight_standardization(weight)
        return torch.ops.bitfast.weight_standardization.reference(weight, 1e-8, None)[0]

    def draw():
        weight = (0.1 * torch.randn(6, 5, 3, 3)).to(dtype)
        grad = torch.randn(weight.shape).to(dtype)

        def gradient(function, dtype):
            leaf = weight.detach().to(dtype).clone().requires_grad_()
            return torch.autograd.grad(function(leaf), leaf, grad.to(dtype))[0]

        gradients = (
            gradient(ours, dtype),
            gradient(plain_standardization, dtype),
            gradient(exact_standardization, torch.float64),
        )
        return {"gradient of weight": gradients}

    assert_draws_within_contract(draw, 3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("layout", [*LAYOUTS, "permuted"])
def test_opcheck(layout, dtype):
    weight = torch.randn(5, 4, 3, 2)
    if layout == "permuted":
        weight = weight.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    else:
        weight = weight.contiguous(memory_format=layout)
    torch.library.opcheck(
        torch.ops.bitfast.weight_standardization.reference, (weight.requires_grad_(), 1e-8, dtype)
    )


def test_autocast_computes_in_float32_and_rounds_to_the_autocast_dtype():
    weight = torch.randn(5, 4, 3, 3) + 100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = weight_standardization(weight)
        asked = weight_standardization(weight, dtype=torch.float32)
        unaffected = weight_standardization(weight.double())
    assert torch.equal(actual, weight_standardization(weight).bfloat16())
    assert asked.dtype == torch.float32
    assert unaffected.dtype == torch.float64


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    compiled = torch.compile(weight_standardization, fullgraph=True, backend="aot_eager")
    weight = torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(compiled(weight), weight_standardization(weight))


def test_explicit_backend_never_degrades():
    with (
        use_backend(weight_standardization="native"),
        pytest.raises(BackendUnavailableError, match="weight_standardization"),
    ):
        weight_standardization(torch.randn(2, 2, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 8, 3),), ValueError, "weight must have shape"),
        ((torch.zeros(2, 0, 3, 3),), ValueError, "weight must have shape"),
        ((torch.zeros(0, 2, 3, 3),), ValueError, "each at least 1, got"),
        ((torch.zeros(2, 1, 3, 3, dtype=torch.int8),), TypeError, "floating-point"),
        ((torch.zeros(2, 1, 3, 3), -1.0), ValueError, "eps must be at least 0, got -1.0"),
        ((torch.zeros(2, 1, 3, 3), 1e-8, torch.int32), TypeError, "dtype must be .*int32"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        weight_standardization(*arguments)
