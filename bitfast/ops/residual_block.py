"""A residual block of convolutions and norms as one differentiable op.

He et al., "Identity Mappings in Deep Residual Networks", 2016 (https://arxiv.org/abs/1603.05027): the block of
Big Transfer, and the older one of the same authors (https://arxiv.org/abs/1512.03385), which ViT hybrids have.

For autograd a block is one node. It keeps what each norm reads and that one's statistics, and no normalized
activation: those are computed again in the backward pass, by the kernels that compute the norms' gradients.
That is about half of what a node per convolution and norm would keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitfast import reference
from bitfast.activations import ACTIVATION_GRADIENTS, ACTIVATIONS
from bitfast.memory_format import laid_out, memory_format_of
from bitfast.ops import block_links as links
from bitfast.ops import group_norm_act_gradients as norms
from bitfast.ops.block_links import Convolution, Link, Parameters, Wanted
from bitfast.ops.derivatives import can_use_backward_kernel, differentiable_gradients
from bitfast.ops.eager import is_unwatched, may_launch
from bitfast.ops.group_norm_act_contract import OP as NORM
from bitfast.ops.group_norm_act_gradients import NormSettings, Statistics
from bitfast.ops.residual_block_eager import (
    PreparedBlock,
    cut_saved,
    find_block,
    keep_block,
    key_of,
)
from bitfast.torch_state import is_dispatch_watched, is_transformed


class Join(NamedTuple):
    """How the block of ViT hybrids ends: ``activation(norm(branch) + shortcut)``.

    Attributes:
        norm: Of the branch; without an activation.
        shortcut_norm: Of the shortcut, if that is a convolution with a norm.
        activation: Of the sum.
    """

    norm: NormSettings
    shortcut_norm: NormSettings | None
    activation: str


class Form(NamedTuple):
    """What determines a block besides its parameters.

    Attributes:
        links: In order. A second convolution of the first computes the shortcut, which is else the input.
        join: None: the branch is added to the shortcut.
    """

    links: tuple[Link, ...]
    join: Join | None = None

    @property
    def has_shortcut_convolution(self) -> bool:
        """Whether a convolution computes the shortcut."""
        return len(self.links[0].convolutions) > 1

    def cut(self, parameters: Sequence[Any]) -> tuple[list[Parameters], tuple[Any, ...]]:
        """Share values, one for each parameter, out to the links; those of the join's norms are left."""
        values = iter(parameters)
        shares = [
            Parameters(_take(values, 0 if link.norm is None else 2), _take(values, len(link.convolutions)))
            for link in self.links
        ]  # fmt: skip
        return shares, tuple(values)


def _take(values: Iterator[Any], count: int) -> tuple[Any, ...]:
    return tuple(next(values) for _ in range(count))


class Drop(NamedTuple):
    """Stochastic depth: the branch is divided by ``keep``, then multiplied by ``mask``, (N, 1, 1, 1)."""

    keep: float
    mask: Tensor


class Computed(NamedTuple):
    """What a block returns.

    Attributes:
        branch: The branch, still to be added to the shortcut; or the block's result.
        shortcut: None: ``branch`` is the block's result.
        moments: Of the channels of the block's result, if they are known.
    """

    branch: Tensor
    shortcut: Tensor | None
    moments: Tensor | None


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
    settings = _Settings(form, sums or form.join is not None, 1.0 if drop is None else drop.keep)
    mask = None if drop is None else drop.mask
    if is_transformed():
        # Transforms and forward mode see into plain PyTorch only.
        read = x if residual is None else x + residual
        result, own = _composite(settings, mask, read, parameters)
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
        (branch, shortcut, total, moments), _ = _compute(
            settings, x, residual, moments, mask, parameters, keeps=False
        )
    if not settings.sums and shortcut is None:
        shortcut = x if total is None else total
    return Computed(branch, shortcut, moments)


def _any_requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)


# ---- forward --------------------------------------------------------------------------------------


