"""The stem of a network in training, as one differentiable op: convolution, (norm), max-pool.

For autograd it is one node. It keeps the images, which of each window's pixels was the maximum, and with a norm
what that reads; not what the pool reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitfast import reference
from bitfast.backends import select_backend
from bitfast.memory_format import laid_out, memory_format_of
from bitfast.ops import block_links as links
from bitfast.ops import group_norm_act_gradients as norms
from bitfast.ops.block_links import Convolution, Link, Parameters, Wanted, pad
from bitfast.ops.derivatives import (
    call_without_autograd,
    can_use_backward_kernel,
    differentiable_gradients,
)
from bitfast.ops.group_norm_act_gradients import NormSettings, Statistics
from bitfast.ops.same_padding import OP as SAME_PADDING
from bitfast.ops.same_padding import same_padding
from bitfast.ops.same_padding_cuda import Window


class Pool(NamedTuple):
    """What determines a max-pool.

    Attributes:
        window: Kernel size, stride and dilation.
        zeros: How many zeros each side is padded with; None: TensorFlow's "same" padding.
        value: What the padding holds.
    """

    window: Window
    zeros: int | None
    value: float

    def sides(self, size: tuple[int, ...]) -> list[int]:
        """Return the padding (top, bottom, left, right) of an input of this height and width."""
        return same_padding(size, *self.window) if self.zeros is None else [self.zeros] * 4


class Form(NamedTuple):
    """What determines a stem besides its parameters.

    Attributes:
        convolution: Of the images.
        zeros: How many zeros each side of its result is padded with.
        norm: Of the padded result, or None.
        pool: Of that.
    """

    convolution: Convolution
    zeros: int
    norm: NormSettings | None
    pool: Pool

    @property
    def link(self) -> Link:
        """The convolution as a link of one."""
        return Link(None, (self.convolution,))

    @property
    def sides(self) -> list[int]:
        """The padding (top, bottom, left, right) of the convolution's result."""
        return [self.zeros] * 4


def stem_training(form: Form, images: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Compute a stem.

    Args:
        form: What stem it is.
        images: Shape (N, C, H, W), in the layout to compute in.
        parameters: The standardized filters, of whose dtype the result is; then the norm's weight and bias.

    Returns:
        Shape (N, out, about H / 4, about W / 4).
    """
    if torch.is_grad_enabled() and (
        images.requires_grad or any(p.requires_grad for p in parameters)
    ):
        return _Stem.apply(form, images, *parameters)
    return _compute(form, images, parameters, keeps=False)[0]


class _Kept(NamedTuple):
    """What the backward pass reads besides the inputs: what the norm and the pool have read, or their traces.

    Attributes:
        taps: Which pixel of each window was the maximum.
        normed: What the norm reads; None without one.
        statistics: Of that.
        size: Height and width of what the pool reads.
    """

    taps: Tensor
    normed: Tensor | None
    statistics: Statistics | None
    size: torch.Size


def _compute(
    form: Form, images: Tensor, parameters: Sequence[Tensor], keeps: bool
) -> tuple[Tensor, _Kept]:
    filters, *of_norm = parameters
    made = links.forward(form.link, Parameters((), (filters,)), images.to(filters.dtype))
    x = made.outputs[0]
    if form.zeros:
        x = pad(x, form.sides)
    normed = statistics = None
    if form.norm is not None:
        normed, x, statistics = norms.forward(x, None, form.norm.of(of_norm), keeps)
    backend = select_backend(SAME_PADDING, x.device.type, x.dtype)
    operator = getattr(torch.ops.bitfast.same_max_pool, backend)
    sides, value = form.pool.sides(x.shape[2:]), form.pool.value
    result, taps = call_without_autograd(operator, x, *form.pool.window, sides, value, keeps)
    return result, _Kept(taps, normed, statistics, x.shape[2:])


class _Stem(torch.autograd.Function):
    """A stem as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, form: Form, images: Tensor, *parameters: Tensor) -> Tensor:
        """Return the result."""
        result, kept = _compute(form, images, parameters, keeps=True)
        statistics = kept.statistics
        ctx.form, ctx.size, ctx.count = form, kept.size, len(parameters)
        ctx.origin = "" if statistics is None else statistics.origin
        tensors = () if statistics is None else statistics.tensors
        ctx.save_for_backward(images, *parameters, kept.taps, kept.normed, *tensors)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the images and the parameters."""
        images, *others = ctx.saved_tensors
        parameters = others[: ctx.count]
        taps, normed, *tensors = others[ctx.count :]
        statistics = Statistics(ctx.origin, tuple(tensors)) if tensors else None
        kept = _Kept(taps, normed, statistics, ctx.size)
        if can_use_backward_kernel(grad):
            _, *needs = ctx.needs_input_grad
            return None, *_gradients(ctx.form, images, parameters, kept, grad, needs)

        def composite(images: Tensor, *parameters: Tensor) -> Tensor:
            return _composite(ctx.form, images, parameters)

        return None, *differentiable_gradients(composite, (images, *parameters), grad)


def _gradients(
    form: Form,
    images: Tensor,
    parameters: Sequence[Tensor],
    kept: _Kept,
    grad: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of the images and the parameters, by kernels."""
    filters, *of_norm = parameters
    x = images.to(filters.dtype)
    backend = select_backend(SAME_PADDING, grad.device.type, grad.dtype)
    operator = getattr(torch.ops.bitfast.same_max_pool_backward, backend)
    grad = call_without_autograd(
        operator, laid_out(grad, memory_format_of(x)), kept.taps, kept.size, *form.pool.window,
        form.pool.sides(kept.size),
    )  # fmt: skip
    grads: list[Tensor | None] = []
    if form.norm is not None:
        assert kept.normed is not None
        assert kept.statistics is not None
        norm = form.norm.of(of_norm)
        grad, grad_weight, grad_bias, _ = norms.gradients(
            grad, None, kept.normed, norm, kept.statistics, False
        )
        grads = [grad_weight, grad_bias]
    if form.zeros:
        grad = pad(grad, [-side for side in form.sides])
    wanted = Wanted(needs[0], False, (needs[1],))
    grad_images, _, of_filters = links.gradients(
        form.link, Parameters((), (filters,)), x, None, [grad], None, wanted
    )
    return [None if grad_images is None else grad_images.to(images.dtype), *of_filters, *grads]


def _composite(form: Form, images: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Compute a stem in plain PyTorch, differentiable to any order."""
    filters, *of_norm = parameters
    (x,) = links.composite(form.link, Parameters((), (filters,)), images.to(filters.dtype))
    if form.zeros:
        x = reference.same_pad_forward(x, form.sides, 0.0)
    if form.norm is not None:
        x = reference.group_norm_act_forward(x, *form.norm.of(of_norm))[0]
    sides = form.pool.sides(x.shape[2:])
    return reference.same_max_pool(x, *form.pool.window, sides, form.pool.value)


__all__ = ["Form", "Pool", "stem_training"]
