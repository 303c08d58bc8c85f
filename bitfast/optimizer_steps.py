"""Telling those who keep what they computed from parameters when an optimizer has stepped these.

torch counts in-place changes of a tensor, but not those that fused optimizers make.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class ParameterCache(Protocol):
    """Somebody who keeps what was computed from parameters."""

    def drop_if_from(self, weights: set[int]) -> None:
        """Forget what was kept if any of it comes from the parameters with these ids."""


_caches: weakref.WeakSet[Any] = weakref.WeakSet()
_caches_lock = threading.Lock()
_is_hooked = threading.Event()


def is_in_shared_memory(weight: Tensor) -> bool:
    """Whether other processes may change the weight, which torch does not count here."""
    return weight.device.type == "cpu" and weight.is_shared()


def watch_optimizers(cache: ParameterCache) -> None:
    """Let the cache, while it lives, know of the steps of all optimizers from now on."""
    with _caches_lock:
        if not _is_hooked.is_set():
            register_optimizer_step_post_hook(_after_optimizer_step)
            _is_hooked.set()
        _caches.add(cache)


def _after_optimizer_step(optimizer: Any, *_: Any) -> None:
    stepped = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    with _caches_lock:
        notified = list(_caches)
    for cache in notified:
        cache.drop_if_from(stepped)
