"""The CUDA kernels of weight_standardization, run on the CPU by tests/host/gpu_emulation.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfast import reference
from bitfast.memory_format import laid_out
from bitfast.ops import native_cuda
from bitfast.ops.weight_buffer import ALIGNMENT, starts_of, unpack
from bitfast.ops.weight_standardization_cuda import PreparedKernels, check_first_use
from bitfast.ops.weight_standardization_eager import PreparedCallOfAll, StandardizeAll
from tests.emulated import A100, H100, at_page_end, emulate, library
from tests.feature_maps import DTYPES, LAYOUTS
from tests.plain_ops import exact_standardization, plain_standardization
from tests.tolerances import Triples, assert_draws_within_contract

EPS = 1e-8
NAN = float("nan")
FEW = (90, 1, 227 * 1024)
"""A GPU of one multiprocessor, whose blocks take several pieces each."""


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = library("csrc/weight_standardization.cu")
    monkeypatch.setattr(native_cuda, "library", lambda: emulated)
    emulate(emulated)


def on(device: tuple[int, int, int], seed: int = 0) -> None:
    emulate(library("csrc/weight_standardization.cu"), device, seed)


# ---- calls ----------------------------------------------------------------------------------------


def buffer(weights: Sequence[Tensor], dtype: torch.dtype, shift: int = 0) -> Tensor:
    """Return a poisoned buffer for the results of weights, which ends where its memory does."""
    _, end = starts_of([weight.numel() for weight in weights])
    return at_page_end(torch.empty(end + shift, dtype=dtype), NAN)[shift:]


def check_untouched(packed: Tensor, weights: Sequence[Tensor]) -> None:
    """Nothing is written between the weights."""
    starts, end = starts_of([weight.numel() for weight in weights])
    for weight, start, next_start in zip(weights, starts, [*starts[1:], end], strict=True):
        assert packed[start + weight.numel() : next_start].isnan().all()


def forward(
    weights: Sequence[Tensor],
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    eps: float = EPS,
    shift: int = 0,
) -> tuple[list[Tensor], Tensor, Tensor]:
    dtype = dtype or weights[0].dtype
    prepared = PreparedKernels(weights, eps, dtype, channels_last)
    packed = buffer(weights, dtype, shift)
    rows = sum(weight.shape[0] for weight in weights)
    mean, rstd = (at_page_end(torch.empty(rows), NAN) for _ in range(2))
    addresses = [weight.data_ptr() for weight in weights]
    prepared.forward(0, addresses, packed.data_ptr(), mean.data_ptr(), rstd.data_ptr())
    check_untouched(packed, weights)
    return unpack(packed, weights, channels_last), mean, rstd


def backward(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    shift: int = 0,
) -> list[Tensor]:
    prepared = PreparedKernels(weights, EPS, dtype or weights[0].dtype, channels_last)
    packed = buffer(weights, weights[0].dtype, shift)
    prepared.backward(
        0,
        [weight.data_ptr() for weight in weights],
        [None if grad is None else grad.data_ptr() for grad in grads],
        mean.data_ptr(),
        rstd.data_ptr(),
        packed.data_ptr(),
    )
    check_untouched(packed, weights)
    return unpack(packed, weights, False)


def gradients_for(
    weights: Sequence[Tensor], dtype: torch.dtype, channels_last: bool
) -> list[Tensor]:
    """Return random gradients in the layouts of the results."""
    grads = []
    for weight in weights:
        layout = torch.channels_last if channels_last else None
        like = weight if layout is None else laid_out(weight, layout)
        grad = torch.empty_like(like, dtype=dtype).copy_(torch.randn(weight.shape))
        grads.append(at_page_end(grad))
    return grads


def draw(
    shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format, mean: float = 0.0
) -> Tensor:
    weight = 0.1 * (torch.randn(*shape) + mean)
    return at_page_end(laid_out(weight.to(dtype), layout))


def plain_gradient(function: Any, weight: Tensor, grad: Tensor, result: torch.dtype) -> Tensor:
    leaf = weight.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).to(result), leaf, grad.to(result))[0]


def triples_of(
    weights: Sequence[Tensor], dtype: torch.dtype, channels_last: bool, name: str = ""
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Run forward and backward; return what the contract compares, by name."""
    results, mean, rstd = forward(weights, dtype, channels_last)
    grads = gradients_for(weights, dtype, channels_last)
    grad_weights = backward(weights, grads, mean, rstd, dtype, channels_last)
    triples = {}
    for number, weight in enumerate(weights):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last or weight.is_contiguous():
            assert results[number].is_contiguous(memory_format=layout)
        assert grad_weights[number].stride() == weight.stride()
        plain = plain_standardization(weight.contiguous()).to(dtype)
        exact = exact_standardization(weight)
        triples[f"{name}{number}"] = (results[number], plain, exact)
        grad = grads[number]
        triples[f"{name}{number} gradient"] = (
            grad_weights[number],
            plain_gradient(plain_standardization, weight.contiguous(), grad, dtype),
            plain_gradient(exact_standardization, weight.double(), grad, torch.float64),
        )
    return triples


