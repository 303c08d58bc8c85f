"""Changing the class of a module in place, and undoing it.

The module stays the same object: its parameters, hooks and children, and references to it, are not touched.
Attributes that are added or replaced are recorded in the module itself, so that the change can be undone, also
in a copy of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

RECORD = "_before_bitfast"
"""The attribute in which a changed module records what it was."""


class UnsuitableError(Exception):
    """A module cannot be changed; the message completes the sentence "left as it is, because"."""


def require(condition: object, reason: str) -> None:
    """Raise UnsuitableError unless the condition holds."""
    if not condition:
        raise UnsuitableError(reason)


@dataclass(frozen=True)
class Change:
    """The change of a module's class.

    Attributes:
        becomes: The new class, whose ``__init__`` is not called.
        attributes: Attributes that the new class needs.
    """

    becomes: type[nn.Module]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, module: nn.Module) -> None:
        """Change the module."""
        own = module.__dict__
        record = _Record(
            type(module),
            {name: own[name] for name in self.attributes if name in own},
            tuple(name for name in self.attributes if name not in own),
        )
        own.update(self.attributes)
        own[RECORD] = record
        module.__class__ = self.becomes


class _Record(NamedTuple):
    """What a module was before it was changed."""

    cls: type[nn.Module]
    replaced: dict[str, Any]
    added: tuple[str, ...]


def is_changed(module: nn.Module) -> bool:
    """Whether the module is changed now."""
    return RECORD in module.__dict__


def class_before(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module had before it was changed, or has if it is not."""
    return module.__dict__[RECORD].cls if is_changed(module) else type(module)


def undo(module: nn.Module) -> None:
    """Undo the change of a module. What others have done to the module meanwhile stays."""
    own = module.__dict__
    record: _Record = own.pop(RECORD)
    module.__class__ = record.cls
    for name in record.added:
        own.pop(name, None)
    own.update(record.replaced)
