"""Problems about convolutions that normalize what they read and measure what they write.

The convolution is timed alone, its factors given, and once more with the launch that makes the factors of the
next norm. Beside it stand plain PyTorch, and our norm followed by cuDNN's convolution, as plans do it without
these kernels. (Plans normalize in place; here x must stay what it is. As many bytes cross memory.) Those add a
residual together with the next norm, and so do their rows, which then hold one norm more than the fused ones;
what follows is cuDNN's convolution alone. That has a row, too, so that blocks can be added up.

At most 48 sets of inputs take turns, so that no cache holds them. At batch 128 most maps alone exceed an L2
cache of 50 MB; at batch 1 the smallest layers find a part of 48 sets there, and in a network nearly everything.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast.ops.group_norm_act import add_group_norm_act

from .accuracy import Float64Judge, WrongResultError
from .cases import OURS, PLAIN, Contestant, Problem, Running, called, name_of
from .op_problems import CHANNELS_LAST, GROUPS, Inputs, bytes_of, our_norm, plain_norm, sets_of

if TYPE_CHECKING:
    from bitfast.ops.norm_convolution_cuda import PreparedConvolution

EPS = 1e-5
Cut = tuple[int, int, int, int, int]
"""How a convolution is cut: the fields of the kernels' ``Tiling``."""
CUDNN = "cuDNN, normalized before"
UNFUSED, WITH_FACTORS = f"{OURS}, norm and cuDNN", f"{OURS}, with the factors"
STATISTICS_TOLERANCE = 1e-5
"""How far a mean may be off, in standard deviations, and a variance, relatively."""


class Layer(NamedTuple):
    """A convolution, and what is fused into it.

    Attributes:
        channels, size: Of what it reads: square feature maps.
        out_channels: Of its result.
        kernel_size, stride: 3x3 filters have a pixel of zeros around what they read.
        adds: Whether a residual is added.
        second_channels: Of the result of a second convolution that reads the same; 0: there is none.
        has_norm: Whether what it reads is normalized first.
        measures: Whether it takes statistics of its result.
    """

    channels: int
    size: int
    out_channels: int
    kernel_size: int = 1
    stride: int = 1
    adds: bool = False
    second_channels: int = 0
    has_norm: bool = True
    measures: bool = True

    @property
    def padding(self) -> int:
        return self.kernel_size // 2

    @property
    def result_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel_size) // self.stride + 1

    @property
    def pixels_read(self) -> int:
        """Of an image: those in the windows of filters. 1x1 filters of stride 2 leave three of four out."""
        return min(self.size**2, self.result_size**2 * self.kernel_size**2)

    def flops(self, images: int) -> int:
        pixels = images * self.result_size**2
        filters = self.channels * self.kernel_size**2 * (self.out_channels + self.second_channels)
        return 2 * pixels * filters

    def bytes(self, images: int, dtype: torch.dtype) -> int:
        """Return the fewest bytes of maps and filters that must be read and written."""
        out_channels = self.out_channels + self.second_channels
        filters = self.channels * self.kernel_size**2 * out_channels
        written = self.result_size**2 * out_channels
        added = self.result_size**2 * self.out_channels * self.adds
        per_image = self.pixels_read * self.channels + written + added
        return (images * per_image + filters) * dtype.itemsize

    def words(self, images: int) -> str:
        """Return what is convolved, and how, for people."""
        parts = [
            f"{images}x{self.channels}x{self.size}x{self.size} {self.kernel_size}x{self.kernel_size}",
            f"stride {self.stride}" * (self.stride > 1),
            f"to {self.out_channels}{f' and {self.second_channels}' * bool(self.second_channels)} channels",
            "+ residual" * self.adds,
            "without norm" * (not self.has_norm),
            "without statistics" * (not self.measures),
        ]  # fmt: skip
        return " ".join(filter(None, parts))


# ---- convolutions ---------------------------------------------------------------------------------------


