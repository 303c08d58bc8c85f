"""Training: losses, gradients, drop path and gradient checkpointing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bitfast.blocks import BitBottleneckLayer, BitPreActivationBottleneckLayer
from bitfast.execution import nodes
from bitfast.layers import DropPath
from bitfast.ops.residual_block import residual_block
from tests.model_pairs import (
    CLASSES,
    LAYER_TYPES,
    RELATIVE_FLOAT64,
    assert_as_transformers,
    assert_close,
    concatenate,
    flatten,
    gradients,
    our_model,
    pair,
)
from tests.threads import torch_threads
from tests.tolerances import relative_error

# ---- losses -------------------------------------------------------------------------------------

LOSSES: dict[str, tuple[dict[str, Any], Any]] = {
    "single label": ({}, lambda n: torch.randint(5, (n,))),
    "single label, int32": ({}, lambda n: torch.randint(5, (n,), dtype=torch.int32)),
    "single label, a column": ({}, lambda n: torch.randint(5, (n, 1))),
    "single label, by name": (
        {"problem_type": "single_label_classification"},
        lambda n: torch.randint(5, (n,)),
    ),
    "soft labels": (
        {"problem_type": "multi_label_classification"},
        lambda n: torch.rand(n, 5, dtype=torch.float64),
    ),
    "multi label": ({}, lambda n: torch.randint(2, (n, 5)).double()),
    "multi label, by name": (
        {"problem_type": "multi_label_classification"},
        lambda n: torch.randint(2, (n, 5)).double(),
    ),
    "regression": ({"num_labels": 1}, lambda n: torch.randn(n, dtype=torch.float64)),
    "regression, a column": ({"num_labels": 1}, lambda n: torch.randn(n, 1, dtype=torch.float64)),
    "regression of five": (
        {"problem_type": "regression"},
        lambda n: torch.randn(n, 5, dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", LOSSES)
def test_losses_equal_transformers(case, batch):
    changes, make_labels = LOSSES[case]
    ours, theirs = (model.double() for model in pair("BitForImageClassification", **changes))
    images = torch.randn(batch, 3, 33, 47, dtype=torch.float64)
    labels = make_labels(batch)
    if labels.dtype == torch.int32:  # torch's cross entropy takes int64 only, in both
        for model in (ours, theirs):
            with pytest.raises(RuntimeError):
                model(images, labels)
        return
    actual, expected = ours(images, labels), theirs(images, labels)
    assert actual.loss.shape == ()
    assert_close(actual, expected, RELATIVE_FLOAT64)
    assert_close(
        ours(images, labels, return_dict=False),
        theirs(images, labels, return_dict=False),
        RELATIVE_FLOAT64,
    )
    our_gradients, their_gradients = (
        gradients(m, lambda m: m(images, labels).loss) for m in (ours, theirs)
    )
    assert_close(concatenate(our_gradients), concatenate(their_gradients), RELATIVE_FLOAT64)


def test_the_kind_of_loss_is_chosen_anew_for_each_call():
    # transformers writes the first choice into the configuration, where it is saved with the model.
    model = our_model("BitForImageClassification")
    images = torch.randn(2, 3, 32, 32)
    logits = model(images).logits
    single, multi = torch.tensor([1, 2]), torch.rand(2, 5)
    loss = nn.functional.cross_entropy(logits, single)
    assert torch.equal(model(images, single).loss, loss)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, multi)
    assert torch.equal(model(images, multi).loss, loss)
    assert model.config.problem_type is None


def test_without_labels_there_is_no_loss():
    model = our_model("BitForImageClassification", num_labels=0)
    output = model(torch.randn(2, 3, 32, 32))
    assert output.loss is None
    assert list(output) == ["logits"]
    assert output.logits.shape == (2, 64)


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_gradients_reach_the_images(layer_type):
    ours, theirs = (m.double() for m in pair("BitForImageClassification", layer_type=layer_type))
    images = torch.randn(2, 3, 33, 47, dtype=torch.float64, requires_grad=True)
    actual, expected = (
        torch.autograd.grad(m(images).logits.square().sum(), images) for m in (ours, theirs)
    )
    assert_close(actual, expected, RELATIVE_FLOAT64)


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_a_few_steps_of_sgd_equal_transformers(layer_type):
    ours, theirs = (m.double() for m in pair("BitForImageClassification", layer_type=layer_type))
    images = torch.randn(4, 3, 33, 47, dtype=torch.float64)
    labels = torch.randint(5, (4,))
    losses: list[list[Tensor]] = [[], []]
    for model, history in zip((ours, theirs), losses, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(images, labels).loss
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
    # A step multiplies a difference by the loss's curvature: allow ten per step.
    assert_close(losses[0], losses[1], 1e5 * RELATIVE_FLOAT64)
    assert losses[0][-1] < losses[0][0]


# ---- drop path ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("rate", [0.2, 0.9])
def test_drop_path_equals_transformers_with_equal_seeds(rate, layer_type, seed):
    ours, theirs = pair("BitForImageClassification", layer_type=layer_type, drop_path_rate=rate)
    images = torch.randn(8, 3, 33, 47)
    labels = torch.randint(5, (8,))

    def run(model):
        torch.manual_seed(seed)
        return model(images.to(model.dtype), labels=labels, output_hidden_states=True)

    assert_as_transformers(ours, theirs, run)
    ours.double(), theirs.double()
    actual, expected = (gradients(m, lambda m: run(m).loss) for m in (ours, theirs))
    for name in expected:
        # All images of a block may be dropped; then its gradients are zeros.
        assert (actual[name] - expected[name]).norm() <= RELATIVE_FLOAT64 * concatenate(
            expected
        ).norm(), name
    trained = run(ours).logits
    assert_close(ours.eval()(images.double()), theirs.eval()(images.double()), RELATIVE_FLOAT64)
    assert relative_error(trained.detach(), ours(images.double()).logits.detach()) > 1e-3


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    layer = DropPath(0.3).train()
    x = torch.ones(20_000, 1, 2, 2)
    y = layer(x)
    flat = y.flatten(1)
    assert torch.equal(flat, flat[:, :1].expand(-1, 4))
    kept = flat[:, 0] != 0
    torch.testing.assert_close(flat[kept], torch.full_like(flat[kept], 1 / 0.7))
    assert abs(kept.float().mean() - 0.7) < 5 * (0.7 * 0.3 / 20_000) ** 0.5
    assert layer.eval()(x) is x
    assert DropPath(0.0).train()(x) is x
    assert "p=0.3" in repr(layer)


# ---- gradient checkpointing ---------------------------------------------------------------------


@pytest.fixture(params=[1, 2])
def threads(request):
    """Run with so many threads: PyTorch's convolutions are others with one than with more."""
    with torch_threads(request.param):
        yield request.param


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("options", [None, {"use_reentrant": True}])
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_gradient_checkpointing_changes_no_number(name, layer_type, options, seed):
    model = our_model(name, layer_type=layer_type, drop_path_rate=0.5)
    images = torch.randn(4, 3, 33, 47)

    def objective(model):
        torch.manual_seed(seed)
        return sum(value.square().mean() for value in flatten(model(images)))

    def run():
        loss = objective(model)
        return loss.detach(), gradients(model, objective)

    loss, expected = run()
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    assert model.is_gradient_checkpointing
    with counted_blocks() as calls:
        again, actual = run()
    blocks = sum(1 for _ in blocks_of(model))
    assert (
        len(calls) == 3 * blocks
    )  # one forward alone; one forward with a backward, which repeats it
    assert torch.equal(again, loss)
    assert list(actual) == list(expected)
    for key in expected:
        assert torch.equal(actual[key], expected[key]), key
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    with counted_blocks() as calls:
        run()
    assert len(calls) == 2 * blocks


