"""Training with each block as one node, in the many ways in which torch lets people train."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode

import bitfast
from tests.threads import in_threads, torch_threads
from tests.training_models import (
    BLOCKS,
    KINDS,
    PATHS,
    SOME,
    Watch,
    assert_alike,
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


# ---- hooks ------------------------------------------------------------------------------------------------


def hook_forward(module: nn.Module, seen: list[Tensor]) -> None:
    def hook(_: Any, __: Any, result: Tensor) -> Tensor:
        seen.append(result.detach())
        return result * 1.1

    module.register_forward_hook(hook)


def hook_before(module: nn.Module, seen: list[Tensor]) -> None:
    def hook(_: Any, inputs: tuple[Tensor]) -> Tensor:
        seen.append(inputs[0].detach())
        return inputs[0] * 1.1

    module.register_forward_pre_hook(hook)


def hook_backward(module: nn.Module, seen: list[Tensor]) -> None:
    def hook(_: Any, of_inputs: tuple[Tensor], of_results: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(of_results[0].detach())
        return (of_inputs[0] * 1.1,)

    module.register_full_backward_hook(hook)


@pytest.mark.parametrize("hook", [hook_forward, hook_before, hook_backward])
@pytest.mark.parametrize("path", PATHS)
def test_hooks_of_modules(kind, path, hook):
    found = []
    x = images()
    for model in models(kind):
        gradients(model, objective(x))  # so that the network has been read
        seen: list[Tensor] = []
        hook(model.get_submodule(path), seen)
        found.append(gradients(model, objective(x)))
        assert seen
        found[-1] |= {f"seen {n}": each for n, each in enumerate(seen)}
    assert_alike(*found)


def test_hooks_of_parameters(kind):
    found = []
    x = images()
    for model in models(kind):
        seen: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():

            def note(p: Tensor, name: str = name, seen: dict[str, Tensor] = seen) -> None:
                assert p.grad is not None
                seen[f"{name}, accumulated"] = p.grad.clone()

            parameter.register_hook(lambda g: 1.5 * g)
            parameter.register_post_accumulate_grad_hook(note)
        result = gradients(model, objective(x))
        found.append({**result, **{f"{n}, accumulated": seen[f"{n}, accumulated"] for n in result}})
    assert_alike(*found)


def test_weights_that_change_during_the_backward_pass(kind):
    """As soon as a weight has its gradient, as who saves the gradients' memory does it."""
    found = []
    x = images()

    @torch.no_grad()
    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.sub_(1e-3 * parameter.grad)
        parameter.grad = None

    for model in models(kind):
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            objective(x)(model).backward()
        found.append({n: p.detach() for n, p in model.named_parameters()})
    assert_alike(*found)


# ---- several backward passes, and changes between ---------------------------------------------------------


def test_backward_twice(kind):
    model, _ = models(kind, dtype=torch.float32)
    parameters = list(model.parameters())
    loss = objective(images(dtype=torch.float32))(model)
    first, second = (
        torch.autograd.grad(loss, parameters, retain_graph=True, create_graph=creates)
        for creates in (False, True)
    )
    third = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, third))
    for a, b in zip(first, second, strict=True):
        assert (a - b).norm() <= 1e-3 * (a.norm() + 1)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("part", ["norm1.weight", "norm2.weight", "conv2.weight", "conv3.weight"])
def test_a_weight_that_has_changed_since(kind, part):
    for dtype in (torch.float32, torch.float64):
        model, _ = models(kind, dtype=dtype)
        loss = objective(images(dtype=dtype))(model)
        with torch.no_grad():
            model.get_parameter(f"bit.encoder.stages.1.layers.0.{part}").mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_hidden_state_that_has_changed_since(kind):
    """Never a wrong gradient: the change is noticed, or what is kept is another tensor."""
    for dtype in (torch.float32, torch.float64):
        for number in range(4):
            model, _ = models(kind, "BitModel", dtype)
            x = images(dtype=dtype)
            found = []
            for factor in (1, 2):
                torch.manual_seed(0)
                output = model(x, output_hidden_states=True)
                model.zero_grad()
                if factor == 2:
                    with torch.no_grad():
                        output.hidden_states[number].mul_(factor)
                noticed = pytest.raises(RuntimeError, match="modified by an inplace operation")
                if factor == 2 and dtype == torch.float64:  # there the hidden state itself is kept
                    with noticed:
                        output.pooler_output.square().sum().backward()
                    continue
                output.pooler_output.square().sum().backward()
                found.append(gradients_of(model))
            if len(found) == 2:  # a copy in another layout is
                assert_same(*found)


