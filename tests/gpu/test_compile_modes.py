"""The modes of torch.compile that capture CUDA graphs and try kernels out, on whole models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast.backends import use_backend
from bitfast.modeling import BitBackbone, BitForImageClassification, BitModel
from tests.gpu.test_group_norm_act import needs_cuda
from tests.gpu.test_models import exact_float32, images, make
from tests.model_pairs import flatten
from tests.tolerances import Triples, assert_draws_within_contract

FIXTURES = (exact_float32,)
"""Float32 without TF32, on the Triton kernels."""

MODES = pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
CALLS = 4
"""The first compile and warm up, then a graph is captured, then it is replayed."""

pytestmark = [needs_cuda, pytest.mark.usefixtures("fresh_compiler")]


def outputs(model: Any, x: Tensor) -> list[Tensor]:
    """Return copies, which the next replay of a graph does not overwrite."""
    torch.compiler.cudagraph_mark_step_begin()
    with torch.no_grad():
        return [tensor.clone() for tensor in flatten(model(x))]


def assert_like_eager(compiled: Any, model: Any, batch: int, dtype: torch.dtype) -> None:
    """Hold every one of a few calls, each with fresh images, to the contract."""
    exact = copy.deepcopy(model).double()

    def draw() -> Triples:
        x = images(batch, dtype=dtype)
        actual, plain = outputs(compiled, x), outputs(model, x)
        with use_backend("reference"):
            oracle = outputs(exact, x.double())
        return {f"output {n}": t for n, t in enumerate(zip(actual, plain, oracle, strict=True))}

    for _ in range(CALLS):
        assert_draws_within_contract(draw, 1)


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [BitModel, BitForImageClassification, BitBackbone])
def test_a_compiled_model_is_as_exact_as_eager(kind, dtype, mode):
    model = make(kind).to(dtype).eval()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for batch in (2, 3):
        assert_like_eager(compiled, model, batch, dtype)


@MODES
def test_the_other_blocks_and_a_dynamic_batch(mode):
    model = make(BitForImageClassification, layer_type="bottleneck").eval()
    compiled = torch.compile(model, mode=mode, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        assert_like_eager(compiled, model, batch, torch.float32)


@MODES
def test_a_change_of_the_weights_shows_in_a_captured_graph(mode):
    model = make(BitForImageClassification).eval()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    assert_like_eager(compiled, model, 2, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert_like_eager(compiled, model, 2, torch.float32)
