"""norm_convolution by CUDA kernels, ``csrc/norm_convolution*.cu``, past torch's dispatcher; for inference.

A convolution normalizes and activates what it reads, adds a residual, and leaves statistics of what it writes.
They are float32 numbers of two kinds. *Partials*, (images, strips, 1 + cells, 2), are mean and squared
deviations of cells of a few channels in each of several strips of an image. A small launch makes *factors*,
(images, 2, channels), of them and of the parameters of the norm that follows: the scale and shift by which the
next convolution normalizes.

The functions of the CPU, :mod:`bitfast.ops.norm_convolution`, do not serve GPUs: their statistics are moments
of channels in float64, their zeros are as many on all sides, and they have one result. So plans call what
:func:`prepare_convolution` returns; tests and benchmarks call :mod:`bitfast.ops.norm_convolution_fused`.

There is no Triton form: it would take statistics by reshape-and-reduce, which on a card has given other numbers
than in the interpreter, so that nothing could prove it without one.

The kernels multiply by wgmma of sm_90a: they are for compute capability 9.0 alone. Until cards have proved them
they serve on demand: by ``use_backend(norm_convolution="native")``, or once
:func:`bitfast.backends.enable_kernel` has enabled them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast import extension
from bitfast.activations import ACTIVATIONS
from bitfast.backends import KernelKey, register_kernel, requested_backend, select_backend
from bitfast.kernels.launch import as_current
from bitfast.ops.first_use import why_unusable
from bitfast.ops.group_norm_act import OP as GROUP_NORM_ACT
from bitfast.ops.native_cuda import ADDRESS, entry
from bitfast.ops.native_cuda import DTYPES as DTYPE_NUMBERS
from bitfast.ops.norm_convolution import OP
from bitfast.ops.same_padding import OP as SAME_PADDING
from bitfast.torch_state import constant_when_compiled

DTYPES = frozenset({torch.bfloat16, torch.float16})
"""Of feature maps and filters. Parameters of norms may be float32, too."""

CAPABILITY = (9, 0)
"""The compute capability of the GPUs that the kernels are for."""

CHANNEL_MULTIPLE = 8
"""Channels of all feature maps are a multiple of this."""

CHUNK = 64
"""Input channels that packed filters hold together."""

CELL_CHANNELS = (8, 4, 2)
"""How many channels a cell of partials may have."""

KERNEL_SIZES, STRIDES = (1, 3), (1, 2)

ACTIVATIONS_READ = ("none", "relu")

MOST = 2**31 - 1
"""The largest number in the kernels' arguments, but for the number of images."""

MOST_STRIPS = 2**24
"""Strips of an image that factors can be made of."""

Sides = tuple[int, int, int, int]
"""(top, bottom, left, right)."""