class Norm(NamedTuple):
    """A norm's weight and bias, in the dtype of the feature maps, as plain PyTorch wants them."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def drawn(cls, channels: int, like: Inputs) -> Norm:
        return cls(*like._replace(shape=(0, channels, 0, 0)).with_norm()[1:])


class Given(NamedTuple):
    """The inputs of a convolution: ``norm`` is of what is read, ``following`` of the result."""

    x: Tensor
    filters: Tensor
    norm: Norm
    following: Norm
    residual: Tensor | None
    second_filters: Tensor | None

    @classmethod
    def drawn(cls, layer: Layer, images: int, dtype: torch.dtype, device: str) -> Given:
        maps = Inputs(
            (images, layer.channels, layer.size, layer.size), dtype, CHANNELS_LAST, device
        )
        result_shape = (images, layer.out_channels, layer.result_size, layer.result_size)

        def filters(out_channels: int) -> Tensor:
            shape = (out_channels, layer.channels, layer.kernel_size, layer.kernel_size)
            drawn = maps._replace(shape=shape).feature_maps()
            return drawn * (layer.channels * layer.kernel_size**2) ** -0.5

        second = layer.second_channels
        return cls(
            maps.feature_maps(), filters(layer.out_channels),
            Norm.drawn(layer.channels, maps), Norm.drawn(layer.out_channels, maps),
            maps._replace(shape=result_shape).feature_maps() if layer.adds else None,
            filters(second) if second else None,
        )  # fmt: skip

    def maps_and_filters(self) -> list[Tensor]:
        """Return what is large."""
        found = (self.x, self.filters, self.residual, self.second_filters)
        return [tensor for tensor in found if tensor is not None]

    def to(self, dtype: torch.dtype) -> Given:
        def cast(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(dtype)

        x, filters, *norms, residual, second_filters = self
        norm, following = (Norm(*map(cast, each)) for each in norms)
        return Given(cast(x), cast(filters), norm, following, cast(residual), cast(second_filters))


def plain(layer: Layer, given: Given) -> list[Tensor]:
    """Compute the results by plain PyTorch."""
    x = plain_norm(given.x, *given.norm) if layer.has_norm else given.x
    result = F.conv2d(x, given.filters, None, layer.stride, layer.padding)
    results = [result if given.residual is None else result + given.residual]
    if given.second_filters is not None:
        results.append(F.conv2d(x, given.second_filters, None, layer.stride, layer.padding))
    return results


def unfused(layer: Layer, given: Given) -> list[Tensor]:
    """Compute the results by our norms and cuDNN."""
    x = our_norm(given.x, *given.norm) if layer.has_norm else given.x
    result = F.conv2d(x, given.filters, None, layer.stride, layer.padding)
    if given.residual is not None:
        total, _ = add_group_norm_act(result, given.residual, *given.following, GROUPS)
        return [total]
    results = [result]
    if given.second_filters is not None:
        results.append(F.conv2d(x, given.second_filters, None, layer.stride, layer.padding))
    return results


class Fused:
    """The same by our kernel. The weights are packed, and the factors made, beforehand.

    Attributes:
        partials: The statistics of the last call's first result, or None.
    """

    def __init__(
        self, layer: Layer, given: Given, makes_factors: bool, tiling: Cut | None = None
    ) -> None:
        from bitfast.ops import norm_convolution_cuda as kernels  # another commit may lack it

        x, images, channels = given.x, given.x.shape[0], layer.out_channels
        self.given = given
        self.prepared = prepared_for(layer, images, x.dtype, tiling)
        self.cell_channels = cell_channels_for(layer)
        self.factors = exact_factors(x, *given.norm) if layer.has_norm else None
        self.packed = kernels.pack_filters(given.filters)
        self.second_packed: Tensor | None = None
        self.partials: Tensor | None = None
        self.make_factors: Callable[..., None] | None = None
        if given.second_filters is not None:
            self.second_packed = kernels.pack_filters(given.second_filters)
        shapes = (self.prepared.result_shape, self.prepared.second_shape)
        self.result_shapes = [shape for shape in shapes if shape is not None]
        strips = self.prepared.strips
        if layer.measures:
            self.partials_shape = kernels.partials_shape(
                images, strips, channels, self.cell_channels
            )
        if makes_factors:
            self.next_factors_shape = kernels.factors_shape(images, channels)
            self.make_factors = kernels.prepare_factors(
                images, strips, channels, self.cell_channels, GROUPS, EPS, x.dtype, x.dtype
            )

    def __call__(self) -> list[Tensor]:
        given, device = self.given, self.given.x.device
        results = [empty_maps(shape, given.x) for shape in self.result_shapes]
        if self.cell_channels:
            self.partials = torch.empty(self.partials_shape, device=device)
        stream, second = stream_of(device), results[1] if len(results) > 1 else None
        arguments = (
            given.x, self.factors, self.packed, given.residual, results[0], self.partials,
            self.second_packed, second,
        )  # fmt: skip
        self.prepared.run(stream, *map(address_of, arguments))
        if self.make_factors is not None:
            factors = torch.empty(self.next_factors_shape, device=device)
            tensors = (self.partials, *given.following, factors)
            self.make_factors(stream, *map(address_of, tensors))
        return results


def prepared_for(
    layer: Layer, images: int, dtype: torch.dtype, tiling: Cut | None = None
) -> PreparedConvolution:
    """Return a layer's launch; RuntimeError where it cannot be cut as ``tiling`` says."""
    from bitfast.ops import norm_convolution_cuda as kernels

    convolution = kernels.Convolution(
        (images, layer.channels, layer.size, layer.size), dtype, layer.kernel_size, layer.stride,
        (layer.padding,) * 4, layer.out_channels, second_channels=layer.second_channels,
        activation="relu" if layer.has_norm else None, adds=layer.adds,
        cell_channels=cell_channels_for(layer),
    )  # fmt: skip
    if tiling is None:
        return kernels.prepare_convolution(convolution)
    return kernels.prepare_convolution(convolution, tiling=kernels.Tiling(*tiling))


