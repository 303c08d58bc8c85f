"""Eager standardization of all weights goes past the dispatcher, and computes what its operator computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitfast.ops.weight_standardization import weight_standardization_all
from tests.eager_calls import (
    Watched,
    alone_and_watched,
    assert_same,
    filters,
    gradients_of,
    shifted,
    triton,  # noqa: F401
)
from tests.interpreter import DEVICE

# ---- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("result_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_all_weights(channels_last, result_dtype):
    def forward(*weights: Tensor) -> list[Tensor]:
        return weight_standardization_all(weights, 1e-6, result_dtype, channels_last)

    with torch.no_grad():
        itself, watched, seen = alone_and_watched(forward, *filters())
    assert_same(itself, watched)
    assert seen == ["weight_standardization_all.triton"]
    itself, watched, _ = alone_and_watched(gradients_of(forward), *filters())
    assert_same(itself, watched)


def test_all_weights_under_autocast():
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        itself, watched, _ = alone_and_watched(
            gradients_of(lambda *w: weight_standardization_all(w)), *filters()
        )
    assert_same(itself, watched)
    assert itself[0].dtype == torch.bfloat16


@pytest.mark.parametrize("used", [[0], [2, 1]])
def test_some_weights_of_all(used):
    def run(*weights: Tensor) -> list[Tensor]:
        leaves = [w.detach().clone().requires_grad_() for w in weights]
        results = weight_standardization_all(leaves)
        loss = sum(results[number].sin().sum() for number in used)
        return list(torch.autograd.grad(loss, leaves))

    itself, watched, _ = alone_and_watched(run, *filters())
    for a, b in zip(itself, watched, strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_of_all_weights():
    def run(*weights: Tensor) -> list[Tensor]:
        leaves = [w.detach().clone().requires_grad_() for w in weights]
        loss = sum(r.sin().sum() for r in weight_standardization_all(leaves)[:2])
        first = torch.autograd.grad(loss, leaves[:2], create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves[:2])]

    itself, watched, _ = alone_and_watched(run, *filters())
    for a, b in zip(itself, watched, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_all_weights_in_batches():
    leaves = [w.requires_grad_() for w in filters()]
    results = weight_standardization_all(leaves)
    grads = [torch.randn(2, *r.shape, device=DEVICE) for r in results]
    batched = torch.autograd.grad(results, leaves, grads, is_grads_batched=True, retain_graph=True)
    for number in range(2):
        single = torch.autograd.grad(results, leaves, [g[number] for g in grads], retain_graph=True)
        for b, s in zip(batched, single, strict=True):
            torch.testing.assert_close(b[number], s, rtol=1e-4, atol=1e-4)


WEIGHTS = {
    "two dtypes": lambda: [*filters(), *filters(torch.bfloat16)],
    "not dense": lambda: [*filters(), torch.randn(4, 8, 3, 6, device=DEVICE)[..., ::2]],
    "misaligned": lambda: [shifted(w) for w in filters()],
    "negative": lambda: [torch._neg_view(w) for w in filters()],
    "none": lambda: [],
    "a subclass": lambda: [w.as_subclass(Watched) for w in filters()],
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_odd_weights(name):
    weights = WEIGHTS[name]()
    itself, watched, _ = alone_and_watched(lambda: weight_standardization_all(weights))
    for a, b in zip(itself, watched, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def test_a_bad_weight_is_named():
    with pytest.raises(ValueError, match=r"weights\[1\] must have shape"):
        weight_standardization_all([filters()[0], torch.ones(3, device=DEVICE)])
    with pytest.raises(TypeError, match=r"weights\[1\] must be a torch\.Tensor"):
        weight_standardization_all([filters()[0], None])


def test_updated_weights_are_standardized_anew():
    weights = filters()
    first = [r.clone() for r in weight_standardization_all(weights)]
    weights[0].mul_(-1)
    second = weight_standardization_all(weights)
    torch.testing.assert_close(second[0], -first[0])
