"""A residual block of convolutions and norms as one differentiable op.

He et al., "Identity Mappings in Deep Residual Networks", 2016 (https://arxiv.org/abs/1603.05027): the block of
Big Transfer, and the older one of the same authors (https://arxiv.org/abs/1512.03385), which ViT hybrids have.

For autograd a block is one node. It keeps what each norm reads and that one's statistics, and no normalized
activation: those are computed again in the backward pass, by the kernels that compute the norms' gradients.
That is about half of what a node per convolution and norm would keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitfast.ops.block_links import Convolution, Link
from bitfast.ops.derivatives import can_use_backward_kernel
from bitfast.ops.eager import is_unwatched, may_launch
from bitfast.ops.group_norm_act_contract import OP as NORM
from bitfast.ops.group_norm_act_gradients import NormSettings, Statistics
from bitfast.ops.residual_block_contract import (
    Computed,
    Drop,
    Form,
    Join,
    Kept,
    Needs,
    Outputs,
    Saved,
    Settings,
)
from bitfast.ops.residual_block_eager import (
    PreparedBlock,
    cut_saved,
    find_block,
    keep_block,
    key_of,
)
from bitfast.ops.residual_block_passes import composite, compute, differentiable, gradients
from bitfast.torch_state import is_transformed


def residual_block(
    form: Form,
    x: Tensor,
    residual: Tensor | None,
    moments: Tensor | None,
    drop: Drop | None,
    parameters: Sequence[Tensor],
    *,
    sums: bool,
) -> Computed:
    """Compute a block.

    What a preactivation block adds is best added by the norm that reads the sum next: the next block's.

    Args:
        form: What block it is.
        x: Shape (N, in, H, W), dense in one layout.
        residual: Added to x first; only for a block that begins with a norm. Like x.
        moments: Of the channels of x: see :func:`~bitfast.ops.norm_convolution.norm_convolution`. Not if there
            is a residual.
        drop: Stochastic depth, or None.
        parameters: Those of each link in order, its norm's weight and bias and its standardized filters, which
            have the dtype of x; then weight and bias of the join's norm, and of its shortcut's norm.
        sums: Whether branch and shortcut are to be added. They are where the form has a join.

    Returns:
        The branch, of shape (N, out, H', W'), and the shortcut, or their sum; like x in dtype and layout.
    """
    settings = Settings(form, sums or form.join is not None, 1.0 if drop is None else drop.keep)
    mask = None if drop is None else drop.mask
    if is_transformed():
        # Transforms and forward mode see into plain PyTorch only.
        read = x if residual is None else x + residual
        result, own = composite(settings, mask, read, parameters)
        return Computed(result, None if settings.sums else own, None)
    if torch.is_grad_enabled() and _any_requires_grad((x, residual, *parameters)):
        block, key = None, None
        if not settings.sums and may_launch(NORM, x):
            key = key_of(settings, x, residual, parameters)
            block = find_block(key, x, residual, parameters)
        if block is not None:
            branch, shortcut, total = _PreparedBlock.apply(
                settings, block, x, residual, mask, *parameters
            )
        else:
            branch, shortcut, total, moments = _ResidualBlock.apply(
                settings, key, x, residual, moments, mask, *parameters
            )
    else:
        (branch, shortcut, total, moments), _ = compute(
            settings, x, residual, moments, mask, parameters, keeps=False
        )
    if not settings.sums and shortcut is None:
        shortcut = x if total is None else total
    return Computed(branch, shortcut, moments)


def _any_requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)


# ---- autograd -------------------------------------------------------------------------------------


class _ResidualBlock(torch.autograd.Function):
    """A block as one node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        key: Any,
        x: Tensor,
        residual: Tensor | None,
        moments: Tensor | None,
        mask: Tensor | None,
        *parameters: Tensor,
    ) -> Outputs:
        """Return the outputs of :func:`compute`. With a key, prepare later calls if that can be done."""
        outputs, kept = compute(settings, x, residual, moments, mask, parameters, keeps=True)
        if key is not None:
            convolutions = [link.convolutions for link in settings.form.links]
            keep_block(key, convolutions, settings.keep, kept.maps, kept.statistics)
        ctx.settings, ctx.has_residual = settings, residual is not None
        # What the statistics are of is told apart from their tensors, which autograd may move elsewhere.
        ctx.origins = ["" if each is None else each.origin for each in kept.statistics]
        tensors = [each.tensors if each is not None else () for each in kept.statistics]
        ctx.counts = list(map(len, tensors))
        ctx.maps = len(kept.maps)
        ctx.shape = outputs[0].shape
        ctx.save_for_backward(
            *parameters, mask, kept.before, *kept.maps, *(t for each in tensors for t in each)
        )
        if outputs[3] is not None:
            ctx.mark_non_differentiable(outputs[3])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(
        ctx: Any,
        grad: Tensor | None,
        grad_shortcut: Tensor | None,
        grad_total: Tensor | None,
        _: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, residual and the parameters."""
        saved = Saved.of(ctx)
        first = saved.kept.maps[0]
        if grad is None:
            grad = first.new_zeros(ctx.shape)
        if ctx.settings.form.has_shortcut_convolution and not ctx.settings.sums:
            if grad_shortcut is None:
                grad_shortcut = first.new_zeros(ctx.shape)
        else:
            grad_shortcut = None
        if can_use_backward_kernel(grad, grad_shortcut, grad_total):
            grad_x, grads = gradients(
                ctx.settings, saved, grad, grad_shortcut, grad_total, Needs.of(ctx)
            )
        else:
            grad_x, grads = differentiable(ctx.settings, saved, grad, grad_shortcut, grad_total)
        return None, None, grad_x, grad_x if ctx.has_residual else None, None, None, *grads


class _PreparedBlock(torch.autograd.Function):
    """A prepared block as one node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        block: PreparedBlock,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the branch, the shortcut if it is not the input, and x + residual if there is one."""
        outputs, maps, statistics = block.forward(x, residual, mask, parameters)
        ctx.settings, ctx.block, ctx.shape = settings, block, outputs[0].shape
        ctx.has_residual = residual is not None
        ctx.save_for_backward(*parameters, mask, *maps, *statistics)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_shortcut: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, residual and the parameters."""
        settings, block = ctx.settings, ctx.block
        saved = cut_saved(block, ctx.saved_tensors)
        if grad is None:
            grad = saved.maps[0].new_zeros(ctx.shape)
        if not block.has_shortcut_convolution:
            grad_shortcut = None
        elif grad_shortcut is None:
            grad_shortcut = grad.new_zeros(ctx.shape)
        _, _, needs_x, needs_residual, _, *needs = ctx.needs_input_grad
        needs_input = needs_x or needs_residual
        grads = (grad, grad_shortcut, grad_total)
        can_use_kernels = can_use_backward_kernel(*grads)
        found = None
        if can_use_kernels and is_unwatched():
            found = block.gradients(saved, *grads, (needs_input, *needs))
        if found is None:
            origins = (link.norm for link in block.links)
            statistics = [
                Statistics(origin, (buffer,))
                for origin, buffer in zip(origins, saved.statistics, strict=True)
            ]
            kept = Kept(list(saved.maps), list(statistics), None)
            same = Saved(saved.parameters, saved.mask, kept)
            if can_use_kernels:
                found = gradients(settings, same, *grads, Needs(needs_input, tuple(needs)))
            else:
                found = differentiable(settings, same, *grads)
        grad_x, of_parameters = found
        return None, None, grad_x, grad_x if ctx.has_residual else None, None, *of_parameters


__all__ = [
    "Computed",
    "Convolution",
    "Drop",
    "Form",
    "Join",
    "Link",
    "NormSettings",
    "residual_block",
]