class _Settings(NamedTuple):
    form: Form
    sums: bool
    keep: float


class _Kept(NamedTuple):
    """What the backward pass reads, besides the inputs.

    Attributes:
        maps: What each link's norm reads; with a join what its norms read.
        statistics: Of these maps.
        before: What the gradient of the join's activation is computed from.
    """

    maps: list[Tensor]
    statistics: list[Statistics | None]
    before: Tensor | None


_Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""The branch or the result; the shortcut if a convolution computes it and nobody has added it; x + residual;
moments."""


def _compute(
    settings: _Settings,
    x: Tensor,
    residual: Tensor | None,
    moments: Tensor | None,
    mask: Tensor | None,
    parameters: Sequence[Tensor],
    keeps: bool,
) -> tuple[_Outputs, _Kept]:
    form = settings.form
    shares, of_join = form.cut(parameters)
    kept = _Kept([], [], None)
    shortcut: Tensor | None = None
    value, total = x, None
    # A shortcut that is added to the branch as it is can be added by the last convolution.
    last = len(form.links) - 1 if settings.sums and form.join is None and mask is None else None
    for number, (link, share) in enumerate(zip(form.links, shares, strict=True)):
        is_first = number == 0
        made = links.forward(
            link, share, value, residual if is_first else None, moments,
            shortcut if number == last else None, keeps_statistics=keeps,
        )  # fmt: skip
        if is_first:
            total = made.total
            shortcut = made.outputs[1] if form.has_shortcut_convolution else total
        kept.maps.append(made.total)
        kept.statistics.append(made.statistics)
        value, moments = made.outputs[0], made.moments
    assert shortcut is not None
    if form.join is not None:
        result, kept = _join(form, kept, value, shortcut, settings.keep, mask, of_join, keeps)
        return (result, None, None, None), kept
    branch = value
    if mask is not None:
        branch, moments = _dropped(branch, settings.keep, mask), None
    new_total = None if residual is None else total
    if settings.sums:
        if last is None:
            branch = links.added_to(branch, shortcut)
        return (branch, None, new_total, moments), kept
    own = shortcut if form.has_shortcut_convolution else None
    return (branch, own, new_total, None), kept


def _join(
    form: Form,
    kept: _Kept,
    branch: Tensor,
    shortcut: Tensor,
    keep: float,
    mask: Tensor | None,
    parameters: Sequence[Tensor],
    keeps: bool,
) -> tuple[Tensor, _Kept]:
    """Return the result of a block with a join, and what is kept with the join's part."""
    join = form.join
    assert join is not None
    kept.maps.append(branch)
    _, branch, statistics = norms.forward(branch, None, join.norm.of(parameters[:2]), keeps)
    kept.statistics.append(statistics)
    if join.shortcut_norm is not None:
        kept.maps.append(shortcut)
        _, shortcut, statistics = norms.forward(
            shortcut, None, join.shortcut_norm.of(parameters[2:]), keeps
        )
        kept.statistics.append(statistics)
    if mask is not None:
        branch = _dropped(branch, keep, mask)
    total = links.added_to(branch, shortcut)
    overwrites = join.activation == "relu" and not is_dispatch_watched()
    result = total.relu_() if overwrites else ACTIVATIONS[join.activation](total)
    # The gradient of ReLU can be told from its result, which the next block keeps too.
    before = {"none": None, "relu": result}.get(join.activation, total)
    return result, kept._replace(before=before)


def _dropped(branch: Tensor, keep: float | None, mask: Tensor) -> Tensor:
    if is_dispatch_watched():  # see links.added_to
        return branch.div(keep).mul(mask)
    return branch.div_(keep).mul_(mask)


# ---- autograd -------------------------------------------------------------------------------------


