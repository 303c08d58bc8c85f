"""Classes for whole networks of other libraries, computed by bitfast's forward pass.

Such a class derives from the network's own, so that ``isinstance``, ``save_pretrained`` and every other method
work as before.
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
"""By the full name of a class, the function that plans for a module of it, given the changes planned so far."""


def network_change(module: nn.Module, runner: type[nn.Module], **attributes: Any) -> Change:
    """Return the change of a network that is to be computed by ``runner``, a subclass of ForwardPass.

    Args:
        attributes: More attributes that the runner needs.
    """
    attributes["plans"] = Plans(module)
    return Change(subclass_run_by(type(module), runner), attributes)  # type: ignore[arg-type]


@lru_cache
def subclass_run_by(cls: type[nn.Module], runner: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of ``cls`` with the same name, whose forward pass is the runner's."""
    members = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "_origin": (cls, runner),
    }
    return type(cls.__name__, (runner, cls), members)


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    """Let copies and pickles make the class, which no Python module holds, from its two bases again."""
    _, _, *rest = super(type(module), module).__reduce_ex__(protocol)
    return _new, module._origin, *rest


def _new(cls: type[nn.Module], runner: type[nn.Module]) -> nn.Module:
    made = subclass_run_by(cls, runner)  # type: ignore[arg-type]
    return made.__new__(made)


__all__ = ["Recipes", "network_change", "subclass_run_by"]
