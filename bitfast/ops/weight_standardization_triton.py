"""weight_standardization in Triton: the operators' implementations, and launches for eager calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitfast.memory_format import memory_format_of
from bitfast.ops.common import launch_kernels
from bitfast.ops.eager import BoundedCache
from bitfast.ops.weight_buffer import starts_of
from bitfast.ops.weight_standardization_contract import fake, fake_all, fake_all_backward

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


# ---- launches for eager calls ---------------------------------------------------------------------


class TritonLaunches:
    """``Launches`` of weight_standardization_eager.py. Gradients are copied into one buffer first."""

    def __init__(
        self, weights: Sequence[Tensor], eps: float, dtype: torch.dtype, channels_last: bool
    ) -> None:
        """Prepare for weights like these, which are dense, contiguous or channels_last."""
        from bitfast.kernels import weight_standardization as kernels

        self.kernels = kernels
        self.device, self.dtype = weights[0].device, weights[0].dtype
        self.eps, self.result_dtype = eps, dtype
        self.filters = tuple(kernels.filters_of(weight, channels_last) for weight in weights)
        starts, self.end = starts_of([weight.numel() for weight in weights])
        self.starts = tuple(starts)
        self._forward: BoundedCache[Callable[..., None]] = BoundedCache(most=16)
        self._backward: BoundedCache[Callable[..., None]] = BoundedCache(most=16)

    def at(self, addresses: Sequence[int]) -> Table | None:
        """Return the kernels' table for weights at these addresses; None if it cannot be made now."""
        return self.kernels.table_at(self.filters, tuple(addresses), self.starts, self.device)

    def forward(self, stream: int, weights: Table, result: int, mean: int, rstd: int) -> None:
        """Launch the forward kernel."""
        count = weights.programs.shape[0]
        run = self._forward.get(count)
        if run is None:
            made = self.kernels.prepare_forward_all(
                weights, self.dtype, self.result_dtype, self.eps
            )
            run = self._forward.keep(count, made)
        run(stream, weights, result, mean, rstd)

    def backward(
        self,
        stream: int,
        weights: Table,
        grads: Sequence[Tensor | None],
        like: Sequence[tuple[torch.Size, tuple[int, ...], int]],
        mean: int,
        rstd: int,
        grad_weight: int,
    ) -> None:
        """Launch the backward kernel."""
        count = weights.programs.shape[0]
        run = self._backward.get(count)
        if run is None:
            made = self.kernels.prepare_backward_all(weights, self.dtype, self.result_dtype)
            run = self._backward.keep(count, made)
        packed = torch.empty(self.end, dtype=self.result_dtype, device=self.device)
        places = [packed.as_strided(*place) for place in like]
        for place, given in zip(places, grads, strict=True):
            if given is None:
                place.zero_()
        used = [place for place, given in zip(places, grads, strict=True) if given is not None]
        if used:
            torch._foreach_copy_(used, [given for given in grads if given is not None])
        run(stream, weights, packed.data_ptr(), mean, rstd, grad_weight)


__all__ = ["TritonLaunches", "all_backward", "all_forward", "backward", "forward"]
