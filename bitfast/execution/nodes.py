"""The residual blocks of a network that may be computed as one node of autograd's graph each.

:mod:`bitfast.ops.residual_block` computes such a block. Where it cannot, its steps are computed one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitfast.activations import activation_name
from bitfast.blocks import (
    BitBottleneckLayer,
    BitPreActivationBottleneckLayer,
    add_to_shortcut,
)
from bitfast.layers import (
    DropPath,
    DynamicPad2d,
    GroupNormActivation,
    WeightStandardizedConv2d,
)
from bitfast.ops.block_links import Convolution, Link, size_after
from bitfast.ops.common import autocast_dtype
from bitfast.ops.eager import PLAIN_TYPES
from bitfast.ops.group_norm_act_gradients import NormSettings
from bitfast.ops.residual_block import Computed, Drop, Form, Join, residual_block
from bitfast.torch_state import is_concrete

FiltersOf = Callable[[WeightStandardizedConv2d], Tensor]
"""Returns the standardized weight of a convolution."""


class Node(NamedTuple):
    """A block that may be computed as one node.

    Attributes:
        form: What the op computes.
        parts: The modules that hold the form's parameters, in order.
        drop_path: Stochastic depth of the branch.
        recomputation: The options of ``torch.utils.checkpoint.checkpoint`` if the backward pass computes the
            block again.
    """

    form: Form
    parts: tuple[GroupNormActivation | WeightStandardizedConv2d, ...]
    drop_path: nn.Module
    recomputation: dict[str, Any] | None = None

    def parameters(self, filters_of: FiltersOf) -> list[Tensor]:
        """Return the parameters as the op takes them."""
        found: list[Tensor] = []
        for part in self.parts:
            if isinstance(part, WeightStandardizedConv2d):
                found.append(filters_of(part))
            else:
                found += part.weight, part.bias
        return found

    def suits(self, x: Tensor, residual: Tensor | None, parameters: Sequence[Tensor]) -> bool:
        """Whether the op can compute the block for this input, and nobody has to see its parts."""
        dtype = autocast_dtype(x) or x.dtype
        maps = [x] if residual is None else [x, residual]
        return (
            is_concrete(x)
            and all(type(m) in PLAIN_TYPES and m.dtype == dtype for m in maps)
            and all(type(p) in PLAIN_TYPES and p.device == x.device for p in parameters)
            and all(p.dtype == dtype for p in parameters if p.dim() == 4)
            and 0 not in x.shape
            and self.knows_drop_path()
            and self.keeps_sizes(x.shape)
        )

    def knows_drop_path(self) -> bool:
        """Whether the branch is dropped as :class:`DropPath` does it, or not at all."""
        drop_path = self.drop_path
        return isinstance(drop_path, (nn.Identity, DropPath)) or not drop_path.training

    def keeps_sizes(self, shape: Sequence[int]) -> bool:
        """Whether branch and shortcut have one size, and the convolutions take what they are given."""
        filters = [p.weight.shape for p in self.parts if isinstance(p, WeightStandardizedConv2d)]
        size = shortcut = tuple(shape[2:])
        number = 0
        for link in self.form.links:
            sizes = []
            for convolution in link.convolutions:
                sizes.append(size_after(convolution, filters[number][2:], size))
                number += 1
            if len(sizes) > 1:
                shortcut = sizes[1]
            size = sizes[0]
        return size == shortcut and min(size) > 0

    def compute(
        self,
        x: Tensor,
        residual: Tensor | None,
        moments: Tensor | None,
        parameters: Sequence[Tensor],
        *,
        sums: bool,
    ) -> Computed:
        """Compute the block; see :func:`~bitfast.ops.residual_block.residual_block`."""
        if self.recomputation is None:
            return self._compute(x, residual, moments, parameters, sums)
        # Of the input only the sum is kept, not what is added.
        x = x if residual is None else add_to_shortcut(x, residual)

        def compute(
            x: Tensor, moments: Tensor | None, *parameters: Tensor
        ) -> tuple[Tensor, Tensor | None]:
            computed = self._compute(x, None, moments, parameters, True)
            return computed.branch, computed.moments

        result, moments = checkpoint(compute, x, moments, *parameters, **self.recomputation)
        return Computed(result, None, None if moments is None else moments.detach())

    def _compute(
        self,
        x: Tensor,
        residual: Tensor | None,
        moments: Tensor | None,
        parameters: Sequence[Tensor],
        sums: bool,
    ) -> Computed:
        drop = None
        if isinstance(self.drop_path, DropPath) and self.drop_path.is_active():
            drop = Drop(self.drop_path.keep_probability, self.drop_path.draw(x))
        return residual_block(self.form, x, residual, moments, drop, parameters, sums=sums)


def preactivation_node(block: BitPreActivationBottleneckLayer) -> Node:
    """Return the node of a block that begins with a norm, all parts of which run as written."""
    parts: list[Any] = [block.norm1, block.conv1]
    first = [block.conv1]
    if block.downsample is not None:
        parts.append(block.downsample.conv)
        first.append(block.downsample.conv)
    parts += [block.norm2, block.conv2, block.norm3, block.conv3]
    links = (
        Link(_settings_of(block.norm1), tuple(map(_convolution_of, first))),
        Link(_settings_of(block.norm2), (_convolution_of(block.conv2),)),
        Link(_settings_of(block.norm3), (_convolution_of(block.conv3),)),
    )
    return Node(Form(links), tuple(parts), block.drop_path)


def bottleneck_node(block: BitBottleneckLayer) -> Node:
    """Return the node of a block that ends with an activation, all parts of which run as written."""
    parts: list[Any] = [block.conv1]
    first = [block.conv1]
    shortcut_norm: Any = None
    if block.downsample is not None:
        parts.append(block.downsample.conv)
        first.append(block.downsample.conv)
        if isinstance(block.downsample.norm, GroupNormActivation):
            shortcut_norm = block.downsample.norm
    parts += [block.norm1, block.conv2, block.norm2, block.conv3, block.norm3]
    if shortcut_norm is not None:
        parts.append(shortcut_norm)
    links = (
        Link(None, tuple(map(_convolution_of, first))),
        Link(_settings_of(block.norm1), (_convolution_of(block.conv2),)),
        Link(_settings_of(block.norm2), (_convolution_of(block.conv3),)),
    )
    activation = activation_name(block.activation)
    assert activation is not None
    join = Join(
        _settings_of(block.norm3),
        None if shortcut_norm is None else _settings_of(shortcut_norm),
        activation,
    )
    return Node(Form(links, join), tuple(parts), block.drop_path)


def _settings_of(norm: GroupNormActivation) -> NormSettings:
    activation = norm.fused_activation()
    assert activation is not None
    return NormSettings(norm.num_groups, norm.eps, activation)


def _convolution_of(convolution: WeightStandardizedConv2d) -> Convolution:
    pad = convolution.pad
    if not isinstance(pad, DynamicPad2d) or convolution.kernel_size == (1, 1):
        return Convolution(convolution.geometry)
    return Convolution(convolution.geometry, (pad.kernel_size, pad.stride, pad.dilation))


__all__ = ["FiltersOf", "Node", "bottleneck_node", "preactivation_node"]