class Convolution(NamedTuple):
    """A convolution, of square filters, with what is fused to it.

    Attributes:
        shape: (N, C, H, W), of x.
        dtype: Of all feature maps and of the filters.
        kernel_size: Of the filters, in both axes.
        stride: In both axes.
        padding: Zeros around the normalized x: (top, bottom, left, right).
        out_channels: Of the result.
        second_channels: Of a second result: another convolution of the same normalized x with filters of the
            same size, at the same stride. 0: there is none.
        activation: Of the norm of x. None: x is convolved as it is.
        adds: Whether a residual is added to the (first) result.
        cell_channels: Of the partials of the (first) result; 0: there are none.
    """

    shape: Sequence[int]
    dtype: torch.dtype
    kernel_size: int
    stride: int
    padding: Sides
    out_channels: int
    second_channels: int = 0
    activation: str | None = None
    adds: bool = False
    cell_channels: int = 0

    @property
    def result_size(self) -> tuple[int, int]:
        """Height and width of the results."""
        top, bottom, left, right = self.padding
        height, width = self.shape[2] + top + bottom, self.shape[3] + left + right
        rows, columns = ((n - self.kernel_size) // self.stride + 1 for n in (height, width))
        return rows, columns


# ---- what there is a kernel for -------------------------------------------------------------------------


def why_unsuited(convolution: Convolution) -> str | None:
    """Return why there is no kernel for a convolution, in words; None if there is one."""
    images, channels, height, width = convolution.shape
    every_channels = channels, convolution.out_channels, convolution.second_channels
    if convolution.dtype not in DTYPES:
        return f"the kernels are for bfloat16 and float16, not {convolution.dtype}"
    if convolution.kernel_size not in KERNEL_SIZES:
        kernel_size = convolution.kernel_size
        return f"the kernels are for filters of 1x1 and 3x3, not {kernel_size}x{kernel_size}"
    if convolution.stride not in STRIDES:
        return f"the kernels are for strides of 1 and 2, not {convolution.stride}"
    if convolution.activation not in (None, *ACTIVATIONS_READ):
        return f"the kernels are for relu and for norms without activation, not {convolution.activation}"
    if any(n % CHANNEL_MULTIPLE for n in every_channels):
        (wrong, *_) = (n for n in every_channels if n % CHANNEL_MULTIPLE)
        return f"channels must be multiples of {CHANNEL_MULTIPLE}, and {wrong} is not"
    if min(images, channels, height, width, convolution.out_channels) < 1:
        return "there is nothing to convolve"
    most = convolution.kernel_size - 1
    if not all(0 <= side <= most for side in convolution.padding):
        return (
            f"a side may have 0 to {most} zeros, so that no window lies in them alone; there are"
            f" {convolution.padding}"
        )
    size = convolution.result_size
    if min(size) < 1:
        return f"images of {height}x{width} are smaller than a window"
    cell_channels = convolution.cell_channels
    if cell_channels not in (0, *CELL_CHANNELS):
        return f"a cell of partials has 2, 4 or 8 channels, not {cell_channels}"
    counts = height * width, size[0] * size[1], channels * convolution.kernel_size**2
    if max(*counts, convolution.out_channels, convolution.second_channels) > MOST:
        return "the sizes of an image exceed 32 bits"
    return None


def why_no_factors(channels: int, groups: int) -> str | None:
    """Return why the kernels cannot make the factors of a norm, in words; None if they can."""
    if cell_channels_of(channels, groups) > 0 and channels % CHANNEL_MULTIPLE == 0:
        return None
    return (
        f"channels must be multiples of {CHANNEL_MULTIPLE}, and a group have an even number of them; there are"
        f" {channels} in {groups} groups"
    )


def cell_channels_of(channels: int, groups: int) -> int:
    """Return how many channels a cell of partials has: 8, 4 or 2, a divisor of a group's; 0 if none divides."""
    if groups < 1 or channels % groups:
        return 0
    return next((n for n in CELL_CHANNELS if channels // groups % n == 0), 0)


def uses_fused_convolution(
    device_type: str, dtype: torch.dtype, enabled: frozenset[KernelKey] | None = None
) -> bool:
    """Whether the kernels may be used now, where no gradient is recorded: they are demanded, or enabled.

    They do the work of ``group_norm_act`` and ``same_padding``, too, and are not used where the reference of
    one of these is demanded; nor, unless they are demanded themselves, where Triton is.

    Args:
        device_type: Of the feature maps.
        dtype: Of the feature maps.
        enabled: What ``enabled_kernels`` returned when this was to be decided; None: what it returns now.

    Raises:
        BackendUnavailableError: they are demanded, and cannot be used for this dtype, or here.
    """
    if select_backend(OP, device_type, dtype, enabled=enabled) != "native":
        return False
    refused = {"reference"} if requested_backend(OP) == "native" else {"reference", "triton"}
    return not refused & {requested_backend(GROUP_NORM_ACT), requested_backend(SAME_PADDING)}


@constant_when_compiled
def why_no_kernels() -> str | None:
    """Return why the kernels cannot be used on the current device; None if they can."""
    if extension.CUDA.problem is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability != CAPABILITY:
            found = ".".join(map(str, capability))
            return f"the kernels, by wgmma of sm_90a, are for compute capability 9.0; the GPU's is {found}"
    return why_unusable(OP)


# ---- memory -------------------------------------------------------------------------------------------


def partials_shape(
    images: int, strips: int, channels: int, cell_channels: int
) -> tuple[int, int, int, int]:
    """Return the shape of partials, which are float32."""
    return images, strips, 1 + channels // cell_channels, 2


def factors_shape(images: int, channels: int) -> tuple[int, int, int]:
    """Return the shape of factors, which are float32."""
    return images, 2, channels


def pack_filters(standardized: Tensor) -> Tensor:
    """Lay standardized filters out as the kernels read them.

    Args:
        standardized: Shape (out, in, k, k), of any strides.

    Returns:
        Shape (ceil(in / 64), k * k, 8, out, 8), contiguous: of 64 input channels at a place in the filters,
        taken by 8s, for each result channel the 8 weights. Zeros stand for channels that the input lacks.

    Raises:
        ValueError: another shape.
    """
    if standardized.dim() != 4 or standardized.shape[2] != standardized.shape[3]:
        raise ValueError(
            f"{OP}: filters must have shape (out, in, k, k), got {tuple(standardized.shape)}"
        )
    out, channels, *size = standardized.shape
    chunks = -(-channels // CHUNK)
    filters = standardized.reshape(out, channels, size[0] * size[1])
    if channels % CHUNK:
        filters = F.pad(filters, (0, 0, 0, chunks * CHUNK - channels))
    in_eights = filters.view(out, chunks, CHUNK // 8, 8, size[0] * size[1])
    return in_eights.permute(1, 4, 2, 0, 3).contiguous()


# ---- calls that are prepared --------------------------------------------------------------------------


class Tiling(ctypes.Structure):
    """``bitfast::norm_convolution::Tiling``: how a convolution is cut. By default the kernels choose.

    Fields:
        columns: Result channels of a tile: 64, 128 or 256. 0: chosen for the shape, and so is all else.
        takes_turns: Whether each group of warps has tiles of its own, or both share each tile.
        keeps_weights: Whether a block loads its weights once, or for each tile.
        cluster: Blocks that bring weights for each other: 1 or 2.
        units: Of 64 pixels, that a group of warps multiplies at a time: 1 or 2 for 64 columns, 2 for 128, 1 for
            256.
    """

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in ("columns", "takes_turns", "keeps_weights", "cluster", "units")
    )


class Call(ctypes.Structure):
    """``bitfast::norm_convolution::Call`` of ``csrc/norm_convolution_cuda.h``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "has_norm", "activation")),
        ("images", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("height", "width", "channels")),
        *((name, ctypes.c_int32) for name in ("kernel_size", "stride", "top", "left")),
        *((name, ctypes.c_int32) for name in ("result_height", "result_width", "result_channels")),
        *((name, ctypes.c_int32) for name in ("second_channels", "has_residual", "cell_channels")),
        ("tiling", Tiling),
    )

    @classmethod
    def of(cls, convolution: Convolution, tiling: Tiling | None = None) -> Call:
        """Return the call for a convolution that the kernels suit, cut as they choose or as is wanted."""
        images, channels, height, width = convolution.shape
        rows, columns = convolution.result_size
        activation = convolution.activation
        return cls(
            dtype=DTYPE_NUMBERS[convolution.dtype],
            has_norm=activation is not None,
            activation=tuple(ACTIVATIONS).index(activation or "none"),
            images=images,
            height=height,
            width=width,
            channels=channels,
            kernel_size=convolution.kernel_size,
            stride=convolution.stride,
            top=convolution.padding[0],
            left=convolution.padding[2],
            result_height=rows,
            result_width=columns,
            result_channels=convolution.out_channels,
            second_channels=convolution.second_channels,
            has_residual=convolution.adds,
            cell_channels=convolution.cell_channels,
            tiling=tiling or Tiling(),
        )


class Prepared(ctypes.Structure):
    """``bitfast::norm_convolution::Prepared``: a call that is ready, and how it is launched."""

    _fields_ = (
        ("tiling", Tiling),
        *((name, ctypes.c_int32) for name in ("stages", "strips", "shared_bytes")),
        *((name, ctypes.c_int64) for name in ("blocks", "tiles")),
        ("cost", ctypes.c_double),
        ("dtype", ctypes.c_int32),
        ("arguments", ctypes.c_int64 * 61),
    )


class PartialsCall(ctypes.Structure):
    """``bitfast::norm_convolution::PartialsCall``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "channels", "cell_channels", "strips")),
        *((name, ctypes.c_int64) for name in ("images", "pixels")),
    )


class FactorsCall(ctypes.Structure):
    """``bitfast::norm_convolution::FactorsCall``."""

    _fields_ = (
        ("images", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("strips", "channels", "cell_channels", "groups")),
        *((name, ctypes.c_int32) for name in ("weight_dtype", "bias_dtype")),
        ("eps", ctypes.c_float),
    )


class PreparedConvolution(NamedTuple):
    """A convolution that is ready to run.

    Attributes:
        run: Takes the stream's handle and the addresses of x, factors, packed filters, residual, result,
            partials, second packed filters and second result: 0 for each that the convolution does not have.
            The residual may be the same memory as the result. Raises RuntimeError if the launch fails.
        result_shape: (N, out_channels, H', W').
        second_shape: Of the second result; None if there is none.
        strips: Of the partials, in each image; 0 if there are none.
        launch: How it is launched, for reports.
    """

    run: Callable[..., None]
    result_shape: tuple[int, int, int, int]
    second_shape: tuple[int, int, int, int] | None
    strips: int
    launch: Prepared


class PreparedPartials(NamedTuple):
    """Partials of a feature map, ready to be computed.

    Attributes:
        run: Takes the stream's handle and the addresses of x and of partials.
        strips: Of the partials, in each image.
    """

    run: Callable[[int, int, int], None]
    strips: int


def prepare_convolution(
    convolution: Convolution, device: torch.device | None = None, tiling: Tiling | None = None
) -> PreparedConvolution:
    """Prepare the launch of a convolution. From call to call only the stream and addresses change.

    Feature maps are dense and channels_last, and addresses multiples of 16. The device must be the current one
    when the launch is run, which may be from several threads, and while a CUDA graph is recorded.

    Args:
        convolution: One that :func:`why_unsuited` has nothing against.
        device: Where the tensors will be. None: on the current device.
        tiling: How the convolution is cut, for comparisons. None: as the kernels choose for its shape.

    Raises:
        RuntimeError: there are no CUDA kernels here, or these cannot take the convolution, or cut it like that.
        ValueError: :func:`why_unsuited` says why.
    """
    reason = why_unsuited(convolution)
    if reason is not None:
        raise ValueError(f"{OP}: {reason}")
    prepared = Prepared()
    prepare = entry("bitfast_norm_convolution_prepare", ADDRESS, ADDRESS)
    with _current(device):
        prepare(ctypes.byref(Call.of(convolution, tiling)), ctypes.byref(prepared))
    if convolution.cell_channels and prepared.strips > MOST_STRIPS:
        raise RuntimeError(f"{OP}: images of so many pixels cannot be measured")
    launch = entry("bitfast_norm_convolution", *(ADDRESS,) * 10)
    images, second, size = (
        convolution.shape[0],
        convolution.second_channels,
        convolution.result_size,
    )
    return PreparedConvolution(
        partial(launch, ctypes.byref(prepared)),
        (images, convolution.out_channels, *size),
        (images, second, *size) if second else None,
        prepared.strips if convolution.cell_channels else 0,
        prepared,
    )


def prepare_partials(
    shape: Sequence[int],
    dtype: torch.dtype,
    cell_channels: int,
    device: torch.device | None = None,
) -> PreparedPartials:
    """Prepare the launch that computes the partials of a feature map that no kernel of this op has written.

    Args:
        shape: (N, C, H, W), of x, which is dense and channels_last.
        dtype: Of x, one of :data:`DTYPES`.
        cell_channels: What :func:`cell_channels_of` returns for the norm that follows; not 0.
        device: Where x will be. None: on the current device.

    Raises:
        RuntimeError: there are no CUDA kernels here, or these cannot take the arguments.
    """
    images, channels, height, width = shape
    call = PartialsCall(DTYPE_NUMBERS[dtype], channels, cell_channels, 0, images, height * width)
    told, strips = ctypes.byref(call), ctypes.c_int32()
    ask = entry("bitfast_norm_convolution_strips", ADDRESS, ADDRESS)
    with _current(device):
        ask(told, ctypes.byref(strips))
    call.strips = strips.value
    launch = entry("bitfast_norm_convolution_partials", *(ADDRESS,) * 4)

    return PreparedPartials(partial(launch, told), strips.value)


def prepare_factors(
    images: int,
    strips: int,
    channels: int,
    cell_channels: int,
    groups: int,
    eps: float,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> Callable[[int, int, int, int, int], None]:
    """Return a function that makes the factors of a norm from partials.

    It takes the stream's handle and the addresses of partials, of the norm's weight and bias, and of factors.

    Args:
        images: As many as partials and factors are of.
        strips: Of the partials, in each image.
        channels: Of the feature map.
        cell_channels: Of the partials; it divides the channels of a group.
        groups: Of the norm.
        eps: Of the norm.
        weight_dtype: Of the norm's weight: float32, bfloat16 or float16.
        bias_dtype: Of its bias.

    Raises:
        RuntimeError: there are no CUDA kernels here.
    """
    numbers = DTYPE_NUMBERS[weight_dtype], DTYPE_NUMBERS[bias_dtype]
    call = FactorsCall(images, strips, channels, cell_channels, groups, *numbers, eps)
    return partial(entry("bitfast_norm_convolution_factors", *(ADDRESS,) * 6), ctypes.byref(call))


def _current(device: torch.device | None) -> AbstractContextManager[object]:
    return nullcontext() if device is None else as_current(device)


register_kernel(OP, "native", "cuda", DTYPES, why_no_kernels, on_demand=True)

__all__ = [
    "DTYPES",
    "Call",
    "Convolution",
    "FactorsCall",
    "PartialsCall",
    "Prepared",
    "PreparedConvolution",
    "PreparedPartials",
    "Sides",
    "Tiling",
    "cell_channels_of",
    "factors_shape",
    "pack_filters",
    "partials_shape",
    "prepare_convolution",
    "prepare_factors",
    "prepare_partials",
    "uses_fused_convolution",
    "why_no_factors",
    "why_no_kernels",
    "why_unsuited",
]
