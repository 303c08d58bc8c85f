"""The CUDA kernels of norm_convolution on a card; tests/test_norm_convolution_cuda.py emulates them.

The simple cases come first: a fault that spoils the GPU for this process fails all that follow.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.norm_convolutions import LAYERS, Layer
from bitfast import BitConfig, BitModel, extension
from bitfast.backends import disable_kernel, enable_kernel, use_backend
from bitfast.graphs import capture
from bitfast.ops import first_use
from bitfast.ops.norm_convolution import OP, Norm
from bitfast.ops.norm_convolution_cuda import (
    CAPABILITY,
    Convolution,
    Sides,
    cell_channels_of,
    pack_filters,
    partials_shape,
    prepare_convolution,
    uses_fused_convolution,
    why_no_factors,
    why_no_kernels,
    why_unsuited,
)
from bitfast.ops.norm_convolution_fused import Fused, cell_moments, fused_convolution
from tests.gpu.test_group_norm_act import need_memory
from tests.plain_ops import plain_norm
from tests.test_execution_cuda import plans
from tests.threads import in_threads
from tests.tiny_models import ours
from tests.tolerances import assert_within_contract, relative_error
from tests.weight_changes import move_weights

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != CAPABILITY,
    reason="needs a GPU of compute capability 9.0, for whose wgmma the kernels are written",
)

DEVICE, GROUPS = "cuda", 32
BFLOAT, HALF = torch.bfloat16, torch.float16
NONE: Sides = (0, 0, 0, 0)
FEW = (LAYERS[0], LAYERS[5], LAYERS[10], LAYERS[12], LAYERS[-1])
"""Of a large map with a residual, of many channels, 3x3, 3x3 of stride 2, and with a second result."""


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- inputs, and what is right ------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A fused convolution and its inputs; see :func:`fused_convolution`."""

    x: Tensor
    norm: Norm | None
    filters: Tensor
    stride: int = 1
    padding: Sides = NONE
    residual: Tensor | None = None
    next_groups: int | None = GROUPS
    second_filters: Tensor | None = None

    def run(self, partials: Tensor | None = None) -> Fused:
        """Run the kernels, where memory that becomes free holds NaN."""
        second = self.second_filters
        packed, second_packed = (
            None if f is None else pack_filters(f) for f in (self.filters, second)
        )
        assert packed is not None
        poison = [torch.full_like(self.plain_result(self.x), torch.nan) for _ in range(2)]
        del poison
        return fused_convolution(
            self.x, self.norm, packed, stride=self.stride, padding=self.padding, residual=self.residual,
            partials=partials, next_groups=self.next_groups, second_packed=second_packed,
        )  # fmt: skip

    def plain_result(self, x: Tensor, second: bool = False) -> Tensor:
        """Return the (second) result by plain PyTorch, in the dtype of x."""
        if self.norm is not None:
            x = plain_norm(x, *self.norm[:3], self.norm.activation)
        filters = self.second_filters if second else self.filters
        assert filters is not None
        top, bottom, left, right = self.padding
        padded = F.pad(x, (left, right, top, bottom)).contiguous(memory_format=torch.channels_last)
        result = F.conv2d(padded, filters.to(x.dtype), None, self.stride)
        return result if second or self.residual is None else result + self.residual.to(x.dtype)

    def check(self, found: Fused) -> None:
        """Hold everything that the kernels left to the contract."""
        compare = [(found.result, False)]
        if found.second is not None:
            compare.append((found.second, True))
        assert (found.second is None) == (self.second_filters is None)
        for actual, second in compare:
            plain, exact = (self.plain_result(x, second) for x in (self.x, self.x.double()))
            assert actual.is_contiguous(memory_format=torch.channels_last)
            assert_within_contract(actual, plain, exact, f"the {'second ' * second}result")
        if self.next_groups is None:
            assert found.partials is None
        else:
            assert found.partials is not None
            assert_measures(found.partials, found.result)


