"""Telling those who keep what they computed from parameters when an optimizer has stepped these.

torch counts in-place changes of a tensor, but not those that fused optimizers make.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class Keeper(Protocol):
    """Somebody who keeps what was computed from parameters."""

    def drop_if_from(self, weights: set[int]) -> None:
        """Forget what was kept if any of it comes from the parameters with these ids."""


_watching: weakref.WeakSet[Any] = weakref.WeakSet()
_watching_lock = threading.Lock()
_is_hooked = threading.Event()


def is_shared(weight: Tensor) -> bool:
    """Say whether other processes may change the weight, which torch does not count here."""
    return weight.device.type == "cpu" and weight.is_shared()


def watch_optimizers(keeper: Keeper) -> None:
    """Let the keeper, while it lives, know of the steps of all optimizers from now on."""
    with _watching_lock:
        if not _is_hooked.is_set():
            register_optimizer_step_post_hook(_after_optimizer_step)
            _is_hooked.set()
        _watching.add(keeper)


def _after_optimizer_step(optimizer: Any, *_: Any) -> None:
    stepped = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    with _watching_lock:
        keepers = list(_watching)
    for keeper in keepers:
        keeper.drop_if_from(stepped)
