"""norm_convolution for tensors on a GPU, as tests and benchmarks call it, and its check before the first use.

Plans prepare the launches of :mod:`bitfast.ops.norm_convolution_cuda` themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitfast import reference
from bitfast.kernels.launch import as_current
from bitfast.ops.first_use import difference, register_first_use
from bitfast.ops.native_cuda import DTYPES as PARAMETER_DTYPES
from bitfast.ops.norm_convolution import OP, Norm
from bitfast.ops.norm_convolution_cuda import (
    CHUNK,
    DTYPES,
    KERNEL_SIZES,
    Convolution,
    Sides,
    Tiling,
    cell_channels_of,
    factors_shape,
    pack_filters,
    partials_shape,
    prepare_convolution,
    prepare_factors,
    prepare_partials,
    why_no_factors,
    why_unsuited,
)


class Fused(NamedTuple):
    """What :func:`fused_convolution` returns.

    Attributes:
        result: Shape (N, out, H', W'), channels_last.
        partials: Of the result, float32, of the shape that ``partials_shape`` tells; None if not asked for.
        second: Shape (N, second out, H', W'), channels_last; None if there are no second filters.
    """

    result: Tensor
    partials: Tensor | None
    second: Tensor | None


def fused_convolution(
    x: Tensor,
    norm: Norm | None,
    packed: Tensor,
    *,
    stride: int = 1,
    padding: Sides = (0, 0, 0, 0),
    residual: Tensor | None = None,
    partials: Tensor | None = None,
    next_groups: int | None = None,
    second_packed: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Fused:
    """Convolve the normalized, activated x, add a residual, and measure the result for the norm that follows.

    By the CUDA kernels, whatever backend is demanded or enabled. There are no gradients.

    Args:
        x: Shape (N, C, H, W), bfloat16 or float16, dense in channels_last. As all tensors here it begins at a
            multiple of 16 bytes.
        norm: Of x; its parameters have C elements. None: x is convolved as it is.
        packed: What ``pack_filters`` returns for standardized filters of the dtype of x.
        stride: 1 or 2, in both axes.
        padding: Zeros around the normalized x: (top, bottom, left, right); 0 to 2 each for 3x3 filters, none
            for 1x1 filters.
        residual: Added to the (first) result; of its shape and dtype, channels_last.
        partials: Of x, for its norm: those of an earlier result, for instance. None: they are computed.
        next_groups: Groups of the norm that follows. None: the partials of the result are not computed.
        second_packed: Filters of a second convolution of the same normalized x, of the same size.
        tiling: How the convolution is cut, for comparisons. None: as the kernels choose.

    Raises:
        TypeError: an argument is no tensor of a dtype that there are kernels for.
        ValueError: shapes or layouts do not fit, or there is no kernel for the convolution.
        RuntimeError: a gradient would be recorded, there are no kernels here, or a launch fails.
    """
    convolution = _convolution(
        x, norm, packed, stride, padding, residual, partials, next_groups, second_packed
    )
    with as_current(x.device), torch.no_grad():
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        factors = None if norm is None else _factors(stream, x, norm, partials)
        run = prepare_convolution(convolution, tiling=tiling)
        result = _empty_map(x, run.result_shape)
        second = None if run.second_shape is None else _empty_map(x, run.second_shape)
        made = None
        if convolution.cell_channels:
            made = x.new_empty(
                partials_shape(x.shape[0], run.strips, result.shape[1], convolution.cell_channels),
                dtype=torch.float32,
            )
        tensors = (x, factors, packed, residual, result, made, second_packed, second)
        run.run(stream, *(0 if tensor is None else tensor.data_ptr() for tensor in tensors))
    return Fused(result, made, second)


def _factors(stream: int, x: Tensor, norm: Norm, partials: Tensor | None) -> Tensor:
    """Return the factors of x, by the kernels."""
    images, channels = x.shape[:2]
    if partials is None:
        cell_channels = cell_channels_of(channels, norm.num_groups)
        measure = prepare_partials(x.shape, x.dtype, cell_channels)
        shape = partials_shape(images, measure.strips, channels, cell_channels)
        partials = x.new_empty(shape, dtype=torch.float32)
        measure.run(stream, x.data_ptr(), partials.data_ptr())
    strips, cells = partials.shape[1], partials.shape[2] - 1
    run = prepare_factors(
        images, strips, channels, channels // cells, norm.num_groups, norm.eps, norm.weight.dtype,
        norm.bias.dtype,
    )  # fmt: skip
    factors = x.new_empty(factors_shape(images, channels), dtype=torch.float32)
    tensors = (partials, norm.weight, norm.bias, factors)
    run(stream, *(tensor.data_ptr() for tensor in tensors))
    return factors


def _empty_map(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )  # fmt: skip


def cell_moments(partials: Tensor, channels: int) -> Tensor:
    """Merge the partials of the strips of each image.

    Args:
        partials: As :class:`Fused` has them.
        channels: Of the feature map.

    Returns:
        The mean and the (biased) variance of each image's cells: float64, shape (2, N, cells).
    """
    pixels = partials[:, :, :1, 0].double()
    mean, squares = partials[:, :, 1:].double().unbind(3)
    total, cell_channels = pixels.sum(1), channels // mean.shape[2]
    merged = (pixels * mean).sum(1) / total
    between = pixels * (mean - merged[:, None]).square()
    return torch.stack([merged, (squares / cell_channels + between).sum(1) / total])


# ---- the checks of arguments ------------------------------------------------------------------------------


def _convolution(
    x: Tensor,
    norm: Norm | None,
    packed: Tensor,
    stride: int,
    padding: Sides,
    residual: Tensor | None,
    partials: Tensor | None,
    next_groups: int | None,
    second_packed: Tensor | None,
) -> Convolution:
    """Return the convolution that the arguments describe, or raise as :func:`fused_convolution` says."""
    _check_tensor("x", x, x, DTYPES)
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{OP}: x must have shape (N, C, H, W), dense in channels_last; got {tuple(x.shape)} of strides"
            f" {x.stride()}"
        )
    channels = x.shape[1]
    kernel_size, out_channels = _check_packed("packed", packed, x)
    second_channels = 0
    if second_packed is not None:
        second_size, second_channels = _check_packed("second_packed", second_packed, x)
        if second_size != kernel_size:
            raise ValueError(
                f"{OP}: second_packed must hold filters of size {kernel_size}, as packed; got {second_size}"
            )
    if norm is not None:
        _check_norm(norm, x, partials)
    elif partials is not None:
        raise ValueError(f"{OP}: partials must be None where norm is None")
    cell_channels = 0
    if next_groups is not None:
        reason = why_no_factors(out_channels, next_groups)
        if reason is not None:
            raise ValueError(
                f"{OP}: next_groups, {next_groups}, does not suit the result: {reason}"
            )
        cell_channels = cell_channels_of(out_channels, next_groups)
    if len(padding) != 4:
        raise ValueError(f"{OP}: padding must be (top, bottom, left, right), got {padding!r}")
    convolution = Convolution(
        tuple(x.shape), x.dtype, kernel_size, stride, padding, out_channels, second_channels,
        None if norm is None else norm.activation, residual is not None, cell_channels,
    )  # fmt: skip
    reason = why_unsuited(convolution)
    if reason is not None:
        raise ValueError(
            f"{OP}: there is no kernel for this convolution of {channels} channels: {reason}"
        )
    if residual is not None:
        _check_tensor("residual", residual, x, {x.dtype})
        shape = (x.shape[0], out_channels, *convolution.result_size)
        if residual.shape != shape or not residual.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"{OP}: residual must have the result's shape {shape}, dense in channels_last; got"
                f" {tuple(residual.shape)} of strides {residual.stride()}"
            )
    return convolution


def _check_packed(name: str, packed: Tensor, x: Tensor) -> tuple[int, int]:
    """Check packed filters; return their size and how many there are."""
    _check_tensor(name, packed, x, {x.dtype})
    chunks = -(-x.shape[1] // CHUNK)
    places = tuple(size**2 for size in KERNEL_SIZES)
    shape = tuple(packed.shape)
    fits = len(shape) == 5 and shape[1] in places and shape == (chunks, shape[1], 8, shape[3], 8)
    if not fits or not packed.is_contiguous():
        raise ValueError(
            f"{OP}: {name} must come from pack_filters, for {x.shape[1]} input channels:"
            f" ({chunks}, 1 or 9, 8, out, 8); got {shape}"
        )
    return KERNEL_SIZES[places.index(shape[1])], shape[3]


def _check_norm(norm: Norm, x: Tensor, partials: Tensor | None) -> None:
    images, channels = x.shape[:2]
    for name in ("weight", "bias"):
        parameter = getattr(norm, name)
        _check_tensor(f"norm.{name}", parameter, x, PARAMETER_DTYPES)
        if parameter.shape != (channels,) or not parameter.is_contiguous():
            raise ValueError(
                f"{OP}: norm.{name} must have the {channels} channels of x, got {tuple(parameter.shape)}"
            )
    reason = why_no_factors(channels, norm.num_groups)
    if reason is not None:
        raise ValueError(f"{OP}: norm.num_groups, {norm.num_groups}, does not suit x: {reason}")
    if partials is None:
        return
    _check_tensor("partials", partials, x, {torch.float32})
    largest = cell_channels_of(channels, norm.num_groups)
    cells = [channels // n for n in (8, 4, 2) if largest % n == 0]
    shape = tuple(partials.shape)
    fits = len(shape) == 4 and (shape[0], shape[3]) == (images, 2) and shape[2] - 1 in cells
    if not fits or not partials.is_contiguous():
        raise ValueError(
            f"{OP}: partials must have the shape ({images}, strips, 1 + cells, 2), with"
            f" {' or '.join(map(str, cells))} cells for {channels} channels in {norm.num_groups} groups;"
            f" got {shape}"
        )


def _check_tensor(
    name: str,
    tensor: Tensor,
    x: Tensor,
    dtypes: frozenset[torch.dtype] | set[torch.dtype] | dict[torch.dtype, int],
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{OP}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(sorted(str(dtype) for dtype in dtypes))
        raise TypeError(f"{OP}: {name} must be of {allowed}, not {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(
            f"{OP}: {name} must be on {x.device}, where x is; it is on {tensor.device}"
        )
    if tensor.data_ptr() % 16:
        raise ValueError(f"{OP}: {name} must begin at a multiple of 16 bytes")
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise RuntimeError(
            f"{OP}: {name} requires a gradient, and these kernels have none; call them under torch.no_grad()"
        )


# ---- first use --------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A chain of two calls that the check before the first use makes.

    The first call computes the partials of x; the second takes those that the first has left.

    Attributes:
        shape: Of x.
        kernel_size, stride, padding, out_channels, second_channels, adds: Of the first convolution.
        groups, activation: Of both norms.
        tiling: Of the first convolution; see :class:`Tiling`. None: the kernels choose.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    kernel_size: int
    stride: int
    padding: Sides
    out_channels: int
    second_channels: int = 0
    adds: bool = False
    groups: int = 8
    activation: str = "relu"
    tiling: tuple[int, int, int, int, int] | None = None


NO_ZEROS, ONE_ZERO = (0, 0, 0, 0), (1, 1, 1, 1)

CHOSEN = (
    Case((3, 64, 20, 20), torch.bfloat16, 1, 1, NO_ZEROS, 256, adds=True),
    Case((2, 256, 9, 13), torch.float16, 1, 1, NO_ZEROS, 64, 256),
    Case((2, 128, 14, 14), torch.bfloat16, 1, 2, NO_ZEROS, 128, activation="none"),
    Case((2, 64, 20, 17), torch.float16, 3, 1, ONE_ZERO, 64),
    Case((2, 128, 15, 14), torch.bfloat16, 3, 2, (0, 1, 0, 1), 128, groups=32),
    Case((5, 256, 7, 7), torch.bfloat16, 3, 1, ONE_ZERO, 256),
    Case((2, 72, 10, 11), torch.bfloat16, 3, 1, ONE_ZERO, 40, adds=True, groups=4),
)
"""As the kernels choose for the shape: 1x1 and 3x3 filters at both strides, channels that fill no tile, a
residual, a second result, cells of 8, 4 and 2 channels."""

SIZES = ((64, 1), (64, 2), (128, 2), (256, 1))
SHARED = tuple((columns, 0, 0, cluster, units) for columns, units in SIZES for cluster in (1, 2))
KEPT = tuple((columns, turns, 1, 1, units) for columns, units in SIZES for turns in (0, 1))
TILINGS = (*SHARED, *KEPT)
"""Each way to cut that there is, as :class:`Tiling` takes it: weights are loaded for each tile, or kept."""

CUT = (
    *(
        Case((2, 144, 9, 11), torch.bfloat16, 1, 1, NO_ZEROS, 208, 72, adds=True, tiling=tiling)
        for tiling in TILINGS
    ),
    *(
        Case((2, 64, 10, 11), torch.float16, 3, 1, ONE_ZERO, 144, tiling=tiling)
        for tiling in (*SHARED, *KEPT[:4], (128, 1, 1, 1, 2))
    ),
    *(
        Case((2, 64, 10, 11), torch.float16, 3, 2, ONE_ZERO, 144, tiling=tiling)
        for tiling in (*SHARED[:4], *SHARED[6:], (64, 1, 1, 1, 2))
    ),
)
"""Each way to cut that there is; for 3x3 filters, of which few can be kept, each that fits."""

LONG = (
    Case((32, 64, 56, 56), torch.bfloat16, 1, 1, NO_ZEROS, 256, adds=True),
    Case((32, 128, 28, 28), torch.bfloat16, 3, 1, ONE_ZERO, 256),
)
"""Blocks compute several tiles one after the other."""


def check_first_use(
    device: torch.device, cases: Sequence[Case] = (*CHOSEN, *CUT, *LONG)
) -> str | None:
    """Run the kernels on a device; return how one differs from plain PyTorch in float64, or None."""
    for case in cases:
        for problem in _problems_of(case, device):
            if problem is not None:
                return f"{case}: {problem}"
    return None


def _problems_of(case: Case, device: torch.device) -> Iterator[str | None]:
    random = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        drawn = torch.randn(size, generator=random, device=device)
        layout = torch.channels_last if len(size) == 4 else torch.contiguous_format
        return drawn.to(case.dtype, memory_format=layout)

    def filters(out: int, channels: int, size: int) -> Tensor:
        return draw(out, channels, size, size) / (channels * size**2) ** 0.5

    def draw_norm(channels: int) -> Norm:
        weight, bias = 1 + draw(channels) / 4, draw(channels).float()
        return Norm(weight, bias, case.groups, 1e-5, case.activation)

    channels, out, size = case.shape[1], case.out_channels, case.kernel_size
    x, norm = draw(*case.shape) + 3, draw_norm(channels)
    weight = filters(out, channels, size)
    second = filters(case.second_channels, channels, size) if case.second_channels else None
    geometry = case.stride, case.padding
    expected = _plain(x, norm, weight, *geometry)
    residual = None
    if case.adds:
        residual = draw(*expected.shape)
        expected = expected + residual.double()
    found = fused_convolution(
        x, norm, pack_filters(weight), stride=case.stride, padding=case.padding, residual=residual,
        next_groups=case.groups, second_packed=None if second is None else pack_filters(second),
        tiling=None if case.tiling is None else Tiling(*case.tiling),
    )  # fmt: skip
    yield difference("the result", found.result, expected)
    assert found.partials is not None
    measured, right = cell_moments(found.partials, out), _plain_moments(found)
    yield difference("the statistics' mean", measured[0].float(), right[0], roundings=64.0)
    yield difference("the statistics' variance", measured[1].float(), right[1], roundings=64.0)
    if second is not None:
        assert found.second is not None
        yield difference("the second result", found.second, _plain(x, norm, second, *geometry))
    norm, weight = draw_norm(out), filters(64, out, 1)
    following = fused_convolution(found.result, norm, pack_filters(weight), partials=found.partials)
    expected = _plain(found.result, norm, weight, 1, (0, 0, 0, 0))
    yield difference("the next result", following.result, expected)


def _plain(x: Tensor, norm: Norm, weight: Tensor, stride: int, padding: Sides) -> Tensor:
    """Return the convolution of the normalized x, by plain PyTorch in float64."""
    normalized = reference.group_norm_act_forward(
        x.double(),
        norm.weight.double(),
        norm.bias.double(),
        norm.num_groups,
        norm.eps,
        norm.activation,
    )[0]
    top, bottom, left, right = padding
    padded = torch.nn.functional.pad(normalized, (left, right, top, bottom))
    return torch.nn.functional.conv2d(padded, weight.double(), None, stride)


def _plain_moments(found: Fused) -> Tensor:
    """Return what :func:`cell_moments` should return for the partials of a result."""
    assert found.partials is not None
    images, cells = found.result.shape[0], found.partials.shape[2] - 1
    numbers = found.result.double().reshape(images, cells, -1)
    return torch.stack([numbers.mean(2), numbers.var(2, correction=0)])


register_first_use(OP, check_first_use)

__all__ = [
    "CHOSEN",
    "CUT",
    "TILINGS",
    "Case",
    "Fused",
    "cell_moments",
    "check_first_use",
    "fused_convolution",
]
