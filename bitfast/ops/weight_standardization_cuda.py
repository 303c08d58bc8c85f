"""weight_standardization by the extension's CUDA kernels: prepared calls, and the check of their first use."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from bitfast import reference
from bitfast.memory_format import is_channels_last, laid_out, memory_format_of
from bitfast.ops.first_use import difference
from bitfast.ops.native_cuda import ADDRESS, DTYPES, entry
from bitfast.ops.weight_buffer import starts_of, unpack

NATIVE_CUDA_DTYPES = frozenset(DTYPES)
"""The dtypes of weights and of results that the kernels take."""


class _Weight(ctypes.Structure):
    """``Weight`` of csrc/weight_standardization_cuda.h."""

    _fields_ = [
        ("filters", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("taps", ctypes.c_int64),
        ("start", ctypes.c_int64),
    ]


class _Call(ctypes.Structure):
    """``Call`` of csrc/weight_standardization_cuda.h."""

    _fields_ = [
        ("weights", ADDRESS),
        ("count", ctypes.c_int32),
        ("weight_dtype", ctypes.c_int32),
        ("result_dtype", ctypes.c_int32),
        ("eps", ctypes.c_float),
    ]


def _described(weight: Tensor, start: int, to_channels_last: bool) -> _Weight:
    filters, channels, height, width = weight.shape
    is_turned = to_channels_last and not is_channels_last(weight) and channels > 1
    if is_turned:
        return _Weight(filters, channels, height * width, start)
    return _Weight(filters, channels * height * width, 1, start)


class PreparedKernels:
    """The kernels' calls for weights of one dtype and device and of these shapes and layouts, prepared.

    Nothing is kept on the device: the shapes and all addresses are arguments of the kernel. So a call may be
    captured in a CUDA graph, and weights may move from call to call.
    """

    def __init__(
        self, weights: Sequence[Tensor], eps: float, dtype: torch.dtype, to_channels_last: bool
    ) -> None:
        """Prepare for weights that are dense, contiguous or channels_last.

        Args:
            weights: Only their metadata matters.
            eps: Added to each variance.
            dtype: Of the results.
            to_channels_last: The results are channels_last; else they have the layouts of the weights.
        """
        starts, _ = starts_of([weight.numel() for weight in weights])
        described = [
            _described(weight, start, to_channels_last)
            for weight, start in zip(weights, starts, strict=True)
        ]
        self._weights = (_Weight * len(weights))(*described)
        self._call = _Call(
            ctypes.addressof(self._weights),
            len(weights),
            DTYPES[weights[0].dtype],
            DTYPES[dtype],
            eps,
        )
        self._at = ctypes.addressof(self._call)
        self._addresses = ADDRESS * len(weights)
        op = "bitfast_weight_standardization"
        self._forward = entry(f"{op}_forward", *[ADDRESS] * 6)
        self._backward = entry(f"{op}_backward", *[ADDRESS] * 7)

    def forward(
        self, stream: int, weights: Sequence[int], result: int, mean: int, rstd: int
    ) -> None:
        """Write all results into one buffer, where ``starts_of`` says, and the statistics of all filters.

        Args:
            stream: Of the current device, on which everything lies.
            weights: The address of each.
            result: The address of the buffer.
            mean, rstd: The addresses of one float32 number per filter.
        """
        self._forward(self._at, stream, self._addresses(*weights), result, mean, rstd)

    def backward(
        self,
        stream: int,
        weights: Sequence[int],
        grads: Sequence[int | None],
        mean: int,
        rstd: int,
        grad_weight: int,
    ) -> None:
        """Write the gradients of all weights into one buffer, where ``starts_of`` says.

        Args:
            stream, weights: As in :meth:`forward`.
            grads: The address of the gradient of each result, which has the result's dtype and layout. None
                stands for zeros.
            mean, rstd: The addresses of what the forward has written.
            grad_weight: The address of the buffer. Each gradient has the dtype and layout of its weight.
        """
        addresses = self._addresses
        self._backward(
            self._at, stream, addresses(*weights), addresses(*grads), mean, rstd, grad_weight
        )


class CudaLaunches:
    """``Launches`` of weight_standardization_eager.py. Gradients are read where they lie."""

    def __init__(
        self, weights: Sequence[Tensor], eps: float, dtype: torch.dtype, channels_last: bool
    ) -> None:
        """Prepare for weights like these, which are dense, contiguous or channels_last."""
        self._kernels = PreparedKernels(weights, eps, dtype, channels_last)
        self._layouts = [
            torch.channels_last if channels_last else memory_format_of(weight) for weight in weights
        ]

    def at(self, addresses: Sequence[int]) -> Sequence[int]:
        """Return the addresses: nothing else is wanted."""
        return addresses

    def forward(
        self, stream: int, weights: Sequence[int], result: int, mean: int, rstd: int
    ) -> None:
        """Launch the forward kernel."""
        self._kernels.forward(stream, weights, result, mean, rstd)

    def backward(
        self,
        stream: int,
        weights: Sequence[int],
        grads: Sequence[Tensor | None],
        like: Sequence[object],
        mean: int,
        rstd: int,
        grad_weight: int,
    ) -> None:
        """Launch the backward kernel."""
        # Copies, where there are any, live until the kernel is launched; what takes their memory is behind it.
        dense = [
            None if grad is None else grad.contiguous(memory_format=layout)
            for grad, layout in zip(grads, self._layouts, strict=True)
        ]
        addresses = [None if grad is None else grad.data_ptr() for grad in dense]
        self._kernels.backward(stream, weights, addresses, mean, rstd, grad_weight)


# ---- first use ------------------------------------------------------------------------------------


def check_first_use(device: torch.device) -> str | None:
    """Run each of the ways that filters are computed on a device; return what is wrong, or None."""
    for weight_dtype, dtype in [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ]:
        problem = _check(device, weight_dtype, dtype)
        if problem is not None:
            return problem
    return None


SHAPES = ((5, 3, 7, 7), (70, 64, 1, 1), (9, 64, 3, 3), (3, 1024, 3, 3), (3, 9216, 1, 1))
"""An odd fan-in, filters that share a warp, filters for several warps, and filters in chunks."""


def _check(device: torch.device, weight_dtype: torch.dtype, dtype: torch.dtype) -> str | None:
    random = torch.Generator().manual_seed(0)
    weights, grads = [], []
    for number, shape in enumerate(SHAPES):
        weight = torch.randn(shape, generator=random).to(device, weight_dtype) + 3
        weights.append(laid_out(weight, torch.channels_last) if number == 1 else weight)
        grad = torch.randn(shape, generator=random).to(device, dtype)
        grads.append(laid_out(grad, torch.channels_last))
    kernels = PreparedKernels(weights, 1e-8, dtype, to_channels_last=True)
    _, end = starts_of([weight.numel() for weight in weights])
    results = torch.empty(end, dtype=dtype, device=device)
    grad_weights = torch.empty(end, dtype=weight_dtype, device=device)
    rows = sum(weight.shape[0] for weight in weights)
    mean, rstd = torch.empty(2, rows, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    addresses = [weight.data_ptr() for weight in weights]
    statistics = (mean.data_ptr(), rstd.data_ptr())
    kernels.forward(stream, addresses, results.data_ptr(), *statistics)
    kernels.backward(
        stream, addresses, [g.data_ptr() for g in grads], *statistics, grad_weights.data_ptr()
    )
    written = zip(
        weights, grads, unpack(results, weights, True), unpack(grad_weights, weights, False),
        strict=True,
    )  # fmt: skip
    for weight, grad, result, grad_weight in written:
        exact = weight.double()
        expected, *saved = reference.weight_standardization_forward(exact, 1e-8, None)
        expected_grad = reference.weight_standardization_backward(grad.double(), exact, *saved)
        name = f"{tuple(weight.shape)} ({weight_dtype})"
        problem = difference(f"the weight {name}", result, expected) or difference(
            f"the gradient of {name}", grad_weight, expected_grad, 16.0
        )
        if problem is not None:
            return problem
    return None


__all__ = ["NATIVE_CUDA_DTYPES", "CudaLaunches", "PreparedKernels", "check_first_use"]
