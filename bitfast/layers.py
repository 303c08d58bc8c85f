"""The layers BiT is made of. They hold parameters and call ops; they never name a backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfast.backends import select_backend
from bitfast.ops.common import autocast_dtype
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act, group_norm_act_into
from bitfast.ops.norm_convolution import (
    Norm,
    add_norm_convolution_,
    fits,
    fuses,
    norm_convolution,
)
from bitfast.ops.packed_convolution import (
    add_packed_convolution_,
    can_pack,
    packed_convolution,
    packs,
)
from bitfast.ops.packed_weights import packed_weights
from bitfast.ops.same_padding import same_max_pool, same_pad
from bitfast.ops.weight_standardization import weight_standardization
from bitfast.prepared_weights import prepared_weight

WEIGHT_EPS = 1e-8
"""Added to a filter's variance in BiT's transformers checkpoints (Google's own code uses 1e-10)."""


def runs_as_written(module: nn.Module) -> bool:
    """Say whether calling the module does what its class says: no hooks, no replaced or compiled call.

    Only then may its work be done by another module, as part of a fused op.
    """
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )


def runs_channels_last(x: Tensor) -> bool:
    """Say whether a network on such a tensor should run channels_last, whatever the layout of x.

    It should where the norms run in Triton, and on the CPU where they run in C++ and the convolutions in
    oneDNN: these are fastest there.
    """
    if x.dim() != 4:
        return False
    backend = select_backend("group_norm_act", x.device.type, x.dtype)
    return backend == "triton" or (backend == "native" and _packs(x))


def infers(module: nn.Module) -> bool:
    """Say whether the module may compute in ways that differ, by rounding, from those that record gradients.

    In training it may not, even where no gradients are recorded: reentrant checkpoints run a block first
    without them, then with them, and the numbers must agree.
    """
    return not module.training and not torch.is_grad_enabled()


def runs_packed(network: nn.Module, x: Tensor) -> bool:
    """Say whether the convolutions of a network on such a tensor run with packed weights."""
    return infers(network) and _packs(x)


def _packs(x: Tensor) -> bool:
    return packs(x.device.type, autocast_dtype(x) or x.dtype)


