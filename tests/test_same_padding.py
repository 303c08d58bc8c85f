"""The pad and the pool, on every backend of the CPU, against their definitions written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfast import extension
from bitfast.backends import BackendUnavailableError, use_backend
from bitfast.ops.same_padding import max_pool_for, pad_for, same_max_pool, same_pad, same_padding
from tests.drawn_cases import SEEDS
from tests.feature_maps import DTYPES, LAYOUTS, make
from tests.tolerances import Triples, assert_draws_within_contract
from tests.versions import TRACER_KEEPS_LAYOUTS

BACKENDS = ("native", "reference")


def test_the_extension_is_here() -> None:
    """The tests below demand "native" by name; this one says plainly why, where they cannot."""
    assert extension.CPU.problem is None


def windows() -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    pair = st.tuples(st.integers(1, 4), st.integers(1, 4))
    return st.tuples(pair, pair, st.tuples(st.integers(1, 3), st.integers(1, 3)))


def given_maps(**others: st.SearchStrategy[Any]) -> Callable[..., Any]:
    """Draw a window, and the shape, dtype, layout and seed of a feature map that it moves over."""
    sides = st.integers(1, 9)
    return given(
        window=windows(),
        shape=st.tuples(st.integers(0, 3), st.integers(1, 5), sides, sides),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(LAYOUTS),
        seed=SEEDS,
        **others,
    )


def padded_by_hand(x: Tensor, sides: list[int], value: float) -> Tensor:
    top, bottom, left, right = sides
    batch, channels, height, width = x.shape
    result = x.new_full((batch, channels, height + top + bottom, width + left + right), value)
    result[:, :, top : top + height, left : left + width] = x
    return result


def pooled_by_hand(x: Tensor, window: Any, sides: list[int], value: float) -> Tensor:
    """The maximum of each window, window by window."""
    (kh, kw), (sh, sw), (dh, dw) = window
    padded = padded_by_hand(x, sides, value)
    height = (padded.shape[2] - (kh - 1) * dh - 1) // sh + 1
    width = (padded.shape[3] - (kw - 1) * dw - 1) // sw + 1
    rows = [
        torch.stack(
            [
                padded[:, :, i * sh : i * sh + kh * dh : dh, j * sw : j * sw + kw * dw : dw].amax(
                    dim=(2, 3)
                )
                for j in range(width)
            ],
            dim=-1,
        )
        for i in range(height)
    ]
    return torch.stack(rows, dim=2)


# ---- forward ------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 5), st.integers(1, 3))
def test_the_rule_is_tensorflows(size: int, kernel: int, stride: int, dilation: int) -> None:
    before, after, _, _ = same_padding((size, size), (kernel,) * 2, (stride,) * 2, (dilation,) * 2)
    outputs = (size + before + after - (kernel - 1) * dilation - 1) // stride + 1
    assert outputs == math.ceil(size / stride)
    assert after - before in (0, 1)
    if before + after:  # and not one zero too many
        assert (size + before + after - 1 - (kernel - 1) * dilation - 1) // stride + 1 < outputs


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80)
@given_maps(value=st.sampled_from([0.0, -1.5, math.inf, -math.inf, math.nan]))
def test_pad(backend, window, shape, dtype, layout, value, seed) -> None:
    x = make(shape, dtype, layout, seed)
    sides = same_padding(shape[2:], *window)
    with use_backend(backend):
        actual = same_pad(x, *window, value=value)
        prepared = pad_for(shape, window, value, "cpu", dtype)
    expected = padded_by_hand(x, sides, value)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    if not any(sides):
        assert actual is x
        assert prepared is None
    else:
        assert actual.is_contiguous(memory_format=format_of(x))
        assert prepared is not None
        torch.testing.assert_close(prepared(x), actual, rtol=0, atol=0, equal_nan=True)


def format_of(x: Tensor) -> torch.memory_format:
    both = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if both else torch.channels_last


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80)
@given_maps(
    sides=st.one_of(st.just("same"), st.lists(st.integers(0, 3), min_size=4, max_size=4)),
    value=st.sampled_from([0.0, -1.5, math.inf, -math.inf]),
)
def test_pool(backend, window, shape, sides, dtype, layout, value, seed) -> None:
    x = make(shape, dtype, layout, seed)
    explicit = same_padding(shape[2:], *window) if sides == "same" else sides
    top, bottom, left, right = explicit
    assume(shape[2] + top + bottom > (window[0][0] - 1) * window[2][0])
    assume(shape[3] + left + right > (window[0][1] - 1) * window[2][1])
    with use_backend(backend):
        actual = same_max_pool(x, *window, padding=sides, value=value)
        padding = None if sides == "same" else sides
        prepared = max_pool_for(shape, window, padding, value, "cpu", dtype)
    expected = pooled_by_hand(x, window, explicit, value)
    assert torch.equal(actual, expected)
    assert torch.equal(prepared(x), expected)
    assert actual.is_contiguous(memory_format=format_of(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_beats_everything(backend: str, layout: torch.memory_format) -> None:
    x = make((2, 5, 8, 8), layout=layout)
    x[0, 1, 3, 4], x[1, 2, 0, 0], x[1, 3, 7, 7] = math.nan, math.nan, math.inf
    with use_backend(backend):
        actual = same_max_pool(x, 3, 2)
        all_nan = same_max_pool(x, 3, 2, padding=(3, 3, 3, 3), value=math.nan)
    torch.testing.assert_close(
        actual,
        pooled_by_hand(x, ((3, 3), (2, 2), (1, 1)), [0, 1, 0, 1], 0.0),
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    assert all_nan[..., 0, :].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", ["sliced", "stepped", "permuted", "expanded", "narrowed"])
def test_views_are_read_and_nothing_beside_them(backend: str, view: str) -> None:
    whole = torch.full((4, 8, 12, 14), math.nan)
    x = {
        "sliced": whole[1:3, 2:7, 1:10, 3:12],
        "stepped": whole[::2, ::3, ::2, 1::3],
        "permuted": whole.permute(0, 3, 1, 2)[:, 1:6],
        "expanded": whole[:, :1, :7, :7].expand(4, 3, 7, 7),
        "narrowed": whole.contiguous(memory_format=torch.channels_last)[:, :, 2:9, 1:8],
    }[view]
    numbers = make((1, 1, *x.shape[2:]))
    (whole[:, :1, :7, :7] if view == "expanded" else x).copy_(numbers)
    with use_backend(backend):
        padded, pooled = same_pad(x, 3, 2), same_max_pool(x, 3, 2)
        assert torch.equal(padded, same_pad(x.contiguous(), 3, 2))
        assert torch.equal(pooled, same_max_pool(x.contiguous(), 3, 2))
    assert padded.isfinite().all()
    assert pooled.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_are_shared_among_threads(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Large enough for several tasks, whose borders must not show."""
    x = make((3, 37, 61, 67), dtype, layout)
    padding = same_padding(x.shape[2:], (3, 3), (2, 2), (1, 1))
    with use_backend("native"):
        padded, pooled = same_pad(x, 3, 2), same_max_pool(x, 3, 2)
    assert torch.equal(padded, padded_by_hand(x, padding, 0.0))
    expected = F.max_pool2d(padded_by_hand(x, padding, 0.0).float(), 3, 2).to(dtype)
    assert torch.equal(pooled, expected)


