"""A network's steps computed one op after the other: differentiable, traceable, on any device and backend.

Networks are trained this way, and use it in inference where no plan can be made. A residual is added together
with the norm that comes next, so that the sum is written once and read once.
"""

from __future__ import annotations

from collections.abc import Callable, Container

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitfast.activations import activation_name
from bitfast.blocks import add_to_shortcut
from bitfast.execution.steps import (
    IMAGES,
    CallModule,
    Convolve,
    Join,
    Normalize,
    Pool,
    Step,
    Steps,
    ZeroPad,
    last_reads,
    normalized,
)
from bitfast.execution.weights import Weights
from bitfast.layers import GroupNormActivation
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act
from bitfast.torch_state import is_concrete

Layout = Callable[[Tensor], Tensor]
"""Returns a tensor in another memory format."""


def compute(
    steps: Steps,
    images: Tensor,
    weights: Weights,
    wanted: Container[int],
    replaced: Layout | None = None,
    source: int = IMAGES,
) -> tuple[list[Tensor], Tensor]:
    """Compute a network.

    Args:
        steps: Of the network.
        images: (N, num_channels, H, W), in the layout to compute in.
        weights: The standardized weights that are there already.
        wanted: The numbers of the stages (0 is the stem) whose outputs to return.
        replaced: Applied to each wanted output. The next step reads what it returns, in the layout to compute
            in. None: the outputs are returned as they are.
        source: The number of the value that ``images`` stand for, if the steps do not begin with the images.

    Returns:
        The wanted outputs, in order, and the result.
    """
    outputs: list[Tensor] = []
    wanted_values = [value for number, value in enumerate(steps.outputs) if number in wanted]
    values: dict[int, Tensor] = {source: images}
    sequence = steps.all()
    for step, dead in zip(sequence, last_reads(sequence, {steps.result}), strict=True):
        _compute_step(step, values, weights)
        for value in dead:
            values.pop(value, None)
        times = wanted_values.count(step.result)  # a stage without blocks returns its input
        if times:
            x = values[step.result]
            outer = x if replaced is None else replaced(x)
            outputs += [outer] * times
            if replaced is not None:  # so that gradients with respect to the output exist
                values[step.result] = _laid_out_like(x, outer)
    return outputs, values[steps.result]


def _laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """Return ``other`` in the layout of x."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return other.contiguous(memory_format=torch.channels_last)
    return other


def _compute_step(step: Step, values: dict[int, Tensor], weights: Weights) -> None:
    if isinstance(step, Convolve):
        _convolve(step, values, weights)
    elif isinstance(step, Normalize):
        values[step.result] = _normalized(step.source, step.norm, values)
    elif isinstance(step, Join):
        branch = _through(step.drop_path, _norm(step.norm, values[step.source]))
        values[step.result] = step.activation(add_to_shortcut(branch, values[step.shortcut]))
    elif isinstance(step, Pool):
        values[step.result] = step.pooler.with_zeros(values[step.source], step.zeros)
    elif isinstance(step, ZeroPad):
        values[step.result] = F.pad(values[step.source], (step.zeros,) * 4)
    else:
        values[step.result] = _call(step, values[step.source])


def _convolve(step: Convolve, values: dict[int, Tensor], weights: Weights) -> None:
    convolution = step.convolution
    x = values[step.source] if step.norm is None else _normalized(step.source, step.norm, values)
    if convolution.pad is not None:
        x = convolution.pad(x)
    weight = weights.get(convolution)
    if weight is None:
        weight = convolution.filters()
    branch = convolution._conv_forward(x, weight, None)
    if step.shortcut is None:
        values[step.result] = branch
        return
    branch, shortcut = _through(step.drop_path, branch), values[step.shortcut]
    if step.then is None or _may_differ(branch, shortcut):
        values[step.result] = add_to_shortcut(branch, shortcut)
    else:
        total, following = add_group_norm_act(branch, shortcut, *_arguments(step.then))
        values[step.result], values[normalized(step.result)] = total, following


def _may_differ(branch: Tensor, shortcut: Tensor) -> bool:
    """Whether branch and shortcut differ in shape, because somebody has changed a convolution."""
    return (
        is_concrete(branch) and not torch.compiler.is_compiling() and branch.shape != shortcut.shape
    )


def _normalized(source: int, norm: GroupNormActivation, values: dict[int, Tensor]) -> Tensor:
    """Return the normalized value, which another step may have computed already."""
    place = normalized(source)
    if place not in values:
        values[place] = _norm(norm, values[source])
    return values[place]


def _norm(norm: GroupNormActivation, x: Tensor) -> Tensor:
    return group_norm_act(x, *_arguments(norm))


def _arguments(norm: GroupNormActivation) -> tuple[Tensor, Tensor, int, float, str]:
    name = activation_name(norm.activation)
    assert name is not None
    return norm.weight, norm.bias, norm.num_groups, norm.eps, name


def _through(drop_path: nn.Module | None, branch: Tensor) -> Tensor:
    is_idle = drop_path is None or type(drop_path) is nn.Identity
    return branch if is_idle else drop_path(branch)  # type: ignore[misc]


def _call(step: CallModule, x: Tensor) -> Tensor:
    if step.options is None:
        return step.module(x)
    return checkpoint(step.module, x, **step.options)


__all__ = ["compute"]
