"""The blocks of Big Transfer: bottlenecks of three convolutions, with the norms before or after them.

The preactivation form is that of He et al., "Identity Mappings in Deep Residual Networks", 2016
(https://arxiv.org/abs/1603.05027). Modules are named as in transformers, so that checkpoints fit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitfast.activations import MODULES, activation_name
from bitfast.configuration import BitConfig
from bitfast.convolution_owner import ConvolutionOwner
from bitfast.fusion import Deferred, can_be_normalized_late, fusable_norm, is_fusable, normed
from bitfast.layers import DropPath, GroupNormActivation, WeightStandardizedConv2d, infers
from bitfast.torch_state import is_concrete
from bitfast.watching import runs_as_written

WEIGHT_EPS = 1e-8
"""Added to a filter's variance in BiT's transformers checkpoints (Google's own code uses 1e-10)."""


POINTWISE = (1, 1), (0, 0), (1, 1)
"""Stride, padding and dilation of a convolution that keeps the size."""


def round_to_multiple(width: float, divisor: int = 8) -> int:
    """Round a channel count to a multiple of ``divisor``, losing at most a tenth of it."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


def add_to_shortcut(branch: Tensor, shortcut: Tensor) -> Tensor:
    """Add the two halves of a block; a branch that its convolutions left one pixel of is repeated.

    Raises:
        ValueError: the convolutions have no padding and left the branch smaller than the shortcut.
    """
    check_summands(branch, shortcut)
    return branch + shortcut


def check_summands(branch: Tensor, shortcut: Tensor) -> None:
    """Raise ValueError unless :func:`add_to_shortcut` can add the two."""
    if may_differ(branch, shortcut):
        for small, large in zip(branch.shape[2:], shortcut.shape[2:], strict=True):
            if small not in (1, large):
                raise ValueError(
                    f"a block's branch of shape {tuple(branch.shape)} cannot be added to its shortcut of shape"
                    f" {tuple(shortcut.shape)}: with global_padding='valid' 3x3 convolutions lose the border,"
                    " which fits only where they leave one pixel; use 'same' or None"
                )


def may_differ(branch: Tensor, shortcut: Tensor) -> bool:
    """Say whether the two halves of a block are known to be of different shapes."""
    is_known = is_concrete(branch) and not torch.compiler.is_compiling()
    return is_known and branch.shape != shortcut.shape


def drop_path(rate: float) -> nn.Module:
    """Return what drops a block's branch with probability ``rate``, as the last thing before it is added."""
    return DropPath(rate) if rate > 0 else nn.Identity()


def convolution(
    config: BitConfig,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
) -> WeightStandardizedConv2d:
    """Return a convolution with the padding of the whole network."""
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
    """Return a norm with the activation of the whole network, or with that one."""
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
        return normed(self.norm, self.conv(x), is_fusable(self.conv))

    def makes_new(self) -> bool:
        """Say whether nobody but the caller gets to see the result."""
        has_own_norm = type(self.norm) is nn.Identity or fusable_norm(self.norm) is not None
        return (
            has_own_norm and is_fusable(self.conv) and all(map(runs_as_written, (self, self.norm)))
        )


def makes_new(downsample: nn.Module | None) -> bool:
    """Say whether a block has a shortcut of its own whose result nobody else gets to see."""
    return type(downsample) is BitDownsampleConv and downsample.makes_new()


class ResidualBlock(ConvolutionOwner):
    """What both blocks have in common."""

    idle_in_inference: tuple[type[nn.Module], ...] = (nn.Identity, DropPath)
    """The classes of ``drop_path`` that return what they are given, but for training."""

    drop_path: nn.Module

    def drops_nothing(self) -> bool:
        """Say whether the branch need not go through ``drop_path``, in inference."""
        drop_path = self.drop_path
        return (
            type(drop_path) in self.idle_in_inference
            and runs_as_written(drop_path)
            and (type(drop_path) is nn.Identity or not drop_path.training)
        )


class BitPreActivationBottleneckLayer(ResidualBlock):
    """Norm-activation before each of three convolutions (1x1, 3x3, 1x1), added to the shortcut.

    ``dilation`` is not used: transformers' own layer ignores it, so at ``output_stride`` 8 and 16 the
    stages keep their resolution and convolve undilated.
    """

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
        self.norm1 = norm(config, in_channels)
        self.conv1 = convolution(config, in_channels, mid_channels, 1)
        self.norm2 = norm(config, mid_channels)
        self.conv2 = convolution(config, mid_channels, mid_channels, 3, stride)
        self.norm3 = norm(config, mid_channels)
        self.conv3 = convolution(config, mid_channels, out_channels, 1)
        self.drop_path = drop_path(drop_path_rate)
        self.may_shrink = config.global_padding == "VALID"

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H / stride, W / stride)."""
        return self.run(x, None, None)[0]

    def run(
        self,
        x: Tensor,
        preactivated: Tensor | Deferred | None,
        following: GroupNormActivation | None,
        owns_input: bool = False,
    ) -> tuple[Tensor, Tensor | Deferred | None]:
        """Do the same, together with the norm that comes next.

        Args:
            x: The input.
            preactivated: ``norm1(x)``, if the block before has taken care of it.
            following: The norm to apply to the output, if this block is to do it.
            owns_input: Nobody else needs x, so that it may be overwritten.

        Returns:
            The output, and ``following(output)`` or None.
        """
        if preactivated is None and fusable_norm(self.norm1) is not None:
            preactivated = Deferred.of(x, self.norm1)
        if isinstance(preactivated, Deferred):
            if self.normalizes_as_it_convolves(x):
                return self.run_fused(x, preactivated, following, owns_input)
            preactivated = preactivated.value()
        if preactivated is None:
            preactivated = self.norm1(x)
        assert not isinstance(preactivated, Deferred)
        shortcut = x if self.downsample is None else self.downsample(preactivated)
        owns_shortcut = owns_input if self.downsample is None else makes_new(self.downsample)
        branch = normed(self.norm2, self.conv1(preactivated), is_fusable(self.conv1))
        branch = normed(self.norm3, self.conv2(branch), is_fusable(self.conv2))
        if (
            owns_shortcut
            and self.adds_as_it_convolves(branch)
            and self.conv3.add_to(shortcut, branch)
        ):
            if following is None:
                return shortcut, None
            # What is normalized next takes the place of what was normalized before.
            spare = preactivated if self.owns_preactivated() else None
            return shortcut, Deferred.of(shortcut, following) or following.into(spare, shortcut)
        branch = self.drop_path(self.conv3(branch))
        if following is None or self.may_shrink or may_differ(branch, shortcut):
            return add_to_shortcut(branch, shortcut), None
        if can_be_normalized_late(self, branch):
            total = add_to_shortcut(branch, shortcut)
            return total, Deferred.of(total, following)
        return following.add_and_norm(branch, shortcut)

    def run_fused(
        self,
        x: Tensor,
        preactivated: Deferred,
        following: GroupNormActivation | None,
        owns_input: bool,
    ) -> tuple[Tensor, Deferred | None]:
        """Do what :meth:`run` does with convolutions that normalize what they read."""
        if self.downsample is not None:
            total, _ = preactivated.convolved(self.downsample.conv, wants_moments=False)
        else:
            total = x if owns_input else x.clone()
        branch = Deferred(*preactivated.convolved(self.conv1), self.norm2)
        branch = Deferred(*branch.convolved(self.conv2), self.norm3)
        if branch.x.shape[2:] == total.shape[2:]:
            moments = branch.convolved_onto(total, self.conv3, wants_moments=following is not None)
        else:  # somebody has changed a convolution's padding
            total, moments = add_to_shortcut(self.conv3(branch.value()), total), None
        return total, None if following is None else Deferred(total, moments, following)

    def normalizes_as_it_convolves(self, x: Tensor) -> bool:
        """Say whether the convolutions can apply the norms before them, and nobody sees what is between."""
        return (
            self.adds_as_it_convolves(x)
            and fusable_norm(self.norm2) is not None
            and fusable_norm(self.norm3) is not None
            and is_fusable(self.conv1)
            and is_fusable(self.conv2)
            and self.conv1.can_normalize(x)
            and self.conv3.can_normalize(x)
            and (
                self.downsample is None
                or (
                    makes_new(self.downsample)
                    and type(self.downsample.norm) is nn.Identity
                    and self.downsample.conv.can_normalize(x)
                )
            )
        )

    def owns_preactivated(self) -> bool:
        """Say whether nobody but the block gets to see what its first norm has made."""
        return is_fusable(self.conv1) and (self.downsample is None or makes_new(self.downsample))

    def adds_as_it_convolves(self, x: Tensor) -> bool:
        """Say whether the last convolution may add its result to the shortcut by itself."""
        return (
            infers(self, x)
            and not self.may_shrink
            and is_fusable(self.conv3)
            and self.conv3.geometry == POINTWISE
            and self.drops_nothing()
        )


class BitBottleneckLayer(ResidualBlock):
    """Three convolutions (1x1, 3x3, 1x1), each followed by its norm, added to the shortcut, activated."""

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
        self.conv1 = convolution(config, in_channels, mid_channels, 1)
        self.norm1 = norm(config, mid_channels)
        self.conv2 = convolution(config, mid_channels, mid_channels, 3, stride, dilation)
        self.norm2 = norm(config, mid_channels)
        self.conv3 = convolution(config, mid_channels, out_channels, 1)
        self.norm3 = norm(config, out_channels, "none")
        self.drop_path = drop_path(drop_path_rate)
        self.activation = MODULES[config.hidden_act]()
        self.may_shrink = config.global_padding == "VALID"

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H / stride, W / stride)."""
        if can_be_normalized_late(self, x) and self.normalizes_as_it_convolves(x):
            return self.run_fused(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        branch = normed(self.norm1, self.conv1(x), is_fusable(self.conv1))
        branch = normed(self.norm2, self.conv2(branch), is_fusable(self.conv2))
        branch = normed(self.norm3, self.conv3(branch), is_fusable(self.conv3))
        return self.activation(add_to_shortcut(self.drop_path(branch), shortcut))

    def run_fused(self, x: Tensor) -> Tensor:
        """Do the same with convolutions that normalize what they read."""
        shortcut = x
        if self.downsample is not None:
            shortcut, moments = self.downsample.conv.with_moments(x)
            norm = fusable_norm(self.downsample.norm)
            shortcut = shortcut if norm is None else norm.into(shortcut, shortcut, moments)
        branch = Deferred(*self.conv1.with_moments(x), self.norm1)
        branch = Deferred(*branch.convolved(self.conv2), self.norm2)
        result, moments = branch.convolved(self.conv3)
        if result.shape != shortcut.shape:  # somebody has changed a convolution's padding
            result = self.norm3.into(result, result, moments)
            return self.activation(add_to_shortcut(result, shortcut))
        name = activation_name(self.activation)
        assert name is not None
        return self.norm3.add_and_activate_(result, moments, shortcut, name)

    def normalizes_as_it_convolves(self, x: Tensor) -> bool:
        """Say whether the convolutions can apply the norms before them, and nobody sees what is between."""
        convolutions = (self.conv1, self.conv2, self.conv3)
        norms = (self.norm1, self.norm2, self.norm3)
        downsample = self.downsample
        return (
            not self.may_shrink
            and self.drops_nothing()
            and runs_as_written(self.activation)
            and activation_name(self.activation) is not None
            and all(map(is_fusable, convolutions))
            and all(fusable_norm(norm) is not None for norm in norms)
            and self.norm3.fused_activation() == "none"
            and self.conv1.can_normalize(x)
            and self.conv3.can_normalize(x)
            and (downsample is None or (makes_new(downsample) and downsample.conv.can_normalize(x)))
        )


LAYERS = {
    "preactivation": BitPreActivationBottleneckLayer,
    "bottleneck": BitBottleneckLayer,
}
