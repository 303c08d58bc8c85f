"""Eager standardization of all weights, past torch's dispatcher: one launch, one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from bitfast import reference
from bitfast.backends import requested_backend, select_backend
from bitfast.kernels.device_cache import is_capturing
from bitfast.kernels.launch import aligned_count, as_current
from bitfast.memory_format import memory_format_of
from bitfast.ops.derivatives import (
    call_without_autograd,
    can_use_backward_kernel,
    differentiable_gradients,
)
from bitfast.ops.eager import (
    PLAIN_TYPES,
    BoundedCache,
    current_stream,
    has_unusual_memory,
    is_unwatched,
)
from bitfast.ops.weight_buffer import pack, starts_of, unpack
from bitfast.ops.weight_standardization_contract import OP, check
from bitfast.ops.weight_standardization_cuda import NATIVE_CUDA_DTYPES, CudaLaunches
from bitfast.ops.weight_standardization_triton import TritonLaunches

Place = tuple[torch.Size, tuple[int, ...], int]
"""Shape, strides and offset of a weight's results in the buffer of all."""


class Launches(Protocol):
    """A backend's launches for weights of the same metadata."""

    def at(self, addresses: Sequence[int]) -> Any:
        """Return what the launches want to know of weights at these addresses.

        None if it cannot be had now, because a CUDA graph is being captured.
        """

    def forward(self, stream: int, weights: Any, result: int, mean: int, rstd: int) -> None:
        """Write the results into the buffer at the address ``result``, and the statistics of all filters."""

    def backward(
        self,
        stream: int,
        weights: Any,
        grads: Sequence[Tensor | None],
        like: Sequence[Place],
        mean: int,
        rstd: int,
        grad_weight: int,
    ) -> None:
        """Write the gradients into the buffer at ``grad_weight``.

        Args:
            stream: A stream of the current device.
            weights: What :meth:`at` has returned.
            grads: Of the results, of their dtype, in any layout; None stands for zeros.
            like: Shape and strides of each result.
            mean, rstd: The addresses of the statistics.
            grad_weight: The address of the buffer.
        """


def launch_all(
    weights: Sequence[Tensor], eps: float, dtype: torch.dtype | None, channels_last: bool
) -> list[Tensor] | None:
    """Return the results of several weights without torch's dispatcher; None where operators are needed.

    Operators are needed for weights that are not dense, not plain or not of one dtype and device, for another
    backend, and for weights that are first met while a CUDA graph is recorded. The caller has asked
    ``eager.may_launch`` about the first weight.

    Raises:
        TypeError, ValueError: As the op.
    """
    device = weights[0].device
    if dtype is None and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    try:
        key = (
            *map(type, weights), *map(Tensor.stride, weights), *map(_FEATURES, weights),
            eps, dtype, channels_last, requested_backend(OP),
        )  # fmt: skip
    except (AttributeError, RuntimeError, TypeError):  # not a tensor, or one without strides
        return None
    call = _calls.get(key, _UNKNOWN)
    if call is _UNKNOWN:
        call = _new_call(weights, eps, dtype, channels_last)
        if not is_capturing():  # a backend may be unavailable only until a graph is captured
            _calls.keep(key, call)
    if call is None or any(map(Tensor.is_neg, weights)):
        return None
    try:
        addresses = tuple(map(Tensor.data_ptr, weights))
    except RuntimeError:  # one has no memory of its own
        return None
    found = call.launches.at(addresses)
    if found is None:
        return None
    if torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, weights)):
        return list(StandardizeAll.apply(call, found, *weights))
    return call.forward(found)[0]


_FEATURES: Any = attrgetter("shape", "dtype", "device")
_REQUIRES_GRAD: Any = attrgetter("requires_grad")


