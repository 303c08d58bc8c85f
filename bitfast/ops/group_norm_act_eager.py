"""Eager calls of group_norm_act without torch's dispatcher: prepared launches, by CUDA or Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from operator import index
from typing import Any

import torch
from torch import Tensor

from bitfast.backends import requested_backend, select_backend
from bitfast.kernels.launch import aligned_count, as_current
from bitfast.memory_format import memory_format_of
from bitfast.ops import group_norm_act_backward_cuda, group_norm_act_cuda
from bitfast.ops.derivatives import call_without_autograd, can_use_backward_kernel
from bitfast.ops.eager import (
    PLAIN_TYPES,
    BoundedCache,
    current_stream,
    has_unusual_memory,
    is_unwatched,
)
from bitfast.ops.group_norm_act_contract import (
    ADD_OP,
    OP,
    check,
    check_residual,
    differentiable_norm_gradients,
)
from bitfast.ops.native_cuda import DTYPES

# ---- what prepares launches -----------------------------------------------------------------------


def prepare_forward(backend: str, *arguments: Any, **options: Any) -> Callable[..., None]:
    """Return a function that launches a backend's kernels: "native" or "triton".

    It takes the stream, and the addresses of x, residual, weight, bias, total, result, mean, rstd; 0 for
    missing tensors.

    Args:
        backend: Whose kernels.
        arguments, options: As ``kernels.group_norm_act_prepared.prepare_forward`` takes them.
    """
    if backend == "native":
        return group_norm_act_cuda.prepare_forward(*arguments, **options)
    from bitfast.kernels import group_norm_act_prepared

    return group_norm_act_prepared.prepare_forward(*arguments, **options)


def prepare_backward(backend: str, *arguments: Any, **options: Any) -> Callable[..., None]:
    """Return a function that launches a backend's kernels, as :func:`prepare_forward`.

    It takes the stream, and the addresses of grad, grad_total, x, weight, bias, mean, rstd, grad_x,
    grad_weight, grad_bias, result; 0 for missing tensors. With ``recomputes=True``, ``result`` is filled with
    what the forward pass gave for x.
    """
    if backend == "native":
        return group_norm_act_backward_cuda.prepare_backward(*arguments, **options)
    from bitfast.kernels import group_norm_act_prepared

    return group_norm_act_prepared.prepare_backward(*arguments, **options)


def kernels_of(
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    parameter_dtypes: Sequence[torch.dtype],
) -> str | None:
    """Return the backend whose launches can be prepared for such tensors; None if an operator is needed."""
    backend = select_backend(OP, device.type, dtype, memory_format)
    if backend == "triton":
        return backend
    is_prepared = backend == "native" and device.type == "cuda"
    return backend if is_prepared and all(d in DTYPES for d in parameter_dtypes) else None


# ---- eager calls ----------------------------------------------------------------------------------


def launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor] | None:
    """Return x (plus the residual) and its norm without torch's dispatcher; None where an operator is needed.

    An operator is needed for tensors that are not dense, not aligned or not plain, and for another backend. The
    caller has asked ``eager.may_launch`` about x, and checks the arguments itself if None is returned.

    Raises:
        TypeError, ValueError: As the op.
    """
    call = find_call(x, residual, weight, bias, num_groups, eps, activation)
    if call is None:
        return None
    if torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or bias.requires_grad
        or (residual is not None and residual.requires_grad)
    ):
        if residual is None:
            total, result = x, GroupNormAct.apply(call, x, weight, bias)
        else:
            total, result = AddGroupNormAct.apply(call, x, residual, weight, bias)
    else:
        total, result, _ = call.forward(x, residual, weight, bias, keeps_statistics=False)
    if torch.is_autocast_enabled(call.device.type):
        result = result.to(torch.get_autocast_dtype(call.device.type))
    return total, result


def find_call(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    activation: str,
) -> PreparedCall | None:
    """Return the prepared launches for such arguments; None where an operator is needed: see :func:`launch`."""
    try:
        key = (
            x.shape, x.stride(), x.dtype, x.device,
            type(weight), weight.stride(), weight.numel(), weight.dtype, weight.device,
            type(bias), bias.stride(), bias.numel(), bias.dtype, bias.device,
            num_groups, eps, activation, requested_backend(OP),
            residual is None or (
                type(residual), residual.shape, residual.stride(), residual.dtype, residual.device
            ),
        )  # fmt: skip
    except (AttributeError, RuntimeError):  # not a tensor, or one without strides
        return None
    call = _calls.get(key, _UNKNOWN)
    if call is _UNKNOWN:
        call = _new_call(x, residual, weight, bias, num_groups, eps, activation)
        _calls.keep(key, call)
    if (
        call is None
        or has_unusual_memory(x, weight, bias)
        or (residual is not None and has_unusual_memory(residual))
    ):
        return None
    return call


class PreparedCall:
    """The prepared launches for calls whose arguments have the same metadata; see :func:`launch` for these."""

    def __init__(
        self, backend: str, x: Tensor, has_residual: bool, weight: Tensor, bias: Tensor,
        num_groups: int, eps: float, activation: str,
    ) -> None:  # fmt: skip
        self.backend = backend
        self.device, self.dtype, self.shape = x.device, x.dtype, x.shape
        self.memory_format = memory_format_of(x)
        self.parameter_dtypes = weight.dtype, bias.dtype
        self.has_residual = has_residual
        self.num_groups, self.eps, self.activation = index(num_groups), float(eps), activation
        numbers = x.shape[0] * self.num_groups
        self.statistics = aligned_count(numbers)
        """How many numbers the means take in the buffer of statistics, rounded up so that 1/std is aligned."""
        self._backwards: dict[tuple[bool, bool], Any] = {}
        """The launches of the backward pass, by whether they add a gradient and give the result again."""
        self._settings = (
            tuple(x.shape), x.dtype, x.device, self.memory_format == torch.channels_last, self.num_groups
        )  # fmt: skip

    def _prepare_forward(self, keeps_statistics: bool) -> Any:
        return prepare_forward(
            self.backend, *self._settings, self.eps, self.activation, *self.parameter_dtypes,
            has_residual=self.has_residual, keeps_statistics=keeps_statistics,
        )  # fmt: skip

    @cached_property
    def _inference(self) -> Any:
        return self._prepare_forward(False)

    @cached_property
    def _training(self) -> Any:
        return self._prepare_forward(True)

    def _prepare_backward(self, has_grad_total: bool, recomputes: bool) -> Any:
        run = prepare_backward(
            self.backend, *self._settings, self.activation, *self.parameter_dtypes,
            has_grad_total=has_grad_total, recomputes=recomputes,
        )  # fmt: skip
        self._backwards[has_grad_total, recomputes] = run
        return run

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        keeps_statistics: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the sum (or x), the result, and if they are kept the statistics: all means, then all 1/std."""
        stream = current_stream(self.device)
        if stream is None:
            with as_current(self.device):
                return self.forward(x, residual, weight, bias, keeps_statistics)
        result = torch.empty_like(x)
        total, residual_at = x, 0
        if residual is not None:
            total, residual_at = torch.empty_like(x), residual.data_ptr()
        run, statistics, mean, rstd = self._inference, None, 0, 0
        if keeps_statistics:
            run, statistics = self._training, self._new_statistics()
            mean = statistics.data_ptr()
            rstd = mean + 4 * self.statistics
        run(
            stream, x.data_ptr(), residual_at, weight.data_ptr(), bias.data_ptr(),
            total.data_ptr(), result.data_ptr(), mean, rstd,
        )  # fmt: skip
        return total, result, statistics

    def _new_statistics(self) -> Tensor:
        return torch.empty(2 * self.statistics, dtype=torch.float32, device=self.device)

    def backward(
        self, saved: Sequence[Tensor], grad: Tensor | None, grad_total: Tensor | None
    ) -> Sequence[Tensor | None]:
        """Return the gradients of x (or the sum), weight and bias.

        Args:
            saved: x (or the sum), weight, bias and the statistics.
            grad: The gradient of the result; None if the result was not used.
            grad_total: The gradient that reached the sum directly, or None.
        """
        if grad is None:
            return grad_total, None, None
        if torch.is_grad_enabled() or not can_use_backward_kernel(grad, grad_total):
            return differentiable_norm_gradients(
                saved[:3], self.num_groups, self.eps, self.activation, grad, grad_total
            )
        return self.gradients(saved, grad, grad_total, False)[:3]

    def gradients(
        self,
        saved: Sequence[Tensor],
        grad: Tensor,
        grad_total: Tensor | None,
        recomputes: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the gradients of x (or the sum), weight and bias, and the result if it is to be recomputed.

        Args:
            saved, grad, grad_total: As in :meth:`backward`. No gradient is recorded.
            recomputes: Whether to compute the result again.
        """
        if self._takes(saved, grad, grad_total):
            return self.launch_backward(saved, grad, grad_total, recomputes)
        *inputs, statistics = saved
        mean, rstd = (
            part[: self.shape[0] * self.num_groups].view(self.shape[0], self.num_groups)
            for part in (statistics[: self.statistics], statistics[self.statistics :])
        )
        operators = torch.ops.bitfast
        overloads = (
            operators.group_norm_act_recompute if recomputes else operators.group_norm_act_backward
        )
        found = call_without_autograd(
            getattr(overloads, self.backend), grad, grad_total, *inputs, mean, rstd,
            self.num_groups, self.activation,
        )  # fmt: skip
        return found if recomputes else (*found, None)

    def _takes(self, saved: Sequence[Tensor], grad: Tensor, grad_total: Tensor | None) -> bool:
        """Whether the prepared kernels can take the tensors, and nobody has to see an operator."""
        maps = (saved[0], grad) if grad_total is None else (saved[0], grad, grad_total)
        if not is_unwatched() or has_unusual_memory(*maps, *saved[1:]):
            return False
        for x in maps:
            if (
                type(x) not in PLAIN_TYPES
                or x.dtype != self.dtype
                or not x.is_contiguous(memory_format=self.memory_format)
            ):
                return False
        return True

    def launch_backward(
        self, saved: Sequence[Tensor], grad: Tensor, grad_total: Tensor | None, recomputes: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return what :meth:`gradients` does. The tensors are plain, dense, aligned, and nobody watches."""
        stream = current_stream(self.device)
        if stream is None:
            with as_current(self.device):
                return self.launch_backward(saved, grad, grad_total, recomputes)
        x, weight, bias, statistics = saved
        grad_x = torch.empty_like(x)
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
        result = torch.empty_like(x) if recomputes else None
        run = self._backwards.get((grad_total is not None, recomputes))
        if run is None:
            run = self._prepare_backward(grad_total is not None, recomputes)
        mean = statistics.data_ptr()
        run(
            stream, grad.data_ptr(), 0 if grad_total is None else grad_total.data_ptr(), x.data_ptr(),
            weight.data_ptr(), bias.data_ptr(), mean, mean + 4 * self.statistics,
            grad_x.data_ptr(), grad_weight.data_ptr(), grad_bias.data_ptr(),
            0 if result is None else result.data_ptr(),
        )  # fmt: skip
        return grad_x, grad_weight, grad_bias, result


_calls: BoundedCache[PreparedCall | None] = BoundedCache(most=1024)
"""By the metadata of the arguments; None where an operator is needed."""

_UNKNOWN: Any = object()


def forget_calls() -> None:
    """Forget the prepared calls."""
    _calls.clear()


def _new_call(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    activation: str,
) -> PreparedCall | None:
    """Check the arguments and return the prepared call; None if an operator is needed."""
    check(OP if residual is None else ADD_OP, x, weight, bias, num_groups, eps, activation)
    if residual is not None:
        check_residual(x, residual)
    tensors = [t for t in (x, residual, weight, bias) if t is not None]
    maps = tensors[:-2]
    memory_format = memory_format_of(x)
    backend = kernels_of(x.device, x.dtype, memory_format, (weight.dtype, bias.dtype))
    if (
        backend is None
        or any(type(t) not in PLAIN_TYPES or t.device != x.device for t in tensors)
        or not all(m.is_contiguous(memory_format=memory_format) for m in maps)
        or not (weight.is_contiguous() and bias.is_contiguous())
    ):
        return None
    return PreparedCall(backend, x, residual is not None, weight, bias, num_groups, eps, activation)


class GroupNormAct(torch.autograd.Function):
    """``group_norm_act`` as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, call: PreparedCall, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the result."""
        _, result, statistics = call.forward(x, None, weight, bias, keeps_statistics=True)
        ctx.call = call
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        return (None, *ctx.call.backward(ctx.saved_tensors, grad, None))


class AddGroupNormAct(torch.autograd.Function):
    """``add_group_norm_act`` as one node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any, call: PreparedCall, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the sum and the result."""
        total, result, statistics = call.forward(x, residual, weight, bias, keeps_statistics=True)
        ctx.call = call
        ctx.save_for_backward(total, weight, bias, statistics)
        ctx.set_materialize_grads(False)
        return total, result

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, residual, weight and bias."""
        grad_x, *others = ctx.call.backward(ctx.saved_tensors, grad, grad_total)
        return (None, grad_x, grad_x, *others)


__all__ = [
    "PreparedCall",
    "find_call",
    "forget_calls",
    "kernels_of",
    "launch",
    "prepare_backward",
    "prepare_forward",
]
