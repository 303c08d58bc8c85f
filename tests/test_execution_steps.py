"""What is read of a network: its steps, and the modules that are called as somebody has to do with them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune

import bitfast
from bitfast.backends import use_backend
from bitfast.execution import op_by_op
from bitfast.execution.steps import (
    IMAGES,
    Call,
    Convolve,
    Join,
    Normalize,
    Pool,
    Steps,
    Zeros,
    last_reads,
    normalized,
    reads_of,
    steps_of,
)
from bitfast.layers import DropPath, GroupNormActivation, WeightStandardizedConv2d
from bitfast.network import BitEmbeddings, BitEncoder, BitStage
from tests.foreign_models import timm_resnet
from tests.model_pairs import their_model
from tests.tiny_models import ours

DEPTHS = {"depths": [2, 1], "hidden_sizes": [16, 32]}
SETTINGS: dict[str, dict[str, Any]] = {
    "preactivation": {},
    "bottleneck": {"layer_type": "bottleneck"},
    "same": {"global_padding": "same"},
    "dynamic pool": {"global_padding": "same", "embedding_dynamic_padding": True},
    "valid": {"global_padding": "valid"},
    "valid bottleneck": {"global_padding": "valid", "layer_type": "bottleneck"},
    "drop path": {"drop_path_rate": 0.3},
    "gelu": {"hidden_act": "gelu", "layer_type": "bottleneck"},
    "gelu_new": {"hidden_act": "gelu_new"},
    "selu": {"hidden_act": "selu"},
    "dilated": {"output_stride": 8, "layer_type": "bottleneck"},
    "wide": {"width_factor": 2},
    "a stage of no blocks": {"depths": [1, 0], "hidden_sizes": [16, 16]},
}


def model_of(kind: str = "preactivation", **settings: Any) -> Any:
    return ours("BitModel", **{**DEPTHS, **SETTINGS[kind], **settings}).eval()


def read(model: Any) -> Steps | None:
    return steps_of(model.embedder, list(model.encoder.stages), model.norm, [model.encoder])


def steps(model: Any) -> Steps:
    result = read(model)
    assert result is not None
    return result


def calls(model: Any) -> list[nn.Module]:
    """The modules that are called."""
    return [step.module for step in steps(model).all() if isinstance(step, Call)]


def blocks(model: Any) -> list[Any]:
    return [block for stage in model.encoder.stages for block in stage.layers]


# ---- what is read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SETTINGS)
def test_each_module_of_a_network_is_read(kind):
    model = model_of(kind)
    found = steps(model)
    assert calls(model) == []
    assert found.unusual == ()
    modules = [m for part in (model.embedder, *model.encoder.stages) for m in part.modules()]
    assert set(found.read) == {*modules, *model.norm.modules(), model.encoder}
    convolutions = [m for m in model.modules() if isinstance(m, WeightStandardizedConv2d)]
    assert sorted(map(id, found.convolutions())) == sorted(map(id, convolutions))
    norms = {m for m in model.modules() if isinstance(m, GroupNormActivation)}
    assert {n for step in found.all() if (n := getattr(step, "norm", None)) is not None} == norms
    assert len(found.stages) == len(model.encoder.stages)
    assert len(found.outputs) == 1 + len(found.stages)
    assert found.is_plannable() == all(found.stages)


@pytest.mark.parametrize("kind", SETTINGS)
def test_values_are_made_once_and_before_they_are_read(kind):
    found = steps(model_of(kind))
    made = [IMAGES, *(step.result for step in found.all())]
    assert sorted(made) == list(range(found.values))
    there = {IMAGES}
    for step in found.all():
        assert {value for value in reads_of(step) if value >= 0} <= there
        there.add(step.result)
    assert {*found.outputs, found.result} <= there


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_steps_compute_what_the_modules_do(kind):
    model = model_of(kind).double()
    x = torch.randn(2, 3, 17, 17, dtype=torch.float64)
    found = steps(model)
    with torch.no_grad():
        hidden = [model.embedder(x)]
        for stage in model.encoder.stages:
            hidden.append(stage(hidden[-1]))
        expected = [*hidden, model.norm(hidden[-1])]
        outputs, result = op_by_op.run(found, x, {}, range(len(hidden)))
    for actual, wanted in zip([*outputs, result], expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


def test_the_stem_of_each_kind():
    def kinds(kind: str) -> list[type]:
        return [type(step) for step in steps(model_of(kind)).stem]

    assert kinds("preactivation") == [Convolve, Pool]
    assert kinds("bottleneck") == [Convolve, Zeros, Normalize, Pool]
    assert kinds("same") == kinds("dynamic pool") == [Convolve, Pool]
    assert kinds("dilated") == kinds("bottleneck")
    for kind, zeros in (("preactivation", 1), ("same", 0), ("bottleneck", 0)):
        pool = steps(model_of(kind)).stem[-1]
        assert isinstance(pool, Pool)
        assert pool.zeros == zeros


def test_zeros_add_up_and_others_are_left_to_the_module():
    model = model_of()
    pads = nn.ConstantPad2d(2, 0.0), nn.ZeroPad2d(3), nn.ConstantPad2d(0, 0.0)
    for pad in pads:
        model.embedder.pad = pad
        pool = steps(model).stem[-1]
        assert isinstance(pool, Pool)
        assert pool.zeros == pad.padding[0]
    for pad in (
        nn.ConstantPad2d(1, 1.0),
        nn.ConstantPad2d(-1, 0.0),
        nn.ConstantPad2d((1, 1, 1, 2), 0.0),
        nn.ReflectionPad2d(1),
        nn.ReLU(),
    ):
        model.embedder.pad = pad
        assert calls(model) == [model.embedder]


# ---- what reads a result next -----------------------------------------------------------------------


def test_sums_know_the_norm_that_reads_them_next():
    model = model_of()
    found = steps(model)
    first, second, third = blocks(model)
    sums = [s for s in found.all() if isinstance(s, Convolve) and s.shortcut is not None]
    assert [step.convolution for step in sums] == [first.conv3, second.conv3, third.conv3]
    assert [step.then for step in sums] == [second.norm1, third.norm1, model.norm]
    inner = [s for block in blocks(model) for s in (block.norm2, block.norm3)]
    assert [
        s.then
        for s in found.all()
        if isinstance(s, Convolve) and s.convolution in [m for b in blocks(model) for m in (b.conv1, b.conv2)]
    ] == inner  # fmt: skip
    others = [s for s in found.all() if isinstance(s, Convolve) and s.shortcut is None]
    for step in others:
        if step.convolution in (first.downsample.conv, third.downsample.conv):
            assert step.then is None


def test_then_is_the_norm_of_the_step_that_reads_the_result():
    for kind in SETTINGS:
        found = steps(model_of(kind))
        for number, step in enumerate(found.all()):
            then = getattr(step, "then", None)
            if then is not None:
                readers = [s for s in found.all()[number + 1 :] if s.source == step.result]
                assert readers
                assert {getattr(reader, "norm", None) for reader in readers} == {then}


def test_a_branch_that_may_be_left_smaller_is_added_by_itself():
    sums = [s for s in steps(model_of("valid")).all() if getattr(s, "shortcut", None) is not None]
    assert [step.then for step in sums] == [None] * 3  # type: ignore[union-attr]


def test_a_norm_that_is_called_is_not_announced():
    model = model_of()
    _first, second, third = blocks(model)

    def announced() -> list[Any]:
        found = steps(model).all()
        return [s.then for s in found if isinstance(s, Convolve) and s.shortcut is not None]

    handle = second.norm1.register_forward_hook(lambda *_: None)
    assert calls(model) == [second]
    assert announced() == [None, model.norm]
    handle.remove()
    model.norm.register_forward_hook(lambda *_: None)
    assert calls(model) == [model.norm]
    assert announced() == [second.norm1, third.norm1, None]
    third.conv2.register_forward_hook(lambda *_: None)
    assert announced() == [second.norm1, None]


def test_up_to_some_stage():
    model = model_of()
    found = steps(model)
    _first, second, third = blocks(model)

    def announced(part: Steps) -> list[Any]:
        return [s.then for s in part.all() if isinstance(s, Convolve) and s.shortcut is not None]

    whole = found.up_to(2, (), True)
    assert announced(whole) == announced(found) == [second.norm1, third.norm1, model.norm]
    assert (whole.outputs, whole.result, whole.norm) == (found.outputs, found.result, found.norm)
    unnormed = found.up_to(2, (), False)
    assert announced(unnormed) == [second.norm1, third.norm1, None]
    assert (unnormed.norm, unnormed.result) == ((), found.outputs[2])
    one = found.up_to(1, (), False)
    assert announced(one) == [second.norm1, None]
    assert (one.outputs, one.result) == (found.outputs[:2], found.outputs[1])
    assert set(one.convolutions()) == {
        m
        for part in (model.embedder, model.encoder.stages[0])
        for m in part.modules()
        if isinstance(m, WeightStandardizedConv2d)
    }
    stem = found.up_to(0, (), False)
    assert stem.all() == list(found.stem)
    assert (stem.outputs, stem.result) == (found.outputs[:1], found.outputs[0])
    assert announced(found.up_to(2, (1,), True)) == [second.norm1, None, model.norm]
    assert announced(found.up_to(2, (0, 1, 2), True)) == [second.norm1, None, None]
    assert announced(found) == [second.norm1, third.norm1, model.norm]


# ---- who reads a value last ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SETTINGS)
def test_last_reads(kind):
    found = steps(model_of(kind))
    sequence = found.all()
    kept = {found.outputs[-1], found.result}
    dead = last_reads(sequence, kept)
    assert len(dead) == len(sequence)
    assert not kept & {value for values in dead for value in values}
    for number, values in enumerate(dead):
        for value in values:
            assert value in reads_of(sequence[number])
            assert not any(value in reads_of(step) for step in sequence[number + 1 :])
    buried = [value for values in dead for value in values]
    assert len(buried) == len(set(buried))
    read = {value for step in sequence for value in reads_of(step)}
    assert set(buried) == read - kept


def test_what_a_step_reads():
    model = model_of()
    first = blocks(model)[0]
    assert reads_of(Convolve(3, None, first.conv1, 4)) == (3,)
    assert reads_of(Convolve(3, first.norm1, first.conv1, 4)) == (3, normalized(3))
    assert reads_of(Convolve(3, first.norm1, first.conv1, 4, 2)) == (3, normalized(3), 2)
    assert reads_of(Call(3, first, 4)) == (3,)
    assert reads_of(Join(3, first.norm1, 2, nn.Identity(), nn.ReLU(), 4)) == (3, 2)
    assert normalized(normalized(7)) == 7
    assert normalized(0) not in range(100)


# ---- who has to do with a module ------------------------------------------------------------------------


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


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
def test_somebody_who_has_to_do_with_a_module_is_served_there(kind, way):
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
            if not isinstance(now[0] if now else None, Call) and len(found.stages[0]) == 2:
                assert [type(step) for step in before] == [type(step) for step in now]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: getattr(way, "__name__", way))
def test_somebody_who_has_to_do_with_the_encoder_has_it_called(way):
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
    "a lent convolution": lambda b: b.conv2.lend(),
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


@pytest.mark.parametrize("cls", [BitEmbeddings, BitStage, BitEncoder])
@pytest.mark.parametrize("method", ["forward", "parts"])
def test_subclasses_that_run_otherwise_are_called(cls, method):
    if not hasattr(cls, method):
        pytest.skip(f"{cls.__name__} has no {method}")
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
    found = [step for step in steps(model).all() if isinstance(step, Call)]
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


# ---- networks of others -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: their_model("BitModel"), timm_resnet], ids=["bit", "timm"]
)
def test_accelerated_networks_are_read_whole(make):
    model = make().eval()
    bitfast.accelerate(model)
    found = model.plans.steps(model)
    assert not any(isinstance(step, Call) for step in found.all())
    convolutions = {m for m in model.modules() if isinstance(m, WeightStandardizedConv2d)}
    assert set(found.convolutions()) == convolutions


def test_copies_are_read_by_themselves():
    model = model_of()
    model.plans.steps(model)
    twin = copy.deepcopy(model)
    hook(blocks(twin)[0])
    assert not any(isinstance(step, Call) for step in model.plans.steps(model).all())
    found = [s for s in twin.plans.steps(twin).all() if isinstance(s, Call)]
    assert [step.module for step in found] == [blocks(twin)[0]]


def test_called_parts_see_what_they_would_see():
    """Whatever part is hooked: it is called once, with what the module before it returned."""
    model = model_of("bottleneck")
    x = torch.randn(2, 3, 24, 24)
    parts = [model.embedder, *blocks(model)]
    seen: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        part.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    for demands in ({}, {"packed_convolution": "reference"}):
        seen.clear()
        with torch.no_grad():
            if demands:
                with use_backend(**demands):
                    model(x)
            else:
                model(x)
        assert len(seen) == len(parts)
        for (_, output), (given, _) in itertools.pairwise(seen):
            assert given is output
