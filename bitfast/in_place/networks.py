"""Classes for whole networks: somebody else's class, run by bitfast's forward pass.

Such a class derives from the one that the network had, so that ``isinstance``, ``save_pretrained`` and every
other method serve as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from bitfast.execution.plans import Plans
from bitfast.in_place.changes import Change
from bitfast.in_place.parts import Outcome, Planned

Recipes = Mapping[str, Callable[[Any, Planned], Outcome]]
"""By the full name of a class: what plans for a module of it, given the changes planned so far."""


def network_change(module: nn.Module, runner: type[nn.Module], **attributes: Any) -> Change:
    """Return the change of a network that is to run as ``runner`` says, a subclass of ForwardPass.

    Args:
        attributes: More that the runner needs to find in the module.
    """
    attributes["plans"] = Plans(module)
    return Change(subclass_run_by(type(module), runner), attributes)  # type: ignore[arg-type]


@lru_cache
def subclass_run_by(cls: type[nn.Module], runner: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of ``cls``, of its name, whose forward pass is the runner's."""
    members = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "_origin": (cls, runner),
    }
    return type(cls.__name__, (runner, cls), members)


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    """Let copies and pickles find the class, which stands in no module, by the two it was made of."""
    _, _, *rest = super(type(module), module).__reduce_ex__(protocol)
    return _new, module._origin, *rest


def _new(cls: type[nn.Module], runner: type[nn.Module]) -> nn.Module:
    made = subclass_run_by(cls, runner)  # type: ignore[arg-type]
    return made.__new__(made)


__all__ = ["Recipes", "network_change", "subclass_run_by"]
