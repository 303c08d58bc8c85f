"""Modules that notify of changes of their attributes, so that a guard need not compare these in each pass."""

from __future__ import annotations

from typing import Any

from torch import nn

from bitfast.ops.kept_weights import kept_weights


class ChangeNotifier(nn.Module):
    """A module that raises the generation of the kept weights when one of its attributes is set or deleted."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        kept_weights.note_change()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        kept_weights.note_change()


__all__ = ["ChangeNotifier"]
