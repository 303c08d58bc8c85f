"""The C++ kernels of weight_standardization on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from bitfast.backends import use_backend
from bitfast.ops.weight_standardization import (
    pack,
    starts_of,
    unpack,
    weight_standardization,
    weight_standardization_all,
)
from tests.drawn_cases import filter_cases
from tests.feature_maps import LAYOUTS
from tests.plain_ops import plain_standardization
from tests.requirements import NEEDS_EXTENSION
from tests.threads import torch_threads
from tests.tolerances import Triples, assert_draws_within_contract

pytestmark = [NEEDS_EXTENSION, pytest.mark.usefixtures("poisoned")]

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = (
    (64, 3, 7, 7),
    (16, 64, 1, 1),
    (5, 33, 3, 3),
    (1, 1, 1, 1),
    (300, 7, 2, 3),
    (2, 700, 3, 3),
)
operators = torch.ops.bitfast


def weights_of(dtype: torch.dtype, layout: torch.memory_format, mean: float = 0.0) -> list[Tensor]:
    return [
        (torch.randn(shape) + mean).to(dtype).contiguous(memory_format=layout) for shape in SHAPES
    ]


@settings(max_examples=100)
@given(case=filter_cases(DTYPES, most_filters=40, most_channels=40, largest_side=4))
def test_drawn_shapes(case):
    # Of a few values some draws have next to no variance, and the largest error is that of the unluckiest.
    assume(case.filter_size == 1 or case.filter_size >= 8)
    torch.manual_seed(case.seed)

    def draw() -> Triples:
        weight, grad = (
            (torch.randn(case.shape) + mean).to(case.dtype).contiguous(memory_format=case.layout)
            for mean in (case.mean, 0)
        )
        result, mean, rstd = operators.weight_standardization.native(weight, 1e-4, None)
        gradient = operators.weight_standardization_backward.native(grad, weight, mean, rstd)

        def outputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            leaf = weight.detach().to(dtype).requires_grad_()
            output = plain_standardization(leaf, 1e-4) if case.filter_size > 1 else leaf * 0
            return output.detach(), torch.autograd.grad(output, leaf, grad.to(dtype))[0]

        columns = zip((result, gradient), outputs(case.dtype), outputs(torch.float64), strict=True)
        return dict(zip(("result", "gradient"), columns, strict=True))

    assert_draws_within_contract(draw, 4)


@pytest.mark.parametrize("result_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_weights_equal_each_alone(layout, channels_last, dtype, result_dtype):
    weights = [w.requires_grad_() for w in weights_of(dtype, layout, 1.0)]
    grads = [torch.randn(shape) for shape in SHAPES]

    def gradients(results: list[Tensor]) -> list[Tensor]:
        return list(
            torch.autograd.grad(
                results, weights, [g.to(r) for g, r in zip(grads, results, strict=True)]
            )
        )

    with use_backend("native"):
        together = weight_standardization_all(weights, 1e-8, result_dtype, channels_last)
        alone = [weight_standardization(w, 1e-8, result_dtype) for w in weights]
        for ours, theirs, weight in zip(together, alone, weights, strict=True):
            assert ours.dtype == theirs.dtype == (result_dtype or dtype)
            assert torch.equal(ours, theirs)
            assert not channels_last or ours.is_contiguous(memory_format=torch.channels_last)
            assert channels_last or ours.stride() == theirs.stride()
            assert theirs.stride() == weight.stride()
        for ours, theirs in zip(gradients(together), gradients(alone), strict=True):
            assert torch.equal(ours, theirs)


def test_all_weights_do_not_depend_on_the_number_of_threads():
    weights = weights_of(torch.float32, torch.contiguous_format)
    results = []
    for count in (1, 2, 7):
        with torch_threads(count):
            packed = operators.weight_standardization_all.native(weights, 1e-8, None, True)[0]
        results.append(unpack(packed, weights, True))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_nothing_is_written_between_the_weights():
    weights = weights_of(torch.float32, torch.contiguous_format)
    packed = operators.weight_standardization_all.native(weights, 1e-8, None, False)[0]
    starts, _ = starts_of([w.numel() for w in weights])
    written = torch.zeros_like(packed, dtype=torch.bool)
    for start, weight in zip(starts, weights, strict=True):
        written[start : start + weight.numel()] = True
    assert torch.equal(packed.isnan(), ~written)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, layout):
    torch.use_deterministic_algorithms(False)
    weights = [w.requires_grad_() for w in weights_of(dtype, layout)[:3]]
    torch.library.opcheck(operators.weight_standardization.native, (weights[0], 1e-8, None))
    arguments = (weights, 1e-8, torch.bfloat16, True)
    torch.library.opcheck(
        operators.weight_standardization_all.native, arguments,
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_the_operators_check_what_they_are_given():
    weight = torch.randn(4, 3, 2, 2)
    with pytest.raises(RuntimeError, match="none of them 0"):
        operators.weight_standardization.native(weight[:0], 1e-8, None)
    with pytest.raises(RuntimeError, match="float32 and bfloat16"):
        operators.weight_standardization.native(weight.double(), 1e-8, None)
    with pytest.raises(RuntimeError, match="one dtype"):
        operators.weight_standardization_all.native([weight, weight.bfloat16()], 1e-8, None, False)
    statistics = torch.ones(4)
    with pytest.raises(RuntimeError, match="shape of weight"):
        operators.weight_standardization_backward.native(weight[:2], weight, statistics, statistics)
    with pytest.raises(RuntimeError, match="one value per filter"):
        operators.weight_standardization_backward.native(weight, weight, statistics[:2], statistics)
    with pytest.raises(RuntimeError, match="size of the weights' buffer"):
        operators.weight_standardization_all_backward.native(
            pack([weight], False, [weight])[:-1], [weight], statistics, statistics, False
        )