def assert_measures(partials: Tensor, result: Tensor) -> None:
    """Hold partials to what was stored, however far its mean lies from zero."""
    pixels = result.shape[2] * result.shape[3]
    assert (partials[:, :, 0, 0].sum(1) == pixels).all()
    assert not partials[:, :, 0, 1].any()
    assert not partials[partials[:, :, 0, 0] == 0].any(), "a strip without pixels has statistics"
    mean, variance = cell_moments(partials, result.shape[1])
    cells = result.double().permute(0, 2, 3, 1).unflatten(3, (mean.shape[1], -1))
    exact_variance, exact_mean = torch.var_mean(cells, (1, 2, 4), correction=0)
    deviation = exact_variance.sqrt()
    off = (mean - exact_mean).abs()
    assert (off <= 1e-5 * deviation + 2**-20 * exact_mean.abs()).all(), (off / deviation).max()
    variance_off = (variance - exact_variance).abs()
    allowed = 2e-5 * exact_variance + 1e-13 * exact_mean.square()
    assert (variance_off <= allowed).all(), (variance_off / exact_variance).max()


def draw(*shape: int, dtype: torch.dtype = BFLOAT, mean: float = 0.0) -> Tensor:
    drawn = torch.randn(shape, device=DEVICE) + mean
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return drawn.to(dtype).contiguous(memory_format=layout)


def draw_filters(out: int, channels: int, size: int, dtype: torch.dtype = BFLOAT) -> Tensor:
    return draw(out, channels, size, size, dtype=dtype) * (channels * size**2) ** -0.5


def draw_norm(
    channels: int,
    groups: int = GROUPS,
    dtype: torch.dtype = torch.float32,
    activation: str = "relu",
) -> Norm:
    weight = torch.rand(channels, device=DEVICE) + 0.5
    return Norm(weight.to(dtype), draw(channels, dtype=dtype), groups, 1e-5, activation)


def problem_of(
    layer: Layer, images: int, dtype: torch.dtype = BFLOAT, mean: float = -2.3
) -> Problem:
    """Draw the inputs of a layer."""
    channels, size, second = layer.channels, layer.result_size, layer.second_channels
    filters = partial(draw_filters, channels=channels, size=layer.kernel_size, dtype=dtype)
    return Problem(
        draw(images, channels, layer.size, layer.size, dtype=dtype, mean=mean),
        draw_norm(channels), filters(layer.out_channels), layer.stride, (layer.padding,) * 4,
        draw(images, layer.out_channels, size, size, dtype=dtype) if layer.adds else None,
        GROUPS if layer.measures else None,
        filters(second) if second else None,
    )  # fmt: skip


def tensors_of(found: Fused) -> list[Tensor]:
    return [tensor for tensor in found if tensor is not None]


def assert_same_bits(found: Fused, expected: Fused) -> None:
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)


# ---- one convolution ----------------------------------------------------------------------------------------


def test_the_first_use_finds_nothing_wrong() -> None:
    assert extension.CUDA.problem is None
    assert first_use.why_unusable(OP) is None
    assert why_no_kernels() is None


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
@pytest.mark.parametrize("images", [1, 3, 128])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.words(1))
def test_every_convolution_of_r50x1(layer: Layer, images: int, dtype: torch.dtype) -> None:
    need_memory(12)
    problem = problem_of(layer, images, dtype)
    problem.check(problem.run())


@pytest.mark.parametrize("layer", FEW, ids=lambda layer: layer.words(2))
def test_without_its_parts(layer: Layer) -> None:
    problem = problem_of(layer, 2)
    activation = draw_norm(layer.channels, activation="none")
    parts: list[dict[str, Any]] = [{"norm": activation}]
    parts += [{name: None} for name in ("norm", "next_groups", "residual", "second_filters")]
    for part in parts:
        changed = problem._replace(**part)
        changed.check(changed.run())


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_odd_shapes(dtype: torch.dtype) -> None:
    """Images of any size, channels that are no multiples of 64, padding that differs from side to side."""
    for _ in range(80):
        problem = drawn_problem(dtype)
        problem.check(problem.run())