# ---- numbers --------------------------------------------------------------------------------------

R50X1 = [
    (64, 3, 7, 7), (64, 64, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1), (64, 256, 1, 1),
    (64, 128, 3, 3), (128, 512, 1, 1), (32, 256, 3, 3), (32, 1024, 1, 1), (16, 512, 3, 3),
    (33, 2048, 1, 1),
]  # fmt: skip
"""Every size of a filter in R50x1, with fewer filters where there are many."""

WIDE = [(3, 2048, 3, 3), (2, 8192, 1, 1), (5, 192, 3, 3), (2, 1536, 3, 3), (2, 640, 3, 3)]
"""Filters that are longer than what a block holds."""

ODD = [
    (35, 3, 7, 7), (93, 16, 1, 1), (62, 7, 3, 2), (129, 1, 1, 2), (29, 24, 5, 5), (33, 40, 2, 2),
    (259, 8, 1, 1), (2, 5001, 1, 1), (97, 1, 3, 3), (2, 513, 3, 3), (2, 8, 25, 25), (130, 72, 1, 1),
]  # fmt: skip
"""Small filters are many: the error of a few numbers is a matter of luck."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_filters_of_r50x1(dtype, result, layout):
    torch.manual_seed(0)
    weights = [draw(shape, dtype, layout, -2.3) for shape in R50X1]
    assert_draws_within_contract(lambda: triples_of(weights, result, True), 1)


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_and_long_filters(dtype, channels_last, mean):
    def one() -> Triples:
        weights = [
            draw(shape, dtype, layout, mean) for shape in [*ODD, *WIDE[:2]] for layout in LAYOUTS
        ]
        return triples_of(weights, dtype, channels_last)

    torch.manual_seed(1)
    assert_draws_within_contract(one, 1)


@pytest.mark.parametrize("device", [H100, A100, FEW])
def test_filters_longer_than_a_stage(device):
    on(device, 5)
    torch.manual_seed(2)
    weights = [draw(shape, torch.float32, torch.contiguous_format, 100.0) for shape in WIDE]
    assert_draws_within_contract(lambda: triples_of(weights, torch.bfloat16, True), 1)


@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_dtypes(dtype, result):
    shapes = [(5, 3, 7, 7), (9, 32, 3, 3), (17, 64, 1, 1), (1, 520, 3, 3)]

    def one() -> Triples:
        return triples_of([draw(s, dtype, LAYOUTS[0]) for s in shapes], result, True)

    torch.manual_seed(3)
    assert_draws_within_contract(one, 2)


@settings(max_examples=25)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([1, 3, 8, 12, 16, 32, 56, 64]),
                  st.integers(1, 5), st.integers(1, 5)),
        min_size=1, max_size=3,
    ),
    dtype=st.sampled_from(DTYPES),
    result=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_drawn_weights(shapes, dtype, result, layout, channels_last, seed):
    shapes = [shape for shape in shapes if shape[1] * shape[2] * shape[3] > 1]
    if not shapes:
        return
    torch.manual_seed(seed)
    on(FEW if seed % 2 else H100, seed)

    def one() -> Triples:
        return triples_of([draw(s, dtype, layout) for s in shapes], result, channels_last)

    assert_draws_within_contract(one, 2)


def test_statistics_are_those_of_the_reference():
    weights = [
        draw(shape, torch.float32, LAYOUTS[0], 3.0) for shape in [(5, 3, 7, 7), (70, 8, 3, 3)]
    ]
    _, mean, rstd = forward(weights)
    expected = [reference.weight_standardization_forward(w.double(), EPS, None) for w in weights]
    torch.testing.assert_close(mean, torch.cat([e[1] for e in expected]).float())
    torch.testing.assert_close(rstd, torch.cat([e[2] for e in expected]).float())


# ---- memory ---------------------------------------------------------------------------------------


def shifted(x: Tensor) -> Tensor:
    """Return a copy that begins at an odd element."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    return memory[1:].as_strided(x.shape, x.stride(), 1).copy_(x)


