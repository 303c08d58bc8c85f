"""The torch that the tests run on, for the few that an older one cannot pass."""

from __future__ import annotations

import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

TRACER_KEEPS_LAYOUTS = TORCH > (2, 11)
"""torch 2.11 loses channels_last between two ops of a graph with symbolic sizes; the numbers are right."""
