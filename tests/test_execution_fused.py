"""Plans whose convolutions normalize what they read and measure what they write; a stand-in does the work."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from ctypes import string_at
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import host
from bitfast.backends import BackendUnavailableError, use_backend
from bitfast.execution import cuda, cuda_choice
from bitfast.execution.cuda_choice import TABLE, Row
from bitfast.execution.plan import Plan
from bitfast.kernels import launch
from bitfast.ops import native_cuda
from bitfast.ops.norm_convolution import OP
from tests import norm_convolution_stand_in
from tests.interpreter import DEVICE
from tests.norm_convolution_stand_in import StandIn, use_stand_in
from tests.test_execution_cuda import plans
from tests.tiny_models import ours
from tests.tolerances import Triples, assert_draws_within_contract, relative_error
from tests.weight_changes import edit_in_place, features, swap_the_data

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="tests/gpu has the same for a card")

SMALL = {"depths": [2, 1], "hidden_sizes": [32, 64], "embedding_size": 32}

SETTINGS: dict[str, dict[str, Any]] = {
    "preactivation": SMALL,
    "bottleneck": {**SMALL, "layer_type": "bottleneck"},
    "same": {**SMALL, "global_padding": "same", "embedding_dynamic_padding": True},
    "bottleneck same": {**SMALL, "global_padding": "same", "layer_type": "bottleneck"},
    "one group": {**SMALL, "num_groups": 1},
    "32 groups": {"depths": [1], "hidden_sizes": [256], "embedding_size": 64, "num_groups": 32},
    "groups of 3": {"depths": [2], "hidden_sizes": [96], "embedding_size": 24, "num_groups": 8},
    "odd channels": {"depths": [2, 1], "hidden_sizes": [20, 32], "embedding_size": 12},
    "drop path": {**SMALL, "drop_path_rate": 0.5},
    "dilated": {**SMALL, "depths": [1, 2], "layer_type": "bottleneck", "output_stride": 4},
    "valid": {**SMALL, "depths": [1], "hidden_sizes": [32], "global_padding": "valid"},
    "gelu": {**SMALL, "hidden_act": "gelu"},
}


@pytest.fixture
def kernels(monkeypatch) -> Iterator[StandIn]:
    """The stand-in; every convolution that the kernels suit is to be fused."""
    stand_in = use_stand_in(monkeypatch)
    with torch.no_grad(), use_backend(norm_convolution="native"):
        yield stand_in


def model_of(kind: str, dtype: torch.dtype = torch.bfloat16, name: str = "BitModel") -> Any:
    model = ours(name, **SETTINGS[kind]).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.5)
    return model.to(dtype)


def images(kind: str = "", count: int = 2) -> Tensor:
    size = (15, 15) if kind == "valid" else (16, 18)
    return torch.randn(count, 3, *size).bfloat16()


def outputs(model: Any, x: Tensor) -> list[Tensor]:
    output = model(x, output_hidden_states=True)
    return [*output.hidden_states, output.last_hidden_state]


def names_of(plan: Plan) -> list[str]:
    (part,) = plan.parts
    return list(part.program.names)


def last_plan(model: Any) -> Plan:
    return plans(model)[-1]


# ---- numbers -----------------------------------------------------------------------------------------------


def draw(kind: str) -> Triples:
    """Outputs of the fused plan, of plain PyTorch in the same dtype and in float64."""
    model, x = model_of(kind), images(kind)
    actual = outputs(model, x)
    with use_backend("reference"):
        plain, oracle = outputs(model, x), outputs(copy.deepcopy(model).double(), x.double())
    return {
        f"output {n}": triple for n, triple in enumerate(zip(actual, plain, oracle, strict=True))
    }


@pytest.mark.parametrize("kind", SETTINGS)
def test_outputs_are_within_the_contract(kernels, kind) -> None:
    assert_draws_within_contract(lambda: draw(kind), 1)
    assert bool(kernels.calls) == (kind != "gelu")


@pytest.mark.parametrize("kind", ["preactivation", "bottleneck"])
def test_the_error_is_no_larger_than_without_fusing(kernels, kind) -> None:
    errors = []
    for _ in range(4):
        model, x = model_of(kind), images()
        fused = outputs(model, x)
        with use_backend(norm_convolution="reference"):
            unfused = outputs(model, x)
        assert "norm_convolution" in names_of(plans(model)[0])
        assert "norm_convolution" not in names_of(plans(model)[1])
        with use_backend("reference"):
            oracle = outputs(copy.deepcopy(model).double(), x.double())
        errors.append([relative_error(each[-1], oracle[-1]) for each in (fused, unfused)])
    of_fused, of_unfused = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert of_fused <= 1.1 * of_unfused + torch.finfo(torch.bfloat16).eps / 2


def test_the_bits_do_not_depend_on_what_ran_before(kernels) -> None:
    model, x = model_of("preactivation"), images()
    first = outputs(model, x)
    outputs(model, images(count=3))
    outputs(model_of("bottleneck"), images())
    for a, b in zip(first, outputs(model, x), strict=True):
        assert torch.equal(a, b)


def test_hidden_states_are_those_of_the_plan_without_them(kernels) -> None:
    """What is returned is not overwritten; the final result is the same."""
    model, x = model_of("preactivation"), images()
    *states, last = outputs(model, x)
    assert torch.equal(model(x).last_hidden_state, last)
    copies = [state.clone() for state in states]
    outputs(model, images())
    assert all(map(torch.equal, states, copies))
    backbone = model_of("same", name="BitBackbone")
    maps = backbone(x).feature_maps
    with use_backend(norm_convolution="reference"):
        unfused = backbone(x).feature_maps
    for a, b in zip(maps, unfused, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_autocast(kernels) -> None:
    model, x = model_of("preactivation", torch.float32), images().float()
    with torch.autocast("cpu", torch.bfloat16):
        *_, result = outputs(model, x)
    assert result.dtype == torch.bfloat16
    assert "norm_convolution" in names_of(last_plan(model))
    with torch.autocast("cpu", torch.bfloat16), use_backend(norm_convolution="reference"):
        *_, unfused = outputs(model, x)
    with use_backend("reference"):
        *_, oracle = outputs(copy.deepcopy(model).double(), x.double())
    assert relative_error(result, oracle) <= 1.5 * relative_error(unfused, oracle) + 2**-9


# ---- programs -----------------------------------------------------------------------------------------------


def test_what_a_program_consists_of(kernels) -> None:
    model = model_of("preactivation")
    model(images())
    assert names_of(last_plan(model)) == [
        "begin", "convolution", "same_max_pool",
        "partials", "factors",  # of what no fused convolution has written
        "norm_convolution, twice", "factors",  # the shortcut and the first: same filters, same steps
        "norm_convolution", "factors", "norm_convolution_add_", "factors",
        "norm_convolution", "factors", "norm_convolution", "factors", "norm_convolution_add_", "factors",
        "norm_convolution", "norm_convolution", "factors",  # the shortcut at stride 2 has the same factors
        "norm_convolution", "factors", "norm_convolution_add_",
        "group_norm_act",
    ]  # fmt: skip


def test_a_bottleneck_s_program(kernels) -> None:
    """Norms after the last convolutions are launches of their own, and so not measured."""
    model = model_of("bottleneck")
    model(images())
    assert names_of(last_plan(model)) == [
        "begin", "convolution", "zeros", "group_norm_act", "same_max_pool",
        "norm_convolution, twice", "factors", "group_norm_act",
        "norm_convolution", "factors", "norm_convolution", "group_norm_act, add",
        "norm_convolution", "factors", "norm_convolution", "factors", "norm_convolution", "group_norm_act, add",
        "norm_convolution", "group_norm_act", "norm_convolution", "factors",
        "norm_convolution", "factors", "norm_convolution", "group_norm_act, add",
    ]  # fmt: skip


def test_a_shortcut_that_is_kept_is_not_overwritten(kernels) -> None:
    """The stem's output is a hidden state, and the shortcut of a first block without downsample."""
    model, x = model_of("preactivation"), images()
    model.encoder.stages[0].layers[0].downsample = None
    actual = outputs(model, x)
    assert "norm_convolution_add" in names_of(last_plan(model))
    with use_backend(norm_convolution="reference"):
        unfused = outputs(model, x)
    assert torch.equal(actual[0], unfused[0])
    for a, b in zip(actual, unfused, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_where_a_sibling_cannot_be_fused(kernels) -> None:
    """One launch normalizes for both; the fused one reads the result as it is, and nothing is measured."""
    model, x = model_of("preactivation"), images()
    downsample = model.encoder.stages[1].layers[0].downsample.conv
    downsample.weight = nn.Parameter(torch.randn(64, 32, 1, 3).bfloat16())
    downsample.kernel_size, downsample.padding = (1, 3), (0, 1)
    actual = outputs(model, x)
    names = names_of(last_plan(model))
    after = names[[n for n, name in enumerate(names) if name == "norm_convolution_add_"][1] + 1 :]
    assert after == [
        "group_norm_act", "convolution", "norm_convolution", "factors",
        "norm_convolution", "factors", "norm_convolution_add_", "group_norm_act",
    ]  # fmt: skip
    with use_backend(norm_convolution="reference"):
        unfused = outputs(model, x)
    for a, b in zip(actual, unfused, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_not_enabled_nothing_changes(monkeypatch) -> None:
    stand_in = use_stand_in(monkeypatch, is_enabled=False)
    model, x = model_of("preactivation"), images()
    with torch.no_grad():
        model(x)
    assert not stand_in.calls
    names = names_of(last_plan(model))
    block = ["convolution", "group_norm_act", "convolution", "group_norm_act"]
    last = "convolution, add_group_norm_act"
    assert names == [
        "begin", "convolution", "same_max_pool", "group_norm_act", "convolution", *block, last,
        *block, last, "convolution", *block, last,
    ]  # fmt: skip
    assert last_plan(model).choices() == []


def test_float32_is_refused(kernels) -> None:
    with pytest.raises(BackendUnavailableError, match=r"not torch\.float32"):
        model_of("preactivation", torch.float32)(images().float())


def test_a_batch_of_none(kernels) -> None:
    model = model_of("preactivation")
    assert outputs(model, images()[:0])[-1].shape[0] == 0
    assert not kernels.calls
    assert {reason for _, _, reason in last_plan(model).choices()} == {
        "it reads the images",
        "there is nothing to convolve",
    }


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gelu", "not gelu"),
        ("groups of 3", "a group have an even number"),
        ("odd channels", "multiples of 8, and"),
        ("valid", "not of the shape of its shortcut"),
        ("dilated", "its filters are dilated"),
    ],
)
def test_reasons(kernels, kind, reason) -> None:
    model = model_of(kind)
    model(images(kind))
    choices = last_plan(model).choices()
    assert len(choices) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    why_not = [why for _, what, why in choices if what == "convolution"]
    assert any(reason in why for why in why_not), why_not
    assert {what for _, what, _ in choices} == (
        {"convolution", OP} - ({OP} if kind == "gelu" else set())
    )