def drawn_problem(dtype: torch.dtype) -> Problem:
    while True:
        images, height, width = (random.randint(1, most) for most in (5, 40, 40))
        channels, out, second = (8 * random.randint(1, most) for most in (40, 40, 20))
        size, stride = random.choice((1, 3)), random.choice((1, 2))
        padding = tuple(random.randint(0, size - 1) for _ in range(4))
        groups, next_groups = (
            random.choice([g for g in (1, 2, 4, 8, 16, 32) if why_no_factors(n, g) is None])
            for n in (channels, out)
        )
        convolution = Convolution(
            (images, channels, height, width), dtype, size, stride, padding, out, activation="relu"
        )  # fmt: skip
        if why_unsuited(convolution) is not None:
            continue
        result_shape = images, out, *convolution.result_size
        if min(result_shape[2] * result_shape[3], height * width) < 2:
            continue  # of a single pixel's few channels the statistics are a matter of rounding
        return Problem(
            draw(images, channels, height, width, dtype=dtype, mean=-2.3),
            draw_norm(channels, groups, random.choice((dtype, torch.float32))),
            draw_filters(out, channels, size, dtype), stride, padding,
            draw(*result_shape, dtype=dtype) if random.random() < 0.5 else None,
            next_groups,
            draw_filters(second, channels, size, dtype) if random.random() < 0.3 else None,
        )  # fmt: skip


def test_means_far_from_zero() -> None:
    """Of what is read, and of what is stored: its statistics must not cancel."""
    for layer in (LAYERS[0], LAYERS[10]):
        problem = problem_of(layer, 2, mean=100.0)
        size = layer.result_size
        residual = draw(2, layer.out_channels, size, size, mean=100.0)
        problem = problem._replace(residual=residual)
        found = problem.run()
        exact = problem.plain_result(problem.x.double())
        assert_within_contract(found.result, problem.plain_result(problem.x), exact)
        assert found.partials is not None
        assert_measures(found.partials, found.result)