# ---- derivatives of derivatives ---------------------------------------------------------------------------


def products(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return first derivatives and products with the Hessian, of the images and whatever is trained."""
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    first = torch.autograd.grad(objective(x)(model), leaves, create_graph=True)
    directions = [leaf.detach().cos() for leaf in leaves]
    second = torch.autograd.grad(first, leaves, directions, allow_unused=True)
    return {str(n): each for n, each in enumerate([*first, *second]) if each is not None}


def in_batches(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    torch.manual_seed(0)
    logits = model(x).logits
    grads = torch.stack([logits.detach().cos() * n for n in range(1, 4)])
    found = torch.autograd.grad(logits, leaves, grads, is_grads_batched=True)
    return {str(n): each for n, each in enumerate(found)}


@pytest.mark.parametrize("way", [products, in_batches])
@pytest.mark.parametrize("kind", KINDS)
def test_higher_derivatives(kind, way):
    ours, theirs = models(kind)
    x = images().requires_grad_()
    for frozen in ("nothing", "stages.1", "norm1"):
        for model in (ours, theirs):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(frozen not in name)
        assert_alike(way(ours, x), way(theirs, x), frozen)


def test_a_step_that_is_differentiated(kind):
    """As in meta-learning: through weights that are no parameters."""
    found = []
    x = images()
    for model in models(kind):
        weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}

        def loss(weights: dict[str, Tensor], model: nn.Module = model) -> Tensor:
            return objective(x)(lambda images: functional_call(model, weights, (images,)))  # type: ignore[arg-type]

        first = torch.autograd.grad(loss(weights), list(weights.values()), create_graph=True)
        moved = {n: w - 1e-4 * g for (n, w), g in zip(weights.items(), first, strict=True)}
        with counted_nodes() as passes:
            result = torch.autograd.grad(loss(moved), list(weights.values()))
        assert passes.forward == (0 if found else BLOCKS)
        found.append(dict(zip(weights, result, strict=True)))
    assert_alike(*found)


# ---- unusual weights and tensors ---------------------------------------------------------------------------


class Bent(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.sin()


@pytest.mark.parametrize("part", ["conv2", "norm2", "conv3"])
def test_parametrized_weights(kind, part):
    ways: list[Callable[[nn.Module], Any]] = [
        lambda m: parametrize.register_parametrization(m, "weight", Bent())
    ]
    if "conv" in part:
        ways += [parametrizations.weight_norm, parametrizations.spectral_norm]
    x = images()
    for change in ways:
        found = []
        for model in models(kind):
            torch.manual_seed(0)
            change(model.get_submodule(f"bit.encoder.stages.1.layers.0.{part}"))
            found.append(gradients(model, objective(x)))
        assert_alike(*found)


class Seen(Tensor):
    """Tells of each function that is called."""

    functions: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        cls.functions.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


class Follow(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


def test_subclasses_and_modes(kind):
    ours, theirs = models(kind)
    x = images()
    expected = gradients(theirs, objective(x))
    for mode in (Watch, Follow):
        with mode():
            actual = gradients(ours, objective(x))
        assert_alike(actual, expected, mode.__name__)
    Seen.functions.clear()
    seen = objective(x.as_subclass(Seen))
    assert_alike(gradients(ours, lambda m: seen(m).as_subclass(Tensor)), expected)
    assert torch.conv2d in Seen.functions  # type: ignore[comparison-overlap]
    norm = ours.get_submodule("bit.encoder.stages.1.layers.0.norm2")
    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(Seen))
    name = "bit.encoder.stages.1.layers.0.norm2.weight"
    actual = gradients(ours, objective(x))
    actual[name] = actual[name].as_subclass(Tensor)
    assert_alike(actual, expected)


def test_other_devices(kind):
    with torch.device("meta"):
        model, _ = models(kind, dtype=torch.float32)
        objective(images(dtype=torch.float32))(model).backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.bit.parameters())
    model, _ = models(kind, dtype=torch.float32)
    x = images(dtype=torch.float32)
    expected = gradients(model, objective(x))
    loss = objective(x)(model)
    model.zero_grad()
    with torch.device("meta"):  # of new tensors
        loss.backward()
    assert_same(gradients_of(model), expected)


def test_inference_mode(kind):
    for name in ("BitForImageClassification", "BitModel"):
        model, _ = models(kind, name, torch.float32)
        x = images(dtype=torch.float32)
        expected = gradients(model, objective(x))
        with torch.inference_mode():
            inferred = objective(x)(model)
        with torch.no_grad():
            plain = objective(x)(model)
        assert torch.equal(inferred, plain)
        assert torch.equal(plain, objective(x)(model).detach())
        assert_same(gradients(model, objective(x)), expected)
    with torch.inference_mode():
        model, _ = models(kind, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="Inference tensors"):
        gradients(model, objective(x))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_forward_and_backward_by_different_backends(kind, backend):
    """Which one is demanded counts when it is demanded."""
    ours, theirs = models(kind, dtype=torch.float32)
    exact = copy.deepcopy(theirs).double()
    x = images(4, 24, 24, dtype=torch.float32)
    if "drop" in kind:
        for model in (ours, exact):
            for module in model.modules():
                if hasattr(module, "drop_prob"):
                    module.drop_prob = 0.0
    expected = gradients(exact, objective(x.double()))
    demand = {"group_norm_act": backend, "weight_standardization": backend}
    for inside in ("forward", "backward", "both"):
        ours.zero_grad()
        if inside == "backward":
            loss = objective(x)(ours)
            with bitfast.use_backend(**demand):
                loss.backward()
        else:
            with bitfast.use_backend(**demand):
                loss = objective(x)(ours)
                if inside == "both":
                    loss.backward()
            if inside == "forward":
                loss.backward()
        for name, wanted in expected.items():
            error = (gradients_of(ours)[name] - wanted).norm()
            assert error <= 1e-3 * (wanted.norm() + 1), f"{inside} {name}"


# ---- copies and threads --------------------------------------------------------------------------------------


def replica(model: nn.Module) -> nn.Module:
    """Return what DataParallel makes of a model for another GPU: modules with tensors for parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, other in copies.items():
        for name, child in module._modules.items():
            if child is not None:
                other._modules[name] = copies[child]
        for name, parameter in module._parameters.items():
            other._parameters.pop(name, None)
            vars(other)[name] = None if parameter is None else parameter.clone()
    return copies[model]


def test_copies(kind):
    model, _ = models(kind, dtype=torch.float32)
    x = images(dtype=torch.float32)
    expected = gradients(model, objective(x))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):
        assert_same(gradients(other, objective(x)), expected)
    model.zero_grad()
    with counted_nodes() as passes:
        objective(x)(replica(model)).backward()
    assert passes.backward == BLOCKS
    assert_same(gradients_of(model), expected)


def test_threads():
    """Two train a model each; and four compute gradients of one."""
    model, _ = models("bottleneck", dtype=torch.float32)
    inputs = [images(dtype=torch.float32) for _ in range(4)]

    def of_one(x: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(model(x).logits.square().sum(), list(model.parameters())))

    def train(model: nn.Module, x: Tensor) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).logits.square().sum().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    with torch_threads(1):
        expected = list(map(of_one, inputs))
        trained = [train(copy.deepcopy(model), x) for x in inputs[:2]]
        found: dict[int, list[Tensor]] = {}

        def work(number: int) -> None:
            torch.set_num_threads(1)
            for _ in range(3):
                found[number] = of_one(inputs[number])

        in_threads(work, 4)
        for number, wanted in enumerate(expected):
            assert all(map(torch.equal, found[number], wanted))
        copies = [copy.deepcopy(model) for _ in range(2)]

        def work_alone(number: int) -> None:
            torch.set_num_threads(1)
            found[number] = train(copies[number], inputs[number])

        in_threads(work_alone, 2)
        for number, wanted in enumerate(trained):
            assert all(map(torch.equal, found[number], wanted))
