"""Planning the changes of a model: which modules become which of bitfast's, and which are left."""

from __future__ import annotations

from torch import nn

from bitfast.in_place import timm_modules, transformers_modules
from bitfast.in_place.changes import Change, UnsuitableError
from bitfast.in_place.parts import qualified_name

RECIPES = {**transformers_modules.RECIPES, **timm_modules.RECIPES}
ENTRIES = {**transformers_modules.ENTRIES, **timm_modules.ENTRIES}


def plan_changes(model: nn.Module) -> tuple[dict[nn.Module, Change], dict[nn.Module, str]]:
    """Return the change of each module that can be changed, and why the others cannot."""
    changes: dict[nn.Module, Change] = {}
    left: dict[nn.Module, str] = {}
    for module in reversed(list(model.modules())):  # inner modules first
        known = _known_class(type(module))
        if known is None:
            continue
        try:
            _require_as_written(module, known)
            outcome = RECIPES[qualified_name(known)](module, changes)
        except UnsuitableError as reason:
            outcome = {module: str(reason)}
        for part, change in outcome.items():
            if isinstance(change, Change):
                changes[part] = change
            else:
                left[part] = change
    return changes, left


def _known_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """Return the first class among a class and its bases that has a recipe; None if none has."""
    return next((base for base in cls.__mro__ if qualified_name(base) in RECIPES), None)


def _require_as_written(module: nn.Module, known: type[nn.Module]) -> None:
    """Raise UnsuitableError if a module may compute something else than the known class."""
    if "forward" in module.__dict__:
        raise UnsuitableError("its forward was replaced")
    cls = type(module)
    if cls is known:
        return
    entry = ENTRIES.get(qualified_name(known))
    if entry is None or getattr(cls, entry) is not getattr(known, entry):
        raise UnsuitableError(f"it is a {cls.__name__}, a subclass that may compute something else")


__all__ = ["plan_changes"]
