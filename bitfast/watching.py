"""Whether a module may be replaced by an equal computation: nobody hooks it, wraps it or follows its call."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

from torch import nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules import module as torch_module

Module = TypeVar("Module", bound=nn.Module)


def runs_as_written(module: nn.Module) -> bool:
    """Whether calling the module does what its class says: no hooks, no replaced or compiled call.

    Only then may a fused op compute it. ``torch.fx`` follows the calls of all modules.
    """
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or is_every_module_watched()
    )


def is_every_module_watched() -> bool:
    """Whether hooks of the whole process, or ``torch.fx``, see each call of a module."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or is_fx_symbolic_tracing()
    )


def is_plain(module: nn.Module | None, cls: type[Module]) -> TypeGuard[Module]:
    """Whether the module is a ``cls`` with that class's own ``forward``, not one of a subclass."""
    return isinstance(module, cls) and type(module).forward is cls.forward


__all__ = ["is_every_module_watched", "is_plain", "runs_as_written"]
