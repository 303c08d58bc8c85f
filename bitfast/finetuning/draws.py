"""Random numbers without a state: each is a function of a seed, a purpose and a counter.

They are the raw numbers of the counter-based generator Philox (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", 2011), which NumPy promises never to change, unlike those of its distributions.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What numbers are drawn for. Purposes are independent of each other; their values never change."""

    EPOCH = 0
    AUGMENTATION = 1
    MIXUP = 2
    HOLD_OUT = 3
    FEW_SHOT = 4


def generator(seed: int, purpose: Purpose, counter: int) -> np.random.Philox:
    """Return the generator of a seed (below 2**64), a purpose and a counter."""
    key = np.array([seed, purpose], np.uint64)
    # The lowest word counts the numbers drawn.
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, counter], np.uint64))


def bits(seed: int, purpose: Purpose, counter: int, count: int) -> np.ndarray:
    """Return ``count`` uniformly distributed 64-bit numbers, uint64."""
    return generator(seed, purpose, counter).random_raw(count)


def order(seed: int, purpose: Purpose, counter: int, count: int) -> np.ndarray:
    """Return the numbers from 0 to ``count - 1`` in random order, int64."""
    return np.argsort(bits(seed, purpose, counter, count), kind="stable")
