"""The residual blocks of a network that may be computed as one node of autograd's graph each.

:mod:`bitfast.ops.residual_block` computes such a block. Where it cannot, its steps are computed one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import torch
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
    pair_of,
)
from bitfast.ops import stem_training as stem
from bitfast.ops.block_links import Convolution, Link, size_after
from bitfast.ops.common import autocast_dtype
from bitfast.ops.eager import PLAIN_TYPES
from bitfast.ops.group_norm_act_gradients import NormSettings
from bitfast.ops.residual_block import Computed, Drop, Form, Join, residual_block
from bitfast.ops.residual_block_operator import is_one_operator, residual_block_operator
from bitfast.pooling import MaxPool2d

Part: TypeAlias = GroupNormActivation | WeightStandardizedConv2d

FiltersOf = Callable[[WeightStandardizedConv2d], Tensor]
"""Returns the standardized weight of a convolution."""

MOST_VERDICTS = 64

_kind: Any = attrgetter("__class__", "shape", "dtype", "device")


class Node(NamedTuple):
    """A block that may be computed as one node.

    Attributes:
        form: What the op computes.
        parts: The modules that hold the form's parameters, in order.
        drop_path: Stochastic depth of the branch.
        verdicts: Whether :meth:`suits` is true, by the metadata of its arguments.
        recomputation: The options of ``torch.utils.checkpoint.checkpoint`` if the backward pass computes the
            block again.
    """

    form: Form
    parts: tuple[Part, ...]
    drop_path: nn.Module
    verdicts: dict[Any, bool]
    recomputation: dict[str, Any] | None = None

    @property
    def takes_residual(self) -> bool:
        """Whether the block begins with a norm, which can add a residual to what it reads."""
        return self.form.links[0].norm is not None

    def may_be_compiled(self, x: Tensor) -> bool:
        """Whether the op can be part of a compiled program: elsewhere compilers see the block's steps."""
        return is_one_operator(x)

    def suits(self, x: Tensor, residual: Tensor | None, parameters: Sequence[Tensor]) -> bool:
        """Whether the op can compute the block for this input, which nothing traces or transforms."""
        dtype = autocast_dtype(x) or x.dtype
        if torch.compiler.is_compiling():
            return self._suits(x, residual, parameters, dtype)
        key = dtype, _kind(x), residual is None or _kind(residual), *map(_kind, parameters)
        verdict = self.verdicts.get(key)
        if verdict is None:
            if len(self.verdicts) >= MOST_VERDICTS:
                self.verdicts.clear()
            verdict = self.verdicts[key] = self._suits(x, residual, parameters, dtype)
        return verdict and self.knows_drop_path()

    def _suits(
        self, x: Tensor, residual: Tensor | None, parameters: Sequence[Tensor], dtype: torch.dtype
    ) -> bool:
        maps = [x] if residual is None else [x, residual]
        return (
            _are_plain(x, [*maps, *parameters])
            and all(m.dtype == dtype for m in maps)
            and all(p.dtype == dtype for p in parameters if p.dim() == 4)
            and self.knows_drop_path()
            and self.keeps_sizes(x.shape, [p.shape for p in parameters if p.dim() == 4])
        )

    def knows_drop_path(self) -> bool:
        """Whether the branch is dropped as :class:`DropPath` does it, or not at all."""
        drop_path = self.drop_path
        return (
            type(drop_path) is nn.Identity
            or isinstance(drop_path, DropPath)
            or not drop_path.training
        )

    def pads_with_zeros(self) -> bool:
        """Whether the paddings hold zeros, as the op takes them to."""
        convolutions = (p for p in self.parts if isinstance(p, WeightStandardizedConv2d))
        return not any(
            isinstance(each.pad, DynamicPad2d) and each.pad.value != 0 for each in convolutions
        )

    def keeps_sizes(self, shape: Sequence[int], filters: Sequence[torch.Size]) -> bool:
        """Whether branch and shortcut have one size, and the convolutions take what they are given.

        Args:
            shape: Of the input.
            filters: The shapes of the filters, in order.
        """
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
        if torch.compiler.is_compiling():
            x = x if residual is None else add_to_shortcut(x, residual)
            return residual_block_operator(self.form, x, moments, drop, parameters)
        return residual_block(self.form, x, residual, moments, drop, parameters, sums=sums)