@pytest.mark.parametrize("layer", FEW, ids=lambda layer: layer.words(3))
def test_nan_and_infinity_come_out_where_plain_pytorch_lets_them(layer: Layer) -> None:
    problem = problem_of(layer, 3)
    clean = problem_of(layer, 3)._replace(norm=None, filters=problem.filters)
    for value, row, column in (("nan", 0, 0), ("inf", 3, 2), ("-inf", layer.size - 1, 4)):
        clean.x[1, layer.channels // 2, row, column] = float(value)
    found = clean.run()
    exact = clean.plain_result(clean.x.double())
    for marks in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(marks(found.result), marks(exact))
    assert found.partials is not None
    assert found.partials[[0, 2]].isfinite().all()
    assert cell_moments(found.partials, found.result.shape[1])[:, 1].isnan().any()
    # Through the norm: one number spoils the statistics of its group, and so every pixel of its image.
    problem.x[1, 3, 2, 1] = float("nan")
    result = problem.run().result
    assert result[1].isnan().all()
    assert result[[0, 2]].isfinite().all()


def test_relu_lets_nan_through() -> None:
    """With statistics of clean numbers a NaN reaches the pixels around it, and the zeros around images none."""
    for layer in (LAYERS[1], LAYERS[8], LAYERS[13]):
        problem = problem_of(layer, 2)
        assert problem.norm is not None
        measured = fused_convolution(
            problem.x, None, pack_filters(identity_of(layer.channels)), next_groups=GROUPS
        )
        problem.x[0, 5, 0, layer.size - 1] = float("nan")
        result = problem.run(measured.partials).result
        marked = torch.zeros(2, 1, layer.size, layer.size, device=DEVICE)
        marked[0, :, 0, -1] = 1
        window = torch.ones(1, 1, layer.kernel_size, layer.kernel_size, device=DEVICE)
        reached = F.conv2d(marked, window, None, layer.stride, layer.padding) > 0
        assert torch.equal(result.isnan(), reached.expand_as(result))


def identity_of(channels: int) -> Tensor:
    return torch.eye(channels, device=DEVICE, dtype=BFLOAT)[:, :, None, None]


def test_a_measured_copy() -> None:
    """1x1 filters that copy: the partials are those of the numbers that were read."""
    x = draw(2, 64, 9, 13, mean=-2.3)
    found = fused_convolution(x, None, pack_filters(identity_of(64)), next_groups=GROUPS)
    assert torch.equal(found.result, x)
    assert found.partials is not None
    assert_measures(found.partials, x)


# ---- memory -------------------------------------------------------------------------------------------------


GUARD = 4096
"""Numbers before and after what is written."""


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Callable[[], None]]:
    """Return memory full of NaN, and what asserts that nothing around it was written."""
    numbers = torch.Size(shape).numel()
    whole = torch.full((numbers + 2 * GUARD,), torch.nan, dtype=dtype, device=DEVICE)

    def check() -> None:
        assert whole[:GUARD].isnan().all()
        assert whole[GUARD + numbers :].isnan().all()
        assert not whole[GUARD : GUARD + numbers].isnan().any()

    return whole[GUARD : GUARD + numbers].view(shape), check


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.words(1))
def test_nothing_else_is_written_and_all_of_it_is(layer: Layer, images: int) -> None:
    problem = problem_of(layer, images)
    cell_channels = cell_channels_of(layer.out_channels, GROUPS)
    prepared = prepare_convolution(
        Convolution(
            tuple(problem.x.shape), BFLOAT, layer.kernel_size, layer.stride, problem.padding,
            layer.out_channels, layer.second_channels, None, layer.adds, cell_channels,
        )
    )  # fmt: skip
    expected = problem._replace(norm=None, next_groups=GROUPS).run()
    shape = partials_shape(images, prepared.strips, layer.out_channels, cell_channels)
    places = [guarded(prepared.result_shape, BFLOAT), guarded(shape, torch.float32)]
    if prepared.second_shape is not None:
        places.append(guarded(prepared.second_shape, BFLOAT))
    result, partials, *second = (memory.data_ptr() for memory, _ in places)
    packed = pack_filters(problem.filters)
    second_packed = None if problem.second_filters is None else pack_filters(problem.second_filters)
    residual = 0 if problem.residual is None else problem.residual.data_ptr()
    stream = torch.cuda.current_stream().cuda_stream
    prepared.run(
        stream, problem.x.data_ptr(), 0, packed.data_ptr(), residual, result, partials,
        0 if second_packed is None else second_packed.data_ptr(), *(second or [0]),
    )  # fmt: skip
    for _, check in places:
        check()
    written = [memory for memory, _ in places]
    for memory, tensor in zip(written, tensors_of(expected), strict=True):
        in_order = tensor if tensor is expected.partials else tensor.permute(0, 2, 3, 1)
        assert torch.equal(memory.flatten(), in_order.flatten())


@pytest.mark.parametrize("images", [2, 128])
def test_the_residual_may_be_the_result(images: int) -> None:
    for layer in (LAYERS[0], LAYERS[4], LAYERS[6]):
        problem = problem_of(layer, images)._replace(norm=None)
        assert problem.residual is not None
        expected = problem.run()
        cell_channels = cell_channels_of(layer.out_channels, GROUPS)
        prepared = prepare_convolution(
            Convolution(
                tuple(problem.x.shape), BFLOAT, 1, 1, NONE, layer.out_channels, adds=True,
                cell_channels=cell_channels,
            )
        )  # fmt: skip
        shape = partials_shape(images, prepared.strips, layer.out_channels, cell_channels)
        partials, packed = torch.empty(shape, device=DEVICE), pack_filters(problem.filters)
        memory = problem.residual.data_ptr()
        stream = torch.cuda.current_stream().cuda_stream
        prepared.run(
            stream, problem.x.data_ptr(), 0, packed.data_ptr(), memory, memory, partials.data_ptr()
        )
        assert torch.equal(problem.residual, expected.result)
        assert expected.partials is not None
        assert torch.equal(partials, expected.partials)