def cell_channels_for(layer: Layer) -> int:
    from bitfast.ops.norm_convolution_cuda import cell_channels_of

    return cell_channels_of(layer.out_channels, GROUPS) if layer.measures else 0


def empty_maps(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def address_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def convolution_problem(
    layer: Layer, images: int, dtype: torch.dtype, device: str = "cuda"
) -> Problem:
    """Draw the inputs of a convolution, and as many sets of them as the GPU's cache asks for."""
    given = drawn_sets(layer, images, dtype, device)
    oracle = plain(layer, given[0].to(torch.float64))
    word = name_of(dtype)

    def in_turns(
        name: str, function: Callable[[Layer, Given], list[Tensor]], note: str = ""
    ) -> Contestant:
        begin = called(lambda number: function(layer, given[number]), len(given))
        return Contestant(name, word, begin, note)

    def fused(name: str, makes_factors: bool) -> Contestant:
        return Contestant(
            name, word, partial(begin_fused, layer, given, makes_factors), "backend: native"
        )

    contestants = [in_turns(PLAIN, plain)]
    if layer.has_norm and layer.measures:
        adds_norm = "the sum is normalized, too" if layer.adds else ""
        contestants.append(in_turns(UNFUSED, unfused, adds_norm))
    if layer.has_norm and not layer.adds:
        contestants.append(Contestant(CUDNN, word, partial(begin_cudnn, layer, given)))
    contestants.append(fused(OURS, False))
    if layer.has_norm and layer.measures:
        contestants.append(fused(WITH_FACTORS, True))
    moved = layer.bytes(images, dtype)
    return Problem(contestants, Float64Judge(oracle), moved, layer.flops(images))


def drawn_sets(layer: Layer, images: int, dtype: torch.dtype, device: str) -> list[Given]:
    draw = partial(Given.drawn, layer, images, dtype, device)
    first = draw()
    return [first, *(draw() for _ in range(sets_of(first.maps_and_filters()) - 1))]


def begin_cudnn(layer: Layer, given: list[Given], stack: ExitStack) -> Running:
    normalized = [each._replace(x=our_norm(each.x, *each.norm)) for each in given]
    bare = layer._replace(has_norm=False)
    return called(lambda number: plain(bare, normalized[number]), len(given))(stack)


def begin_fused(
    layer: Layer, given: list[Given], makes_factors: bool, stack: ExitStack, tiling: Cut | None = None
) -> Running:  # fmt: skip
    functions = [Fused(layer, each, makes_factors, tiling) for each in given]
    running = called(lambda number: functions[number](), len(functions))(stack)
    first = functions[0]
    if first.partials is not None:
        check_statistics(first.partials, running.results[0], first.cell_channels)
    return running


# ---- statistics -----------------------------------------------------------------------------------------


def exact_factors(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the factors of a norm of x, computed in float64, in float32."""
    groups = x.double().reshape(x.shape[0], GROUPS, -1)
    variance, mean = torch.var_mean(groups, 2, correction=0)
    return factors_of(mean, variance, weight.double(), bias.double()).float()


def factors_of(mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return scale and shift, (N, 2, C), from the moments of groups, (N, groups)."""
    repeats = weight.numel() // mean.shape[1]
    rstd = (variance + EPS).rsqrt().repeat_interleave(repeats, 1)
    scale = weight.to(mean.dtype) * rstd
    return torch.stack((scale, bias.to(mean.dtype) - mean.repeat_interleave(repeats, 1) * scale), 1)


def merged(partials: Tensor, cell_channels: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance, (N, cells), from what the strips of each image have."""
    pixels, means, squares = partials[:, :, :1, 0], partials[:, :, 1:, 0], partials[:, :, 1:, 1]
    count = pixels.sum(1)
    mean = (pixels * means).sum(1) / count
    between = (pixels * (means - mean[:, None]).square()).sum(1)
    return mean, (squares.sum(1) / cell_channels + between) / count


def moments_of(x: Tensor, cell_channels: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance, (N, cells), of a feature map."""
    cells = x.permute(0, 2, 3, 1).unflatten(3, (-1, cell_channels))
    variance, mean = torch.var_mean(cells, (1, 2, 4), correction=0)
    return mean, variance


def check_statistics(partials: Tensor, result: Tensor, cell_channels: int) -> None:
    """Raise WrongResultError where partials are not those of the stored result."""
    mean, variance = merged(partials.double(), cell_channels)
    exact_mean, exact_variance = moments_of(result.double(), cell_channels)
    off = ((mean - exact_mean).abs() / exact_variance.sqrt()).max().item()
    variance_off = (variance / exact_variance - 1).abs().max().item()
    if not (off <= STATISTICS_TOLERANCE and variance_off <= STATISTICS_TOLERANCE):
        raise WrongResultError(
            f"statistics: means are off by {off:.1e} standard deviations, variances by {variance_off:.1e}"
        )


def statistics_problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cuda"
) -> Problem:
    """The statistics of a feature map that something else has written."""
    from bitfast.ops import norm_convolution_cuda as kernels

    cell_channels = kernels.cell_channels_of(shape[1], GROUPS)
    inputs = Inputs(shape, dtype, CHANNELS_LAST, device)
    first = inputs.feature_maps()
    maps = [first, *(inputs.feature_maps() for _ in range(sets_of([first]) - 1))]

    def begin_ours(stack: ExitStack) -> Running:
        prepared = kernels.prepare_partials(shape, dtype, cell_channels)
        sizes = kernels.partials_shape(shape[0], prepared.strips, shape[1], cell_channels)

        def ours(number: int) -> Tensor:
            x = maps[number]
            partials = torch.empty(sizes, device=x.device)
            prepared.run(stream_of(x.device), x.data_ptr(), partials.data_ptr())
            return partials

        running = called(ours, len(maps))(stack)
        (partials,) = running.results
        check_statistics(partials, first, cell_channels)
        moments = merged(partials.double(), cell_channels)
        return replace(running, results=list(moments))

    plain_moments = called(
        lambda number: moments_of(maps[number].float(), cell_channels), len(maps)
    )
    word = name_of(dtype)
    contestants = [
        Contestant(PLAIN, word, plain_moments),
        Contestant(OURS, word, begin_ours, "backend: native"),
    ]
    oracle = moments_of(first.double(), cell_channels)
    return Problem(contestants, Float64Judge(oracle), bytes_of([first]))


def factors_problem(layer: Layer, images: int, dtype: torch.dtype, device: str = "cuda") -> Problem:
    """The factors of a norm from the statistics that a convolution leaves."""
    from bitfast.ops import norm_convolution_cuda as kernels

    given = Given.drawn(layer, images, dtype, device)
    fused = Fused(layer, given, makes_factors=True)
    strips, channels, cells = fused.partials_shape[1], layer.out_channels, fused.cell_channels
    weight, bias = given.following
    partials = drawn_partials(images, strips, layer.result_size**2, channels // cells, device)
    make_factors = kernels.prepare_factors(
        images, strips, channels, cells, GROUPS, EPS, dtype, dtype
    )

    def ours() -> Tensor:
        factors = torch.empty(kernels.factors_shape(images, channels), device=partials.device)
        tensors = (partials, weight, bias, factors)
        make_factors(stream_of(partials.device), *map(address_of, tensors))
        return factors

    def plain_factors(partials: Tensor) -> Tensor:
        mean, variance = (each.unflatten(1, (GROUPS, -1)) for each in merged(partials, cells))
        between, group_mean = torch.var_mean(mean, 2, correction=0)
        return factors_of(group_mean, variance.mean(2) + between, weight, bias)

    word = name_of(torch.float32)
    contestants = [
        Contestant(PLAIN, word, called(lambda _: plain_factors(partials))),
        Contestant(OURS, word, called(lambda _: ours()), "backend: native"),
    ]
    oracle = [plain_factors(partials.double())]
    moved = bytes_of([partials]) + oracle[0].numel() * torch.float32.itemsize
    return Problem(contestants, Float64Judge(oracle), moved)


def drawn_partials(images: int, strips: int, pixels: int, cells: int, device: str) -> Tensor:
    """Draw statistics of strips that are about equally large."""
    partials = torch.randn(images, strips, 1 + cells, 2, device=device)
    each, more = divmod(pixels, strips)
    counts = torch.full((strips,), float(each), device=device)
    counts[:more] += 1
    partials[:, :, 0, 0], partials[:, :, 0, 1] = counts, 0
    partials[:, :, 1:, 1] = partials[:, :, 1:, 1].abs() * counts[:, None]
    return partials