def can_be_normalized_late(module: nn.Module, x: Tensor) -> bool:
    """Say whether convolutions may normalize x themselves while they read it, on behalf of the module."""
    return (
        infers(module)
        and fuses(x.device.type, x.dtype)
        and x.dtype == (autocast_dtype(x) or x.dtype)
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def standardized_convolutions(*modules: nn.Module) -> list[WeightStandardizedConv2d]:
    """Return the weight-standardized convolutions in these modules."""
    return [
        inner
        for module in modules
        for inner in module.modules()
        if isinstance(inner, WeightStandardizedConv2d)
    ]


class WeightStandardizedConv2d(nn.Conv2d):
    """Convolution without bias whose filters are standardized before use.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the filters.
        stride: In both axes.
        dilation: In both axes.
        padding: None: (kernel span - 1 + stride - 1) // 2 zeros on each side. "VALID": none. "SAME":
            TensorFlow's, which depends on the input's size whenever it is not symmetric.
        eps: Added to each filter's variance.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        padding: str | None = None,
        eps: float = WEIGHT_EPS,
    ) -> None:
        span = dilation * (kernel_size - 1)
        is_symmetric = stride == 1 and span % 2 == 0
        self_padded = padding == "SAME" and not is_symmetric
        zeros = 0 if padding == "VALID" or self_padded else (stride - 1 + span) // 2
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=zeros,
            dilation=dilation,
            bias=False,
        )
        self.eps = eps
        self.has_dynamic_padding = self_padded
        self.geometry = ((stride, stride), (zeros, zeros), (dilation, dilation))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H', W')."""
        if self.has_dynamic_padding:
            x = same_pad(x, self.kernel_size, self.stride, self.dilation)
        if infers(self):
            x = _cast_for_autocast(x)
            parameter = self.weight
            if can_pack(x, parameter):
                return packed_convolution(x, parameter, self.eps, self.geometry)
        weight = prepared_weight(self)
        if weight is None:
            weight = weight_standardization(self.weight, self.eps)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation)

    def train(self, mode: bool = True) -> WeightStandardizedConv2d:
        """Switch between training and evaluation, and forget the weight packed for inference."""
        self._forget_packed_weight()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> WeightStandardizedConv2d:
        self._forget_packed_weight()
        return super()._apply(fn, recurse)

    def _forget_packed_weight(self) -> None:
        weight = self._parameters.get("weight")
        if weight is not None:
            packed_weights.drop([weight])

    def can_normalize(self, x: Tensor) -> bool:
        """Say whether the convolution can normalize x itself while it reads it, if any can."""
        # "same" padding of 1x1 filters is none, whatever the stride.
        is_padded_by_itself = self.has_dynamic_padding and self.kernel_size != (1, 1)
        size = None if torch.compiler.is_compiling() else x.shape[2:]
        return not is_padded_by_itself and fits(self.weight, self.geometry, x.dtype, size)

    def with_moments(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Do what :meth:`forward` does where :meth:`can_normalize`; return the result's moments as well."""
        return norm_convolution(x, None, None, self.weight, self.eps, self.stride[0], True)

    def add_to(self, total: Tensor, x: Tensor) -> bool:
        """Add what :meth:`forward` makes of x to ``total`` in place, if that can be done in one pass.

        Args:
            total: Shape (N, out, H', W').
            x: Shape (N, in, H, W).

        Returns:
            Whether it was done. If not, nothing was.
        """
        if not infers(self) or self.has_dynamic_padding:
            return False
        parameter = self.weight
        fits = total.dtype == x.dtype and total.is_contiguous(memory_format=torch.channels_last)
        if not fits or _cast_for_autocast(x) is not x or not can_pack(x, parameter):
            return False
        add_packed_convolution_(x, parameter, total, self.eps, self.geometry)
        return True


def _cast_for_autocast(x: Tensor) -> Tensor:
    """Return x in the dtype that autocast wants convolutions to have."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


class GroupNormActivation(nn.GroupNorm):
    """GroupNorm with scale and shift, followed by an activation.

    Args:
        num_groups: Divides ``num_channels``.
        num_channels: Channels of the input.
        activation: "none", "relu", "gelu", "gelu_new" or "selu".
    """

    def __init__(self, num_groups: int, num_channels: int, activation: str) -> None:
        super().__init__(num_groups, num_channels, eps=1e-5)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        return group_norm_act(x, self.weight, self.bias, self.num_groups, self.eps, self.activation)

    def into(self, memory: Tensor | None, x: Tensor, moments: Tensor | None = None) -> Tensor:
        """Do the same, in memory that may be overwritten (x itself, for instance) where that can be done.

        Args:
            memory: None: new memory.
            moments: Those of x, if ``norm_convolution`` has made it.
        """
        if torch.is_grad_enabled():
            return self.forward(x)
        return group_norm_act_into(
            x, self.weight, self.bias, self.num_groups, self.eps, self.activation, memory, moments
        )

    def add_and_activate_(
        self, x: Tensor, moments: Tensor | None, shortcut: Tensor, activation: str
    ) -> Tensor:
        """Return activation(norm(x) + shortcut), in the memory of x where that can be done; not activated
        in between, for a norm of activation "none"."""
        return group_norm_act_into(
            x, self.weight, self.bias, self.num_groups, self.eps, activation, x, moments, shortcut
        )

    def add_and_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + residual and what :meth:`forward` makes of that sum; all of shape (N, C, H, W)."""
        return add_group_norm_act(
            x, residual, self.weight, self.bias, self.num_groups, self.eps, self.activation
        )

    def extra_repr(self) -> str:
        """Describe the layer for ``print(model)``."""
        return f"{super().extra_repr()}, activation={self.activation}"


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
            stride = convolution.stride[0]
            return norm_convolution(
                self.x, self.moments, self._norm(), convolution.weight, convolution.eps, stride, wants_moments
            )  # fmt: skip
        return convolution(self.norm.into(self.x, self.x, self.moments)), None

    def convolved_onto(
        self, total: Tensor, convolution: WeightStandardizedConv2d, wants_moments: bool
    ) -> Tensor | None:
        """Add the convolution of it to ``total`` in place; return the moments of the sum, if wanted."""
        return add_norm_convolution_(
            self.x, self.moments, self._norm(), convolution.weight, total, convolution.eps, 1, wants_moments
        )  # fmt: skip

    def _norm(self) -> Norm:
        norm = self.norm
        return Norm(norm.weight, norm.bias, norm.num_groups, norm.eps, norm.activation)


class MaxPool2d(nn.Module):
    """3x3 max-pool with stride 2 whose zero padding takes part in the maximum.

    Args:
        zero_pad: Zeros on all four sides.
        dynamic_padding: Then, TensorFlow's "same" zeros for the size at hand.
    """

    def __init__(self, *, zero_pad: int, dynamic_padding: bool) -> None:
        super().__init__()
        self.zero_pad = zero_pad
        self.dynamic_padding = dynamic_padding

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H', W')."""
        sides = (self.zero_pad,) * 4
        if not self.dynamic_padding:
            return same_max_pool(x, 3, 2, padding=sides)
        if self.zero_pad:
            x = F.pad(x, sides)
        return same_max_pool(x, 3, 2, padding="same")

    def extra_repr(self) -> str:
        """Describe the layer for ``print(model)``."""
        return f"zero_pad={self.zero_pad}, dynamic_padding={self.dynamic_padding}"


class DropPath(nn.Module):
    """Stochastic depth: in training, zero the whole branch of an image with probability ``rate``.

    Huang et al., "Deep Networks with Stochastic Depth", 2016 (https://arxiv.org/abs/1603.09382).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, ...) to the same shape; what survives is divided by its probability."""
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        # The draw and its order are those of transformers, so that equal seeds give equal runs.
        draw = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x.div(keep) * (keep + draw).floor()

    def extra_repr(self) -> str:
        """Describe the layer for ``print(model)``."""
        return f"rate={self.rate}"


__all__ = [
    "Deferred",
    "DropPath",
    "GroupNormActivation",
    "MaxPool2d",
    "WeightStandardizedConv2d",
    "can_be_normalized_late",
    "runs_as_written",
    "runs_channels_last",
    "runs_packed",
    "standardized_convolutions",
]
