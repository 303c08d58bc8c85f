"""The ways in which the kernels of group_norm_act work, also of small tensors."""

from __future__ import annotations

from typing import Any

from bitfast.kernels import group_norm_act as kernels
from bitfast.kernels.launch import H100, Device
from bitfast.ops.group_norm_act_triton import forget_calls

WAYS = {
    "one tile": {},
    "stream": {"TILE_IN_REGISTERS": 16, "STREAM_TILE": 256},
    "split": {"TILE_IN_REGISTERS": 16, "SPLIT_BYTES": 1024},
    "parts": {"TILE_IN_REGISTERS": 16, "SPLIT_BYTES": 512, "WIDEST_TILE": 4},
}
"""Limits that make the plan choose each way of working also for small tensors."""

DEVICES = {
    "one tile": H100,
    "stream": Device(multiprocessors=2, l2_bytes=32 * 1024),
    "split": Device(multiprocessors=6, l2_bytes=2**30),
    "parts": Device(multiprocessors=6, l2_bytes=2**30),
}


def choose(monkeypatch: Any, way: str) -> None:
    """Let all calls work in this way, planned before or not; :func:`forget_calls` at the end."""
    forget_calls()
    for name, value in WAYS[way].items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels, "device_of", lambda device: DEVICES[way])


__all__ = ["DEVICES", "WAYS", "choose", "forget_calls"]