def test_offsets_past_two_billion() -> None:
    """Of the result of the first convolution, which the second reads."""
    need_memory(24)
    images = 2**31 // (256 * 56 * 56) + 20
    x = (
        draw(4, 64, 56, 56)
        .repeat(images // 4, 1, 1, 1)
        .contiguous(memory_format=torch.channels_last)
    )
    wide = Problem(x, draw_norm(64), draw_filters(256, 64, 1))
    found = fused_convolution(x, wide.norm, pack_filters(wide.filters), next_groups=GROUPS)
    assert found.result.numel() > 2**31
    wide = wide._replace(x=x[-4:])
    wide.check(
        Fused(found.result[-4:], None if found.partials is None else found.partials[-4:], None)
    )
    narrow = Problem(found.result, draw_norm(256), draw_filters(64, 256, 1))
    following = fused_convolution(
        narrow.x, narrow.norm, pack_filters(narrow.filters), partials=found.partials
    )
    narrow = narrow._replace(x=found.result[-4:], next_groups=None)
    narrow.check(Fused(following.result[-4:], None, None))


# ---- again and again, elsewhere, in graphs ------------------------------------------------------------------


def chain(layer: Layer, images: int) -> Callable[[], list[Tensor]]:
    """Return what convolves, and convolves the result by the statistics that were left of it."""
    problem = problem_of(layer, images)._replace(next_groups=GROUPS)
    norm, out = draw_norm(layer.out_channels), layer.out_channels
    packed, following = pack_filters(problem.filters), pack_filters(draw_filters(64, out, 1))
    second = None if problem.second_filters is None else pack_filters(problem.second_filters)

    def run() -> list[Tensor]:
        found = fused_convolution(
            problem.x, problem.norm, packed, stride=problem.stride, padding=problem.padding,
            residual=problem.residual, next_groups=GROUPS, second_packed=second,
        )  # fmt: skip
        last = fused_convolution(found.result, norm, following, partials=found.partials)
        return [*tensors_of(found), last.result]

    return run


def are_equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("images", [1, 128])
@pytest.mark.parametrize("layer", FEW, ids=lambda layer: layer.words(1))
def test_equal_inputs_give_equal_bits(layer: Layer, images: int) -> None:
    run = chain(layer, images)
    expected = run()
    assert all(are_equal(run(), expected) for _ in range(20))


@pytest.mark.parametrize("layer", FEW, ids=lambda layer: layer.words(1))
def test_on_another_stream(layer: Layer) -> None:
    run = chain(layer, 8)
    expected = run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = run()
    torch.cuda.current_stream().wait_stream(side)
    assert are_equal(found, expected)


@pytest.mark.parametrize("layer", FEW, ids=lambda layer: layer.words(1))
def test_in_a_graph(layer: Layer) -> None:
    run = chain(layer, 8)
    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(3):
        for tensor in found:
            tensor.fill_(torch.nan)
        graph.replay()
        assert are_equal(found, expected)


def test_threads_with_streams_of_their_own() -> None:
    runs = [chain(layer, 16) for layer in (LAYERS[0], LAYERS[10])]
    expected = [run() for run in runs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found = runs[number]()
                torch.cuda.current_stream().synchronize()
                if not are_equal(found, expected[number]):
                    wrong.append(number)

    in_threads(work, 2)
    assert not wrong


# ---- the switch, and whole models ---------------------------------------------------------------------------


@pytest.fixture
def enabled() -> Iterator[None]:
    enable_kernel(OP, "native", "cuda")
    yield
    disable_kernel(OP, "native", "cuda")


def test_the_kernels_serve_on_demand_only() -> None:
    assert not uses_fused_convolution("cuda", BFLOAT)
    with use_backend(norm_convolution="native"):
        assert uses_fused_convolution("cuda", BFLOAT)
    enable_kernel(OP, "native", "cuda")
    try:
        assert uses_fused_convolution("cuda", BFLOAT)
        assert not uses_fused_convolution("cuda", torch.float32)
    finally:
        disable_kernel(OP, "native", "cuda")
    assert not uses_fused_convolution("cuda", BFLOAT)


def r50x1(dtype: torch.dtype = BFLOAT) -> BitModel:
    torch.manual_seed(0)
    model = BitModel(BitConfig()).cuda().eval()
    move_weights(model)
    return model.to(dtype)


def images_for(batch: int, size: int = 224) -> Tensor:
    return torch.randn(batch, 3, size, size, device=DEVICE).to(BFLOAT)


def last_of(model: BitModel, images: Tensor) -> Tensor:
    return model(images).last_hidden_state


def fused_calls(model: BitModel) -> list[str]:
    """Return the calls of the newest plan that are fused convolutions."""
    names = [name for part in plans(model)[-1].parts for name in part.program.names]
    return [name for name in names if "norm_convolution" in name]


def exact_output(model: BitModel, images: Tensor) -> Tensor:
    exact = r50x1(torch.float64)
    exact.load_state_dict(model.state_dict())
    with use_backend("reference"):
        return last_of(exact, images.double())


AS_EXACT = 1.1
"""How many times the error of unfused plans a fused one may have: they round more often, not less, and luck is
worth a few hundredths."""


@pytest.mark.parametrize(("batch", "size"), [(8, 224), (2, 225), (1, 97)])
def test_whole_models_are_as_exact_as_unfused(batch: int, size: int) -> None:
    model, images = r50x1(), images_for(batch, size)
    unfused = last_of(model, images)
    assert fused_calls(model) == []
    with use_backend(norm_convolution="native"):
        fused = last_of(model, images)
        assert len(fused_calls(model)) > 45
        assert torch.equal(last_of(model, images), fused)
    exact = exact_output(model, images)
    assert relative_error(fused, exact) <= AS_EXACT * relative_error(unfused, exact)


def test_the_hidden_states_of_a_small_model() -> None:
    options = {
        "embedding_size": 64,
        "hidden_sizes": [256, 512],
        "depths": [2, 2],
        "num_groups": GROUPS,
    }
    model: Any = ours("BitModel", **options).cuda().eval()
    move_weights(model)
    model, images = model.bfloat16(), torch.randn(4, 3, 128, 96, device=DEVICE).bfloat16()
    with use_backend(norm_convolution="native"):
        actual = model(images, output_hidden_states=True).hidden_states
        assert fused_calls(model)
    with use_backend("reference"):
        plain = model(images, output_hidden_states=True).hidden_states
        exact_model: Any = ours("BitModel", **options).cuda().eval().double()
        exact_model.load_state_dict(model.state_dict())
        exact = exact_model(images.double(), output_hidden_states=True).hidden_states
    for states in zip(actual, plain, exact, strict=True):
        assert_within_contract(*states)


def test_the_table_chooses_once_it_is_enabled(enabled: None) -> None:
    model, images = r50x1(), images_for(32)
    chosen = last_of(model, images)
    calls = len(fused_calls(model))
    with use_backend(norm_convolution="native"):
        last_of(model, images)
        assert 0 < calls < len(fused_calls(model))
    with use_backend(norm_convolution="reference"):
        unfused = last_of(model, images)
        assert fused_calls(model) == []
    exact = exact_output(model, images)
    assert relative_error(chosen, exact) <= AS_EXACT * relative_error(unfused, exact)


@pytest.mark.parametrize("batch", [1, 8])
def test_whole_models_in_a_graph(batch: int) -> None:
    model, images = r50x1(), images_for(batch)
    with use_backend(norm_convolution="native"):
        expected = last_of(model, images)
        capture(model, images)
        for _ in range(3):
            assert torch.equal(last_of(model, images), expected)


def test_whole_models_in_threads() -> None:
    model, images = r50x1(), [images_for(4), images_for(4)]

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream), use_backend(norm_convolution="native"):
            for _ in range(5):
                found = last_of(model, images[number])
                stream.synchronize()
                assert torch.equal(found, expected[number])

    with use_backend(norm_convolution="native"):
        expected = [last_of(model, each) for each in images]
    torch.cuda.synchronize()
    in_threads(work, 2)


def test_a_change_of_the_weights_is_seen() -> None:
    model, images = r50x1(), images_for(2, 64)
    with use_backend(norm_convolution="native"):
        before = last_of(model, images)
        block: Any = model.encoder.stages[0].layers[1]
        block.conv2.weight.mul_(torch.rand_like(block.conv2.weight) + 0.5)
        block.norm2.bias.add_(0.5)
        after = last_of(model, images)
        assert not torch.equal(after, before)
        fresh = r50x1()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(last_of(fresh, images), after)
