"""Modules that announce changes of themselves, so that who has read them need not look in each pass."""

from __future__ import annotations

from typing import Any

from torch import nn

from bitfast.ops.kept_weights import kept_weights


class ChangeNotifier(nn.Module):
    """A module that lets those who have read it look again whenever one of its attributes is set or deleted."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        kept_weights.note_change()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        kept_weights.note_change()


__all__ = ["ChangeNotifier"]
