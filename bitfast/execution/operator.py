"""A network in inference as one operator, for ``torch.compile``.

The compiled program calls the operator, which executes the network's plan as without a compiler. So there is
no graph break, sizes may be symbolic, changes of weights and modules are noticed, and nothing is slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitfast.backends import requested_backends, use_backend
from bitfast.execution.plan import Request, lowering_for
from bitfast.execution.plans import plans_named
from bitfast.memory_format import format_for
from bitfast.ops.common import LIBRARY, autocast_dtype
from bitfast.ops.derivatives import refusing_derivatives
from bitfast.torch_state import constant_when_compiled

SIGNATURE = (
    "(Tensor images, Tensor[] parameters, str network, int last, int[] wanted, bool is_normed,"
    " bool channels_last, ScalarType? autocast, str demands) -> Tensor[]"
)
"""Takes all parameters, so that the compiler knows what the results depend on. Returns the wanted outputs, and
the result unless it is one of them."""


def compute_as_operator(
    network: Any, images: Tensor, request: Request, channels_last: bool
) -> tuple[list[Tensor], Tensor] | None:
    """Compute a network's outputs by the operator, while a compiler traces, in inference.

    Args:
        network: A ``ForwardPass``.
        images: (N, num_channels, H, W).
        request: Which outputs.
        channels_last: The layout of the results.

    Returns:
        The wanted outputs and the result; None if the compiler should trace the modules instead: one of them is
        hooked, wrapped or replaced, or no plan can be made.
    """
    demands = ",".join([f"{op}={backend}" for op, backend in requested_backends().items()])
    autocast = autocast_dtype(images)
    dtype = images.dtype if autocast is None else autocast
    name = network.plans.name
    if not _can_be_operator(name, images.device.type, dtype, demands):
        return None
    results = torch.ops.bitfast.network.planned(
        images,
        list(network.parameters()),
        name,
        request.last,
        list(request.wanted),
        request.is_normed,
        channels_last,
        autocast,
        demands,
    )
    outputs = list(results)
    return outputs[: len(request.wanted)], outputs[-1]


@constant_when_compiled
def _can_be_operator(name: str, device_type: str, dtype: torch.dtype, demands: str) -> bool:
    """Whether a plan can be made for the network, and none of its modules is hooked, wrapped or replaced."""
    plans = plans_named(name)
    with _demanded(demands):
        if lowering_for(device_type, dtype) is None:
            return False
    steps = plans.read(plans.network)
    return steps is not None and steps.is_plannable()


def _demanded(demands: str) -> AbstractContextManager[Any]:
    if not demands:
        return nullcontext()
    return use_backend(**dict(demand.split("=") for demand in demands.split(",")))


# ---- the operator ---------------------------------------------------------------------------------


class _NetworkCall(nn.Module):
    """Lets ``functional_call`` compute a network with other parameters."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, images: Tensor, request: Request) -> Any:
        return self.network.compute_in_own_layout(images, request)


class _Arguments(NamedTuple):
    """The arguments of the operator, as :data:`SIGNATURE` has them."""

    images: Tensor
    parameters: Sequence[Tensor]
    network: str
    last: int
    wanted: Sequence[int]
    is_normed: bool
    channels_last: bool
    autocast: torch.dtype | None
    demands: str

    def request(self) -> Request:
        """Return the request for the outputs."""
        return Request(self.last, tuple(self.wanted), self.is_normed)

    def layout(self) -> torch.memory_format:
        """Return the layout of the results."""
        return format_for(self.channels_last)


def _implementation(*arguments: Any) -> list[Tensor]:
    given = _Arguments(*arguments)
    plans = plans_named(given.network)
    images, request = given.images, given.request()
    with (
        torch.no_grad(),
        _autocast(images.device.type, given.autocast),
        _demanded(given.demands),
    ):
        if plans.are_parameters(given.parameters):
            computed = plans.network.compute_in_own_layout(images, request)
        else:
            names = [f"network.{name}" for name, _ in plans.network.named_parameters()]
            replacements = dict(zip(names, given.parameters, strict=True))
            computed = torch.func.functional_call(
                _NetworkCall(plans.network), replacements, (images, request)
            )
    outputs, result = computed
    results = outputs if any(result is output for output in outputs) else [*outputs, result]
    return [x.contiguous(memory_format=given.layout()) for x in results]


def _autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return a context in which autocast is as it was when the program was traced."""
    is_on = torch.is_autocast_enabled(device_type)
    if dtype is None:
        return torch.autocast(device_type, enabled=False) if is_on else nullcontext()
    if is_on and torch.get_autocast_dtype(device_type) == dtype:
        return nullcontext()
    return torch.autocast(device_type, dtype)


def _fake(*arguments: Any) -> list[Tensor]:
    given = _Arguments(*arguments)
    images = given.images
    return [
        torch.empty(
            shape,
            dtype=given.autocast or images.dtype,
            device=images.device,
            memory_format=given.layout(),
        )
        for shape in plans_named(given.network).shapes(given.request(), tuple(images.shape))
    ]


LIBRARY.define(f"network.planned{SIGNATURE}")
LIBRARY.impl(
    "network.planned",
    refusing_derivatives("network", "planned", _implementation),
    "CompositeExplicitAutograd",
)
torch.library.register_fake("bitfast::network.planned", _fake, lib=LIBRARY)

__all__ = ["compute_as_operator"]
