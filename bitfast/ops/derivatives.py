"""Derivatives of the operators: kernels for first-order gradients, plain PyTorch for everything else.

A *composite* computes what an operator computes, in plain PyTorch. It stands in for the operator under
function transforms (``torch.func``), in forward mode, and where a gradient is differentiated again, so that all
of these are right to any order and in any combination. An operator without derivatives raises when one is asked
for, and never returns zeros instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from bitfast.ops.common import LIBRARY
from bitfast.torch_state import is_transformed

FUNCTION_TRANSFORMS = "FuncTorchDynamicLayerFrontMode"
"""The dispatch key of operator calls under function transforms. Other calls never pass it: what is registered
there costs them nothing."""


class _KernelOfAutograd:
    """Stands in for a library in ``torch.library.register_autograd``, to catch the kernel that it makes."""

    def impl(self, name: str, kernel: Callable[..., Any], key: str, with_keyset: bool) -> None:
        self.kernel = kernel


def connect_derivatives(
    name: str,
    backend: str,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    composite: Callable[..., Any],
) -> None:
    """Make ``bitfast::<name>.<backend>`` differentiable.

    Args:
        setup_context, backward: As in ``torch.library.register_autograd``. The backward must be differentiable
            itself where :func:`can_use_backward_kernel` is false.
        composite: Computes what the operator computes, in plain PyTorch, from the same arguments.
    """
    made = _KernelOfAutograd()
    qualified_name = f"bitfast::{name}.{backend}"
    torch.library.register_autograd(
        qualified_name,
        backward,
        setup_context=setup_context,
        lib=made,
    )

    def differentiate(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if is_transformed():
            return composite(*arguments)
        return made.kernel(keyset, *arguments)

    LIBRARY.impl(f"{name}.{backend}", differentiate, "Autograd", with_keyset=True)
    LIBRARY.impl(f"{name}.{backend}", composite, FUNCTION_TRANSFORMS)


def can_use_backward_kernel(*gradients: Tensor | None) -> bool:
    """Whether a backward pass that was given these gradients may use kernels.

    It may unless its result is to be differentiated again (``create_graph=True``), it runs in forward mode, or
    it computes many gradients at once (``is_grads_batched=True``).
    """
    if torch.is_grad_enabled() or is_transformed():
        return False
    if torch.compiler.is_compiling():  # a compiler cannot trace the question below
        return True
    # What `is_batched` asks without transforms; there may be a gradient for each weight of a model.
    given = [gradient for gradient in gradients if gradient is not None]
    return not any(map(torch._C._functorch.is_legacy_batchedtensor, given))


def differentiable_gradients(
    composite: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor],
    gradient: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """Return the gradients of those inputs that require one, themselves differentiable.

    Args:
        composite: Computes one tensor, or several, from the inputs.
        gradient: The gradient of that tensor, or of each.
    """
    is_differentiated_again = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        # Aliases, because one input may have been computed from another.
        aliases = [x.view_as(x) for x in inputs]
        result = composite(*aliases)
    wanted = [x for x in aliases if x.requires_grad]
    gradients = iter(
        torch.autograd.grad(result, wanted, gradient, create_graph=is_differentiated_again)
    )
    return [next(gradients) if x.requires_grad else None for x in aliases]


def refuse_derivatives(name: str, backend: str) -> None:
    """Let ``bitfast::<name>.<backend>`` raise NotImplementedError where a derivative of it is asked for.

    The check costs some 6 us a call; :func:`call_without_autograd` skips it.
    """
    operator = getattr(getattr(torch.ops.bitfast, name), backend)

    def check_and_run(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        _check_no_derivative(operator, arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    LIBRARY.impl(f"{name}.{backend}", check_and_run, "Autograd", with_keyset=True)
    refuse_transforms(operator)


def refusing_derivatives(
    name: str, backend: str, implementation: Callable[..., Any]
) -> Callable[..., Any]:
    """Return an implementation of ``bitfast::<name>.<backend>`` that raises where a derivative is asked for.

    The check within a Python implementation costs less than that of :func:`refuse_derivatives`, which counts
    where compiled models call the operator.
    """
    operator = getattr(getattr(torch.ops.bitfast, name), backend)
    refuse_transforms(operator)

    def check_and_run(*arguments: Any) -> Any:
        _check_no_derivative(operator, arguments)
        return implementation(*arguments)

    return check_and_run


def call_without_autograd(operator: torch._ops.OpOverload, *arguments: Any) -> Any:
    """Call an operator that refuses derivatives, without the check: no gradient may be recorded here."""
    if torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def refuse_transforms(operator: torch._ops.OpOverload) -> None:
    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            f"{operator} has no derivative and no batching rule, so that function transforms (torch.func, vmap)"
            " cannot see through it; call the function of bitfast.ops, which can be transformed"
        )

    LIBRARY.impl(f"{operator._opname}.{operator._overloadname}", refuse, FUNCTION_TRANSFORMS)


def _check_no_derivative(operator: torch._ops.OpOverload, arguments: tuple[Any, ...]) -> None:
    """Raise NotImplementedError if a derivative of the operator's results would be lost."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        raise NotImplementedError(
            f"{operator} has no derivative, but an argument requires a gradient; call it under torch.no_grad(),"
            " or call the function of bitfast.ops, which is differentiable"
        )
    if is_transformed() and any(map(_has_tangent, tree_leaves(arguments))):
        raise NotImplementedError(
            f"{operator} has no derivative, but an argument has a tangent (torch.autograd.forward_ad); call the"
            " function of bitfast.ops, which is differentiable"
        )


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


__all__ = [
    "call_without_autograd",
    "can_use_backward_kernel",
    "connect_derivatives",
    "differentiable_gradients",
    "refuse_derivatives",
    "refusing_derivatives",
]
