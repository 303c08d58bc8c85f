"""A residual block as one operator of a compiled program, and its gradients as another.

On the CPU a compiler does not see into the kernels: of a block's parts it would make torch's own convolutions,
and write every normalized map. So there a compiled step of training runs what an eager one runs, as
:mod:`bitfast.ops.residual_block` has it. On a GPU the compiler is shown the parts, and fuses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from bitfast.ops import residual_block_passes as passes
from bitfast.ops.block_links import size_after
from bitfast.ops.common import autocast_dtype, define_operator
from bitfast.ops.derivatives import (
    call_without_autograd,
    connect_derivatives,
    refuse_derivatives,
)
from bitfast.ops.group_norm_act_gradients import Statistics
from bitfast.ops.norm_convolution import has_kernel_for, may_train
from bitfast.ops.residual_block_contract import (
    Computed,
    Drop,
    Form,
    Kept,
    Needs,
    Saved,
    Settings,
)
from bitfast.ops.residual_block_form import form_of, text_of

OP = "residual_block"
BACKWARD_OP = f"{OP}_backward"

SIGNATURE = (
    "(Tensor x, Tensor? moments, Tensor? mask, Tensor[] parameters, str form, float keep, bool keeps)"
    " -> Tensor[]"
)
"""Takes what :func:`~bitfast.ops.residual_block.residual_block` does, without a residual; ``mask`` and ``keep``
are those of stochastic depth. Returns the result, its moments (of 0 images where they are not known) and, if
``keeps``, what the backward pass reads: what each norm reads, but for x; the mean and 1/std of that; and what
the join's activation reads, unless that is ReLU. All maps are channels_last."""

BACKWARD_SIGNATURE = (
    "(Tensor grad, Tensor x, Tensor? mask, Tensor[] parameters, Tensor? result, Tensor[] kept, str form,"
    " float keep, bool wants_input, bool[] wanted) -> Tensor[]"
)
"""Takes the gradient of the result, and what the forward operator took, kept and returned; ``result`` where the
join's activation is ReLU. Returns the gradient of x if it is wanted, and of the parameters those that are, each
like its parameter."""


def is_one_operator(x: Tensor) -> bool:
    """Whether a compiler that traces the call is to see a block as one operator.

    It is where a program for this machine's CPU is made, with the kernels for convolutions that normalize what
    they read. A program to export stays as it is written, so that it runs without bitfast.
    """
    return (
        torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and may_train("cpu", autocast_dtype(x) or x.dtype)
    )


def residual_block_operator(
    form: Form,
    x: Tensor,
    moments: Tensor | None,
    drop: Drop | None,
    parameters: Sequence[Tensor],
) -> Computed:
    """Compute a block by the operator. Arguments and result as in ``residual_block`` without a residual."""
    keeps = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
    mask, keep = (None, 1.0) if drop is None else (drop.mask, drop.keep)
    outputs = torch.ops.bitfast.residual_block.native(
        x, moments, mask, list(parameters), text_of(form), keep, keeps
    )
    known = _knows_moments(form, mask, parameters, x.dtype)
    return Computed(outputs[0], None, outputs[1] if known else None)


# ---- what the operators take and return -------------------------------------------------------------


def _knows_moments(
    form: Form, mask: Tensor | None, parameters: Sequence[Tensor], dtype: torch.dtype
) -> bool:
    """Whether the moments of the result are known, whatever the size of the images."""
    shares, _ = form.cut(parameters)
    (filters, *_), (convolution, *_) = shares[-1].filters, form.links[-1].convolutions
    return (
        form.join is None
        and mask is None
        and convolution.window is None
        and tuple(filters.shape[2:]) == (1, 1)
        and has_kernel_for(filters.shape, convolution.geometry, dtype, (1, 1))
    )


def _norms(form: Form) -> list[int | None]:
    """Return the number of groups of each norm, in order; None for a link without a norm."""
    groups = [None if link.norm is None else link.norm.num_groups for link in form.links]
    if form.join is not None:
        groups.append(form.join.norm.num_groups)
        if form.join.shortcut_norm is not None:
            groups.append(form.join.shortcut_norm.num_groups)
    return groups


def _reads_result(form: Form) -> bool:
    """Whether the gradient of the join's activation is computed from the block's result."""
    return form.join is not None and form.join.activation == "relu"


def _keeps_sum(form: Form) -> bool:
    """Whether what the join's activation reads is kept."""
    return form.join is not None and form.join.activation not in ("none", "relu")


def _with_strides(x: Tensor, strides: Sequence[int]) -> Tensor:
    """Return x with these strides, by a copy only if its elements lie in another order."""
    if x.stride() == tuple(strides):
        return x
    places = zip(x.shape, x.stride(), strides, strict=True)
    if all(size == 1 or ours == theirs for size, ours, theirs in places):
        return x.as_strided(x.shape, strides)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _in_channels_last(x: Tensor) -> Tensor:
    _, channels, height, width = x.shape
    strides = channels * height * width, 1, channels * width, channels
    return _with_strides(x, strides)


# ---- forward ----------------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    moments: Tensor | None,
    mask: Tensor | None,
    parameters: Sequence[Tensor],
    text: str,
    keep: float,
    keeps: bool,
) -> list[Tensor]:
    form = form_of(text)
    with torch.no_grad():
        (result, _, _, found), kept = passes.compute(
            Settings(form, True, keep), x, None, moments, mask, parameters, keeps=keeps
        )
        result = _in_channels_last(result)
        if not _knows_moments(form, mask, parameters, x.dtype):
            found = result.new_empty((2, 0, result.shape[1]), dtype=torch.float64)
        elif found is None:
            found = call_without_autograd(torch.ops.bitfast.channel_moments.native, result)
        if not keeps:
            return [result, found]
        statistics = [t for each in kept.statistics if each is not None for t in each.tensors]
        before = [kept.before] if _keeps_sum(form) and kept.before is not None else []
        maps = list(map(_in_channels_last, [*kept.maps[1:], *before]))
    count = len(kept.maps) - 1
    return [result, found, *maps[:count], *statistics, *maps[count:]]


