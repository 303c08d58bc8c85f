"""The layers BiT is made of. They hold parameters and call ops; they never name a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfast.activations import MODULES, activation_name
from bitfast.change_notifier import ChangeNotifier
from bitfast.inference_tensors import make_ordinary
from bitfast.ops.common import autocast_dtype
from bitfast.ops.group_norm_act import group_norm_act
from bitfast.ops.kept_weights import Geometry, kept_weights
from bitfast.ops.norm_convolution import Norm
from bitfast.ops.packed_convolution import can_use_packed_weight, packed_convolution
from bitfast.ops.same_padding import pad_for, same_pad
from bitfast.ops.weight_standardization import weight_standardization
from bitfast.torch_state import is_concrete
from bitfast.watching import runs_as_written

for _op in ("group_norm_act", "same_pad", "weight_standardization"):
    torch.fx.wrap(_op)  # torch.fx takes them whole: they look at shapes and dtypes


class DynamicPad2d(ChangeNotifier):
    """TensorFlow's "same" padding for a window, which depends on the size of the input.

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

    def prepared(
        self, shape: tuple[int, ...], device_type: str, dtype: torch.dtype
    ) -> Callable[[Tensor], Tensor] | None:
        """Return a function that pads tensors of this shape and type; None if they need no padding.

        The backend is chosen once. No gradient may be recorded where the function is called.
        """
        window = self.kernel_size, self.stride, self.dilation
        return pad_for(shape, window, self.value, device_type, dtype)

    def extra_repr(self) -> str:
        """Describe the layer for ``print(model)``."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"


class WeightStandardizedConv2d(ChangeNotifier, nn.Conv2d):
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
    standardizes = True
    """Whether the filters are standardized before use; if not, the weight holds standardized filters."""
    is_wrapped = False
    """Whether another module wraps this one, and may change the weight in ways that torch does not count."""

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
            # Sharding (FSDP) sets a parameter whose memory it fills in a way that torch does not count.
            kept_weights.drop([value])

    @property
    def geometry(self) -> Geometry:
        """Stride, padding and dilation, each as (height, width)."""
        padding: Any = self.padding  # a string, if somebody has put one there
        zeros: Any = padding if isinstance(padding, str) else pair_of(padding)
        return pair_of(self.stride), zeros, pair_of(self.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H', W')."""
        if self.pad is not None:
            x = self.pad(x)
        if self._may_use_inference_kernels(x):
            x = x.to(autocast_dtype(x) or x.dtype)
            if self.keeps_weight() and can_use_packed_weight(x, self.weight):
                return packed_convolution(x, self.weight, self.eps, self.geometry)
        return self._conv_forward(x, self.filters(), self.bias)

    def filters(self) -> Tensor:
        """Return the standardized weight, which the input is convolved with."""
        return weight_standardization(self.weight, self.eps)

    def _may_use_inference_kernels(self, x: Tensor) -> bool:
        """Whether kernels may be used that round differently from those that record gradients.

        In training they may not, even where no gradients are recorded: reentrant checkpoints compute a block
        first without and then with gradients, and the results must agree. Nor may they where a tracer or a
        transform follows x.
        """
        return not self.training and not torch.is_grad_enabled() and is_concrete(x)

    def is_simple(self) -> bool:
        """Whether the layer has no bias, one group, zeros for padding, and is not wrapped."""
        return (
            not self.is_wrapped
            and self.bias is None
            and self.groups == 1
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
        )

    def keeps_weight(self) -> bool:
        """Whether forms of the weight may be kept.

        If so, a weight that was made in inference mode is turned into an ordinary parameter.
        """
        weight = self._parameters.get("weight")
        if type(weight) is not nn.Parameter or not self.is_simple():
            return False
        if not torch.compiler.is_compiling():
            make_ordinary(weight)
        return True

    def mark_wrapped(self) -> None:
        """Keep no form of the weight until :meth:`mark_unwrapped` is called."""
        self.is_wrapped = True

    def mark_unwrapped(self) -> None:
        """Keep forms of the weight again, computed anew."""
        weight = self._parameters.get("weight")
        if self.is_wrapped and weight is not None and not weight.is_inference():
            torch.autograd.graph.increment_version(weight)
        self.is_wrapped = False

    def train(self, mode: bool = True) -> WeightStandardizedConv2d:
        """Switch between training and evaluation, and drop the kept forms of the weight."""
        self._drop_kept_weight()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> WeightStandardizedConv2d:
        self._drop_kept_weight()
        super()._apply(fn, recurse)
        make_ordinary(self._parameters.get("weight"))
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._drop_kept_weight()  # otherwise torch could not swap the parameter for another tensor
        super()._load_from_state_dict(*args)

    def _drop_kept_weight(self) -> None:
        weight = self._parameters.get("weight")
        if weight is not None:
            kept_weights.drop([weight])


def pair_of(value: int | tuple[int, ...]) -> tuple[int, int]:
    """Return one number, or a pair, as (height, width)."""
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[return-value]


def _zeros(
    padding: str | int | tuple[int, int] | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int] | None:
    """Return the padding (height, width) of a convolution; None if it depends on the input's size."""
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


class GroupNormActivation(ChangeNotifier, nn.GroupNorm):
    """GroupNorm followed by an activation, which is a child module.

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
        """Whether there are a weight and a bias, as the ops need them."""
        return self.weight is not None and self.bias is not None

    def activate(self, x: Tensor) -> Tensor:
        """Apply the modules that follow the norm."""
        return self.activation(x)

    def fused_activation(self) -> str | None:
        """Return the activation's name if the op may apply it; None if the module must be called."""
        activation = self.activation
        return activation_name(activation) if runs_as_written(activation) else None

    def op_parameters(self) -> Norm:
        """Return the ops' arguments after x. ``fused_activation()`` must not be None."""
        name = self.fused_activation()
        assert name is not None
        return Norm(self.weight, self.bias, self.num_groups, self.eps, name)


class DropPath(ChangeNotifier):
    """Stochastic depth: in training, zero the whole branch of an image with probability ``drop_prob``.

    Huang et al., "Deep Networks with Stochastic Depth", 2016 (https://arxiv.org/abs/1603.09382).
    """

    def __init__(self, drop_prob: float | None = None) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, ...) to the same shape; branches that are not dropped are divided by their probability."""
        return x.div(self.keep_probability) * self.draw(x) if self.is_active() else x

    def is_active(self) -> bool:
        """Whether branches are dropped."""
        return bool(self.drop_prob) and self.training

    @property
    def keep_probability(self) -> float:
        """The probability that a branch is not dropped."""
        return 1 - (self.drop_prob or 0)

    def draw(self, x: Tensor) -> Tensor:
        """Return 0 for each image whose branch is dropped, else 1: shape (N, 1, ...), the dtype of x."""
        # The draw and its order are those of transformers, so that equal seeds give equal runs.
        draw = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return (self.keep_probability + draw).floor()

    def extra_repr(self) -> str:
        """Describe the layer for ``print(model)``."""
        return f"p={self.drop_prob}"


__all__ = [
    "DropPath",
    "DynamicPad2d",
    "GroupNormActivation",
    "WeightStandardizedConv2d",
    "pair_of",
]
