"""The layers BiT is made of. They hold parameters and call ops; they never name a backend."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfast.activations import MODULES, activation_name
from bitfast.backends import select_backend
from bitfast.inference_tensors import make_ordinary
from bitfast.ops.common import autocast_dtype
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act, group_norm_act_into
from bitfast.ops.norm_convolution import (
    Norm,
    fits,
    norm_convolution,
)
from bitfast.ops.packed_convolution import (
    add_packed_convolution_,
    can_pack,
    packed_convolution,
    packs,
)
from bitfast.ops.packed_weights import Geometry, packed_weights
from bitfast.ops.same_padding import same_pad
from bitfast.ops.weight_standardization import weight_standardization
from bitfast.prepared_weights import prepared_weight
from bitfast.torch_state import is_concrete
from bitfast.watching import runs_as_written

for _op in ("add_group_norm_act", "group_norm_act", "same_pad", "weight_standardization"):
    torch.fx.wrap(_op)  # torch.fx takes them whole: they look at shapes and dtypes


def runs_channels_last(x: Tensor) -> bool:
    """Say whether a network on such a tensor should run channels_last, whatever the layout of x.

    It should where the norms run in Triton, and on the CPU where they run in C++ and the convolutions in
    oneDNN: these are fastest there.
    """
    if not is_concrete(x) or x.dim() != 4:
        return False
    backend = select_backend("group_norm_act", x.device.type, x.dtype)
    return backend == "triton" or (backend == "native" and _packs(x))


def infers(module: nn.Module, x: Tensor) -> bool:
    """Say whether the module may compute in ways that differ, by rounding, from those that record gradients.

    In training it may not, even where no gradients are recorded: reentrant checkpoints run a block first
    without them, then with them, and the numbers must agree. Nor may it where x is followed by a tracer or a
    transform.
    """
    return not module.training and not torch.is_grad_enabled() and is_concrete(x)


def runs_packed(network: nn.Module, x: Tensor) -> bool:
    """Say whether the convolutions of a network on such a tensor run with packed weights."""
    return infers(network, x) and _packs(x)


def _packs(x: Tensor) -> bool:
    return packs(x.device.type, autocast_dtype(x) or x.dtype)


def standardized_convolutions(*modules: nn.Module) -> list[WeightStandardizedConv2d]:
    """Return the weight-standardized convolutions in these modules."""
    return [
        inner
        for module in modules
        for inner in module.modules()
        if isinstance(inner, WeightStandardizedConv2d)
    ]


class DynamicPad2d(nn.Module):
    """TensorFlow's "same" zeros for a window, which depend on the size of the input.

    Args:
        kernel_size: Of the window to come; one integer or (height, width), as the next two.
        stride: Of the window to come.
        dilation: Of the window to come.
        value: What the padding holds.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        dilation: int | tuple[int, int] = 1,
        value: float = 0,
    ) -> None:
        super().__init__()
        self.kernel_size = pair_of(kernel_size)
        self.stride = pair_of(stride)
        self.dilation = pair_of(dilation)
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H', W')."""
        if is_concrete(x) and x.dim() == 3:  # one image, as torch's layers take it
            return self.forward(x[None])[0]
        return same_pad(x, self.kernel_size, self.stride, self.dilation, self.value)

    def extra_repr(self) -> str:
        """Describe the layer for ``print(model)``."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"


