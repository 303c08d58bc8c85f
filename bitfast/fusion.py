"""Which modules may be run as part of a fused op, and norms that the convolution after them applies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitfast.layers import GroupNormActivation, WeightStandardizedConv2d, infers
from bitfast.ops.common import autocast_dtype
from bitfast.ops.norm_convolution import add_norm_convolution_, fuses, norm_convolution
from bitfast.watching import is_plain, runs_as_written


def is_fusable(convolution: nn.Module) -> bool:
    """Say whether the convolution may be part of a fused op: it is bitfast's, and nobody watches it."""
    return (
        type(convolution) is WeightStandardizedConv2d
        and runs_as_written(convolution)
        and (convolution.pad is None or runs_as_written(convolution.pad))
    )


def fusable_norm(norm: nn.Module) -> GroupNormActivation | None:
    """Return the norm if what comes before it may apply it, else None."""
    is_fused = (
        is_plain(norm, GroupNormActivation)
        and runs_as_written(norm)
        and norm.has_scale_and_shift()
        and norm.fused_activation() is not None
    )
    return norm if is_fused else None  # type: ignore[return-value]


def normed(norm: nn.Module, x: Tensor, made_new: bool) -> Tensor:
    """Return norm(x), in the memory of x if that was made new: if nobody else gets to see it."""
    fusable = fusable_norm(norm)
    return norm(x) if fusable is None or not made_new else fusable.into(x, x)


def can_be_normalized_late(module: nn.Module, x: Tensor) -> bool:
    """Say whether convolutions may normalize x themselves while they read it, on behalf of the module."""
    return (
        infers(module, x)
        and fuses(x.device.type, x.dtype)
        and x.dtype == (autocast_dtype(x) or x.dtype)
        and x.is_contiguous(memory_format=torch.channels_last)
    )


class Deferred(NamedTuple):
    """What a norm makes of x, still to be computed: by the convolution that reads it, if that can."""

    x: Tensor
    moments: Tensor | None
    """The mean and the variance of each image's channels, if they are known."""
    norm: GroupNormActivation

    def value(self) -> Tensor:
        """Compute it."""
        return self.norm.into(None, self.x, self.moments)

    @classmethod
    def of(cls, x: Tensor, norm: GroupNormActivation) -> Deferred | None:
        """Return what norm makes of x, or None if convolutions could not compute it, or in training."""
        return cls(x, None, norm) if can_be_normalized_late(norm, x) else None

    def convolved(
        self, convolution: WeightStandardizedConv2d, wants_moments: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return the convolution of it and the moments of that, if wanted and at hand; may overwrite x."""
        if convolution.can_normalize(self.x):
            norm, weight = self.norm.op_parameters(), convolution.weight
            eps, stride = convolution.eps, convolution.geometry[0][0]
            return norm_convolution(self.x, self.moments, norm, weight, eps, stride, wants_moments)
        return convolution(self.norm.into(self.x, self.x, self.moments)), None

    def convolved_onto(
        self, total: Tensor, convolution: WeightStandardizedConv2d, wants_moments: bool
    ) -> Tensor | None:
        """Add the convolution of it to ``total`` in place; return the moments of the sum, if wanted."""
        norm, weight = self.norm.op_parameters(), convolution.weight
        return add_norm_convolution_(
            self.x, self.moments, norm, weight, total, convolution.eps, 1, wants_moments
        )


__all__ = ["Deferred", "can_be_normalized_late", "fusable_norm", "is_fusable", "normed"]
