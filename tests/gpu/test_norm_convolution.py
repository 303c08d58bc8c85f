"""The CUDA kernels of norm_convolution on a card; tests/test_norm_convolution_cuda.py emulates them.

The simple cases come first: a fault that spoils the GPU for this process fails all that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.norm_convolutions import LAYERS, Layer
from bitfast import extension
from bitfast.ops import first_use
from bitfast.ops.norm_convolution import OP
from bitfast.ops.norm_convolution_cuda import (
    Convolution,
    cell_channels_of,
    pack_filters,
    partials_shape,
    prepare_convolution,
    why_no_kernels,
)
from bitfast.ops.norm_convolution_fused import Fused, cell_moments, fused_convolution
from tests.gpu.norm_convolution_problems import (
    BFLOAT,
    DEVICE,
    FEW,
    GROUPS,
    HALF,
    NONE,
    Problem,
    assert_measures,
    draw,
    draw_filters,
    draw_norm,
    drawn_problem,
    identity_of,
    needs_hopper,
    problem_of,
    tensors_of,
)
from tests.gpu.test_group_norm_act import need_memory
from tests.guarded import Guarded
from tests.threads import in_threads
from tests.tolerances import assert_within_contract

pytestmark = [needs_hopper, pytest.mark.usefixtures("no_gradient")]


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


def test_a_measured_copy() -> None:
    """1x1 filters that copy: the partials are those of the numbers that were read."""
    x = draw(2, 64, 9, 13, mean=-2.3)
    found = fused_convolution(x, None, pack_filters(identity_of(64)), next_groups=GROUPS)
    assert torch.equal(found.result, x)
    assert found.partials is not None
    assert_measures(found.partials, x)


# ---- memory -------------------------------------------------------------------------------------------------


MARGIN = 4096
"""Numbers before and after what is written."""


def guarded_map(shape: tuple[int, ...]) -> Guarded:
    like = torch.empty(shape, dtype=BFLOAT, device=DEVICE, memory_format=torch.channels_last)
    return Guarded(like, MARGIN)


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
    places = [
        guarded_map(prepared.result_shape),
        Guarded(torch.empty(shape, device=DEVICE), MARGIN),
    ]
    if prepared.second_shape is not None:
        places.append(guarded_map(prepared.second_shape))
    result, partials, *second = (place.tensor.data_ptr() for place in places)
    packed = pack_filters(problem.filters)
    second_packed = None if problem.second_filters is None else pack_filters(problem.second_filters)
    residual = 0 if problem.residual is None else problem.residual.data_ptr()
    stream = torch.cuda.current_stream().cuda_stream
    prepared.run(
        stream, problem.x.data_ptr(), 0, packed.data_ptr(), residual, result, partials,
        0 if second_packed is None else second_packed.data_ptr(), *(second or [0]),
    )  # fmt: skip
    for place, tensor in zip(places, tensors_of(expected), strict=True):
        place.check()
        assert torch.equal(place.tensor, tensor)


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