class WeightStandardizedConv2d(nn.Conv2d):
    """Convolution whose filters are standardized before use.

    Takes the arguments of transformers' class of this name, and so those that ``torch.nn.Conv2d`` has as well.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the filters; one integer or a pair, as the next three.
        stride: In both axes.
        padding: Zeros on each side. None: (kernel span - 1 + stride - 1) // 2 of them. "valid": none. "same":
            TensorFlow's, which depends on the input's size whenever it is not symmetric.
        dilation: In both axes.
        groups: Divides both numbers of channels.
        bias: Whether to add one number per output channel.
        eps: Added to each filter's variance.
        padding_mode, device, dtype: As in ``torch.nn.Conv2d``.

    Raises:
        ValueError: ``padding`` is another string; or what ``torch.nn.Conv2d`` raises.
    """

    pad: nn.Module | None
    weight_settings = 0
    """How often a weight was set, which counts as a change of it."""
    is_lent = False
    """Whether somebody has wrapped it, who may change its weight unnoticed."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] | None = "SAME",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-6,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kernel_size, stride, dilation = pair_of(kernel_size), pair_of(stride), pair_of(dilation)
        zeros = _zeros(padding, kernel_size, stride, dilation)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=(0, 0) if zeros is None else zeros,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.eps = eps
        self.pad = DynamicPad2d(kernel_size, stride, dilation) if zeros is None else None
        make_ordinary(self.weight)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            # Sharding (FSDP) sets one whose memory it has filled, in a way that torch does not count.
            packed_weights.drop([value])
            self.__dict__["weight_settings"] = self.weight_settings + 1

    @property
    def geometry(self) -> Geometry:
        """Stride, zeros on each side, and dilation, each as (height, width)."""
        padding: Any = self.padding  # a string, if somebody has put one there
        zeros: Any = padding if isinstance(padding, str) else pair_of(padding)
        return pair_of(self.stride), zeros, pair_of(self.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H', W')."""
        if self.pad is not None:
            x = self.pad(x)
        if infers(self, x):
            x = _cast_for_autocast(x)
            if self.can_pack(x):
                return packed_convolution(x, self.weight, self.eps, self.geometry)
        weight = prepared_weight(self)
        if weight is None:
            weight = weight_standardization(self.weight, self.eps)
        return self._conv_forward(x, weight, self.bias)

    def can_pack(self, x: Tensor) -> bool:
        """Say whether a packed weight can serve, in inference, for an input that is padded already."""
        return self._keeps_weight() and can_pack(x, self.weight)

    def _keeps_weight(self) -> bool:
        """Say whether ops that keep their form of the weight can serve: nobody has wrapped it, and it has no
        bias, groups or reflections.

        A weight that was made in inference mode is made one that can be kept.
        """
        if not torch.compiler.is_compiling():
            make_ordinary(self.weight)
        if self.is_lent or self.bias is not None:
            return False
        return (
            self.groups == 1 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        )

    def lend(self) -> None:
        """Keep nothing that is computed from the weight until :meth:`take_back`."""
        self.is_lent = True

    def take_back(self) -> None:
        """Keep it again, and nothing from before."""
        weight = self._parameters.get("weight")
        if self.is_lent and weight is not None and not weight.is_inference():
            torch.autograd.graph.increment_version(weight)
        self.is_lent = False

    def train(self, mode: bool = True) -> WeightStandardizedConv2d:
        """Switch between training and evaluation, and forget the weight packed for inference."""
        self._forget_packed_weight()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> WeightStandardizedConv2d:
        self._forget_packed_weight()
        super()._apply(fn, recurse)
        make_ordinary(self._parameters.get("weight"))
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._forget_packed_weight()  # else torch could not swap it for another tensor
        super()._load_from_state_dict(*args)

    def _forget_packed_weight(self) -> None:
        weight = self._parameters.get("weight")
        if weight is not None:
            packed_weights.drop([weight])

    def can_normalize(self, x: Tensor) -> bool:
        """Say whether the convolution can normalize x itself while it reads it, if any can."""
        # "same" padding of 1x1 filters is none, whatever the stride.
        is_padded_by_itself = self.pad is not None and self.kernel_size != (1, 1)
        size = None if torch.compiler.is_compiling() else x.shape[2:]
        return (
            self._keeps_weight()
            and not is_padded_by_itself
            and fits(self.weight, self.geometry, x.dtype, size)
        )

    def with_moments(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Do what :meth:`forward` does where :meth:`can_normalize`; return the result's moments as well."""
        return norm_convolution(x, None, None, self.weight, self.eps, self.geometry[0][0], True)

    def add_to(self, total: Tensor, x: Tensor) -> bool:
        """Add what :meth:`forward` makes of x to ``total`` in place, if that can be done in one pass.

        Args:
            total: Shape (N, out, H, W).
            x: Shape (N, in, H, W); the convolution is one that keeps the size.

        Returns:
            Whether it was done. If not, nothing was.
        """
        if not infers(self, x) or self.pad is not None:
            return False
        fits = (
            total.dtype == x.dtype
            and total.shape[2:] == x.shape[2:]
            and total.is_contiguous(memory_format=torch.channels_last)
        )
        if not fits or _cast_for_autocast(x) is not x or not self.can_pack(x):
            return False
        add_packed_convolution_(x, self.weight, total, self.eps, self.geometry)
        return True


def pair_of(value: int | tuple[int, ...]) -> tuple[int, int]:
    """Return (height, width) of what torch's layers take as one number or two."""
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[return-value]


def _zeros(
    padding: str | int | tuple[int, int] | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int] | None:
    """Return the zeros that a convolution puts on each side; None if they depend on the input's size."""
    if padding is not None and not isinstance(padding, str):
        return pair_of(padding)
    name = None if padding is None else padding.upper()
    if name not in (None, "SAME", "VALID"):
        raise ValueError(
            f"padding must be None, 'same', 'valid' or numbers of zeros, got {padding!r}"
        )
    if name == "VALID":
        return 0, 0
    spans = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    is_symmetric = stride == (1, 1) and not any(span % 2 for span in spans)
    if name == "SAME" and not is_symmetric:
        return None
    zeros = [(s - 1 + span) // 2 for s, span in zip(stride, spans, strict=True)]
    return zeros[0], zeros[1]


def _cast_for_autocast(x: Tensor) -> Tensor:
    """Return x in the dtype that autocast wants convolutions to have."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


class GroupNormActivation(nn.GroupNorm):
    """GroupNorm, followed by an activation, which is a child of its own.

    Args:
        num_groups: Divides ``num_channels``.
        num_channels: Channels of the input.
        eps, affine, device, dtype: As in ``torch.nn.GroupNorm``.
        activation: "none", "relu", "gelu", "gelu_new" or "selu".
    """

    activation: nn.Module

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.activation = MODULES[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        fused = self.fused_activation()
        if not self.has_scale_and_shift() or (is_concrete(x) and x.dim() != 4):
            x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        else:
            x = group_norm_act(
                x, self.weight, self.bias, self.num_groups, self.eps, fused or "none"
            )
            if fused is not None:
                return x
        return self.activate(x)

    def has_scale_and_shift(self) -> bool:
        """Say whether both are there, as the ops need them."""
        return self.weight is not None and self.bias is not None

    def activate(self, x: Tensor) -> Tensor:
        """Return what the modules after the norm make of it."""
        return self.activation(x)

    def fused_activation(self) -> str | None:
        """Return the name of the activation if a fused op may apply it; None if it must be called."""
        activation = self.activation
        return activation_name(activation) if runs_as_written(activation) else None

    def into(self, memory: Tensor | None, x: Tensor, moments: Tensor | None = None) -> Tensor:
        """Do the same, in memory that may be overwritten (x itself, for instance) where that can be done.

        Args:
            memory: None: new memory.
            moments: Those of x, if ``norm_convolution`` has made it.
        """
        if torch.is_grad_enabled() or not is_concrete(x):
            return self.forward(x)
        return group_norm_act_into(x, *self.op_parameters(), memory, moments)

    def add_and_activate_(
        self, x: Tensor, moments: Tensor | None, shortcut: Tensor, activation: str
    ) -> Tensor:
        """Return activation(norm(x) + shortcut), in the memory of x where that can be done; not activated
        in between, for a norm of activation "none"."""
        parameters = self.op_parameters()._replace(activation=activation)
        return group_norm_act_into(x, *parameters, x, moments, shortcut)

    def add_and_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + residual and what :meth:`forward` makes of that sum; all of shape (N, C, H, W)."""
        return add_group_norm_act(x, residual, *self.op_parameters())

    def op_parameters(self) -> Norm:
        """Return what the fused ops want to know, of a norm for which :func:`fusable_norm` is true."""
        name = self.fused_activation()
        assert name is not None
        return Norm(self.weight, self.bias, self.num_groups, self.eps, name)


class DropPath(nn.Module):
    """Stochastic depth: in training, zero the whole branch of an image with probability ``drop_prob``.

    Huang et al., "Deep Networks with Stochastic Depth", 2016 (https://arxiv.org/abs/1603.09382).
    """

    def __init__(self, drop_prob: float | None = None) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, ...) to the same shape; what survives is divided by its probability."""
        if not self.drop_prob or not self.training:
            return x
        keep = 1 - self.drop_prob
        # The draw and its order are those of transformers, so that equal seeds give equal runs.
        draw = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x.div(keep) * (keep + draw).floor()

    def extra_repr(self) -> str:
        """Describe the layer for ``print(model)``."""
        return f"p={self.drop_prob}"


__all__ = [
    "DropPath",
    "DynamicPad2d",
    "GroupNormActivation",
    "WeightStandardizedConv2d",
    "infers",
    "pair_of",
    "runs_channels_last",
    "runs_packed",
    "standardized_convolutions",
]
