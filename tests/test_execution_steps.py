"""What is read of a network: its steps, and the modules that are called as somebody has to do with them."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitfast
from bitfast.backends import use_backend
from bitfast.execution import op_by_op
from bitfast.execution.steps import (
    IMAGES,
    CallModule,
    Convolve,
    Join,
    Normalize,
    Pool,
    Steps,
    ZeroPad,
    last_reads,
    normalized,
    reads_of,
)
from bitfast.layers import GroupNormActivation, WeightStandardizedConv2d
from tests.foreign_models import timm_resnet
from tests.model_pairs import their_model
from tests.network_steps import (
    SETTINGS,
    blocks,
    calls,
    hook,
    model_of,
    steps,
)

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
        outputs, result = op_by_op.compute(found, x, lambda _: {}, range(len(hidden)))
    for actual, wanted in zip([*outputs, result], expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


def test_the_stem_of_each_kind():
    def kinds(kind: str) -> list[type]:
        return [type(step) for step in steps(model_of(kind)).stem]

    assert kinds("preactivation") == [Convolve, Pool]
    assert kinds("bottleneck") == [Convolve, ZeroPad, Normalize, Pool]
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
    assert reads_of(CallModule(3, first, 4)) == (3,)
    assert reads_of(Join(3, first.norm1, 2, nn.Identity(), nn.ReLU(), 4)) == (3, 2)
    assert normalized(normalized(7)) == 7
    assert normalized(0) not in range(100)


# ---- networks of others -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: their_model("BitModel"), timm_resnet], ids=["bit", "timm"]
)
def test_accelerated_networks_are_read_whole(make):
    model = make().eval()
    bitfast.accelerate(model)
    found = model.plans.steps(model)
    assert not any(isinstance(step, CallModule) for step in found.all())
    convolutions = {m for m in model.modules() if isinstance(m, WeightStandardizedConv2d)}
    assert set(found.convolutions()) == convolutions


def test_copies_are_read_by_themselves():
    model = model_of()
    model.plans.steps(model)
    twin = copy.deepcopy(model)
    hook(blocks(twin)[0])
    assert not any(isinstance(step, CallModule) for step in model.plans.steps(model).all())
    found = [s for s in twin.plans.steps(twin).all() if isinstance(s, CallModule)]
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