@pytest.mark.parametrize("what", ["weights", "results", "gradients", "weight gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_addresses_that_are_not_aligned(dtype, what):
    torch.manual_seed(4)
    weights = [
        draw(shape, dtype, LAYOUTS[0]) for shape in [(5, 32, 3, 3), (3, 64, 1, 1), (2, 520, 3, 3)]
    ]
    grads = gradients_for(weights, dtype, True)
    expected, mean, rstd = forward(weights, channels_last=True)
    expected_gradients = backward(weights, grads, mean, rstd, channels_last=True)
    moved = [shifted(w) for w in weights] if what == "weights" else weights
    results, mean, rstd = forward(moved, channels_last=True, shift=int(what == "results"))
    gradients = backward(
        moved,
        [shifted(g) for g in grads] if what == "gradients" else grads,
        mean,
        rstd,
        channels_last=True,
        shift=int(what == "weight gradients"),
    )
    for a, b in zip([*results, *gradients], [*expected, *expected_gradients], strict=True):
        torch.testing.assert_close(a, b)


def test_a_result_without_gradient_gives_zeros():
    shapes = [(9, 32, 3, 3), (5, 3, 7, 7), (2, 5000, 1, 1), (8, 64, 1, 1)]
    weights = [draw(shape, torch.float32, LAYOUTS[0]) for shape in shapes]
    weights[0][3] = NAN
    grads: list[Tensor | None] = list(gradients_for(weights, torch.bfloat16, True))
    _, mean, rstd = forward(weights, torch.bfloat16, True)
    expected = backward(weights, grads, mean, rstd, torch.bfloat16, True)
    for number in (0, 2):
        grads[number] = None
        expected[number] = torch.zeros_like(weights[number])
    actual = backward(weights, grads, mean, rstd, torch.bfloat16, True)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_filter(value):
    shapes = [(9, 32, 3, 3), (5, 3, 7, 7), (3, 576, 3, 3), (70, 64, 1, 1), (4, 256, 3, 3)]
    weights = [draw(shape, torch.float32, LAYOUTS[0]) for shape in shapes]
    grads = gradients_for(weights, torch.bfloat16, True)
    results, mean, rstd = forward(weights, torch.bfloat16, True)
    gradients = backward(weights, grads, mean, rstd, torch.bfloat16, True)
    for weight in weights:
        weight[1, -1, 0, 0] = value
    for grad in grads:
        grad[2, 0, 0, 0] = value
    changed, mean, rstd = forward(weights, torch.bfloat16, True)
    changed_gradients = backward(weights, grads, mean, rstd, torch.bfloat16, True)
    for before, after in zip(results, changed, strict=True):
        assert after[1].isnan().all()
        others = [n for n in range(len(after)) if n != 1]
        assert torch.equal(after[others], before[others])
    for before, after in zip(gradients, changed_gradients, strict=True):
        assert after[1].isnan().all()
        assert not after[2].isfinite().any()
        others = [n for n in range(len(after)) if n not in (1, 2)]
        assert torch.equal(after[others], before[others])


def test_constant_filters():
    weights = [torch.full(shape, 0.3) for shape in [(9, 64, 3, 3), (2, 3, 7, 7), (2, 640, 3, 3)]]
    results, _, rstd = forward(weights)
    assert all(result.abs().max() < 1e-3 for result in results)
    assert (rstd > 0).all()


# ---- launches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [108, 109, 230])
def test_many_weights(count):
    """More than a launch takes."""
    weights = [draw((2 + n % 3, 8, 1 + n % 3, 1), torch.float32, LAYOUTS[0]) for n in range(count)]
    results, mean, rstd = forward(weights, torch.float16, True)
    grads = gradients_for(weights, torch.float16, True)
    gradients = backward(weights, grads, mean, rstd, torch.float16, True)
    for n in (0, 107, count - 1):
        (alone,), *statistics = forward([weights[n]], torch.float16, True)
        assert torch.equal(results[n], alone)
        (gradient,) = backward([weights[n]], [grads[n]], *statistics, torch.float16, True)
        assert torch.equal(gradients[n], gradient)


def test_the_same_bits_whatever_the_schedule():
    torch.manual_seed(6)
    shapes = [(5, 3, 7, 7), (40, 64, 3, 3), (70, 64, 1, 1), (3, 640, 3, 3), (9, 2048, 1, 1)]
    weights = [draw(shape, torch.float32, LAYOUTS[0]) for shape in shapes]
    grads = gradients_for(weights, torch.bfloat16, True)

    def run(device: tuple[int, int, int], seed: int) -> list[Tensor]:
        on(device, seed)
        results, mean, rstd = forward(weights, torch.bfloat16, True)
        return [*results, *backward(weights, grads, mean, rstd, torch.bfloat16, True), mean, rstd]

    first = run(H100, 0)
    for device, seed in [(H100, 1), (A100, 2), (FEW, 3), (FEW, 4)]:
        for a, b in zip(run(device, seed), first, strict=True):
            assert torch.equal(a, b)


def test_what_cannot_be_launched_is_refused():
    weight = torch.empty(1, 2, 300, 300)
    with pytest.raises(RuntimeError, match="more than 65535 pixels"):
        forward([weight], channels_last=True)
    assert ALIGNMENT == 64, "start_unit in csrc/weight_standardization_pieces.h"


# ---- eager calls ----------------------------------------------------------------------------------


def standardize_all(call: PreparedCallOfAll, weights: Sequence[Tensor]) -> list[Tensor]:
    addresses = [weight.data_ptr() for weight in weights]
    return list(StandardizeAll.apply(call, call.launches.at(addresses), *weights))


def reference_all(call: PreparedCallOfAll, weights: Sequence[Tensor]) -> list[Tensor]:
    dtype, channels_last = call.result_dtype, call.channels_last
    packed, _, _ = torch.ops.bitfast.weight_standardization_all.reference(
        weights, call.eps, dtype, channels_last
    )
    return unpack(packed, weights, channels_last)


SOME = [(5, 3, 7, 7), (9, 32, 3, 3), (16, 64, 1, 1), (2, 640, 3, 3)]


@pytest.mark.parametrize("channels_last", [True, False])
def test_eager_calls_give_what_the_operators_give(channels_last):
    torch.manual_seed(7)
    weights = [draw(shape, torch.float32, layout) for shape in SOME for layout in LAYOUTS]
    leaves = [weight.requires_grad_() for weight in weights]
    call = PreparedCallOfAll(leaves, EPS, torch.bfloat16, channels_last, "native")
    # Of the result that is left out there is no gradient; others lie in whatever layout.
    grads = [torch.randn(w.shape).bfloat16() for w in weights]
    grads[1] = laid_out(grads[1], torch.channels_last)
    grads[2] = torch.randn(3, 3, 9, 32).bfloat16().permute(2, 3, 0, 1)

    def run(function: Any) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        results = function(call, leaves)
        return results, torch.autograd.grad(results[1:], leaves, grads[1:])

    (results, gradients), (expected, expected_gradients) = run(standardize_all), run(reference_all)
    for a, e in zip(results, expected, strict=True):
        torch.testing.assert_close(a, e)
        assert a.stride() == e.stride()
    for a, e in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
        assert a.stride() == e.stride()
    assert not gradients[0].any()


def test_second_derivatives():
    leaves = [draw(shape, torch.float32, LAYOUTS[0]).requires_grad_() for shape in SOME[:2]]
    call = PreparedCallOfAll(leaves, EPS, torch.float32, False, "native")

    def run(function: Any) -> tuple[Tensor, ...]:
        loss = sum(r.sin().sum() for r in function(call, leaves))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for a, e in zip(run(standardize_all), run(reference_all), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3 * float(e.abs().max()))


def test_the_check_of_the_first_use():
    assert check_first_use(torch.device("cpu")) is None