class _ResidualBlock(torch.autograd.Function):
    """A block as one node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        key: Any,
        x: Tensor,
        residual: Tensor | None,
        moments: Tensor | None,
        mask: Tensor | None,
        *parameters: Tensor,
    ) -> _Outputs:
        """Return the outputs of :func:`_compute`. With a key, prepare later calls if that can be done."""
        outputs, kept = _compute(settings, x, residual, moments, mask, parameters, keeps=True)
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
        saved = _Saved.of(ctx)
        first = saved.kept.maps[0]
        if grad is None:
            grad = first.new_zeros(ctx.shape)
        if ctx.settings.form.has_shortcut_convolution and not ctx.settings.sums:
            if grad_shortcut is None:
                grad_shortcut = first.new_zeros(ctx.shape)
        else:
            grad_shortcut = None
        if can_use_backward_kernel(grad, grad_shortcut, grad_total):
            grad_x, grads = _gradients(
                ctx.settings, saved, grad, grad_shortcut, grad_total, _Needs.of(ctx)
            )
        else:
            grad_x, grads = _differentiable(ctx.settings, saved, grad, grad_shortcut, grad_total)
        return None, None, grad_x, grad_x if ctx.has_residual else None, None, None, *grads


class _PreparedBlock(torch.autograd.Function):
    """A prepared block as one node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
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
            kept = _Kept(list(saved.maps), list(statistics), None)
            same = _Saved(saved.parameters, saved.mask, kept)
            if can_use_kernels:
                found = _gradients(settings, same, *grads, _Needs(needs_input, tuple(needs)))
            else:
                found = _differentiable(settings, same, *grads)
        grad_x, of_parameters = found
        return None, None, grad_x, grad_x if ctx.has_residual else None, None, *of_parameters


class _Saved(NamedTuple):
    """What a node has kept."""

    parameters: tuple[Tensor, ...]
    mask: Tensor | None
    kept: _Kept

    @classmethod
    def of(cls, ctx: Any) -> _Saved:
        # Once: whoever recomputes or moves what is saved does so each time it is asked for.
        saved = ctx.saved_tensors
        tensors = iter(saved)
        parameters = _take(tensors, len(saved) - 2 - ctx.maps - sum(ctx.counts))
        mask, before = next(tensors), next(tensors)
        maps = [next(tensors) for _ in range(ctx.maps)]
        statistics = [
            Statistics(origin, _take(tensors, count)) if count else None
            for origin, count in zip(ctx.origins, ctx.counts, strict=True)
        ]
        return cls(parameters, mask, _Kept(maps, statistics, before))


class _Needs(NamedTuple):
    """Which gradients a node is asked for."""

    input: bool
    parameters: tuple[bool, ...]

    @classmethod
    def of(cls, ctx: Any) -> _Needs:
        _, _, x, residual, _, _, *parameters = ctx.needs_input_grad
        return cls(x or residual, tuple(parameters))


