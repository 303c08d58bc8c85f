"""Turning a module into one of another class and back, with everything it holds left in place.

The module stays the object that it is: its parameters, hooks, children and whatever else refers to it are
not touched. What is added or replaced is written down in the module itself, so that the change
can be undone, also in a copy of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

RECORD = "_before_bitfast"
"""The attribute under which a changed module remembers what it was."""


class UnsuitableError(Exception):
    """A module cannot be changed; the message completes the sentence "left as it is, because"."""


def require(condition: object, reason: str) -> None:
    """Raise UnsuitableError unless the condition holds."""
    if not condition:
        raise UnsuitableError(reason)


@dataclass(frozen=True)
class Change:
    """What a module is to become.

    Attributes:
        becomes: Its new class, whose ``__init__`` does not run.
        attributes: What that class needs to find in the module.
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
    """Whether the module is changed, and not yet changed back."""
    return RECORD in module.__dict__


def class_before(module: nn.Module) -> type[nn.Module]:
    """Return the class of the module, or the one that it had before it was changed."""
    return module.__dict__[RECORD].cls if is_changed(module) else type(module)


def undo(module: nn.Module) -> None:
    """Make a changed module what it was. What others have done to it meanwhile stays."""
    own = module.__dict__
    record: _Record = own.pop(RECORD)
    module.__class__ = record.cls
    for name in record.added:
        own.pop(name, None)
    own.update(record.replaced)
