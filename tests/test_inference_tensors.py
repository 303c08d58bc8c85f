"""Models made, loaded or moved in inference mode are as fast as others, and follow changes as others do."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable
from operator import is_
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitfast
from bitfast.backends import use_backend
from bitfast.inference_tensors import make_ordinary
from bitfast.ops.kept_weights import kept_weights
from bitfast.ops.packed_convolution import uses_packed_weights, why_not_packed
from tests.model_pairs import our_model, pair, their_model


def made(tmp_path: Any) -> nn.Module:
    return our_model("BitModel").eval()


def loaded(tmp_path: Any) -> nn.Module:
    their_model("BitModel").save_pretrained(tmp_path)
    return bitfast.BitModel.from_pretrained(tmp_path)


def converted(tmp_path: Any) -> nn.Module:
    return our_model("BitModel").eval().to(torch.bfloat16).float()


def assigned(tmp_path: Any) -> nn.Module:
    model = our_model("BitModel").eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def accelerated(tmp_path: Any) -> nn.Module:
    model = their_model("BitModel").eval()
    bitfast.accelerate(model)
    return model


WAYS = [made, loaded, converted, assigned, accelerated]


def kept(model: nn.Module) -> list[Tensor]:
    """What is kept of a model's weights."""
    entries = [kept_weights._kept.get(id(parameter)) for parameter in model.parameters()]
    return [t for entry in entries if entry is not None for t in entry.by_form.values()]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("make", WAYS)
def test_weights_are_kept_and_changes_are_seen(make, backend, tmp_path):
    """Packed, or standardized all at once as on a GPU."""
    if backend == "native" and not uses_packed_weights("cpu", torch.float32):
        pytest.skip(f"not packed here: {why_not_packed(torch.float32)}")
    with torch.inference_mode(), use_backend(packed_convolution=backend):
        model = make(tmp_path)
        twin = copy.deepcopy(model)
        x = torch.randn(2, 3, 64, 64)
        first = model(x).pooler_output
        before = kept(model)
        assert len(before) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
        assert torch.equal(model(x).pooler_output, first)
        assert all(map(is_, kept(model), before))
        for _ in range(2):
            for module in (model, twin):
                convolution = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
                convolution.weight[:, 0].mul_(-3)
            changed = model(x).pooler_output
            assert not torch.allclose(changed, first)
            now = kept(model)
            assert [a is b for a, b in zip(now, before, strict=True)].count(False) == 1
            before = now
            fresh = copy.deepcopy(twin)  # has kept nothing
            torch.testing.assert_close(changed, fresh(x).pooler_output)
            first = changed
    with torch.no_grad():  # out of inference mode as well
        torch.testing.assert_close(model(x).pooler_output, first)


def test_the_parameter_is_the_same_object_in_the_same_memory():
    with torch.inference_mode():
        weight = nn.Parameter(torch.randn(4, 3, 3, 3), requires_grad=False)
    values, address = weight.clone(), weight.data_ptr()
    make_ordinary(weight)
    assert not weight.is_inference()
    assert type(weight) is nn.Parameter
    assert not weight.requires_grad
    assert weight.data_ptr() == address
    assert torch.equal(weight, values)
    version = weight._version
    with torch.inference_mode():
        weight.add_(1)
    assert weight._version > version


@pytest.mark.filterwarnings("default")
def test_who_cannot_be_made_ordinary_is_told_and_computed_right():
    with torch.inference_mode():
        model = our_model("BitModel").eval()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        convolution = model.encoder.stages[0].layers[0].conv1
        convolution.weight = nn.Parameter(state["encoder.stages.0.layers.0.conv1.weight"])
        holder = weakref.ref(convolution.weight)  # for which torch cannot swap the tensor
        x = torch.randn(1, 3, 32, 32)
        with pytest.warns(UserWarning, match="made in inference mode is standardized in each pass"):
            first = model(x).pooler_output
        torch.testing.assert_close(model(x).pooler_output, first)
        convolution.weight[0].mul_(-2)
        assert not torch.equal(model(x).pooler_output, first)
    assert holder() is convolution.weight


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def test_such_a_model_is_as_fast_as_another():
    settings: dict[str, Any] = {"embedding_size": 64, "hidden_sizes": [256, 512], "depths": [1, 2]}
    ordinary, _ = pair("BitModel", **settings, num_groups=32)
    ordinary.eval()
    with torch.inference_mode():
        model = our_model("BitModel", **settings, num_groups=32).eval()
        x = torch.randn(1, 3, 32, 32)
        # In turns, so that whatever else the machine does meets both; the first rounds pack the weights.
        rounds = [[seconds(lambda m=m: m(x)) for m in (model, ordinary)] for _ in range(25)]
    slow, usual = torch.tensor(rounds)[2:].amin(0)
    assert slow < 1.5 * usual
