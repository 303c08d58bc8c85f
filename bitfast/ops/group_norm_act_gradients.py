"""group_norm_act and its gradients without autograd, for nodes of autograd that compute more than a norm.

The gradients come with the result, computed again from the input and the statistics: so it need not be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitfast.backends import select_backend
from bitfast.memory_format import memory_format_of
from bitfast.ops import group_norm_act_eager as eager
from bitfast.ops.derivatives import call_without_autograd
from bitfast.ops.eager import may_launch
from bitfast.ops.group_norm_act_contract import OP
from bitfast.ops.norm_convolution import Norm


class NormSettings(NamedTuple):
    """The arguments of ``group_norm_act`` that are no tensors."""

    num_groups: int
    eps: float
    activation: str

    def of(self, parameters: Sequence[Tensor]) -> Norm:
        """Return the norm with this weight and bias."""
        weight, bias = parameters
        return Norm(weight, bias, self.num_groups, self.eps, self.activation)


class Statistics(NamedTuple):
    """The statistics of a norm's input.

    Attributes:
        origin: The prepared launches that computed them, in a buffer of their own; or the backend whose
            operator did. These compute the gradients too, whatever is demanded by then.
        tensors: That buffer; or the mean and 1/std, each of shape (N, num_groups).
    """

    origin: eager.PreparedCall | str
    tensors: tuple[Tensor, ...]

    @classmethod
    def of_operator(cls, backend: str, mean: Tensor, rstd: Tensor) -> Statistics:
        """Return statistics that a backend's operator has computed, or could have."""
        return cls(backend, (mean, rstd))


def forward(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    keeps_statistics: bool,
) -> tuple[Tensor, Tensor, Statistics | None]:
    """Return x (plus the residual), its norm, and the statistics if they are kept.

    Args:
        x, residual, norm: The arguments of ``add_group_norm_act``. The result has the dtype of x.
        keeps_statistics: Whether :func:`gradients` will be called.
    """
    call = None
    if may_launch(OP, x):
        call = eager.find_call(x, residual, *norm)
    if call is not None:
        total, result, buffer = call.forward(x, residual, norm.weight, norm.bias, keeps_statistics)
        return total, result, None if buffer is None else Statistics(call, (buffer,))
    backend = select_backend(OP, x.device.type, x.dtype, memory_format_of(x))
    operators = torch.ops.bitfast
    if residual is None:
        operator = getattr(operators.group_norm_act, backend)
        result, mean, rstd = call_without_autograd(operator, x, *norm)
        return x, result, Statistics.of_operator(backend, mean, rstd)
    operator = getattr(operators.add_group_norm_act, backend)
    total, result, mean, rstd = call_without_autograd(operator, x, residual, *norm)
    return total, result, Statistics.of_operator(backend, mean, rstd)


def gradients(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    norm: Norm,
    statistics: Statistics,
    recomputes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, weight and bias, and the norm's result if ``recomputes``.

    Args:
        grad: The gradient of the result.
        grad_total: The gradient that reached x in another way, which is added; or None.
        x: What was normalized: ``total`` of :func:`forward`.
        norm, statistics: As in :func:`forward`.
        recomputes: Whether to compute the result again.
    """
    origin = statistics.origin
    if not isinstance(origin, str):
        return origin.gradients(
            (x, norm.weight, norm.bias, *statistics.tensors), grad, grad_total, recomputes
        )
    operators = torch.ops.bitfast
    overloads = (
        operators.group_norm_act_recompute if recomputes else operators.group_norm_act_backward
    )
    found = call_without_autograd(
        getattr(overloads, origin), grad, grad_total, x, norm.weight, norm.bias,
        *statistics.tensors, norm.num_groups, norm.activation,
    )  # fmt: skip
    return found if recomputes else (*found, None)


__all__ = ["NormSettings", "Statistics", "forward", "gradients"]