def _gradients(
    settings: _Settings,
    saved: _Saved,
    grad: Tensor,
    grad_shortcut: Tensor | None,
    grad_total: Tensor | None,
    needs: _Needs,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of the block's input and of its parameters, by kernels."""
    form, kept = settings.form, saved.kept
    shares, of_join = form.cut(saved.parameters)
    needed, _ = form.cut(needs.parameters)
    layout = memory_format_of(kept.maps[0])
    grad = laid_out(grad, layout)
    if grad_shortcut is not None:
        grad_shortcut = laid_out(grad_shortcut, layout)
    if grad_total is not None:
        grad_total = laid_out(grad_total, layout)
    grads_of_join: list[Tensor | None] = []
    if form.join is not None:
        grad, grad_shortcut, grads_of_join = _join_gradients(settings, saved, of_join, grad)
    else:
        if settings.sums:
            grad_shortcut = grad
        if saved.mask is not None:
            grad = (grad * saved.mask).div_(settings.keep)
    if not form.has_shortcut_convolution and grad_shortcut is not None:
        # What the shortcut is: the block's input.
        grad_total = grad_shortcut if grad_total is None else grad_total + grad_shortcut
    reached = needs.input
    reach = []
    for need in needed:
        reach.append(reached)
        # The gradient of a second convolution, the shortcut's, comes from elsewhere.
        reached = reached or any((*need.norm, *need.filters[:1]))
    grads: list[Tensor | None] = []
    grad_input: Tensor | None = grad
    for number in reversed(range(len(form.links))):
        need = needed[number]
        wanted = Wanted(reach[number], any(need.norm), need.filters)
        if grad_input is None and not any(need.filters[1:]):
            grads[:0] = [None] * (len(need.norm) + len(need.filters))
            continue
        outer = [grad_input]
        if len(form.links[number].convolutions) > 1:
            assert grad_shortcut is not None
            outer.append(grad_shortcut)
        grad_input, of_norm, of_filters = links.gradients(
            form.links[number], shares[number], kept.maps[number], kept.statistics[number], outer,
            grad_total if number == 0 else None, wanted,
        )  # fmt: skip
        if not reach[number]:
            grad_input = None
        grads[:0] = [*of_norm, *of_filters]
    return grad_input, [*grads, *grads_of_join]


def _join_gradients(
    settings: _Settings, saved: _Saved, parameters: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return the gradients of branch and shortcut before their norms, and of these norms' parameters."""
    form, kept = settings.form, saved.kept
    join = form.join
    assert join is not None
    if kept.before is not None:
        grad = ACTIVATION_GRADIENTS[join.activation](grad, kept.before)
    grad_shortcut = grad
    if saved.mask is not None:
        grad = (grad * saved.mask).div_(settings.keep)
    place = len(form.links)
    grads: list[Tensor | None] = []

    def through(norm: NormSettings, place: int, grad: Tensor, pair: Sequence[Tensor]) -> Tensor:
        statistics = kept.statistics[place]
        assert statistics is not None
        grad_x, *others, _ = norms.gradients(
            grad, None, kept.maps[place], norm.of(pair), statistics, False
        )
        grads.extend(others)
        return grad_x

    grad = through(join.norm, place, grad, parameters[:2])
    if join.shortcut_norm is not None:
        grad_shortcut = through(join.shortcut_norm, place + 1, grad_shortcut, parameters[2:])
    return grad, grad_shortcut, grads


# ---- other derivatives ----------------------------------------------------------------------------


def _differentiable(
    settings: _Settings,
    saved: _Saved,
    grad: Tensor,
    grad_shortcut: Tensor | None,
    grad_total: Tensor | None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return what :func:`_gradients` does, itself differentiable."""

    def composite(x: Tensor, *parameters: Tensor) -> list[Tensor]:
        result, shortcut = _composite(settings, saved.mask, x, parameters)
        return [result] if grad_shortcut is None else [result, shortcut]

    given = [grad] if grad_shortcut is None else [grad, grad_shortcut]
    inputs = (saved.kept.maps[0], *saved.parameters)
    grad_x, *grads = differentiable_gradients(composite, inputs, given)
    if grad_x is not None and grad_total is not None:
        grad_x = grad_x + grad_total
    return grad_x, grads


def _composite(
    settings: _Settings, mask: Tensor | None, x: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Compute the branch (or the result) and the shortcut from what the first norm reads, in plain PyTorch."""
    form = settings.form
    shares, of_join = form.cut(parameters)
    branch, shortcut = x, x
    for link, share in zip(form.links, shares, strict=True):
        outputs = links.composite(link, share, branch)
        branch = outputs[0]
        shortcut = outputs[1] if len(outputs) > 1 else shortcut
    join = form.join
    if join is not None:
        branch = reference.group_norm_act_forward(branch, *join.norm.of(of_join[:2]))[0]
        if join.shortcut_norm is not None:
            norm = join.shortcut_norm.of(of_join[2:])
            shortcut = reference.group_norm_act_forward(shortcut, *norm)[0]
    if mask is not None:
        branch = branch.div(settings.keep) * mask
    if join is not None:
        return ACTIVATIONS[join.activation](branch + shortcut), shortcut
    return (branch + shortcut if settings.sums else branch), shortcut


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
