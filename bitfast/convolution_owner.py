"""Modules that notice when one of their convolutions is wrapped, as adapters do."""

from __future__ import annotations

from typing import Any

from bitfast.change_notifier import ChangeNotifier
from bitfast.layers import WeightStandardizedConv2d


class ConvolutionOwner(ChangeNotifier):
    """A module that notices when one of its convolutions is wrapped, and when it is unwrapped.

    A wrapper may write to the weight in ways that torch does not count, as PEFT does where it merges an adapter
    (``weight.data += delta``). So nothing is kept of the weight of a wrapped convolution.
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
