"""Where somebody has to do with a module, what is around it is called, and the rest is read as steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune

from bitfast.execution.steps import (
    CallModule,
)
from bitfast.layers import DropPath
from bitfast.network import BitEmbeddings, BitEncoder, BitStage
from tests.network_steps import (
    blocks,
    calls,
    hook,
    model_of,
    read,
    steps,
)

# ---- who has to do with a module ------------------------------------------------------------------------


def hook_before(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda *_: None)


def hook_backward(module: nn.Module) -> None:
    module.register_full_backward_hook(lambda *_: None)


def hook_before_backward(module: nn.Module) -> None:
    module.register_full_backward_pre_hook(lambda *_: None)


def replace_forward(module: nn.Module) -> None:
    module.forward = lambda *inputs: type(module).forward(module, *inputs)  # type: ignore[method-assign]


def make_subclass(module: nn.Module) -> None:
    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        return super(type(module), self).forward(*inputs, **options)

    module.__class__ = type("Mine", (type(module),), {"forward": forward})


def compile_alone(module: nn.Module) -> None:
    module.compile(backend="eager")


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


WAYS = [
    hook,
    hook_before,
    hook_backward,
    hook_before_backward,
    replace_forward,
    make_subclass,
    compile_alone,
    "wrap",
]


def part_around(path: str) -> str:
    """Return the path of what is called if somebody has to do with a module: a stem, stage, block or norm."""
    names = path.split(".")
    if names[0] in ("embedder", "norm"):
        return names[0]
    return ".".join(names[: min(len(names), 5)])


def paths(kind: str) -> list[str]:
    model = model_of(kind)
    around = {"", "encoder", "encoder.stages", "pooler"}
    containers = {f"encoder.stages.{n}.layers" for n in range(2)}
    return [path for path, _ in model.named_modules() if path not in around | containers]


@pytest.mark.parametrize("kind", ["preactivation", "dynamic pool", "gelu", "drop path"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: getattr(way, "__name__", way))
def test_only_the_part_around_a_watched_module_is_called(kind, way):
    for path in paths(kind):
        model = model_of(kind)
        module = model.get_submodule(path)
        if way == "wrap":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Wrapper(module))
        else:
            way(module)
        expected = model.get_submodule(part_around(path))
        assert calls(model) == [expected], path
        assert not steps(model).is_plannable()
        found = steps(model)
        # All the other parts are read as before.
        for before, now in zip(steps(model_of(kind)).blocks(), found.blocks(), strict=False):
            if not isinstance(now[0] if now else None, CallModule) and len(found.stages[0]) == 2:
                assert [type(step) for step in before] == [type(step) for step in now]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: getattr(way, "__name__", way))
def test_a_watched_encoder_is_called(way):
    model = model_of()
    if way == "wrap":
        model.encoder = Wrapper(model.encoder)
        assert not model.is_known()
        return
    way(model.encoder)
    assert not model.is_known() or read(model) is None


@pytest.fixture(params=["forward", "forward_pre", "full_backward", "full_backward_pre"])
def watched_process(request: Any) -> Iterator[None]:
    register = getattr(torch_module, f"register_module_{request.param}_hook")
    handle = register(lambda *_: None)
    yield
    handle.remove()


def test_hooks_of_the_whole_process_have_all_modules_called(watched_process):
    assert read(model_of()) is None


def test_torch_fx_sees_all_modules():
    seen: list[Any] = []

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, path: str) -> bool:
            return not isinstance(module, Reading)

    class Reading(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            seen.append(read(self.model))
            return x

    Tracer().trace(Reading(model_of()))
    assert seen == [None]


def doubled(module: nn.Module, name: str = "weight") -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(module, name, Doubled())


def two_groups(block: Any) -> None:
    block.conv2.groups = 2
    block.conv2.weight = nn.Parameter(torch.randn(8, 4, 3, 3))


OTHERS: dict[str, Callable[[Any], Any]] = {
    "a bias": lambda b: setattr(b.conv1, "bias", nn.Parameter(torch.ones(8))),
    "reflections": lambda b: setattr(b.conv2, "padding_mode", "reflect"),
    "groups": two_groups,
    "a named padding": lambda b: setattr(b.conv2, "padding", "same"),
    "a lent convolution": lambda b: b.conv2.mark_wrapped(),
    "no scale": lambda b: setattr(b.norm2, "weight", None),
    "no shift": lambda b: setattr(b.norm3, "bias", None),
    "another activation": lambda b: setattr(b.norm1, "activation", nn.Tanh()),
    "leaky": lambda b: setattr(b.norm1, "activation", nn.LeakyReLU()),
    "a subclass of an activation": lambda b: setattr(
        b.norm1, "activation", type("Mine", (nn.ReLU,), {})()
    ),
    "dropout for drop path": lambda b: setattr(b, "drop_path", nn.Dropout(0.1).eval()),
    "a norm on the shortcut": lambda b: setattr(b.downsample, "norm", nn.GroupNorm(2, 16)),
    "another shortcut": lambda b: setattr(b, "downsample", nn.Conv2d(8, 16, 1)),
    "a plain convolution": lambda b: setattr(b, "conv3", nn.Conv2d(8, 16, 1)),
    "a plain norm": lambda b: setattr(b, "norm2", nn.GroupNorm(2, 8)),
    "pruned": lambda b: prune.random_unstructured(b.conv2, "weight", amount=0.5),
    "weight norm": lambda b: parametrizations.weight_norm(b.conv2),
    "a parametrized scale": lambda b: doubled(b.norm2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_step_stands_for_is_called_or_computed_right(name):
    model = model_of().double()
    OTHERS[name](blocks(model)[0].double())
    model.double()
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    if name not in ("weight norm", "a parametrized scale"):  # which may be asked for
        assert calls(model)[:1] == [blocks(model)[0]]
    with torch.no_grad():
        expected = model.norm(model.encoder(model.embedder(x))[0])
        torch.testing.assert_close(model(x).last_hidden_state, expected, rtol=1e-9, atol=1e-9)


def test_idle_modules_in_the_place_of_others():
    model = model_of("drop path")
    block = blocks(model)[1]
    assert type(block.drop_path) is DropPath
    block.drop_path = nn.Identity()
    block.norm2.activation = nn.Identity()
    model.norm = nn.Identity()
    assert calls(model) == []
    found = steps(model)
    assert found.norm == ()
    assert found.result == found.outputs[-1]


@pytest.mark.parametrize("forwards", [True, False])
def test_subclasses_that_only_hold_more_are_read(forwards):
    class Block(type(blocks(model_of())[0])):  # type: ignore[misc]
        note = "mine"

        if forwards:

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x)

    model = model_of()
    blocks(model)[1].__class__ = Block
    assert calls(model) == ([blocks(model)[1]] if forwards else [])


@pytest.mark.parametrize(
    ("cls", "method"),
    [
        (BitEmbeddings, "forward"),
        (BitEmbeddings, "parts"),
        (BitStage, "forward"),
        (BitStage, "parts"),
        (BitEncoder, "forward"),
    ],
)
def test_subclasses_that_run_otherwise_are_called(cls, method):
    members = {method: lambda self, *inputs: getattr(super(type(self), self), method)(*inputs)}
    model = model_of()
    module = next(m for m in model.modules() if type(m) is cls)
    module.__class__ = type("Mine", (cls,), members)
    if cls is BitEncoder:
        assert not model.is_known()
    else:
        assert calls(model) == [module]


def test_stages_of_another_kind_are_called():
    model = model_of()
    model.encoder.stages[1] = nn.Sequential(model.encoder.stages[1])
    assert calls(model) == [model.encoder.stages[1]]
    model.encoder.stages[0].layers[1] = nn.Sequential(model.encoder.stages[0].layers[1])
    assert calls(model) == [model.encoder.stages[0].layers[1], model.encoder.stages[1]]
    assert steps(model).calls_none_from(2)
    assert not steps(model).calls_none_from(1)
    assert not steps(model).calls_none_from(0)


def test_blocks_that_are_recomputed_are_called_with_their_options():
    model = model_of().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    found = [step for step in steps(model).all() if isinstance(step, CallModule)]
    assert [step.module for step in found] == blocks(model)
    assert [step.options for step in found] == [{"use_reentrant": True}] * 3
    model.eval()
    assert calls(model) == []
    model.train()
    model.gradient_checkpointing_disable()
    assert calls(model) == []


def test_a_stage_alone_that_is_recomputed():
    model = model_of().train()
    model.encoder.stages[1].gradient_checkpointing = True
    assert calls(model) == [blocks(model)[2]]
