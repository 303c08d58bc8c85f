"""The Triton kernels of weight_standardization: in the interpreter on the CPU, compiled on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast.backends import use_backend
from bitfast.kernels import weight_standardization as kernels
from bitfast.ops.weight_standardization import (
    ALIGNMENT,
    pack,
    starts_of,
    unpack,
    weight_standardization,
    weight_standardization_all,
)
from bitfast.ops.weight_standardization_eager import forget_calls
from tests.feature_maps import DTYPES, LAYOUTS
from tests.interpreter import DEVICE
from tests.plain_ops import exact_standardization, plain_standardization
from tests.tolerances import Triples, assert_draws_within_contract

hypothesis = pytest.importorskip("hypothesis", reason="the shapes are drawn by hypothesis")
from hypothesis import assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.drawn_cases import filter_cases  # noqa: E402

SHAPES = {
    0: (40, 64, 1, 1),
    1: (9, 512, 1, 1),
    2: (3, 2048, 1, 1),
    3: (2, 4624, 1, 1),
    4: (7, 48, 3, 3),
    5: (2, 272, 3, 3),
    6: (2, 8200, 1, 1),
    7: (5, 3, 7, 7),
}
"""A weight for each KIND; 8192 numbers fill the largest tile."""


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    mean: float = 0.0,
) -> Tensor:
    weight = 0.1 * (torch.randn(shape) + mean)
    return weight.to(DEVICE, dtype).contiguous(memory_format=layout)


def gradient(function: Any, weight: Tensor, grad: Tensor) -> Tensor:
    weight = weight.detach().clone().requires_grad_()
    return torch.autograd.grad(function(weight), weight, grad.to(weight.dtype))[0]


def plain_and_exact_gradient(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    plain = gradient(plain_standardization, weight, grad)
    return plain, gradient(exact_standardization, weight.double(), grad)


# ---- one weight -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind(kind, dtype):
    turned = kind in (4, 5, 7)
    layout = torch.channels_last if turned else torch.contiguous_format

    def draw() -> Triples:
        weight = make(SHAPES[kind], dtype, mean=-2.3)
        assert kernels.kind_of(kernels.filters_of(weight, turned)) == kind
        result = torch.full_like(weight, float("nan"), memory_format=layout)
        mean, rstd = (torch.full((weight.shape[0],), float("nan"), device=DEVICE) for _ in range(2))
        kernels.forward_launch(weight, 1e-8, turned, result=result, mean=mean, rstd=rstd).launch()
        grad = torch.randn(weight.shape).to(weight).contiguous(memory_format=layout)
        grad_weight = torch.full_like(weight, float("nan"))
        kernels.backward_launch(grad, weight, mean, rstd, turned, grad_weight=grad_weight).launch()
        return {
            "result": (result, plain_standardization(weight), exact_standardization(weight)),
            "gradient": (grad_weight, *plain_and_exact_gradient(weight, grad)),
        }

    assert_draws_within_contract(draw, 2)


@settings(max_examples=60)
@given(case=filter_cases(DTYPES, most_filters=9, most_channels=40, largest_side=7))
def test_drawn_shapes(case):
    # Of a few values some draws have next to no variance, and the largest error is that of the unluckiest.
    assume(case.filter_size == 1 or case.filter_size >= 8)
    torch.manual_seed(case.seed)

    def draw() -> Triples:
        weight = make(case.shape, case.dtype, case.layout, case.mean)
        grad = torch.randn(weight.shape).to(weight).contiguous(memory_format=case.layout)
        weight.requires_grad_()
        with use_backend("triton"):
            result = weight_standardization(weight)
            result.backward(grad)
        assert result.is_contiguous(memory_format=case.layout)
        assert weight.grad.is_contiguous(memory_format=case.layout)
        result, weight, grad_weight = result.detach(), weight.detach(), weight.grad
        if case.filter_size == 1:  # batch_norm refuses these; the result is zero
            assert not result.any()
            return {}
        return {
            "result": (
                result,
                plain_standardization(weight.contiguous()),
                exact_standardization(weight),
            ),
            "gradient": (grad_weight, *plain_and_exact_gradient(weight.contiguous(), grad)),
        }

    assert_draws_within_contract(draw, 4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("layout", [*LAYOUTS, "permuted"])
def test_opcheck(layout, dtype):
    weight = torch.randn(5, 4, 3, 2, device=DEVICE)
    weight = weight.mT if layout == "permuted" else weight.contiguous(memory_format=layout)
    operator = torch.ops.bitfast.weight_standardization.triton
    torch.library.opcheck(operator, (weight.requires_grad_(), 1e-8, dtype))


# ---- all weights ----------------------------------------------------------------------------------

MODEL = [*SHAPES.values(), (64, 16, 1, 1), (3, 5, 2, 2), (1, 16, 1, 3), (4, 1, 3, 3)]


def weights_of(
    dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format
) -> list[Tensor]:
    """Return weights of every kind; every fourth is channels_last whatever the others are."""
    return [
        make(shape, dtype, torch.channels_last if number % 4 == 2 else layout, mean=-2.3)
        for number, shape in enumerate(MODEL)
    ]


def is_laid_out(x: Tensor, channels_last: bool) -> bool:
    """Whether x has the layout, in the strides by which convolutions recognise it too."""
    expected = torch.empty(
        x.shape, memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    return x.stride() == expected.stride() or 1 in (x.shape[1], x.shape[2] * x.shape[3])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("result_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_weights_equal_each_alone(dtype, result_dtype, layout, channels_last):
    weights = weights_of(dtype, layout)
    kinds = {kernels.kind_of(kernels.filters_of(w, channels_last), True) for w in weights}
    if channels_last and layout == torch.contiguous_format:
        assert kinds == set(SHAPES)
    grads = [torch.randn(w.shape, device=DEVICE).to(result_dtype or dtype) for w in weights]

    def run(function: Any) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [w.detach().clone().requires_grad_() for w in weights]
        with use_backend("triton"):
            results = function(leaves)
        torch.autograd.backward(results, grads)
        return [r.detach() for r in results], [w.grad for w in leaves]

    together, gradients = run(
        lambda ws: weight_standardization_all(ws, 1e-8, result_dtype, channels_last)
    )
    alone, expected = run(lambda ws: [weight_standardization(w, 1e-8, result_dtype) for w in ws])
    for weight, a, b, c, d in zip(weights, together, alone, gradients, expected, strict=True):
        # Not bit for bit: another layout is another tile, and another order of summation.
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if a.dtype == c.dtype == torch.float32 else {}
        torch.testing.assert_close(a, b, **tolerance)
        torch.testing.assert_close(c, d, **tolerance)
        assert is_laid_out(a, channels_last or not weight.is_contiguous())
        assert c.stride() == weight.stride() or 1 in weight.shape


def test_all_weights_are_within_the_contract():
    def draw() -> Triples:
        weights = weights_of()
        with use_backend("triton"):
            results = weight_standardization_all(weights, channels_last=True)
        return {
            f"{tuple(weight.shape)}": (
                result.contiguous(),
                plain_standardization(weight.contiguous()),
                exact_standardization(weight),
            )
            for weight, result in zip(weights, results, strict=True)
        }

    assert_draws_within_contract(draw, 2)


def test_one_launch_for_all_weights(monkeypatch):
    launches: list[str] = []
    prepare = kernels.prepare

    def prepare_and_note(launch):
        prepared = prepare(launch)
        return lambda *tensors: (launches.append(launch.kernel.__name__), prepared(*tensors))

    monkeypatch.setattr(kernels, "prepare", prepare_and_note)
    forget_calls()
    weights = [w.requires_grad_() for w in weights_of()]
    with use_backend("triton"):
        results = weight_standardization_all(weights, dtype=torch.bfloat16, channels_last=True)
    assert launches == ["forward_all_kernel"]
    torch.autograd.backward(results, [torch.ones_like(r) for r in results])
    assert launches == ["forward_all_kernel", "backward_all_kernel"]
    forget_calls()


def test_weights_that_are_not_used_get_no_gradient_or_zero():
    weights = [w.requires_grad_() for w in weights_of()]
    with use_backend("triton"):
        results = weight_standardization_all(weights)
    results[1].square().sum().backward()
    for number, weight in enumerate(weights):
        if number != 1:
            assert weight.grad is None or not weight.grad.any()


def test_the_table_is_built_once_while_storage_and_shapes_stay():
    weights = weights_of()
    starts = starts_of([w.numel() for w in weights])[0]
    table = kernels.table_of(weights, starts, True)
    weights[0].mul_(2)
    assert kernels.table_of(weights, starts, True) is table
    assert kernels.table_of(weights, starts, False) is not table
    weights[0] = weights[0].clone()
    assert kernels.table_of(weights, starts, True) is not table


def test_the_table_covers_every_filter_once():
    weights = weights_of()
    starts = starts_of([w.numel() for w in weights])[0]
    segments, programs = (t.tolist() for t in kernels.table_of(weights, starts, True))
    seen = []
    for number, first in programs:
        entry = dict(zip(kernels.SEGMENT_FIELDS, segments[number], strict=True))
        assert entry["address"] == weights[number].data_ptr()
        assert entry["start"] == starts[number]
        rows = range(first, min(first + kernels.KINDS[entry["kind"]].rows, entry["rows"]))
        seen += [entry["first_filter"] + row for row in rows]
    assert sorted(seen) == list(range(sum(w.shape[0] for w in weights)))
    assert len(seen) == len(set(seen))


def test_nothing_is_written_between_the_weights():
    weights = weights_of()
    starts, end = starts_of([w.numel() for w in weights])
    filters = sum(w.shape[0] for w in weights)
    result = torch.full((end + ALIGNMENT,), 77.0, device=DEVICE)
    mean, rstd = (torch.full((filters + 8,), 77.0, device=DEVICE) for _ in range(2))
    table = kernels.table_of(weights, starts, True)
    kernels.forward_all_launch(table, weights, 1e-8, result=result, mean=mean, rstd=rstd).launch()
    inside = torch.zeros(result.shape, dtype=torch.bool)
    for weight, start in zip(weights, starts, strict=True):
        inside[start : start + weight.numel()] = True
    assert (result[~inside.to(DEVICE)] == 77).all()
    assert not (result[inside.to(DEVICE)] == 77).any()
    assert (mean[filters:] == 77).all()
    assert (rstd[filters:] == 77).all()


def test_mixed_dtypes_and_a_weight_given_twice():
    weights = [make((4, 3, 3, 3)), make((2, 5, 1, 1), torch.bfloat16), make((4, 3, 3, 3))]
    weights.append(weights[0])
    with use_backend("triton"):
        results = weight_standardization_all(weights)
    assert [r.dtype for r in results] == [w.dtype for w in weights]
    for weight, result in zip(weights, results, strict=True):
        torch.testing.assert_close(result, exact_standardization(weight).to(weight.dtype))


def test_weights_on_two_devices():
    """Each device's weights are standardized there; the meta device stands for a second GPU."""
    weights = [make((4, 3, 3, 3)), torch.empty(2, 5, 1, 1, device="meta"), make((2, 5, 1, 1))]
    results = weight_standardization_all(weights)
    assert [r.device for r in results] == [w.device for w in weights]
    for number in (0, 2):
        torch.testing.assert_close(results[number], plain_standardization(weights[number]))


