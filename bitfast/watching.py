"""Whether calling a module does what its class says, so that its work may be done by another."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

from torch import nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules import module as torch_module

Module = TypeVar("Module", bound=nn.Module)


def runs_as_written(module: nn.Module) -> bool:
    """Whether calling the module does what its class says: no hooks, no replaced or compiled call.

    Only then may its work be done by another module, as part of a fused op. ``torch.fx`` watches all modules.
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
    """Whether the module does what its class ``cls`` says: nobody's subclass computes something else."""
    return isinstance(module, cls) and type(module).forward is cls.forward


__all__ = ["is_every_module_watched", "is_plain", "runs_as_written"]
