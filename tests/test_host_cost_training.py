"""What a training step costs the host, counted by direction: of R50x1, and of one block of it.

The bounds are near what is counted, so that the cost cannot creep back. ``python -m bench.host_training``
prints it beside transformers', and times it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from bench import host, host_training
from bitfast.ops.norm_convolution import uses_norm_convolution


class Bound(NamedTuple):
    """What one more block may cost, at most; and a whole step.

    Attributes:
        python: Calls of Python functions of a block.
        entries: Into torch's dispatcher of a block, those that operators make left out.
        step: Calls of Python functions of a step.
    """

    python: int
    entries: int
    step: int


BOUNDS = {
    "cpu": {"forward": Bound(640, 20, 11_000), "backward": Bound(470, 42, 8_000)},
    "gpu": {"forward": Bound(200, 14, 4_200), "backward": Bound(60, 41, 1_500)},
}
NODES_OF_STANDARDIZATION = {"cpu": 3, "gpu": 0}
"""In one block more. On a GPU one node standardizes the weights of a stage, however many they are."""

NODE = {"cpu": "_ResidualBlockBackward", "gpu": "_PreparedBlockBackward"}

Counts = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=BOUNDS)
def path(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and not uses_norm_convolution("cpu", torch.float32):
        pytest.skip("what is counted needs AVX-512 and the extension, which are not both here")
    return request.param


@pytest.fixture(scope="module")
def counts(path: str) -> Iterator[Counts]:
    with host_training.on_path(path) as device:
        images = torch.randn(host.IMAGES, device=device)
        yield host_training.block_counts("bitfast", images, device)


def most(names: dict[str, int]) -> list[tuple[str, int]]:
    return Counter(names).most_common(20)


@pytest.mark.parametrize("direction", host_training.DIRECTIONS)
def test_a_block_makes_few_calls(path: str, counts: Counts, direction: str) -> None:
    found, bound = counts["block"][direction], BOUNDS[path][direction]
    print(found["python_calls"], found["operators_from_python"])
    assert 0 < found["python_calls"] <= bound.python, most(found["python_calls_most"])
    assert 0 < found["operators_from_python"] <= bound.entries, most(found["operators_most"])


@pytest.mark.parametrize("direction", host_training.DIRECTIONS)
def test_a_step_makes_few_calls(path: str, counts: Counts, direction: str) -> None:
    found = counts["step"][direction]
    print(found["python_calls"])
    assert found["python_calls"] <= BOUNDS[path][direction].step, most(found["python_calls_most"])


def test_a_block_is_one_node(path: str, counts: Counts) -> None:
    nodes = Counter(counts["block"]["forward"]["nodes"])
    standardization = [name for name in nodes if "standardiz" in name.lower()]
    assert sum(nodes.pop(name) for name in standardization) == NODES_OF_STANDARDIZATION[path]
    assert nodes == {NODE[path]: 1, "AccumulateGrad": 9}


def test_every_block_is_one_node(path: str, counts: Counts) -> None:
    nodes = counts["step"]["forward"]["nodes"]
    assert nodes[NODE[path]] == sum(host_training.DEPTHS)
    assert nodes["_StemBackward"] == 1
    assert not [name for name in nodes if "Convolution" in name]


def test_each_step_makes_the_same_calls(path: str) -> None:
    with host_training.on_path(path) as device:
        model = host_training.model_of("bitfast", device, depths=[1, 1, 1, 1])
        images = torch.randn(host.IMAGES, device=device)
        first, second = (host_training.counts_of(model, images) for _ in range(2))
    assert first == second


# ---- how it is measured ---------------------------------------------------------------------------------


def test_nodes_are_counted_once_each() -> None:
    x = torch.randn(3, requires_grad=True)
    twice = x * 2
    assert host_training.nodes_of(twice * twice + twice) == {
        "AddBackward0": 1, "MulBackward0": 2, "AccumulateGrad": 1,
    }  # fmt: skip


def test_what_nodes_of_autograd_call_is_counted() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return doubled(doubled(grad))

    def doubled(grad: torch.Tensor) -> torch.Tensor:
        return grad + grad

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> Any:
            return SimpleNamespace(pooler_output=Twice.apply(self.weight))

    counts = host_training.counts_of(Model(), torch.ones(2))
    assert counts["forward"]["nodes"] == {"TwiceBackward": 1, "AccumulateGrad": 1}
    called = {name.split()[-1]: n for name, n in counts["backward"]["python_calls_most"].items()}
    assert called["doubled"] == 2
    assert counts["backward"]["operators_most"]["aten::add"] == 2
    assert sys.getprofile() is None


def test_differences_name_what_differs() -> None:
    fewer = {"python_calls": 3, "python_calls_most": {"a": 1, "b": 2}}
    more = {"python_calls": 7, "python_calls_most": {"a": 1, "b": 4, "c": 2}}
    assert host_training.difference(more, fewer) == {
        "python_calls": 4, "python_calls_most": {"b": 2, "c": 2},
    }  # fmt: skip


def test_a_base_that_is_no_commit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host_training.main(["--base", "no such commit"])
    assert "error: " in capsys.readouterr().err
