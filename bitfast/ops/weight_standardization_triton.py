"""weight_standardization in Triton: the operators' implementations, and eager calls without operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitfast import reference
from bitfast.backends import requested_backend, select_backend
from bitfast.kernels.launch import aligned_count, as_current
from bitfast.memory_format import memory_format_of
from bitfast.ops.common import launch_kernels
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
from bitfast.ops.weight_standardization_contract import (
    OP,
    check,
    fake,
    fake_all,
    fake_all_backward,
)

if TYPE_CHECKING:
    from bitfast.kernels.weight_standardization import Table

# ---- operators ------------------------------------------------------------------------------------


def forward(weight: Tensor, eps: float, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel of one weight."""
    from bitfast.kernels import weight_standardization as kernels

    weight = weight.contiguous(memory_format=memory_format_of(weight))
    result, mean, rstd = fake(weight, eps, dtype)
    launch = kernels.forward_launch(weight, eps, False, result=result, mean=mean, rstd=rstd)
    launch_kernels([launch], weight)
    return result, mean, rstd


def backward(grad: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Launch the backward kernel of one weight."""
    from bitfast.kernels import weight_standardization as kernels

    memory_format = memory_format_of(weight)
    weight = weight.contiguous(memory_format=memory_format)
    grad = grad.contiguous(memory_format=memory_format)
    result = torch.empty_like(weight)
    launch = kernels.backward_launch(grad, weight, mean, rstd, False, grad_weight=result)
    launch_kernels([launch], weight)
    return result


def all_forward(
    weights: Sequence[Tensor], eps: float, dtype: torch.dtype | None, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel of all weights."""
    from bitfast.kernels import weight_standardization as kernels

    weights = [w.contiguous(memory_format=memory_format_of(w)) for w in weights]
    result, mean, rstd = fake_all(weights, eps, dtype, channels_last)
    starts, _ = starts_of([w.numel() for w in weights])
    launches = kernels.forward_all_launches(
        weights, starts, eps, channels_last, result=result, mean=mean, rstd=rstd
    )
    launch_kernels(launches, weights[0])
    return result, mean, rstd


def all_backward(
    grad: Tensor, weights: Sequence[Tensor], mean: Tensor, rstd: Tensor, channels_last: bool
) -> Tensor:
    """Launch the backward kernel of all weights."""
    from bitfast.kernels import weight_standardization as kernels

    weights = [w.contiguous(memory_format=memory_format_of(w)) for w in weights]
    result = fake_all_backward(grad, weights, mean, rstd, channels_last)
    starts, _ = starts_of([w.numel() for w in weights])
    launches = kernels.backward_all_launches(
        grad.contiguous(), weights, starts, mean, rstd, channels_last, grad_weight=result
    )
    launch_kernels(launches, weights[0])
    return result


# ---- eager calls ----------------------------------------------------------------------------------


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
        call = _calls.keep(key, _new_call(weights, eps, dtype, channels_last))
    if call is None or any(map(Tensor.is_neg, weights)):
        return None
    try:
        addresses = tuple(map(Tensor.data_ptr, weights))
    except RuntimeError:  # one has no memory of its own
        return None
    table = call.table_at(addresses)
    if table is None:
        return None
    if torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, weights)):
        return list(StandardizeAll.apply(call, table, *weights))
    return call.forward(table)[0]


_FEATURES: Any = attrgetter("shape", "dtype", "device")
_REQUIRES_GRAD: Any = attrgetter("requires_grad")


