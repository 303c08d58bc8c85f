"""accelerate on a GPU: models of transformers and timm on the Triton kernels, as exact as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the models to accelerate are transformers'")
pytest.importorskip("timm", reason="the models to accelerate are timm's")

import bitfast
from tests.foreign_models import ALL
from tests.model_pairs import flatten
from tests.tolerances import Triples, assert_draws_within_contract

EACH = pytest.mark.parametrize("name", ALL)


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch TF32 off, whose error would hide all others."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def results(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return flatten(model(images))


def pair(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    theirs = ALL[name].model(dtype).cuda()
    ours = copy.deepcopy(theirs)
    bitfast.accelerate(ours)
    return ours, theirs


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_within_the_contract(name, dtype):
    def draw() -> Triples:
        ours, theirs = pair(name, dtype)
        images = ALL[name].images(dtype, batch=4).cuda()
        actual, plain = results(ours, images), results(theirs, images)
        exact = results(theirs.double(), images.double())
        return {f"output {n}": t for n, t in enumerate(zip(actual, plain, exact, strict=True))}

    assert_draws_within_contract(draw, 3)


@EACH
def test_training_under_autocast_gives_every_gradient(name):
    ours, theirs = pair(name, torch.float32)
    images = ALL[name].images(batch=3).cuda()

    def gradients(model: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        with torch.autocast("cuda", torch.bfloat16):
            total = sum(value.float().square().mean() for value in flatten(model.train()(images)))
        total.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    actual, expected = gradients(ours), gradients(theirs)
    assert list(actual) == list(expected)
    assert all(torch.isfinite(gradient).all() for gradient in actual.values())


def test_a_model_is_moved_after_it_was_accelerated():
    model = ALL["DPT-hybrid"].model()
    bitfast.accelerate(model)
    images = ALL["DPT-hybrid"].images()
    expected = results(model, images)
    for actual, there in zip(results(model.cuda(), images.cuda()), expected, strict=True):
        torch.testing.assert_close(actual.cpu(), there, rtol=1e-3, atol=1e-3)
    bitfast.restore(model)
    for actual, there in zip(results(model, images.cuda()), expected, strict=True):
        torch.testing.assert_close(actual.cpu(), there, rtol=1e-3, atol=1e-3)
