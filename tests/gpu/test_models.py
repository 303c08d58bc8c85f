"""Whole models on a GPU: graphs, compilation, autocast, kept weights, memory, streams.

What needs no CUDA as such also runs in Triton's interpreter; see test_group_norm_act.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfast.backends import use_backend
from bitfast.configuration import BitConfig
from bitfast.modeling import BitForImageClassification, BitModel
from tests.gpu.test_group_norm_act import ON_GPU, needs_cuda
from tests.interpreter import DEVICE
from tests.threads import in_threads
from tests.tolerances import relative_error
from tests.weight_changes import move_weights

SMALL: dict[str, Any] = (
    {"embedding_size": 32, "hidden_sizes": [64, 128, 96], "depths": [2, 2, 1], "num_groups": 8}
    if ON_GPU
    else {"embedding_size": 8, "hidden_sizes": [16], "depths": [1], "num_groups": 2}
)
SIZE = 64 if ON_GPU else 16
LABELS = 7


def on_triton() -> AbstractContextManager[None]:
    return use_backend(group_norm_act="triton", weight_standardization="triton")


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Run on the Triton kernels, and without TF32, whose error would hide all others."""
    previous = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with on_triton():
        yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = previous


def make(kind: Callable[..., Any], **settings: Any) -> Any:
    """Return a model on the device, in training, with norms that are not at their defaults."""
    model = kind(BitConfig(**{**SMALL, "num_labels": LABELS, **settings})).to(DEVICE)
    move_weights(model)
    return model


def images(batch: int, size: int = SIZE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, size, size, device=DEVICE).to(dtype)


def features(model: BitModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).pooler_output.flatten(1)


