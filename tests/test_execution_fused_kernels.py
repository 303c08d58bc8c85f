"""Plans that call the CUDA kernels of norm_convolution, which run on the CPU: small models as a whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bitfast.backends import use_backend
from bitfast.ops import native_cuda
from tests.emulated import H100, ROOT, emulate, library
from tests.norm_convolution_stand_in import use_stand_in
from tests.test_execution_fused import images, last_plan, model_of, names_of, outputs, pytestmark
from tests.tolerances import Triples, assert_draws_within_contract, relative_error

SOURCES = ("csrc/norm_convolution.cu", "csrc/norm_convolution_statistics.cu")

pytestmark = [
    pytestmark,
    pytest.mark.skipif(
        not all((ROOT / source).exists() for source in SOURCES), reason="there are no kernels yet"
    ),
]


class Kernels:
    """The entries of both sources, as one library."""

    def __init__(self) -> None:
        self.libraries = [library(source) for source in SOURCES]

    def emulate(self, device: tuple[int, int, int], seed: int) -> None:
        for each in self.libraries:
            emulate(each, device, seed)

    def __getitem__(self, name: str) -> Any:
        return next(each[name] for each in self.libraries if hasattr(each, name))


@pytest.fixture
def kernels(monkeypatch) -> Iterator[Kernels]:
    """The kernels; every convolution that they suit is to be fused."""
    found = Kernels()
    found.emulate(H100, 0)
    use_stand_in(monkeypatch)
    monkeypatch.setattr(native_cuda, "library", lambda: found)
    with torch.no_grad(), use_backend(norm_convolution="native"):
        yield found


def draw(kind: str, dtype: torch.dtype) -> Triples:
    """Outputs of the fused plan, of plain PyTorch in the same dtype and in float64."""
    model, x = model_of(kind, dtype), images(kind).to(dtype)
    actual = outputs(model, x)
    with use_backend("reference"):
        plain, oracle = outputs(model, x), outputs(copy.deepcopy(model).double(), x.double())
    return {
        f"output {n}": triple for n, triple in enumerate(zip(actual, plain, oracle, strict=True))
    }


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("preactivation", torch.bfloat16),
        ("bottleneck", torch.float16),
        ("same", torch.bfloat16),
        ("32 groups", torch.bfloat16),
        ("groups of 3", torch.bfloat16),
    ],
)
def test_outputs_are_within_the_contract(kernels, kind, dtype) -> None:
    assert_draws_within_contract(lambda: draw(kind, dtype), 1)


@pytest.mark.parametrize("kind", ["preactivation", "bottleneck"])
def test_the_error_is_no_larger_than_without_fusing(kernels, kind) -> None:
    errors = []
    for _ in range(3):
        model, x = model_of(kind), images()
        fused = outputs(model, x)
        with use_backend(norm_convolution="reference"):
            unfused = outputs(model, x)
        with use_backend("reference"):
            oracle = outputs(copy.deepcopy(model).double(), x.double())
        errors.append([relative_error(each[-1], oracle[-1]) for each in (fused, unfused)])
    of_fused, of_unfused = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert of_fused <= 1.1 * of_unfused + torch.finfo(torch.bfloat16).eps / 2


def test_the_order_of_threads_makes_no_difference(kernels) -> None:
    model, x = model_of("preactivation"), images()
    first = outputs(model, x)
    assert "norm_convolution, twice" in names_of(last_plan(model))
    for seed in range(1, 4):
        kernels.emulate(H100, seed)
        for a, b in zip(first, outputs(model, x), strict=True):
            assert torch.equal(a, b)