class PreparedCallOfAll:
    """The prepared launches for calls with weights of the same metadata; see :func:`launch_all`."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        eps: float,
        dtype: torch.dtype | None,
        channels_last: bool,
        backend: str,
    ) -> None:
        self.backend = backend
        self.device, self.dtype = weights[0].device, weights[0].dtype
        self.eps, self.result_dtype = float(eps), dtype or self.dtype
        self.asked_dtype, self.channels_last = dtype, channels_last
        kind = CudaLaunches if backend == "native" else TritonLaunches
        self.launches: Launches = kind(weights, self.eps, self.result_dtype, channels_last)
        _, self.end = starts_of([weight.numel() for weight in weights])
        self.rows = sum(weight.shape[0] for weight in weights)
        self.statistics = aligned_count(self.rows)
        """How many numbers the means take in the buffer of statistics, rounded up so that 1/std is aligned."""
        self.results = self._places(weights, channels_last)
        self.gradients = self._places(weights, False)

    def _places(self, weights: Sequence[Tensor], channels_last: bool) -> list[Place]:
        """Return shape, strides and offset of each weight in the buffer."""
        buffer = torch.empty(self.end, device="meta")
        like = [weight.detach().to("meta") for weight in weights]
        views = unpack(buffer, like, channels_last)
        return [(view.shape, view.stride(), int(view.storage_offset())) for view in views]

    def forward(self, weights: Any) -> tuple[list[Tensor], Tensor]:
        """Return the results, and the statistics of all filters: all means, then all 1/std."""
        stream = current_stream(self.device)
        if stream is None:
            with as_current(self.device):
                return self.forward(weights)
        packed = torch.empty(self.end, dtype=self.result_dtype, device=self.device)
        statistics = torch.empty(2 * self.statistics, dtype=torch.float32, device=self.device)
        mean = statistics.data_ptr()
        rstd = mean + 4 * self.statistics
        self.launches.forward(stream, weights, packed.data_ptr(), mean, rstd)
        return [packed.as_strided(*place) for place in self.results], statistics

    def backward(
        self, found: Any, saved: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Return the gradients of the weights.

        Args:
            found: What the launches know of the weights at their addresses, or None.
            saved: The weights and the statistics.
            grads: The gradients of the results; None for each result that was not used.
        """
        *weights, statistics = saved
        given = [grad for grad in grads if grad is not None]
        if not can_use_backward_kernel(*given):
            return self._differentiable_gradients(weights, grads)
        can_launch = is_unwatched() and not has_unusual_memory(*given, statistics)
        if not can_launch or found is None or set(map(type, given)) - PLAIN_TYPES:
            filled = [
                torch.zeros_like(weight, dtype=self.result_dtype) if grad is None else grad
                for grad, weight in zip(grads, weights, strict=True)
            ]
            mean, rstd = statistics[: self.rows], statistics[self.statistics :][: self.rows]
            operators = torch.ops.bitfast.weight_standardization_all_backward
            operator = getattr(operators, self.backend)
            grad = pack(filled, self.channels_last, weights)
            packed = call_without_autograd(operator, grad, weights, mean, rstd, self.channels_last)
            return unpack(packed, weights, channels_last=False)
        return self._launch_backward(found, statistics, grads)

    def _launch_backward(
        self, found: Any, statistics: Tensor, grads: Sequence[Tensor | None]
    ) -> list[Tensor]:
        stream = current_stream(self.device)
        if stream is None:
            with as_current(self.device):
                return self._launch_backward(found, statistics, grads)
        packed = torch.empty(self.end, dtype=self.dtype, device=self.device)
        mean = statistics.data_ptr()
        rstd = mean + 4 * self.statistics
        self.launches.backward(stream, found, grads, self.results, mean, rstd, packed.data_ptr())
        return [packed.as_strided(*place) for place in self.gradients]

    def _differentiable_gradients(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        used = [number for number, grad in enumerate(grads) if grad is not None]

        members = [weights[number] for number in used]

        def of_members(*members: Tensor) -> list[Tensor]:
            return [
                reference.weight_standardization_forward(w, self.eps, self.asked_dtype)[0]
                for w in members
            ]

        found = differentiable_gradients(
            of_members, members, [grad for grad in grads if grad is not None]
        )
        by_number = dict(zip(used, found, strict=True))
        return [
            by_number[number] if number in by_number else torch.zeros_like(weight)
            for number, weight in enumerate(weights)
        ]


_calls: BoundedCache[PreparedCallOfAll | None] = BoundedCache(most=64)
"""By the metadata of the weights; None where operators are needed."""

_UNKNOWN: Any = object()


def forget_calls() -> None:
    """Forget the prepared calls."""
    _calls.clear()


def _new_call(
    weights: Sequence[Tensor], eps: float, dtype: torch.dtype | None, channels_last: bool
) -> PreparedCallOfAll | None:
    """Check the arguments and return the prepared call; None if operators are needed."""
    for number, weight in enumerate(weights):
        check(f"weights[{number}]", weight, eps, dtype)
    first = weights[0]
    backend = select_backend(OP, first.device.type, first.dtype)
    if (
        not (backend == "triton" or (backend == "native" and first.is_cuda))
        or (backend == "native" and (dtype or first.dtype) not in NATIVE_CUDA_DTYPES)
        or any((w.device, w.dtype) != (first.device, first.dtype) for w in weights)
        or any(type(w) not in PLAIN_TYPES for w in weights)
        or not all(w.is_contiguous(memory_format=memory_format_of(w)) for w in weights)
    ):
        return None
    return PreparedCallOfAll(weights, eps, dtype, channels_last, backend)


class StandardizeAll(torch.autograd.Function):
    """The standardization of all weights as one node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any, call: PreparedCallOfAll, found: Any, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the results."""
        results, statistics = call.forward(found)
        ctx.call = call
        ctx.save_for_backward(*weights, statistics)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the weights."""
        call, saved = ctx.call, ctx.saved_tensors
        found = call.launches.at([weight.data_ptr() for weight in saved[:-1]])
        return (None, None, *call.backward(found, saved, grads))


__all__ = ["Launches", "PreparedCallOfAll", "StandardizeAll", "forget_calls", "launch_all"]
