"""Convolutions that somebody else takes over for a while, as adapters do."""

from __future__ import annotations

from typing import Any

from bitfast.change_notifier import ChangeNotifier
from bitfast.layers import WeightStandardizedConv2d


class ConvolutionOwner(ChangeNotifier):
    """A module that notices when a convolution of its own is wrapped, and when it comes back.

    Who wraps one may write to its weight in ways that torch does not count, as PEFT does where it merges an
    adapter (``weight.data += delta``). So meanwhile nothing is kept of that weight.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get("_modules", {}).get(name)
        super().__setattr__(name, value)
        if before is not value:
            if isinstance(before, WeightStandardizedConv2d):
                before.mark_wrapped()
            if isinstance(value, WeightStandardizedConv2d):
                value.mark_unwrapped()


__all__ = ["ConvolutionOwner"]
