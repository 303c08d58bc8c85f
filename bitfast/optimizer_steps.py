"""Notifies caches of what was computed from parameters when an optimizer has changed these.

torch counts in-place changes of a tensor, but not those by fused optimizers.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class ParameterCache(Protocol):
    """A cache of what was computed from parameters."""

    def drop_if_from(self, weights: set[int]) -> None:
        """Drop what was computed from the parameters with these ids."""


_caches: weakref.WeakSet[Any] = weakref.WeakSet()
_caches_lock = threading.Lock()
_is_hooked = threading.Event()


def is_in_shared_memory(weight: Tensor) -> bool:
    """Whether other processes may change the weight, which torch does not count in this one."""
    return weight.device.type == "cpu" and weight.is_shared()


def watch_optimizers(cache: ParameterCache) -> None:
    """Notify the cache, while it lives, of the steps of all optimizers from now on."""
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
