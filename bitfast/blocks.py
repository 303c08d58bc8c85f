"""The blocks of Big Transfer: bottlenecks of three convolutions, with the norms before or after them.

The preactivation form is that of He et al., "Identity Mappings in Deep Residual Networks", 2016
(https://arxiv.org/abs/1603.05027). Modules are named as in transformers, so that checkpoints fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitfast.activations import MODULES
from bitfast.configuration import BitConfig
from bitfast.convolution_owner import ConvolutionOwner
from bitfast.layers import DropPath, GroupNormActivation, WeightStandardizedConv2d
from bitfast.torch_state import is_concrete

WEIGHT_EPS = 1e-8
"""Added to a filter's variance in BiT's transformers checkpoints (Google's own code uses 1e-10)."""


def round_to_multiple(width: float, divisor: int = 8) -> int:
    """Round a channel count to a multiple of ``divisor``, losing at most a tenth of it."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


def add_to_shortcut(branch: Tensor, shortcut: Tensor) -> Tensor:
    """Add a block's branch to its shortcut; a branch that its convolutions have left one pixel of is broadcast.

    Raises:
        ValueError: the convolutions have no padding and left the branch smaller than the shortcut.
    """
    is_known = is_concrete(branch) and not torch.compiler.is_compiling()
    if is_known and branch.shape != shortcut.shape:
        check_summands(branch.shape, shortcut.shape)
    return branch + shortcut


def check_summands(branch: Sequence[int], shortcut: Sequence[int]) -> None:
    """Raise ValueError unless :func:`add_to_shortcut` can add tensors of these shapes."""
    for small, large in zip(branch[2:], shortcut[2:], strict=True):
        if small not in (1, large):
            raise ValueError(
                f"a block's branch of shape {tuple(branch)} cannot be added to its shortcut of shape"
                f" {tuple(shortcut)}: with global_padding='valid' 3x3 convolutions lose the border,"
                " which fits only where they leave one pixel; use 'same' or None"
            )


def drop_path(rate: float) -> nn.Module:
    """Return the module that drops a block's branch with probability ``rate`` before it is added."""
    return DropPath(rate) if rate > 0 else nn.Identity()


def convolution(
    config: BitConfig,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
) -> WeightStandardizedConv2d:
    """Return a convolution with the configuration's padding."""
    return WeightStandardizedConv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        config.global_padding,
        dilation,
        eps=WEIGHT_EPS,
    )


def norm(
    config: BitConfig, num_channels: int, activation: str | None = None
) -> GroupNormActivation:
    """Return a norm with the given activation, by default the configuration's."""
    return GroupNormActivation(
        config.num_groups, num_channels, activation=activation or config.hidden_act
    )


class BitDownsampleConv(ConvolutionOwner):
    """The shortcut of a stage's first block: 1x1 convolution, in the bottleneck form with a norm."""

    def __init__(self, config: BitConfig, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = convolution(config, in_channels, out_channels, 1, stride)
        self.norm = (
            nn.Identity()
            if config.layer_type == "preactivation"
            else norm(config, out_channels, "none")
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H / stride, W / stride)."""
        return self.norm(self.conv(x))


class ResidualBlock(ConvolutionOwner):
    """The base of both blocks: a shortcut, and a branch whose layers subclasses add.

    Args:
        config: Of the network.
        in_channels, out_channels: Of the input and the output.
        stride: Of the 3x3 convolution and of the shortcut.
        dilation: Of the 3x3 convolution.
        drop_path_rate: The probability that the branch is dropped in training.
        is_first_layer: Whether the shortcut changes the width and the resolution.
    """

    idle_in_inference: tuple[type[nn.Module], ...] = (nn.Identity, DropPath)
    """The classes of ``drop_path`` that return their input unchanged in inference."""

    downsample: BitDownsampleConv | None
    drop_path: nn.Module

    def __init__(
        self,
        config: BitConfig,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        dilation: int,
        drop_path_rate: float,
        is_first_layer: bool,
    ) -> None:
        super().__init__()
        mid_channels = round_to_multiple(out_channels / 4)
        self.downsample = (
            BitDownsampleConv(config, in_channels, out_channels, stride) if is_first_layer else None
        )
        self.add_layers(config, (in_channels, mid_channels, out_channels), stride, dilation)
        self.drop_path = drop_path(drop_path_rate)

    def add_layers(
        self, config: BitConfig, channels: tuple[int, int, int], stride: int, dilation: int
    ) -> None:
        """Add the convolutions and norms of the branch.

        Args:
            channels: Of the input, between the convolutions, and of the output.
        """
        raise NotImplementedError


class BitPreActivationBottleneckLayer(ResidualBlock):
    """Norm-activation before each of three convolutions (1x1, 3x3, 1x1), added to the shortcut.

    ``dilation`` is not used: transformers' own layer ignores it, so at ``output_stride`` 8 and 16 the
    stages keep their resolution and convolve undilated.
    """

    def add_layers(
        self, config: BitConfig, channels: tuple[int, int, int], stride: int, dilation: int
    ) -> None:
        """Add the convolutions, and the norms before them."""
        in_channels, mid_channels, out_channels = channels
        self.norm1 = norm(config, in_channels)
        self.conv1 = convolution(config, in_channels, mid_channels, 1)
        self.norm2 = norm(config, mid_channels)
        self.conv2 = convolution(config, mid_channels, mid_channels, 3, stride)
        self.norm3 = norm(config, mid_channels)
        self.conv3 = convolution(config, mid_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H / stride, W / stride)."""
        preactivated = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(preactivated)
        branch = self.conv1(preactivated)
        branch = self.conv2(self.norm2(branch))
        branch = self.conv3(self.norm3(branch))
        return add_to_shortcut(self.drop_path(branch), shortcut)


class BitBottleneckLayer(ResidualBlock):
    """Three convolutions (1x1, 3x3, 1x1), each followed by its norm, added to the shortcut, activated."""

    def __init__(
        self, config: BitConfig, in_channels: int, out_channels: int, **options: Any
    ) -> None:
        super().__init__(config, in_channels, out_channels, **options)
        self.activation = MODULES[config.hidden_act]()

    def add_layers(
        self, config: BitConfig, channels: tuple[int, int, int], stride: int, dilation: int
    ) -> None:
        """Add the convolutions, and the norms after them."""
        in_channels, mid_channels, out_channels = channels
        self.conv1 = convolution(config, in_channels, mid_channels, 1)
        self.norm1 = norm(config, mid_channels)
        self.conv2 = convolution(config, mid_channels, mid_channels, 3, stride, dilation)
        self.norm2 = norm(config, mid_channels)
        self.conv3 = convolution(config, mid_channels, out_channels, 1)
        self.norm3 = norm(config, out_channels, "none")

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        branch = self.norm1(self.conv1(x))
        branch = self.norm2(self.conv2(branch))
        branch = self.norm3(self.conv3(branch))
        return self.activation(add_to_shortcut(self.drop_path(branch), shortcut))


LAYERS = {
    "preactivation": BitPreActivationBottleneckLayer,
    "bottleneck": BitBottleneckLayer,
}