def _fake(
    x: Tensor,
    moments: Tensor | None,
    mask: Tensor | None,
    parameters: Sequence[Tensor],
    text: str,
    keep: float,
    keeps: bool,
) -> list[Tensor]:
    form = form_of(text)
    maps = [
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for shape in _shapes(form, x.shape, parameters)
    ]
    result = torch.empty_like(maps.pop(0))
    images = x.shape[0] if _knows_moments(form, mask, parameters, x.dtype) else 0
    found = x.new_empty((2, images, result.shape[1]), dtype=torch.float64)
    if not keeps:
        return [result, found]
    statistics = [
        x.new_empty((x.shape[0], groups), dtype=torch.float32)
        for groups in _norms(form)
        if groups is not None
        for _ in range(2)
    ]
    before = [torch.empty_like(result)] if _keeps_sum(form) else []
    return [result, found, *maps, *statistics, *before]


def _shapes(
    form: Form, shape: Sequence[int], parameters: Sequence[Tensor]
) -> list[tuple[int, ...]]:
    """Return the shape of the result, and of what each norm reads but the first link's."""
    images, _, *rest = shape
    size = tuple(rest)
    shares, _ = form.cut(parameters)
    shapes: list[tuple[int, ...]] = []
    shortcut: tuple[int, ...] = ()
    for link, share in zip(form.links, shares, strict=True):
        made = [
            (images, filters.shape[0], *size_after(convolution, filters.shape[2:], size))
            for convolution, filters in zip(link.convolutions, share.filters, strict=True)
        ]
        size = made[0][2:]
        shapes.append(made[0])
        shortcut = made[1] if len(made) > 1 else shortcut
    result = shapes[-1]
    if form.join is None:
        shapes.pop()
    elif form.join.shortcut_norm is not None:
        shapes.append(shortcut)
    return [result, *shapes]


# ---- backward ---------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, _, mask, parameters, ctx.form, ctx.keep, _ = inputs
    result, *others = output
    ctx.parameters = len(parameters)
    ctx.result_shape = result.shape
    saved = result if _reads_result(form_of(ctx.form)) else None
    ctx.save_for_backward(x, mask, saved, *parameters, *others[1:])
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


def _run_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, mask, result, *others = ctx.saved_tensors
    parameters, kept = others[: ctx.parameters], others[ctx.parameters :]
    wants_input, _, _, wanted, *_ = ctx.needs_input_grad
    grad = grads[0]
    found: list[Tensor] = []
    if grad is None:  # nobody reads the result
        wants_input, wanted = False, [False] * len(parameters)
    else:
        found = torch.ops.bitfast.residual_block_backward.native(
            grad, x, mask, parameters, result, kept, ctx.form, ctx.keep, wants_input, list(wanted)
        )
    given = iter(found)
    grad_x = next(given) if wants_input else None
    of_parameters = [next(given) if is_wanted else None for is_wanted in wanted]
    return grad_x, None, None, of_parameters, None, None, None


def _backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    parameters: Sequence[Tensor],
    result: Tensor | None,
    kept: Sequence[Tensor],
    text: str,
    keep: float,
    wants_input: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    form = form_of(text)
    norms = _norms(form)
    given = iter(kept)
    maps = [x, *(next(given) for _ in norms[1:])]
    statistics = [
        None if groups is None else Statistics.of_operator("native", next(given), next(given))
        for groups in norms
    ]
    before = next(given) if _keeps_sum(form) else result
    saved = Saved(tuple(parameters), mask, Kept(maps, statistics, before))
    needs = Needs(wants_input, tuple(wanted))
    with torch.no_grad():
        grad_x, grads = passes.gradients(Settings(form, True, keep), saved, grad, None, None, needs)
    found = []
    if wants_input:
        assert grad_x is not None
        found.append(_in_channels_last(grad_x))
    for gradient, parameter, is_wanted in zip(grads, parameters, wanted, strict=True):
        if is_wanted:
            assert gradient is not None
            found.append(
                _with_strides(gradient, torch.empty_like(parameter, device="meta").stride())
            )
    return found


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    parameters: Sequence[Tensor],
    result: Tensor | None,
    kept: Sequence[Tensor],
    text: str,
    keep: float,
    wants_input: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    form_of(text)
    of_input = [torch.empty_like(x, memory_format=torch.channels_last)] if wants_input else []
    of_parameters = [
        torch.empty_like(parameter)
        for parameter, is_wanted in zip(parameters, wanted, strict=True)
        if is_wanted
    ]
    return [*of_input, *of_parameters]


def _refuse_transforms(*_: Any) -> NoReturn:
    raise NotImplementedError(
        "bitfast.residual_block.native has no derivative under function transforms (torch.func, vmap) and in"
        " forward mode; call the model itself, which can be transformed, not a program compiled from it"
    )


# ---- the operators ----------------------------------------------------------------------------------

define_operator(OP, "native", SIGNATURE, _forward, _fake)
define_operator(BACKWARD_OP, "native", BACKWARD_SIGNATURE, _backward, _fake_backward)
connect_derivatives(OP, "native", _setup_context, _run_backward, _refuse_transforms)
refuse_derivatives(BACKWARD_OP, "native")

__all__ = ["is_one_operator", "residual_block_operator"]