class PreparedCallOfAll:
    """The prepared launches for calls with weights of the same metadata; see :func:`launch_all`."""

    def __init__(
        self, weights: Sequence[Tensor], eps: float, dtype: torch.dtype | None, channels_last: bool
    ) -> None:
        from bitfast.kernels import weight_standardization as kernels

        self.kernels = kernels
        self.device, self.dtype = weights[0].device, weights[0].dtype
        self.eps, self.result_dtype = float(eps), dtype or self.dtype
        self.asked_dtype, self.channels_last = dtype, channels_last
        self.filters = tuple(kernels.filters_of(weight, channels_last) for weight in weights)
        starts, self.end = starts_of([weight.numel() for weight in weights])
        self.starts = tuple(starts)
        rows = sum(filters.rows for filters in self.filters)
        self.statistics = aligned_count(rows)
        """How many numbers the means take in the buffer of statistics, rounded up so that 1/std is aligned."""
        self.rows = rows
        self.results = self._places(weights, channels_last)
        self.gradients = self._places(weights, False)
        self._forward: BoundedCache[Callable[..., None]] = BoundedCache(most=16)
        self._backward: BoundedCache[Callable[..., None]] = BoundedCache(most=16)

    def _places(self, weights: Sequence[Tensor], channels_last: bool) -> list[tuple[Any, Any, Any]]:
        """Return shape, strides and offset of each weight in the buffer."""
        buffer = torch.empty(self.end, device="meta")
        like = [weight.detach().to("meta") for weight in weights]
        views = unpack(buffer, like, channels_last)
        return [(view.shape, view.stride(), view.storage_offset()) for view in views]

    def table_at(self, addresses: tuple[int, ...]) -> Table | None:
        """Return the kernels' table for weights at these addresses."""
        return self.kernels.table_at(self.filters, addresses, self.starts, self.device)

    def forward(self, table: Table) -> tuple[list[Tensor], Tensor]:
        """Return the results, and the statistics of all filters: all means, then all 1/std."""
        stream = current_stream(self.device)
        if stream is None:
            with as_current(self.device):
                return self.forward(table)
        count = table.programs.shape[0]
        run = self._forward.get(count)
        if run is None:
            made = self.kernels.prepare_forward_all(table, self.dtype, self.result_dtype, self.eps)
            run = self._forward.keep(count, made)
        packed = torch.empty(self.end, dtype=self.result_dtype, device=self.device)
        statistics = torch.empty(2 * self.statistics, dtype=torch.float32, device=self.device)
        mean = statistics.data_ptr()
        run(stream, table, packed.data_ptr(), mean, mean + 4 * self.statistics)
        return [packed.as_strided(*place) for place in self.results], statistics

    def backward(
        self, table: Table | None, saved: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Return the gradients of the weights.

        Args:
            table: Of the weights.
            saved: The weights and the statistics.
            grads: The gradients of the results; None for each result that was not used.
        """
        *weights, statistics = saved
        given = [grad for grad in grads if grad is not None]
        if not can_use_backward_kernel(*given):
            return self._differentiable_gradients(weights, grads)
        can_launch = is_unwatched() and not has_unusual_memory(*given, statistics)
        if not can_launch or table is None or set(map(type, given)) - PLAIN_TYPES:
            filled = [
                torch.zeros_like(weight, dtype=self.result_dtype) if grad is None else grad
                for grad, weight in zip(grads, weights, strict=True)
            ]
            mean, rstd = statistics[: self.rows], statistics[self.statistics :][: self.rows]
            operator = torch.ops.bitfast.weight_standardization_all_backward.triton
            grad = pack(filled, self.channels_last, weights)
            packed = call_without_autograd(operator, grad, weights, mean, rstd, self.channels_last)
            return unpack(packed, weights, channels_last=False)
        return self._launch_backward(table, statistics, grads)

    def _launch_backward(
        self, table: Table, statistics: Tensor, grads: Sequence[Tensor | None]
    ) -> list[Tensor]:
        stream = current_stream(self.device)
        if stream is None:
            with as_current(self.device):
                return self._launch_backward(table, statistics, grads)
        count = table.programs.shape[0]
        run = self._backward.get(count)
        if run is None:
            made = self.kernels.prepare_backward_all(table, self.dtype, self.result_dtype)
            run = self._backward.keep(count, made)
        grad = torch.empty(self.end, dtype=self.result_dtype, device=self.device)
        places = [grad.as_strided(*place) for place in self.results]
        for place, given in zip(places, grads, strict=True):
            if given is None:
                place.zero_()
        used = [place for place, given in zip(places, grads, strict=True) if given is not None]
        if used:
            torch._foreach_copy_(used, [given for given in grads if given is not None])
        packed = torch.empty(self.end, dtype=self.dtype, device=self.device)
        mean = statistics.data_ptr()
        run(stream, table, grad.data_ptr(), mean, mean + 4 * self.statistics, packed.data_ptr())
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
    if (
        select_backend(OP, first.device.type, first.dtype) != "triton"
        or any((w.device, w.dtype) != (first.device, first.dtype) for w in weights)
        or any(type(w) not in PLAIN_TYPES for w in weights)
        or not all(w.is_contiguous(memory_format=memory_format_of(w)) for w in weights)
    ):
        return None
    return PreparedCallOfAll(weights, eps, dtype, channels_last)


class StandardizeAll(torch.autograd.Function):
    """The standardization of all weights as one node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any, call: PreparedCallOfAll, table: Table, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the results."""
        results, statistics = call.forward(table)
        ctx.call = call
        ctx.save_for_backward(*weights, statistics)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the weights."""
        call, saved = ctx.call, ctx.saved_tensors
        table = call.table_at(tuple(weight.data_ptr() for weight in saved[:-1]))
        return (None, None, *call.backward(table, saved, grads))


__all__ = ["all_backward", "all_forward", "backward", "forget_calls", "forward", "launch_all"]
