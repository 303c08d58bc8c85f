"""Which operators are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorCalls(TorchDispatchMode):
    """Notes each operator that is called, under this mode, by its name or by what ``note`` makes of it.

    Args:
        note: Maps an operator and its positional arguments to what is noted; None is not.
    """

    def __init__(self, note: Callable[[Any, Any], Any] = lambda operator, _: str(operator)) -> None:
        super().__init__()
        self.note = note
        self.noted: list[Any] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        noted = self.note(operator, arguments)
        if noted is not None:
            self.noted.append(noted)
        return operator(*arguments, **(options or {}))


def calls_of(name: str, note: Callable[[Any], Any]) -> OperatorCalls:
    """Note the calls of one operator of bitfast, by what ``note`` makes of its positional arguments."""
    return OperatorCalls(
        lambda operator, arguments: (
            note(arguments) if operator.name().startswith(f"bitfast::{name}.") else None
        )
    )
