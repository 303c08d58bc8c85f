"""A residual block's forward pass and its gradients, without autograd."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bitfast import reference
from bitfast.activations import ACTIVATION_GRADIENTS, ACTIVATIONS
from bitfast.memory_format import laid_out, memory_format_of
from bitfast.ops import block_links as links
from bitfast.ops import group_norm_act_gradients as norms
from bitfast.ops.block_links import Wanted
from bitfast.ops.derivatives import differentiable_gradients
from bitfast.ops.group_norm_act_gradients import NormSettings
from bitfast.ops.residual_block_contract import Form, Kept, Needs, Outputs, Saved, Settings
from bitfast.torch_state import is_dispatch_watched

# ---- forward --------------------------------------------------------------------------------------


def compute(
    settings: Settings,
    x: Tensor,
    residual: Tensor | None,
    moments: Tensor | None,
    mask: Tensor | None,
    parameters: Sequence[Tensor],
    keeps: bool,
) -> tuple[Outputs, Kept]:
    """Return what a block computes, and what its backward pass reads if ``keeps``.

    Args:
        settings: Of the block.
        x, residual, moments, parameters: As :func:`~bitfast.ops.residual_block.residual_block` takes them.
        mask: Of stochastic depth, or None.
        keeps: Whether there is a backward pass.
    """
    form = settings.form
    shares, of_join = form.cut(parameters)
    kept = Kept([], [], None)
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
    kept: Kept,
    branch: Tensor,
    shortcut: Tensor,
    keep: float,
    mask: Tensor | None,
    parameters: Sequence[Tensor],
    keeps: bool,
) -> tuple[Tensor, Kept]:
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


def _dropped(branch: Tensor, keep: float, mask: Tensor) -> Tensor:
    if is_dispatch_watched():  # see links.added_to
        return branch.div(keep).mul(mask)
    return branch.div_(keep).mul_(mask)


# ---- gradients ------------------------------------------------------------------------------------


def gradients(
    settings: Settings,
    saved: Saved,
    grad: Tensor,
    grad_shortcut: Tensor | None,
    grad_total: Tensor | None,
    needs: Needs,
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
        grad, grad_shortcut, grads_of_join = _gradients_of_join(settings, saved, of_join, grad)
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


def _gradients_of_join(
    settings: Settings, saved: Saved, parameters: Sequence[Tensor], grad: Tensor
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


def differentiable(
    settings: Settings,
    saved: Saved,
    grad: Tensor,
    grad_shortcut: Tensor | None,
    grad_total: Tensor | None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return what :func:`gradients` does, itself differentiable."""

    def in_plain_pytorch(x: Tensor, *parameters: Tensor) -> list[Tensor]:
        result, shortcut = composite(settings, saved.mask, x, parameters)
        return [result] if grad_shortcut is None else [result, shortcut]

    given = [grad] if grad_shortcut is None else [grad, grad_shortcut]
    inputs = (saved.kept.maps[0], *saved.parameters)
    grad_x, *grads = differentiable_gradients(in_plain_pytorch, inputs, given)
    if grad_x is not None and grad_total is not None:
        grad_x = grad_x + grad_total
    return grad_x, grads


def composite(
    settings: Settings, mask: Tensor | None, x: Tensor, parameters: Sequence[Tensor]
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


__all__ = ["composite", "compute", "differentiable", "gradients"]