# ---- modules and parameters that change ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["preactivation", "bottleneck"])
@pytest.mark.parametrize("layer", [0, 1])
def test_blocks_next_to_a_watched_one_are_fused(kernels, kind, layer) -> None:
    model, x = model_of(kind), images()
    expected = outputs(model, x)
    seen: list[Tensor] = []
    watched = model.encoder.stages[0].layers[layer]
    watched.conv2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    kernels.calls.clear()
    actual = outputs(model, x)
    assert len(seen) == 1
    assert "norm_convolution" in kernels.calls
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)
    choices = last_plan(model).choices()
    assert {step.convolution for step, *_ in choices}.isdisjoint(watched.modules())
    assert len(choices) == sum(isinstance(m, nn.Conv2d) for m in model.modules()) - sum(
        isinstance(m, nn.Conv2d) for m in watched.modules()
    )


def test_what_a_hooked_module_returns_may_begin_anywhere(kernels) -> None:
    model, x = model_of("preactivation"), images()

    def elsewhere(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        memory = output.new_empty(output.numel() + 1)[1:]
        images, channels, height, width = output.shape
        moved = memory.view(images, height, width, channels).permute(0, 3, 1, 2)
        return moved.copy_(output)

    block = model.encoder.stages[0].layers[0]
    handle = block.register_forward_hook(lambda module, inputs, output: None)
    expected = outputs(model, x)
    handle.remove()
    block.register_forward_hook(elsewhere)
    for a, b in zip(outputs(model, x), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", [edit_in_place, swap_the_data])
def test_a_change_of_weights_is_seen(kernels, change) -> None:
    model, x = model_of("preactivation"), images(count=1)
    before = features(model, x)
    with torch.enable_grad(), use_backend("reference"):
        change(model)
    after = features(model, x)
    assert torch.equal(after, features(copy.deepcopy(model), x))
    assert not torch.equal(after, before)


def test_a_norm_s_parameters_may_move_and_change(kernels) -> None:
    model, x = model_of("preactivation"), images()
    before = features(model, x)
    norm = model.encoder.stages[0].layers[0].norm2
    norm.weight.mul_(-2)
    after = features(model, x)
    assert not torch.equal(after, before)
    norm.weight.data = norm.weight.detach() / -2
    assert torch.equal(features(model, x), before)


def test_norms_of_another_dtype(kernels) -> None:
    model, x = model_of("preactivation"), images()
    expected = features(model, x)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.float()
    assert torch.equal(features(model, x), expected)


def test_norms_whose_parameters_are_not_aligned(kernels, monkeypatch) -> None:
    model, x = model_of("preactivation"), images()
    expected = features(model, x)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            for name in ("weight", "bias"):
                parameter = getattr(module, name)
                memory = torch.empty(module.num_channels + 1, dtype=parameter.dtype)
                parameter.data = memory[1:].copy_(parameter)
    aligned = norm_convolution_stand_in.at

    def at(address: int, dtype: torch.dtype, shape: Any) -> Tensor:
        if address % 16 == 0 or len(shape) > 1:
            return aligned(address, dtype, shape)
        count = torch.Size(shape).numel()
        memory = bytearray(string_at(address, count * dtype.itemsize))
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    monkeypatch.setattr(norm_convolution_stand_in, "at", at)
    assert torch.equal(features(model, x), expected)


def test_weights_are_standardized_within_somebody_s_graph(kernels, monkeypatch) -> None:
    model, x = model_of("same"), images()
    packed: list[Tensor] = []
    original = cuda.pack_filters
    with use_backend(weight_standardization="triton"):
        expected = features(model, x)
        monkeypatch.setattr(cuda, "is_recorded_by_others", lambda: True)
        monkeypatch.setattr(cuda, "pack_filters", lambda w: packed.append(w) or original(w))
        model.plans.clear()
        assert torch.equal(features(model, x), expected)
    assert len(packed) == len(last_plan(model).choices()) - 1  # the stem's are not packed


# ---- the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["preactivation", "bottleneck"])
@pytest.mark.parametrize("fused_stage", [0, 1])
def test_blocks_that_are_fused_next_to_others(monkeypatch, kind, fused_stage) -> None:
    """Where a norm stands between the two, a launch normalizes."""
    kernels = use_stand_in(monkeypatch)
    row = TABLE[-1]._replace(holds=lambda facts: (facts.intensity < 14) == (fused_stage == 0))
    monkeypatch.setattr(
        cuda_choice, "TABLE", (TABLE[0], row, Row(lambda _: True, False, "it is not"))
    )
    with torch.no_grad():
        model, x = model_of(kind), images()
        actual = outputs(model, x)
        by_module = {step.convolution: what for step, what, _ in last_plan(model).choices()}
        for number, stage in enumerate(model.encoder.stages):
            whats = {by_module[m] for m in stage.modules() if isinstance(m, nn.Conv2d)}
            assert whats == {OP if number == fused_stage else "convolution"}
        names = names_of(last_plan(model))
        with use_backend(norm_convolution="reference"):
            unfused = outputs(model, x)
        with use_backend("reference"):
            oracle = outputs(copy.deepcopy(model).double(), x.double())
    for a, b, c in zip(actual, unfused, oracle, strict=True):
        assert relative_error(a, c) <= 2 * relative_error(b, c) + 2**-8
    assert kernels.calls.count("norm_convolution_partials") == names.count("partials")
    assert names.count("partials") == (kind == "preactivation" and fused_stage == 0)


def test_the_table_decides_where_nothing_is_demanded(monkeypatch) -> None:
    use_stand_in(monkeypatch)
    model = model_of("preactivation")
    with torch.no_grad():
        model(images())
        assert not any(name.startswith("norm_convolution") for name in names_of(last_plan(model)))
        model(images(count=66))
    assert "norm_convolution" in names_of(last_plan(model))
    (few, many) = ({why for _, _, why in plan.choices()} for plan in plans(model))
    assert any("too few tiles" in why for why in few)
    assert any("bound by memory" in why for why in many)


# ---- the host ---------------------------------------------------------------------------------------------


class Idle(StandIn):
    """Launches nothing, without a call of a Python function."""

    def __getitem__(self, name: str) -> Any:
        is_launch = not name.endswith(("_shape", "_strips"))
        takes_anything = partial(Exception().__init__)  # written in C, and returns None
        return takes_anything if is_launch else super().__getitem__(name)


def test_a_fused_pass_costs_the_host_no_more(kernels, monkeypatch) -> None:
    """It enters torch's dispatcher for new maps alone; for each convolution it may call one function more."""
    monkeypatch.setattr(native_cuda, "library", Idle)
    monkeypatch.setattr(launch.Launch, "launch", lambda *_: None)
    monkeypatch.setattr(launch._PublicLaunch, "__call__", lambda *_: None)
    model, x = model_of("preactivation"), images()
    fused = host.calls_of(model, x)
    with use_backend(norm_convolution="reference"):
        unfused = host.calls_of(model, x)
    print({name: (fused[name], unfused[name]) for name in ("python_calls", "operators")})
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert fused["operators"] <= unfused["operators"] - 4 * convolutions
    assert fused["operators_from_python"] <= unfused["operators_from_python"]
    assert fused["python_calls"] <= unfused["python_calls"] + convolutions
