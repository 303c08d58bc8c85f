"""A bitfast model beside the transformers model that it must equal, and images to run both on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import bitfast.modeling
from bitfast.configuration import BitConfig
from tests.tolerances import relative_error
from tests.weight_changes import move_weights

CLASSES = ["BitModel", "BitForImageClassification", "BitBackbone"]
LAYER_TYPES = ["preactivation", "bottleneck"]
SMALL: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [16, 32, 48, 64],
    "depths": [1, 2, 1, 1],
    "num_groups": 4,
    "num_labels": 5,
}
DPT_HYBRID: dict[str, Any] = {
    "layer_type": "bottleneck",
    "global_padding": "same",
    "embedding_dynamic_padding": True,
    "depths": [3, 4, 9],
    "out_features": ["stage1", "stage2", "stage3"],
}
RELATIVE = 1e-5
"""How far bitfast may be from float64 in float32 if transformers is not: norm of the difference over norm."""
RELATIVE_FLOAT64 = 1e-11
"""How far the two may be apart where both compute in float64: 1e-5 divided by the ratio of the two types'
roundings, 5e8, and rounded up by a few hundred. What differs in meaning, if only in one pixel of the border,
exceeds it."""


def our_model(name: str, **settings: Any) -> Any:
    return getattr(bitfast.modeling, name)(BitConfig(**{**SMALL, **settings}))


def their_model(name: str, **settings: Any) -> Any:
    config = transformers.BitConfig(**copy.deepcopy({**SMALL, **settings}))
    return getattr(transformers, name)(config)


def pair(name: str, **settings: Any) -> tuple[Any, Any]:
    """Return our model and theirs, in training mode, with equal weights none of which is 0 or 1."""
    ours, theirs = our_model(name, **settings), their_model(name, **settings)
    move_weights(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def flatten(value: Any) -> list[Tensor]:
    """Return the tensors of an output, a tuple or a tensor, in order."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for item in values for tensor in flatten(item)]


def assert_close(
    actual: Any, expected: Any, bound: float = RELATIVE_FLOAT64, what: str = ""
) -> None:
    """Hold every tensor of an output to a relative difference, norm over norm."""
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
    actual, expected = flatten(actual), flatten(expected)
    assert len(actual) == len(expected)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, f"{what} {number}"
        assert a.dtype == e.dtype, f"{what} {number}"
        error = relative_error(a.detach(), e.detach())
        assert error <= bound, f"{what} {number}: relative difference {error:.2e} > {bound:.0e}"


def assert_as_transformers(ours: nn.Module, theirs: nn.Module, run: Callable[[Any], Any]) -> None:
    """Hold what ``run`` makes of our float32 model to what it makes of theirs, in float32 and in float64.

    Args:
        ours: A model of bitfast.
        theirs: The model of transformers with the same weights.
        run: Returns the outputs or the gradients of a model, which may be in float64.
    """
    exact = run(copy.deepcopy(theirs).double())
    assert_close(run(copy.deepcopy(ours).double()), exact)
    assert_as_exact(run(ours), run(theirs), exact)


def assert_as_exact(actual: Any, plain: Any, exact: Any) -> None:
    """Hold float32 results to 1e-5 plus twice the error of transformers, all against float64.

    Some random weights amplify rounding, and gradients of scales and shifts are small sums of large terms:
    transformers is then 1e-5 and more away from float64 as well. Which tensor gets the largest error is
    chance, and so the root mean square over all of them is held; none may be lost, though.
    """
    if isinstance(exact, dict):
        assert list(actual) == list(plain) == list(exact)
    actual, plain, exact = flatten(actual), flatten(plain), flatten(exact)
    for a, p in zip(actual, plain, strict=True):
        assert a.shape == p.shape
        assert a.dtype == p.dtype
    errors, allowed = (
        torch.tensor(
            [relative_error(r.detach(), e.detach()) for r, e in zip(results, exact, strict=True)]
        )
        for results in (actual, plain)
    )
    bound = RELATIVE + 2 * allowed.square().mean().sqrt()
    error = errors.square().mean().sqrt()
    assert error <= bound, f"relative error {error:.2e} > {bound:.2e}"
    assert errors.max() <= 10 * bound, f"relative error {errors.max():.2e} > 10 x {bound:.2e}"


def gradients(model: nn.Module, objective: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Return the gradient of a model's scalar objective for each parameter that it depends on."""
    model.zero_grad()
    objective(model).backward()
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def concatenate(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


# ---- images without kinks -----------------------------------------------------------------------

REACH = 1e-5
"""How far rounding may move a pre-activation of float32: they are of size 1, and hidden states of the two
implementations agree to 3e-6."""


def images_without_kinks(exact: nn.Module, *shape: int) -> Tensor:
    """Draw images on which no ReLU and no max-pool of a float64 transformers model is near its kink.

    Rounding can carry a pre-activation across zero, or make another pixel a window's largest. Outputs hardly
    move then, but a gradient jumps by a whole pixel's share (1e-2 of a small model's): two correct float32
    implementations differ by that now and then. So gradients are compared where it cannot happen.
    """
    for _ in range(100):
        images = torch.randn(shape)
        with recorded_margins(exact) as margins, torch.no_grad():
            exact(images.double())
        if min(margins) > REACH:
            return images
    raise AssertionError("no images without kinks: the model is too large for this method")


@contextmanager
def recorded_margins(model: nn.Module) -> Iterator[list[float]]:
    """Collect, while the model runs, each kinked function's distance to its nearest kink."""
    margins: list[float] = [float("inf")]

    def at_relu(_: nn.Module, inputs: tuple[Tensor]) -> None:
        margins.append(float(inputs[0].abs().min()))

    def at_pool(module: Any, inputs: tuple[Tensor]) -> None:
        windows = module.pad(inputs[0]).unfold(2, 3, 2).unfold(3, 3, 2).flatten(4)
        largest = windows.topk(2).values
        gaps = largest[..., 0] - largest[..., 1]
        gaps = gaps[gaps > 0]  # equal pixels are equal zeros, of which both take the first
        if gaps.numel():
            margins.append(float(gaps.min()))

    kinked = (nn.ReLU, nn.SELU)
    handles = [
        module.register_forward_pre_hook(at_relu if isinstance(module, kinked) else at_pool)
        for module in model.modules()
        if isinstance(module, (*kinked, nn.MaxPool2d))
    ]
    try:
        yield margins
    finally:
        for handle in handles:
            handle.remove()
