"""Training with each block as one node: what is kept may be recomputed or lie elsewhere, and is freed."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import checkpoint

from bitfast.ops import residual_block
from tests.model_pairs import CLASSES
from tests.threads import torch_threads
from tests.training_models import (
    BLOCKS,
    KINDS,
    SOME,
    Watch,
    assert_same,
    counted_nodes,
    gradients,
    gradients_of,
    images,
    models,
    objective,
)


@pytest.fixture(params=SOME)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


# ---- activations that are recomputed, or kept elsewhere --------------------------------------------------


def save_convolutions(_: Any, operator: Any, *__: Any, **___: Any) -> checkpoint.CheckpointPolicy:
    policies = checkpoint.CheckpointPolicy
    return policies.MUST_SAVE if "conv" in str(operator) else policies.PREFER_RECOMPUTE


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "not reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {
        "use_reentrant": False,
        "context_fn": partial(checkpoint.create_selective_checkpoint_contexts, save_convolutions),
    },
}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Hold float32 results to each other, but for rounding, which some weights amplify."""
    largest = max(each.norm() for each in expected.values())
    for name, wanted in expected.items():
        assert (actual[name] - wanted).norm() <= 1e-3 * (wanted.norm() + largest), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_change_no_bit(kind, dtype):
    with torch_threads(1):
        for name in CLASSES:
            model, _ = models(kind, name, dtype)
            x = images(dtype=dtype)
            expected = gradients(model, objective(x))
            for way, options in CHECKPOINTS.items():
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
                with counted_nodes() as passes:
                    actual = gradients(model, objective(x))
                assert passes.backward == BLOCKS, way
                assert passes.forward == (BLOCKS if way == "reentrant" else 2 * BLOCKS), way
                if (
                    way == "selective" and dtype == torch.float32
                ):  # other kernels, where a mode looks on
                    assert_near(actual, expected)
                else:
                    assert_same(actual, expected, way)
                loss = objective(x)(model)
                model.zero_grad()
                with Watch():
                    loss.backward()
                assert_near(gradients_of(model), expected)
                with torch.autocast("cpu", torch.bfloat16):
                    gradients(model, objective(x))
                model.gradient_checkpointing_disable()


def test_a_checkpoint_around_the_whole_model(kind):
    model, _ = models(kind, "BitModel", torch.float32)
    x = images(dtype=torch.float32)
    expected = gradients(model, objective(x))

    def recomputed(images: Tensor) -> Any:
        return checkpoint.checkpoint(model, images, use_reentrant=False)

    model.zero_grad()
    objective(x)(recomputed).backward()  # type: ignore[arg-type]
    assert_same(gradients_of(model), expected)


def test_hooks_of_saved_tensors(kind):
    """Each is packed once and unpacked once, and may come back from elsewhere."""
    model, _ = models(kind, dtype=torch.float32)
    x = images(dtype=torch.float32)
    expected = gradients(model, objective(x))
    counts = [0, 0]

    def pack(tensor: Tensor) -> Tensor:
        counts[0] += 1
        return tensor.clone()

    def unpack(tensor: Tensor) -> Tensor:
        counts[1] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert_same(gradients(model, objective(x)), expected)
    assert counts[0] == counts[1] > 0
    with torch.autograd.graph.save_on_cpu():
        assert_same(gradients(model, objective(x)), expected)
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_same(gradients(model, objective(x)), expected)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        loss = objective(x)(model)
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        model.zero_grad()
        loss.backward()
    for name, wanted in expected.items():
        torch.testing.assert_close(gradients_of(model)[name], wanted, rtol=1e-3, atol=1e-4)
    model.load_state_dict(before)


# ---- memory ------------------------------------------------------------------------------------


def test_nodes_are_freed_without_the_garbage_collector(kind, monkeypatch):
    model, _ = models(kind, "BitModel", torch.float32)
    x = images(dtype=torch.float32)
    nodes: list[weakref.ref[Any]] = []
    forward = residual_block._ResidualBlock.forward

    def noted(ctx: Any, *arguments: Any) -> Any:
        nodes.append(weakref.ref(ctx))
        return forward(ctx, *arguments)

    monkeypatch.setattr(residual_block._ResidualBlock, "forward", staticmethod(noted))
    gc.collect()
    gc.disable()
    try:
        output = model(x, output_hidden_states=True)
        output.pooler_output.sum().backward()
        del output
        model(x)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf).pooler_output.sum(), leaf, create_graph=True)
        first.square().sum().backward()
        del first, leaf
        model.gradient_checkpointing_enable()
        model(x).pooler_output.sum().backward()
        assert len(nodes) == 5 * BLOCKS
        assert not any(node() is not None for node in nodes)
    finally:
        gc.enable()
