"""Residual blocks on a GPU, computed straight through: what the host decides is decided once for each metadata.

:mod:`bitfast.ops.residual_block` decides anew in each call, for which a GPU would have to wait. Where all norms
of a block are prepared launches (:mod:`bitfast.ops.group_norm_act_eager`), the block is prepared as a whole,
the first time that it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitfast.backends import requested_backend
from bitfast.memory_format import memory_format_of
from bitfast.ops import block_links as links
from bitfast.ops.block_links import Convolution
from bitfast.ops.eager import BoundedCache, has_unusual_memory
from bitfast.ops.group_norm_act_contract import OP
from bitfast.ops.group_norm_act_eager import PreparedCall
from bitfast.ops.group_norm_act_gradients import Statistics

_convolution_backward = torch.ops.aten.convolution_backward.default._op
_INPUT, _FILTERS = (True, False, False), (False, True, False)
_NO_OUTPUT_PADDING = (0, 0)


class _Link(NamedTuple):
    """A link, prepared.

    Attributes:
        number: Of the link.
        norm: The launches of its norm.
        at: The place of the norm's weight among the block's parameters; bias and filters follow.
        convolutions: As in :class:`~bitfast.ops.block_links.Link`.
        strides: Of what the norm reads.
    """

    number: int
    norm: PreparedCall
    at: int
    convolutions: tuple[Convolution, ...]
    strides: tuple[int, ...]


class _Wanted(NamedTuple):
    """A link in the backward pass.

    Attributes:
        link: Which.
        filters: Which filters' gradients are wanted.
        goes_on: Whether links before this one have gradients too.
    """

    link: _Link
    filters: tuple[bool, ...]
    goes_on: bool


Outputs = tuple[Tensor, Tensor | None, Tensor | None]
"""The branch; the shortcut if a convolution computes it; x + residual if there is one."""


class PreparedBlock:
    """A block that begins with a norm, and whose branch and shortcut the next norm adds.

    Args:
        convolutions: Of each link.
        keep: The probability that a branch is kept.
        maps: What each link's norm has read.
        norms: The launches of each link's norm.
    """

    def __init__(
        self,
        convolutions: Sequence[tuple[Convolution, ...]],
        keep: float,
        maps: Sequence[Tensor],
        norms: Sequence[PreparedCall],
    ) -> None:
        self.keep = keep
        self.memory_format = memory_format_of(maps[0])
        made: list[_Link] = []
        at = 0
        for number, (each, x, norm) in enumerate(zip(convolutions, maps, norms, strict=True)):
            made.append(_Link(number, norm, at, each, x.stride()))
            at += 2 + len(each)
        self.links = tuple(made)
        self.parameters = at
        self.has_shortcut_convolution = len(convolutions[0]) > 1
        self._backwards: dict[tuple[bool, ...], tuple[_Wanted, ...] | None] = {}

    # ---- forward ---------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        parameters: Sequence[Tensor],
    ) -> tuple[Outputs, list[Tensor], list[Tensor]]:
        """Return the outputs, what each norm has read, and the statistics of that."""
        maps: list[Tensor] = []
        statistics: list[Tensor] = []
        has_residual, shortcut, value = residual is not None, None, x
        for _, norm, at, convolutions, strides in self.links:
            if value.stride() != strides:  # torch's convolutions were switched over meanwhile
                value = value.contiguous(memory_format=self.memory_format)
            total, read, buffer = norm.forward(
                value, residual, parameters[at], parameters[at + 1], True
            )
            assert buffer is not None
            residual = None
            maps.append(total)
            statistics.append(buffer)
            if len(convolutions) > 1:
                shortcut = _convolve(convolutions[1], read, parameters[at + 3])
            value = _convolve(convolutions[0], read, parameters[at + 2])
        if mask is not None:
            value = value.div_(self.keep).mul_(mask)
        return (value, shortcut, maps[0] if has_residual else None), maps, statistics

    # ---- backward --------------------------------------------------------------------------------

    def gradients(
        self,
        saved: _Saved,
        grad: Tensor,
        grad_shortcut: Tensor | None,
        grad_total: Tensor | None,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, list[Tensor | None]] | None:
        """Return the gradients of the block's input and of its parameters; None where others must compute them.

        Args:
            saved: What the forward pass kept.
            grad, grad_shortcut, grad_total: The gradients of the outputs.
            needs: Whether the gradient of the input, and of each parameter, is wanted.
        """
        wanted = self._backwards.get(needs, ())
        if wanted == ():
            wanted = self._backwards[needs] = self._wanted(needs)
        if wanted is None:
            return None
        layout = self.memory_format
        parameters, mask, maps, statistics = saved
        grad = grad.contiguous(memory_format=layout)
        if mask is not None:
            grad = (grad * mask).div_(self.keep)
        if grad_shortcut is not None:
            grad_shortcut = grad_shortcut.contiguous(memory_format=layout)
        if grad_total is not None:
            grad_total = grad_total.contiguous(memory_format=layout)
            if has_unusual_memory(grad_total):
                grad_total = grad_total.clone(memory_format=layout)
        grads: list[Tensor | None] = [None] * self.parameters
        for (number, norm, at, convolutions, strides), filters, goes_on in wanted:
            x = maps[number]
            if x.stride() != strides:  # somebody has moved what was saved
                x = x.contiguous(memory_format=layout)
            grad_read = _input_gradient(convolutions[0], grad, x, parameters[at + 2])
            if len(convolutions) > 1:
                assert grad_shortcut is not None
                grad_read += _input_gradient(convolutions[1], grad_shortcut, x, parameters[at + 3])
            if grad_read.stride() != strides:
                grad_read = grad_read.contiguous(memory_format=layout)
            grad_x, grads[at], grads[at + 1], read = norm.launch_backward(
                (x, parameters[at], parameters[at + 1], statistics[number]), grad_read,
                grad_total if number == 0 else None, any(filters),
            )  # fmt: skip
            outer = (grad, grad_shortcut)
            for k, is_wanted in enumerate(filters):
                if is_wanted:
                    assert read is not None
                    grads[at + 2 + k] = _filter_gradient(
                        convolutions[k], outer[k], read, parameters[at + 2 + k]
                    )
            if not goes_on:
                return grad_x if number == 0 else None, grads
            grad = grad_x
        return grad, grads

    def _wanted(self, needs: tuple[bool, ...]) -> tuple[_Wanted, ...] | None:
        """Return the links that have gradients, last first; None if not all of these have one of their norm."""
        reached, *of_parameters = needs
        found = []
        for link in self.links:
            end = link.at + 2 + len(link.convolutions)
            filters = tuple(of_parameters[link.at + 2 : end])
            is_normed = any(of_parameters[link.at : link.at + 2])
            if not (reached or is_normed) and any(filters):
                return None
            if reached or is_normed:
                found.append(_Wanted(link, filters, reached and link.number > 0))
            # The gradient of a second convolution, the shortcut's, comes from elsewhere.
            reached = reached or is_normed or any(filters[:1])
        return tuple(reversed(found))


def _convolve(convolution: Convolution, x: Tensor, filters: Tensor) -> Tensor:
    if convolution.window is not None:
        x = links.padded(convolution, x)
    return torch.conv2d(x, filters, None, *convolution.geometry)


def _input_gradient(convolution: Convolution, grad: Tensor, x: Tensor, filters: Tensor) -> Tensor:
    if convolution.window is not None:
        return links.input_gradient_of(convolution, filters, grad, x)
    # Of x only shape and layout are read.
    return _convolution_backward(
        grad, x, filters, None, *convolution.geometry, False, _NO_OUTPUT_PADDING, 1, _INPUT
    )[0]


def _filter_gradient(
    convolution: Convolution, grad: Tensor | None, read: Tensor, filters: Tensor
) -> Tensor:
    if convolution.window is not None:
        read = links.padded(convolution, read)
    return _convolution_backward(
        grad, read, filters, None, *convolution.geometry, False, _NO_OUTPUT_PADDING, 1, _FILTERS
    )[1]


class _Saved(NamedTuple):
    """What a node has kept."""

    parameters: tuple[Tensor, ...]
    mask: Tensor | None
    maps: tuple[Tensor, ...]
    statistics: tuple[Tensor, ...]


def cut_saved(block: PreparedBlock, tensors: tuple[Any, ...]) -> _Saved:
    """Return what a node has kept, from the tensors that autograd has saved."""
    count, links_count = block.parameters, len(block.links)
    maps = count + 1 + links_count
    return _Saved(tensors[:count], tensors[count], tensors[count + 1 : maps], tensors[maps:])


# ---- what is prepared -----------------------------------------------------------------------------

_blocks: BoundedCache[PreparedBlock | None] = BoundedCache(most=1024)
"""By the metadata of the arguments; None where there is none."""

_features: Any = attrgetter("shape", "dtype")


def key_of(
    settings: Any, x: Tensor, residual: Tensor | None, parameters: Sequence[Tensor]
) -> tuple[Any, ...]:
    """Return the metadata of a call; all tensors are on one device."""
    return (
        settings, x.shape, x.stride(), x.dtype, x.device,
        residual is None or residual.stride(),
        tuple(map(_features, parameters)), tuple(map(Tensor.stride, parameters)), requested_backend(OP),
    )  # fmt: skip


def find_block(
    key: tuple[Any, ...], x: Tensor, residual: Tensor | None, parameters: Sequence[Tensor]
) -> PreparedBlock | None:
    """Return the prepared block for a call; None if there is none."""
    block = _blocks.get(key)
    if block is None or has_unusual_memory(x, *parameters):
        return None
    return None if residual is not None and has_unusual_memory(residual) else block


def keep_block(
    key: tuple[Any, ...],
    convolutions: Sequence[tuple[Convolution, ...]],
    keep: float,
    maps: Sequence[Tensor],
    statistics: Sequence[Statistics | None],
) -> None:
    """Prepare a block for calls of the same metadata, if all its norms were prepared launches.

    Args:
        key: Of the calls.
        convolutions: Of each link.
        keep: The probability that a branch is kept.
        maps, statistics: What a call has computed.
    """
    norms = [each.origin for each in statistics if each is not None]
    if len(norms) == len(convolutions) and all(isinstance(norm, PreparedCall) for norm in norms):
        _blocks.keep(key, PreparedBlock(convolutions, keep, maps, norms))  # type: ignore[arg-type]


def forget_blocks() -> None:
    """Forget the prepared blocks."""
    _blocks.clear()


__all__ = ["PreparedBlock", "cut_saved", "find_block", "forget_blocks", "keep_block", "key_of"]
