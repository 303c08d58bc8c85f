"""Adapters of PEFT on the convolutions: the numbers are those of transformers with the same adapters."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
import transformers.integrations.peft
from packaging.version import Version
from torch import Tensor, nn

import bitfast
import bitfast.transformers
from bitfast.layers import WeightStandardizedConv2d
from tests.model_pairs import assert_close, move_weights
from tests.tiny_models import TINY

CONVOLUTIONS = ["conv1", "conv2", "conv3", "convolution", "downsample.conv"]
KINDS = ["bitfast.transformers", "bitfast", "accelerated"]


def their_model() -> Any:
    model = transformers.BitForImageClassification(transformers.BitConfig(**TINY))
    move_weights(model)
    return model


def same_model(theirs: Any, kind: str) -> Any:
    """A model of that kind with the weights of transformers' own."""
    if kind == "accelerated":
        ours = copy.deepcopy(theirs)
        bitfast.accelerate(ours)
        return ours
    config = transformers.BitConfig(**TINY)
    if kind == "bitfast":
        ours = bitfast.BitForImageClassification(config)
    else:
        ours = bitfast.transformers.BitForImageClassification(config)
    ours.load_state_dict(theirs.state_dict())
    return ours


def adapters(use_dora: bool = False, **settings: Any) -> peft.LoraConfig:
    """Adapters that are no identity, as after some training."""
    return peft.LoraConfig(
        r=3,
        target_modules=CONVOLUTIONS,
        modules_to_save=["classifier"],
        use_dora=use_dora,
        init_lora_weights=False,
        **settings,
    )


def adapted(theirs: Any, kind: str, **settings: Any) -> tuple[Any, Any]:
    """Our model and theirs with the same adapters; ours has run before."""
    ours = same_model(theirs, kind).eval()
    logits(ours, images())
    expected = peft.get_peft_model(copy.deepcopy(theirs), adapters(**settings)).eval()
    actual = peft.get_peft_model(ours, adapters(**settings)).eval()
    actual.load_state_dict(expected.state_dict())
    return actual, expected


def images() -> Tensor:
    return torch.rand(2, 3, 40, 48)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).logits


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    """Run twice: what is kept of the weights serves from the second time on."""
    for _ in range(2):
        x = images()
        assert_close(logits(actual, x), logits(expected, x), 1e-5)


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("kind", KINDS)
class TestAllKinds:
    def test_before_and_after_merging(self, kind, use_dora):
        ours, theirs = adapted(their_model(), kind, use_dora=use_dora)
        assert_same(ours, theirs)
        merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
        assert_same(merged, expected)
        convolutions = [m for m in merged.modules() if isinstance(m, WeightStandardizedConv2d)]
        assert len(convolutions) == sum(isinstance(m, nn.Conv2d) for m in expected.modules())
        assert all(convolution.keeps_weight() for convolution in convolutions)  # as fast as ever

    def test_merging_without_running_in_between(self, kind, use_dora):
        ours, theirs = adapted(their_model(), kind, use_dora=use_dora)
        assert_same(ours.merge_and_unload(), theirs.merge_and_unload())

    def test_merging_and_unmerging_in_place(self, kind, use_dora):
        ours, theirs = adapted(their_model(), kind, use_dora=use_dora)
        for change in ("merge_adapter", "unmerge_adapter", "merge_adapter"):
            assert_same(ours, theirs)
            getattr(ours, change)()
            getattr(theirs, change)()
        assert_same(ours, theirs)

    def test_a_step_of_training(self, kind, use_dora):
        base = their_model().double()
        expected = peft.get_peft_model(copy.deepcopy(base), adapters(use_dora)).train()
        actual = peft.get_peft_model(same_model(base, kind).double(), adapters(use_dora)).train()
        actual.load_state_dict(expected.state_dict())
        x, labels = images().double(), torch.tensor([0, 2])
        for model in (actual, expected):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                model(x, labels=labels).loss.backward()
                optimizer.step()
        ours, theirs = actual.state_dict(), expected.state_dict()
        assert list(ours) == list(theirs)
        for name in theirs:
            assert_close(ours[name], theirs[name], 1e-9, name)
        trained = [name for name in theirs if "lora_A" in name]
        assert len(trained) == 9

    def test_saved_adapters_load_there_and_here(self, kind, use_dora, tmp_path):
        base = their_model()
        ours, theirs = adapted(base, kind, use_dora=use_dora)
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        for folder in ("ours", "theirs"):
            loaded = peft.PeftModel.from_pretrained(same_model(base, kind), tmp_path / folder)
            assert_same(loaded, theirs)
        there = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
        assert_same(there, ours)


NEEDED = Version(transformers.integrations.peft.MIN_PEFT_VERSION)


@pytest.mark.skipif(
    Version(peft.__version__) < NEEDED,
    reason=f"transformers {transformers.__version__} refuses PEFT before {NEEDED}, {peft.__version__} is here",
)
@pytest.mark.parametrize("kind", ["bitfast.transformers", "accelerated"])
def test_transformers_own_methods(kind, tmp_path):
    base = their_model()
    ours, theirs = same_model(base, kind).eval(), copy.deepcopy(base).eval()
    for model in (ours, theirs):
        model.add_adapter(
            peft.LoraConfig(target_modules=CONVOLUTIONS, init_lora_weights=False), "a"
        )
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs)
    for model in (ours, theirs):
        model.disable_adapters()
    assert_same(ours, theirs)
    assert_same(ours, base.eval())
    for model in (ours, theirs):
        model.enable_adapters()
        model.set_adapter("a")
    assert_same(ours, theirs)
    ours.save_pretrained(tmp_path)
    fresh = same_model(base, kind).eval()
    fresh.load_adapter(str(tmp_path))
    assert_same(fresh, theirs)


def test_gradient_checkpointing_with_adapters():
    base = their_model().double()
    models = []
    for options in (None, {}, {"use_reentrant": True}):
        model = same_model(base, "bitfast.transformers").double()
        if options is not None:
            model.gradient_checkpointing_enable(options)
        model = peft.get_peft_model(model, adapters()).train()
        if models:
            model.load_state_dict(models[0].state_dict())
        models.append(model)
    x = images().double()
    for model in models:
        model(x).logits.square().sum().backward()
    plain, *others = (
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in models
    )
    assert len(plain) == 20
    for other in others:
        assert list(other) == list(plain)
        for name in plain:
            assert_close(other[name], plain[name], 1e-11, name)


@pytest.mark.parametrize(
    "method", ["add_adapter", "load_adapter", "set_adapter", "enable_adapters"]
)
def test_own_classes_say_where_these_methods_are(method):
    model = bitfast.BitModel(bitfast.BitConfig(**TINY))
    with pytest.raises(NotImplementedError, match=rf"{method}.*bitfast\.transformers"):
        getattr(model, method)("a")


def test_a_wrapped_convolution_and_one_that_comes_back():
    stage = bitfast.BitModel(bitfast.BitConfig(**TINY)).eval().encoder.stages[0]
    block, x = stage.layers[0], torch.rand(1, 8, 8, 8)
    with torch.no_grad():
        before = block(x)
        convolution = block.conv1
        block.conv1 = nn.Sequential(convolution)
        assert_close(block(x), before, 1e-5)
        convolution.weight.data += torch.randn_like(convolution.weight)
        changed = block(x)
        assert not torch.allclose(changed, before)
        block.conv1 = convolution
        assert_close(block(x), changed, 1e-5)
    assert convolution.keeps_weight()
