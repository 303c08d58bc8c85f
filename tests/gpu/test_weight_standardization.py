"""The Triton and CUDA kernels of weight_standardization as a GPU runs them; see test_group_norm_act.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from bitfast.backends import use_backend
from bitfast.configuration import BitConfig
from bitfast.modeling import BitModel
from bitfast.ops.weight_standardization import weight_standardization, weight_standardization_all
from tests.feature_maps import DTYPES, LAYOUTS
from tests.gpu.test_group_norm_act import ON_GPU, need_memory, needs_cuda
from tests.interpreter import DEVICE
from tests.plain_ops import plain_standardization
from tests.tolerances import assert_within_contract, relative_error
from tests.weight_changes import convolutions

SMALL = [(5, 3, 7, 7), (3, 16, 1, 1), (9, 64, 3, 3), (2, 7, 3, 2)]
LARGE = [
    (64, 3, 7, 7), (2048, 1024, 1, 1), (512, 512, 3, 3), (64, 6144, 1, 1), (3, 9001, 1, 1),
    (256, 2048, 3, 3),
]  # fmt: skip
SHAPES = [*SMALL, *(LARGE if ON_GPU else [])]


@pytest.fixture(autouse=True, params=["triton", "native"] if ON_GPU else ["triton"])
def backend(request) -> Iterator[str]:
    with use_backend(weight_standardization=request.param):
        yield request.param


def draw(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    mean: float = 0.0,
) -> Tensor:
    weight = 0.1 * (torch.randn(*shape, device=DEVICE) + mean)
    return weight.to(dtype).contiguous(memory_format=layout)


def shapes_of_r50x1() -> list[torch.Size]:
    small = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 2}
    with torch.device("meta"):
        model = BitModel(BitConfig(**({} if ON_GPU else small)))
    return [layer.weight.shape for layer in convolutions(model)]


# ---- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [0.0, -2.3, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_weight(dtype, mean, layout):
    for shape in SHAPES:
        weight = draw(shape, dtype, layout, mean)
        actual = weight_standardization(weight)
        assert actual.stride() == weight.stride()
        oracle = plain_standardization(weight.double())
        assert_within_contract(
            actual, plain_standardization(weight.contiguous()), oracle, str(shape)
        )


@pytest.mark.parametrize("to_channels_last", [False, True])
@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_weights_together(dtype, result, to_channels_last):
    weights = [draw(s, dtype, layout) for s in SHAPES for layout in LAYOUTS]
    actual = weight_standardization_all(weights, dtype=result, channels_last=to_channels_last)
    for weight, a in zip(weights, actual, strict=True):
        layout = torch.channels_last if to_channels_last else torch.contiguous_format
        if to_channels_last or weight.is_contiguous():
            assert a.is_contiguous(memory_format=layout)
        baseline = plain_standardization(weight.contiguous()).to(result)
        assert_within_contract(
            a, baseline, plain_standardization(weight.double()), str(tuple(weight.shape))
        )


def test_the_weights_of_a_model_take_one_launch(monkeypatch, backend):
    if backend == "native":
        pytest.skip("counts Triton's launches; the extension makes one, as its entry shows")
    from bitfast.kernels.launch import Launch

    launches = []
    run = Launch.launch

    def counted(self: Launch, kernel: object = None) -> None:
        launches.append(self)
        run(self, kernel)

    monkeypatch.setattr(Launch, "launch", counted)
    weights = [draw(shape) for shape in shapes_of_r50x1()]
    actual = weight_standardization_all(weights, dtype=torch.bfloat16, channels_last=True)
    assert len(launches) == 1
    for weight, a in zip(weights, actual, strict=True):
        baseline = plain_standardization(weight).bfloat16()
        assert_within_contract(
            a, baseline, plain_standardization(weight.double()), str(tuple(weight.shape))
        )


def gradients(function, weights: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
    weights = [weight.detach().clone().requires_grad_() for weight in weights]
    results = function(weights)
    return torch.autograd.grad(
        results, weights, [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype, together, layout):
    weights = [draw(s, dtype, layout) for s in SHAPES]
    grads = [draw(s, dtype, layout) for s in SHAPES]

    def ours(weights: list[Tensor]) -> list[Tensor]:
        if together:
            return weight_standardization_all(weights, channels_last=True)
        return [weight_standardization(weight) for weight in weights]

    def theirs(weights: list[Tensor]) -> list[Tensor]:
        return [plain_standardization(weight) for weight in weights]

    actual = gradients(ours, weights, grads)
    baseline = gradients(theirs, weights, grads)
    oracle = gradients(theirs, [w.double() for w in weights], grads)
    for shape, a, p, o in zip(SHAPES, actual, baseline, oracle, strict=True):
        assert_within_contract(a, p, o, str(shape))


def test_equal_inputs_give_equal_bits():
    weights = [draw(shape).requires_grad_() for shape in shapes_of_r50x1()]
    grads = [torch.randn_like(weight) for weight in weights]

    def run() -> list[Tensor]:
        results = weight_standardization_all(weights, channels_last=True)
        return [*results, *torch.autograd.grad(results, weights, grads)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_filter(value):
    weight = draw((5, 16, 3, 3))
    weight[2, 1, 0, 1] = value
    for actual in (weight_standardization(weight), weight_standardization_all([weight])[0]):
        torch.testing.assert_close(actual, plain_standardization(weight), equal_nan=True)
        assert actual[2].isnan().all()


# ---- offsets --------------------------------------------------------------------------------------


def huge_weight() -> Tensor:
    """Return a weight whose last filters lie past the 2^31st element; in the interpreter a small one."""
    filters, channels = (66_000, 32_768) if ON_GPU else (5, 32)
    weight = torch.empty((filters, channels, 1, 1), dtype=torch.bfloat16, device=DEVICE)
    for part in weight.split(4096):
        part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device=DEVICE))
    return weight


def assert_last_filters(results: Tensor, weight: Tensor) -> None:
    last = weight[-4:].contiguous()
    assert_within_contract(
        results[-4:], plain_standardization(last), plain_standardization(last.double())
    )
    assert relative_error(results[-4:], weight_standardization(last)) < 2**-9


def test_filters_past_two_billion_elements():
    need_memory(10)
    weight = huge_weight()
    assert_last_filters(weight_standardization(weight), weight)


@pytest.mark.parametrize("to_channels_last", [False, True])
def test_a_buffer_of_more_than_two_billion_elements(to_channels_last):
    need_memory(10)
    weight, small = huge_weight(), draw((8, 16, 3, 3), torch.bfloat16)
    results = weight_standardization_all([weight, small], channels_last=to_channels_last)
    assert_last_filters(results[0], weight)
    assert_within_contract(
        results[1], plain_standardization(small), plain_standardization(small.double())
    )


def test_gradients_past_two_billion_elements():
    need_memory(19)
    weight = huge_weight().requires_grad_()
    grad = torch.ones_like(weight)
    grad[-4:] = torch.randn(grad[-4:].shape, device=DEVICE).bfloat16()
    (actual,) = torch.autograd.grad(weight_standardization(weight), weight, grad)
    last = [weight[-4:].detach()], [grad[-4:]]
    (baseline,) = gradients(lambda weights: [plain_standardization(weights[0])], *last)
    (oracle,) = gradients(
        lambda weights: [plain_standardization(weights[0])], [last[0][0].double()], last[1]
    )
    assert_within_contract(actual[-4:], baseline, oracle)


# ---- streams and devices --------------------------------------------------------------------------


@needs_cuda
def test_the_current_stream_is_used():
    weights = [draw(shape) for shape in shapes_of_r50x1()]
    doubled = [weight * 2 for weight in weights]
    expected = weight_standardization_all(doubled)  # also compiles the kernel
    for weight in doubled:
        weight.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for weight, double in zip(weights, doubled, strict=True):
            torch.mul(weight, 2, out=double)  # not there yet when the weights are standardized
        actual = weight_standardization_all(doubled)
    stream.synchronize()
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    weights = [draw(shape) for shape in SMALL]
    expected = weight_standardization_all(weights)
    moved = [weight.to("cuda:1").requires_grad_() for weight in weights]
    assert torch.cuda.current_device() == 0
    results = weight_standardization_all(moved)
    for a, e in zip(results, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        assert torch.equal(a.cpu(), e.cpu())
    for gradient in torch.autograd.grad(sum(r.square().sum() for r in results), moved):
        assert gradient.isfinite().all()