def loss_gradient(model: nn.Module, x: Tensor, run: Any = None) -> Tensor:
    """Return the gradient of all parameters, as one vector; ``run`` may stand in for the model."""
    model.zero_grad(set_to_none=True)
    labels = torch.arange(x.shape[0], device=x.device) % LABELS
    logits = (model if run is None else run)(x).logits
    F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def in_float64(model: nn.Module, x: Tensor, result: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """Return what the reference makes of the model and the images in float64; the model is as before."""
    dtype = next(model.parameters()).dtype
    try:
        with use_backend("reference"):
            return result(model.double(), x.double())
    finally:
        model.to(dtype)


# ---- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_type", ["preactivation", "bottleneck"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_are_within_the_contract(dtype, layer_type):
    model = make(BitModel, layer_type=layer_type).to(dtype).eval()
    x = images(3, dtype=dtype)
    oracle = in_float64(model, x, features)
    with use_backend("reference"):
        plain = relative_error(features(model, x), oracle)
    assert relative_error(features(model, x), oracle) <= 2 * plain + torch.finfo(dtype).eps / 2


def test_a_training_step_under_autocast_is_within_the_contract():
    model = make(BitForImageClassification)
    x = images(4)
    oracle = in_float64(model, x, loss_gradient)

    def error() -> float:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            gradient = loss_gradient(model, x)
        assert gradient.dtype == torch.float32
        return relative_error(gradient, oracle)

    with use_backend("reference"):
        plain = error()
    assert error() <= 2 * plain + torch.finfo(torch.bfloat16).eps / 2


def test_equal_images_give_equal_bits():
    model = make(BitModel).to(torch.bfloat16).eval()
    x = images(3, dtype=torch.bfloat16)
    first = features(model, x)
    assert torch.equal(first, features(model, x))
    model.eval()  # drops the weights that were kept
    assert torch.equal(first, features(model, x))


# ---- kept weights ---------------------------------------------------------------------------------


def test_an_optimizer_step_renews_the_kept_weights():
    model, x = make(BitModel).eval(), images(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = features(model, x)
    model(x).pooler_output.square().sum().backward()
    optimizer.step()
    after = features(model, x)
    model.eval()
    assert relative_error(after, before) > 1e-4
    assert relative_error(after, features(model, x)) < 1e-6


def test_loading_renews_the_kept_weights():
    model, other, x = make(BitModel).eval(), make(BitModel).eval(), images(2)
    features(model, x)
    model.load_state_dict(other.state_dict())
    assert relative_error(features(model, x), features(other, x)) < 1e-6


# ---- CUDA graphs ----------------------------------------------------------------------------------


@contextmanager
def captured(model: BitModel, x: Tensor) -> Iterator[tuple[torch.cuda.CUDAGraph, Tensor]]:
    """Capture the evaluation of x in a graph; yields the graph and what it writes."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        result = model(x).pooler_output.flatten(1)
    yield graph, result


def warm_up(model: BitModel, x: Tensor) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            features(model, x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


@needs_cuda
@pytest.mark.parametrize("are_kept", [True, False])
def test_a_replayed_graph_equals_eager(are_kept):
    model, x = make(BitModel).to(torch.bfloat16).eval(), images(2, dtype=torch.bfloat16)
    warm_up(model, x)
    if not are_kept:
        model.eval()  # the weights are standardized within the graph
    with captured(model, x) as (graph, result):
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.cuda.synchronize()
            assert relative_error(result, features(model, x)) < 1e-3


@needs_cuda
def test_graphs_after_a_change_of_the_weights():
    model, x = make(BitModel).eval(), images(2)
    warm_up(model, x)
    with captured(model, x) as (old_graph, old_result):
        old_graph.replay()
        before = old_result.clone()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        warm_up(model, x)
        with captured(model, x) as (new_graph, new_result):
            new_graph.replay()
            torch.cuda.synchronize()
            assert relative_error(new_result, features(model, x)) < 1e-5
            assert relative_error(new_result, before) > 1e-3


# ---- torch.compile --------------------------------------------------------------------------------

COMPILER = "inductor" if ON_GPU else "aot_eager"


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_evaluation_has_one_graph_for_all_batches():
    model = make(BitForImageClassification).eval()
    compiled = torch.compile(model, fullgraph=True, backend=COMPILER)
    for number, batch in enumerate((2, 3, 5)):
        x = images(batch)
        stance = "fail_on_recompile" if number == 2 else "default"
        with torch.no_grad(), torch.compiler.set_stance(stance):
            actual = compiled(x).logits
        with torch.no_grad():
            assert relative_error(actual, model(x).logits) < 1e-5


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_training_equals_eager():
    # A smooth activation: at the kink of a ReLU rounding decides about a whole pixel's gradient.
    model = make(BitForImageClassification, hidden_act="gelu")
    compiled = torch.compile(model, fullgraph=True, backend=COMPILER)
    for batch in (2, 3):
        x = images(batch)
        actual = loss_gradient(model, x, compiled)
        assert relative_error(actual, loss_gradient(model, x)) < 1e-3


# ---- memory, threads ------------------------------------------------------------------------------


@needs_cuda
def test_a_training_step_needs_less_memory_than_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    settings = {"num_labels": LABELS, "depths": [3, 4, 6, 3]}
    peaks = []
    for model in (
        BitForImageClassification(BitConfig(**settings)),
        transformers.BitForImageClassification(transformers.BitConfig(**settings)),
    ):
        model.to(DEVICE)
        x = images(16, 224)
        for _ in range(2):  # the first one compiles
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = F.cross_entropy(
                    model(x).logits.float(), torch.arange(16, device=DEVICE) % LABELS
                )
            loss.backward()
            peak = torch.cuda.max_memory_allocated() - before
            model.zero_grad(set_to_none=True)
            del loss
        peaks.append(peak)
        model.cpu()
    assert peaks[0] < peaks[1]


@pytest.mark.parametrize("are_kept", [True, False])
def test_two_threads_on_two_streams(are_kept):
    model = make(BitModel).eval()
    inputs = [images(2) for _ in range(2)]
    expected = [features(model, x) for x in inputs]
    if not are_kept:
        model.eval()  # both threads will find that there are no weights
    rounds = 20 if ON_GPU else 1  # on the CPU with the reference: the interpreter has no threads
    barrier = threading.Barrier(2)
    results: list[list[Tensor]] = [[], []]

    def run(number: int) -> None:
        with ExitStack() as stack:
            if ON_GPU:
                stack.enter_context(on_triton())  # each thread chooses for itself
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
            barrier.wait(60)
            results[number] += [features(model, inputs[number]) for _ in range(rounds)]
            if ON_GPU:
                torch.cuda.current_stream().synchronize()

    if ON_GPU:
        torch.cuda.synchronize()
    in_threads(run, 2)
    for number in range(2):
        assert len(results[number]) == rounds
        for result in results[number]:
            assert relative_error(result, expected[number]) < 1e-5


@needs_cuda
def test_evaluation_on_another_stream_right_after_a_change():
    """The weights are standardized on the stream that asks, after what it has been given before."""
    model, x = make(BitModel).eval(), images(2)
    target = make(BitModel).eval()
    expected = features(target, x)
    features(model, x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(50_000_000)
        for parameter, new in zip(model.parameters(), target.parameters(), strict=True):
            parameter.copy_(new)
        actual = features(model, x)
    stream.synchronize()
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_device_than_the_current_one():
    model, x = make(BitModel).eval(), images(2)
    expected = features(model, x)
    moved = model.to("cuda:1")
    actual = features(moved, x.to("cuda:1"))
    assert relative_error(actual.cpu(), expected.cpu()) < 1e-5