def test_gradient_checkpointing_rests_in_evaluation():
    model = our_model("BitModel").eval()
    model.gradient_checkpointing_enable()
    with counted_blocks() as calls:
        model(torch.randn(1, 3, 32, 32)).pooler_output.sum().backward()
    assert len(calls) == sum(1 for _ in blocks_of(model))


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    kinds = (BitBottleneckLayer, BitPreActivationBottleneckLayer)
    return (module for module in model.modules() if isinstance(module, kinds))


@contextmanager
def counted_blocks() -> Iterator[list[Any]]:
    """Collect the forms of the blocks that are computed. With a hook, a block would be called as written."""
    calls: list[Any] = []

    def noted(form: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(form)
        return residual_block(form, *arguments, **options)

    with patch.object(nodes, "residual_block", noted):
        yield calls


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, beside the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(images)
    total = sum(kept.values())
    del output
    return total


R50X1 = {
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
    "num_groups": 32,
}


def test_gradient_checkpointing_saves_fewer_bytes():
    model = our_model("BitForImageClassification", **R50X1)
    images = torch.randn(2, 3, 128, 128)
    everything = saved_bytes(model, images)
    model.gradient_checkpointing_enable()
    checkpointed = saved_bytes(model, images)
    print(f"saved for the backward pass: {everything / 1e6:.1f} MB, {checkpointed / 1e6:.1f} MB")
    assert checkpointed < everything / 5


def test_gradient_checkpointing_lowers_the_peak_of_a_training_step():
    model = our_model("BitForImageClassification", **R50X1)
    images, labels = torch.randn(2, 3, 128, 128), torch.tensor([0, 1])

    def step():
        model(images, labels).loss.backward()

    step()  # so that the gradients' own memory is there before and after
    everything = peak_bytes(step)
    model.gradient_checkpointing_enable()
    checkpointed = peak_bytes(step)
    print(f"peak of a step: {everything / 1e6:.1f} MB, {checkpointed / 1e6:.1f} MB")
    assert checkpointed < everything / 2


def peak_bytes(run: Callable[[], None]) -> int:
    """Return the most bytes that a call had allocated at once, by what the allocator reports."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(nbytes for _, nbytes in changes))