@settings(max_examples=100)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)), min_size=1),
    channels_last=st.booleans(),
)
def test_packing_is_undone_by_unpacking(sizes, channels_last):
    weights = [torch.randn(out, channels, side, side) for out, channels, side in sizes]
    packed = pack(weights, channels_last, weights)
    assert packed.numel() % ALIGNMENT == 0
    for weight, view in zip(weights, unpack(packed, weights, channels_last), strict=True):
        assert torch.equal(view, weight)
        assert is_laid_out(view, channels_last)
        assert view.storage_offset() % ALIGNMENT == 0


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_opcheck_of_all(backend):
    weights = [torch.randn(s, device=DEVICE) for s in ((8, 8, 3, 3), (4, 16, 1, 1))]
    weights.append(torch.randn(4, 4, 2, 2, device=DEVICE).to(memory_format=torch.channels_last))
    weights = [w.requires_grad_() for w in weights]
    operator = getattr(torch.ops.bitfast.weight_standardization_all, backend)
    for dtype, channels_last in ((None, False), (torch.bfloat16, True)):
        torch.library.opcheck(operator, (weights, 1e-8, dtype, channels_last))


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_reference_of_all_weights(channels_last):
    weights = [
        w.double().requires_grad_() for w in (torch.randn(3, 2, 3, 2), torch.randn(2, 3, 1, 1))
    ]
    results = weight_standardization_all(weights, channels_last=channels_last)
    for weight, result in zip(weights, results, strict=True):
        torch.testing.assert_close(result, exact_standardization(weight))
        assert is_laid_out(result, channels_last)
    contract = torch.ops.bitfast.weight_standardization_all.reference

    def function(*weights: Tensor) -> Tensor:
        return torch.cat([v.flatten() for v in unpack(
            contract(weights, 1e-8, None, channels_last)[0], weights, channels_last
        )])  # fmt: skip

    assert torch.autograd.gradcheck(function, weights)


def test_autocast_gives_the_autocast_dtype():
    weights = [make((4, 3, 3, 3), mean=100.0), make((2, 5, 1, 1), torch.float64)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        results = weight_standardization_all(weights)
        with use_backend("triton"):
            alone = weight_standardization_all(weights[:1])
    assert [r.dtype for r in results] == [torch.bfloat16, torch.float64]
    assert alone[0].dtype == torch.bfloat16


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    weights = [make((4, 3, 3, 3)), make((8, 16, 1, 1))]
    with use_backend("triton"):
        compiled = torch.compile(weight_standardization_all, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(weights), weight_standardization_all(weights), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([torch.ones(2, 2, 1, 1), torch.zeros(2, 0, 3, 3)], ValueError, r"weights\[1\] must have"),
        (
            [torch.zeros(2, 1, 3, 3, dtype=torch.int8)],
            TypeError,
            r"weights\[0\] must be a floating",
        ),
        ([None], TypeError, r"weights\[0\] must be a torch.Tensor"),
    ],
)
def test_bad_weights_are_numbered(weights, error, message):
    with pytest.raises(error, match=message):
        weight_standardization_all(weights)


def test_no_weights():
    assert weight_standardization_all([]) == []