class StemNode(NamedTuple):
    """A stem that may be computed as one node.

    Attributes:
        form: What the op computes.
        parts: The modules that hold the form's parameters, in order.
    """

    form: stem.Form
    parts: tuple[Part, ...]

    @property
    def takes_residual(self) -> bool:
        """False: a stem reads images."""
        return False

    def may_be_compiled(self, x: Tensor) -> bool:
        """False: compilers see the stem's steps."""
        return False

    def suits(self, x: Tensor, residual: Tensor | None, parameters: Sequence[Tensor]) -> bool:
        """Whether the op can compute the stem of these images, and nobody has to see its parts."""
        dtype = autocast_dtype(x) or x.dtype
        size = size_after(self.form.convolution, parameters[0].shape[2:], tuple(x.shape[2:]))
        size = tuple(n + 2 * self.form.zeros for n in size)
        (top, bottom, left, right), (reach, _, _) = (
            self.form.pool.sides(size),
            self.form.pool.window,
        )
        return (
            _are_plain(x, [x, *parameters])
            and x.is_floating_point()
            and parameters[0].dtype == dtype
            and size[0] + top + bottom >= reach[0]
            and size[1] + left + right >= reach[1]
            and min(size) > 0
        )

    def compute(
        self,
        x: Tensor,
        residual: Tensor | None,
        moments: Tensor | None,
        parameters: Sequence[Tensor],
        *,
        sums: bool,
    ) -> Computed:
        """Compute the stem; see :func:`~bitfast.ops.stem_training.stem_training`."""
        return Computed(stem.stem_training(self.form, x, parameters), None, None)


AnyNode: TypeAlias = Node | StemNode


def parameters_of(node: AnyNode, filters_of: FiltersOf) -> list[Tensor]:
    """Return the parameters of a node as its op takes them."""
    found: list[Tensor] = []
    for part in node.parts:
        own: Any = part._parameters
        if isinstance(part, WeightStandardizedConv2d):
            found.append(filters_of(part))
        elif "weight" in own and "bias" in own:  # without the search of ``nn.Module.__getattr__``
            found += own["weight"], own["bias"]
        else:
            found += part.weight, part.bias
    return found


def _are_plain(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether x and all others are plain tensors on one device."""
    return 0 not in x.shape and all(
        type(t) in PLAIN_TYPES and t.device == x.device for t in tensors
    )


def stem_node(
    convolution: WeightStandardizedConv2d,
    zeros: int,
    norm: GroupNormActivation | None,
    pooler: MaxPool2d,
    pool_zeros: int,
) -> StemNode | None:
    """Return the node of a stem; None if one node cannot compute it.

    Args:
        convolution: Of the images.
        zeros: On each side of its result, before the norm.
        norm: Or None.
        pooler: Pads, and pools.
        pool_zeros: On each side, before the pooler.
    """
    is_dynamic = isinstance(pooler.pad, DynamicPad2d)
    if is_dynamic and pool_zeros:
        return None
    window = pair_of(pooler.kernel_size), pair_of(pooler.stride), pair_of(pooler.dilation)
    value = pooler.pad.value if isinstance(pooler.pad, DynamicPad2d) else 0.0
    pool = stem.Pool(window, None if is_dynamic else pool_zeros, value)
    settings = None if norm is None else _settings_of(norm)
    parts: list[Part] = [convolution] if norm is None else [convolution, norm]
    return StemNode(stem.Form(_convolution_of(convolution), zeros, settings, pool), tuple(parts))


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
    return Node(Form(links), tuple(parts), block.drop_path, {})


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
    return Node(Form(links, join), tuple(parts), block.drop_path, {})


def _settings_of(norm: GroupNormActivation) -> NormSettings:
    activation = norm.fused_activation()
    assert activation is not None
    return NormSettings(norm.num_groups, norm.eps, activation)


def _convolution_of(convolution: WeightStandardizedConv2d) -> Convolution:
    pad = convolution.pad
    if not isinstance(pad, DynamicPad2d) or convolution.kernel_size == (1, 1):
        return Convolution(convolution.geometry)
    return Convolution(convolution.geometry, (pad.kernel_size, pad.stride, pad.dilation))


__all__ = [
    "AnyNode",
    "FiltersOf",
    "Node",
    "StemNode",
    "bottleneck_node",
    "parameters_of",
    "preactivation_node",
    "stem_node",
]
