"""What every op file needs: the library that holds the schemas, argument checks, the autocast rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("bitfast", "FRAGMENT")
"""Owns every schema that Python defines. An operator is called ``bitfast::<name>.<backend>``: one
overload per backend, all of one signature."""


def define_operator(
    name: str,
    backend: str,
    signature: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
) -> torch._ops.OpOverload:
    """Define ``bitfast::<name>.<backend>`` with its implementation and its fake; return it."""
    LIBRARY.define(f"{name}.{backend}{signature}")
    LIBRARY.impl(f"{name}.{backend}", implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bitfast::{name}.{backend}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops.bitfast, name), backend)


def complete_operator(name: str, backend: str, signature: str, fake: Callable[..., Any]) -> None:
    """Give ``bitfast::<name>.<backend>``, which the extension defines and implements, its fake.

    Raises:
        RuntimeError: the extension was built for another signature.
    """
    operator = getattr(getattr(torch.ops.bitfast, name), backend)
    expected = torch._C.parse_schema(f"bitfast::{name}.{backend}{signature}")
    if operator._schema != expected:
        raise RuntimeError(
            f"the extension defines {operator._schema}, this bitfast expects {expected}; install again"
        )
    torch.library.register_fake(f"bitfast::{name}.{backend}", fake, lib=LIBRARY)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype autocast asks of results on x's device, None where it is off.

    float64 tensors are left alone, as torch's own autocast leaves them.
    """
    device_type = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def check_floating(op: str, name: str, x: Tensor) -> None:
    """Raise TypeError unless x is a floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {x.dtype}")


def check_nchw(op: str, name: str, x: Tensor) -> None:
    """Raise TypeError or ValueError unless x is a floating-point tensor of shape (N, C, H, W)."""
    check_floating(op, name, x)
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must have shape (N, C, H, W), got {tuple(x.shape)}")


def check_pair(op: str, name: str, value: int | Sequence[int], minimum: int = 1) -> tuple[int, int]:
    """Return value as (height, width), both at least ``minimum``."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < minimum for v in pair):
        raise ValueError(
            f"{op}: {name} must be an integer >= {minimum} or two of them (height, width), got {value!r}"
        )
    return pair