def test_x_itself_comes_back_where_nothing_is_padded() -> None:
    x = make((1, 2, 6, 6))
    assert same_pad(x, 1, 2) is x
    assert same_pad(x, 2, 2) is x
    assert same_pad(x[:, :, 1:, 1:], 2, 2).shape == (1, 2, 6, 6)
    assert same_pad(x, 3, 1) is not x


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_has_no_influence(backend: str) -> None:
    x = make((1, 2, 5, 5))
    with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_pad(x, 3, 2).dtype == torch.float32
        assert same_max_pool(x, 3, 2).dtype == torch.float32


# ---- the contract of the kernels, and gradients -------------------------------------------------


def operators(name: str, backend: str) -> Any:
    return getattr(getattr(torch.ops.bitfast, name), backend)


@settings(max_examples=60)
@given_maps(value=st.sampled_from([0.0, 0.25, -math.inf]))
def test_native_taps_and_gradients_equal_the_reference(
    window, shape, dtype, layout, value, seed
) -> None:
    x = make(shape, dtype, layout, seed)
    sides = same_padding(shape[2:], *window)
    results = {}
    for backend in BACKENDS:
        pooled, taps = operators("same_max_pool", backend)(x, *window, sides, value, True)
        # Exact sums, in whatever order: small integers.
        grad = torch.randint(-3, 4, pooled.shape, generator=torch.Generator().manual_seed(seed))
        grad = grad.to(dtype)
        backward = operators("same_max_pool_backward", backend)
        results[backend] = (pooled, taps, backward(grad, taps, shape[2:], *window, sides))
    for ours, theirs in zip(results["native"], results["reference"], strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
        assert ours.is_contiguous(memory_format=format_of(theirs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_within_the_contract(backend: str, dtype: torch.dtype, layout: Any) -> None:
    def gradients(ours: Any, plain: Any) -> tuple[Tensor, Tensor, Tensor]:
        x = make((2, 6, 11, 9), dtype, layout)
        grad = torch.randn(plain(x).shape).to(dtype).contiguous(memory_format=layout)

        def gradient(function: Any, dtype: torch.dtype) -> Tensor:
            leaf = x.detach().to(dtype).clone().requires_grad_()
            return torch.autograd.grad(function(leaf), leaf, grad.to(dtype))[0]

        with use_backend(backend):
            actual = gradient(ours, dtype)
        assert actual.is_contiguous(memory_format=layout)
        return actual, gradient(plain, dtype), gradient(plain, torch.float64)

    def plain_pad(x: Tensor) -> Tensor:
        return F.pad(x, (1, 1, 1, 1))

    def plain_max_pool(x: Tensor) -> Tensor:
        return F.max_pool2d(plain_pad(x), 3, 2)

    def draw() -> Triples:
        return {
            "max-pool": gradients(lambda x: same_max_pool(x, 3, 2), plain_max_pool),
            "pad": gradients(lambda x: same_pad(x, 3, 2), plain_pad),
        }

    assert_draws_within_contract(draw, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_maximum_in_the_padding_has_no_gradient(backend: str) -> None:
    x = torch.full((1, 1, 4, 4), -1.0, requires_grad=True)
    with use_backend(backend):
        same_max_pool(x, 3, 2, padding=(1, 1, 1, 1)).sum().backward()
    # Only the middle window of pixels 1..3 reaches no zero.
    expected = torch.zeros(4, 4)
    expected[1, 1] = 1
    assert torch.equal(x.grad[0, 0], expected)


def test_gradcheck_of_the_reference() -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: same_pad(x, 3, 2, value=0.5), x)
    assert torch.autograd.gradcheck(lambda x: same_max_pool(x, 3, 2), x)
    pool = torch.ops.bitfast.same_max_pool.reference
    window = ((3, 3), (2, 2), (1, 1))
    assert torch.autograd.gradcheck(lambda x: pool(x, *window, [0, 1, 0, 1], 0.0, True)[0], x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [*LAYOUTS, "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, layout: Any, backend: str) -> None:
    x = make((2, 4, 5, 6), dtype)
    if layout == "permuted":
        x = x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    else:
        x = x.contiguous(memory_format=layout)
    x.requires_grad_()
    window = ((3, 2), (2, 2), (1, 2))
    pad, pool, backward = (
        operators(name, backend) for name in ("same_pad", "same_max_pool", "same_max_pool_backward")
    )
    torch.library.opcheck(pad, (x, [0, 1, 2, 3], -1.0))
    torch.library.opcheck(pad, (x, [-1, 0, 2, -2], 0.0))
    torch.library.opcheck(pool, (x, *window, [0, 1, 1, 1], 0.0, True))
    torch.library.opcheck(pool, (x.detach(), *window, [0, 1, 1, 1], 0.0, False))
    pooled, taps = (t.detach() for t in pool(x, *window, [0, 1, 1, 1], 0.0, True))
    torch.library.opcheck(backward, (pooled, taps, [5, 6], *window, [0, 1, 1, 1]))


def test_a_pool_without_taps_has_no_gradient_and_says_so() -> None:
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    pool = torch.ops.bitfast.same_max_pool.native
    result = pool(x, (2, 2), (2, 2), (1, 1), (0, 0, 0, 0), 0.0, False)[0]
    with pytest.raises(RuntimeError, match="with_taps=True"):
        result.sum().backward()


# ---- tracing ------------------------------------------------------------------------------------


def pad_and_pool(x: Tensor) -> Tensor:
    return same_max_pool(same_pad(x, 7, 2), 3, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_compiles_with_dynamic_sizes(backend: str | None, layout: torch.memory_format) -> None:
    torch._dynamo.reset()

    def function(x: Tensor) -> Tensor:
        if backend is None:
            return pad_and_pool(x)
        with use_backend(backend):
            return pad_and_pool(x)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in [(2, 3, 15, 18), (3, 3, 24, 17), (5, 3, 8, 31)]:
        x = make(shape, layout=layout).requires_grad_()
        stance = "fail_on_recompile" if shape[0] == 5 else "default"
        with torch.compiler.set_stance(stance):
            actual = compiled(x)
        expected = pad_and_pool(x)
        assert torch.equal(actual, expected)
        if TRACER_KEEPS_LAYOUTS:
            assert actual.stride() == expected.stride()
        ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("backend", "traced"), [(None, "aten"), ("native", "bitfast")])
def test_traced_as_shape_arithmetic_unless_a_backend_is_demanded(
    backend: str | None, traced: str
) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if backend is None:
                return pad_and_pool(x)
            with use_backend(backend):
                return pad_and_pool(x)

    size = {2: torch.export.Dim("height", min=8), 3: torch.export.Dim("width", min=8)}
    program = torch.export.export(Module(), (make((1, 2, 15, 18)),), dynamic_shapes=(size,))
    called = {
        str(node.target).split(".")[0]
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }
    assert traced in called
    assert ("bitfast" in called) == (backend is not None)
    x = make((1, 2, 33, 20))
    assert torch.equal(program.module()(x), pad_and_pool(x))


# ---- arguments ----------------------------------------------------------------------------------


def test_a_demanded_backend_never_degrades() -> None:
    x = make((1, 2, 5, 5))
    with use_backend("triton"), pytest.raises(BackendUnavailableError, match="no triton kernel"):
        same_pad(x, 3, 2)
    with use_backend("native"), pytest.raises(BackendUnavailableError, match=r"not torch\.float64"):
        same_max_pool(x.double(), 3, 2)
    assert same_max_pool(x.double(), 3, 2).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"x must have shape \(N, C, H, W\)"),
        ({"x": torch.zeros(1, 1, 4, 4, dtype=torch.int8)}, TypeError, "floating-point.*int8"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be .*got 0"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size must be .*height, width"),
        ({"stride": -1}, ValueError, "stride must be .*got -1"),
        ({"dilation": (1, 0)}, ValueError, "dilation must be"),
        ({"kernel_size": (1, 40000)}, ValueError, "at most 32767 pixels"),
        ({"padding": "valid"}, ValueError, "padding must be \"same\" or four .*got 'valid'"),
        ({"padding": (1, 1)}, ValueError, "padding must be"),
        ({"padding": (1, 1, -1, 1)}, ValueError, "padding must be"),
        (
            {"padding": (0, 0, 0, 0), "kernel_size": 9},
            ValueError,
            "at least as large as the window",
        ),
        ({"x": torch.zeros(1, 1, 0, 4)}, ValueError, "at least as large as the window"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, error: Any, message: str) -> None:
    arguments = {"x": torch.zeros(1, 1, 4, 4), "kernel_size": 3, "stride": 2, **arguments}
    with pytest.raises(error, match=message):
        same_max_pool(**arguments)
    if "padding" not in arguments and "pixels" not in message and "window" not in message:
        with pytest.raises(error, match=message):
            same_pad(**arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("same_pad", ([0, 0, 0], 0.0), "padding must be"),
        ("same_pad", ([-3, -3, 0, 0], 0.0), "cannot crop more"),
        ("same_max_pool", ([2], [1, 1], [1, 1], [0] * 4, 0.0, False), "two positive numbers"),
        ("same_max_pool", ([2, 0], [1, 1], [1, 1], [0] * 4, 0.0, False), "two positive numbers"),
        ("same_max_pool", ([200, 200], [1, 1], [1, 1], [0] * 4, 0.0, False), "at most 32767"),
        ("same_max_pool", ([5, 5], [1, 1], [1, 1], [0] * 4, 0.0, False), "4 < 5"),
        ("same_max_pool", ([2, 2], [1, 1], [1, 1], [-1, 0, 0, 0], 0.0, False), "negative"),
    ],
)
def test_the_extension_checks_what_could_crash_it(name: str, arguments: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        operators(name, "native")(torch.zeros(1, 1, 4, 4), *arguments)


def test_backward_checks_what_could_crash_it() -> None:
    backward = torch.ops.bitfast.same_max_pool_backward.native
    window = ([2, 2], [2, 2], [1, 1], [0, 0, 0, 0])
    taps = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    grad = torch.ones(1, 1, 2, 2)
    assert backward(grad, taps, [4, 4], *window).sum() == 4
    for bad in (
        (grad, taps.int(), [4, 4]),
        (grad, taps, [9, 9]),
        (grad[..., :1], taps, [4, 4]),
        (grad, taps.expand(1, 3, 2, 2), [4, 4]),
    ):
        with pytest.raises(RuntimeError):
            backward(*bad, *window)
