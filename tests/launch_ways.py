"""The ways in which the kernels of group_norm_act work, also of small tensors."""

from __future__ import annotations

from typing import Any

from bitfast.kernels import group_norm_act as kernels
from bitfast.kernels import group_norm_act_tiling as tiling
from bitfast.kernels.launch import Device
from bitfast.ops.group_norm_act_eager import forget_calls

WAYS: dict[str, dict[str, int]] = {
    "whole": {},
    "split": {"KEPT_VECTORS": 0, "SPLIT_WARPS": 1, "SPLIT_VECTORS": 4},
    "parts": {"KEPT_VECTORS": 0, "SPLIT_WARPS": 1, "SPLIT_VECTORS": 4, "WIDEST_TILE": 4},
}
"""Limits that make the plan choose each way of working also for small tensors."""

DEVICES = {
    "whole": Device(multiprocessors=1, l2_bytes=2**30),
    "split": Device(multiprocessors=1, l2_bytes=2**30),
    "parts": Device(multiprocessors=1, l2_bytes=2**30),
}


def choose(monkeypatch: Any, way: str) -> None:
    """Let all calls work in this way, planned before or not; :func:`forget_calls` at the end."""
    forget_calls()
    for name, value in WAYS[way].items():
        monkeypatch.setattr(tiling, name, value)
    monkeypatch.setattr(kernels, "device_of", lambda device: DEVICES[way])


__all__ = ["DEVICES", "WAYS", "choose", "forget_calls"]
