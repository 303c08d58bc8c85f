"""Prepared launches on a GPU: the bits of ordinary ones, on any stream, in CUDA graphs, in several threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitfast.backends import use_backend
from bitfast.kernels import group_norm_act as kernels
from bitfast.kernels.group_norm_act_prepared import prepare_forward
from bitfast.kernels.launch import Launch, prepare
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act
from bitfast.ops.weight_standardization import weight_standardization_all
from tests.gpu.test_group_norm_act import needs_cuda
from tests.operator_calls import OperatorCalls
from tests.threads import in_threads

pytestmark = needs_cuda

GROUPS = 32
WAYS = {"whole": (8, 512, 7, 7), "large and whole": (128, 256, 56, 56), "split": (2, 256, 128, 128)}
"""Shapes that take each way of working on the GPUs at hand."""


def stream_of() -> int:
    return torch.cuda.current_stream().cuda_stream


class Norm:
    """The tensors of a norm with a residual."""

    def __init__(self, shape: tuple[int, int, int, int], offset: int = 0) -> None:
        generator = torch.Generator("cuda").manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", generator=generator)

        self.x, self.residual = (
            draw(*shape).bfloat16().contiguous(memory_format=torch.channels_last) for _ in range(2)
        )
        self.weight, self.bias = (draw(shape[1] + 8)[offset:][: shape[1]] for _ in range(2))
        self.total, self.result = (torch.full_like(self.x, torch.nan) for _ in range(2))
        self.mean, self.rstd = (
            torch.full((shape[0], GROUPS), torch.nan, device="cuda") for _ in range(2)
        )

    def launches(self) -> list[Launch]:
        return kernels.forward_launches(
            self.x, self.residual, self.weight, self.bias, 1e-5, "relu", True,
            total=self.total, result=self.result, mean=self.mean, rstd=self.rstd,
        )  # fmt: skip

    def outputs(self) -> list[Tensor]:
        return [self.total, self.result, self.mean, self.rstd]

    def clear(self) -> list[Tensor]:
        """Return the outputs, and put NaN in their place."""
        copies = [t.clone() for t in self.outputs()]
        for t in self.outputs():
            t.fill_(torch.nan)
        return copies


def addresses_of(launch: Launch) -> list[int]:
    return [value.data_ptr() for value in launch.arguments.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_the_bits_of_an_ordinary_launch(way, offset):
    norm = Norm(WAYS[way], offset)
    launches = norm.launches()
    prepared = [prepare(launch) for launch in launches]
    assert [p.why_not_direct for p in prepared] == [None] * len(launches)
    assert all(all(p.aligned) for p in prepared) == (offset == 0 or all(
        "weight" not in launch.arguments for launch in launches
    ))  # fmt: skip
    for launch in launches:
        launch.launch()
    expected = norm.clear()
    for p, launch in zip(prepared, launches, strict=True):
        p(stream_of(), *addresses_of(launch))
    assert all(map(torch.equal, norm.clear(), expected))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for p, launch in zip(prepared, launches, strict=True):
            p(side.cuda_stream, *addresses_of(launch))
    torch.cuda.current_stream().wait_stream(side)
    assert all(map(torch.equal, norm.clear(), expected))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = [prepare(launch) for launch in launches]  # of kernels that are loaded
        for p, launch in zip(again, launches, strict=True):
            p(stream_of(), *addresses_of(launch))
    for _ in range(2):
        norm.clear()
        graph.replay()
        assert all(map(torch.equal, norm.outputs(), expected))


@pytest.mark.parametrize("shared", ["nothing", "total in x", "total in x, result in residual"])
@pytest.mark.parametrize("way", WAYS)
def test_a_prepared_norm_and_memory_that_is_used_again(way, shared):
    norm = Norm(WAYS[way])
    for launch in norm.launches():
        launch.launch()
    expected = norm.clear()
    total = norm.total if shared == "nothing" else norm.x
    result = norm.residual if "result" in shared else norm.result
    prepared = prepare_forward(
        WAYS[way], torch.bfloat16, torch.device("cuda"), True, GROUPS, 1e-5, "relu",
        torch.float32, torch.float32,
        has_residual=True, sum_in_place=shared != "nothing", keeps_statistics=False,
    )  # fmt: skip
    tensors = (norm.x, norm.residual, norm.weight, norm.bias, total, result)
    prepared(stream_of(), *(t.data_ptr() for t in tensors), 0, 0)
    assert torch.equal(total, expected[0])
    assert torch.equal(result, expected[1])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("channels", [32, 64, 256])
def test_sums_in_place_in_tiles_of_few_elements(channels, size):
    """No element may be loaded by two threads, of which one then reads what the other has stored."""
    shape = (256, channels, size, size)
    for _ in range(20):
        norm = Norm(shape)
        for launch in norm.launches():
            launch.launch()
        expected = norm.clear()
        for launch in kernels.forward_launches(
            norm.x, norm.residual, norm.weight, norm.bias, 1e-5, "relu", True,
            total=norm.x, result=norm.residual, mean=norm.mean, rstd=norm.rstd,
        ):  # fmt: skip
            launch.launch()
        actual = [norm.x, norm.residual, norm.mean, norm.rstd]
        assert all(map(torch.equal, actual, expected))


# ---- eager calls ----------------------------------------------------------------------------------


def step(shape: tuple[int, int, int, int]) -> Callable[[], list[Tensor]]:
    """Return what runs both forms of the op and their gradients."""
    norm = Norm(shape)
    leaves = [t.requires_grad_() for t in (norm.x, norm.residual, norm.weight, norm.bias)]
    grad = torch.randn_like(norm.x)

    def run() -> list[Tensor]:
        with use_backend(group_norm_act="triton"):
            total, result = add_group_norm_act(*leaves, GROUPS)
            last = group_norm_act(result, *leaves[2:], GROUPS, activation="gelu")
            grads = torch.autograd.grad((total, last), leaves, (grad, grad))
        return [total, result, last, *grads]

    return run


@pytest.mark.parametrize("way", WAYS)
def test_eager_calls_give_the_bits_of_the_operators(way):
    run = step(WAYS[way])
    with OperatorCalls():
        expected = run()
    assert all(map(torch.equal, run(), expected))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        actual = run()
    torch.cuda.current_stream().wait_stream(side)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("way", ["one tile", "split"])
def test_eager_calls_in_a_graph(way):
    run = step(WAYS[way])
    expected = run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run()
    for _ in range(2):
        for t in actual:
            t.detach().fill_(torch.nan)
        graph.replay()
        assert all(map(torch.equal, actual, expected))


def test_weights_in_a_graph():
    weights = [torch.randn(64, 64, 3, 3, device="cuda", requires_grad=True) for _ in range(3)]
    grads = [torch.randn_like(w) for w in weights]

    def run() -> list[Tensor]:
        with use_backend(weight_standardization="triton"):
            results = weight_standardization_all(weights, channels_last=True)
        return [*results, *torch.autograd.grad(results, weights, grads)]

    expected = [t.detach().clone() for t in run()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run()
    graph.replay()
    assert all(map(torch.equal, actual, expected))


def test_threads_with_streams_of_their_own():
    run = step(WAYS["split"])
    expected = run()
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                actual = run()
                torch.cuda.current_stream().synchronize()
                if not all(map(torch.equal, actual, expected)):
                    wrong.append(number)

    in_threads(work, 4)
    assert not wrong


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_eager_calls_on_another_device_than_the_current_one():
    norm = Norm(WAYS["split"])
    tensors = (norm.x, norm.residual, norm.weight, norm.bias)
    with use_backend(group_norm_act="triton"):
        expected = add_group_norm_act(*tensors, GROUPS)
        actual = add_group_norm_act(*(t.to("cuda:1") for t in tensors), GROUPS)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), e.cpu()) for a, e in zip(actual, expected, strict=True))
