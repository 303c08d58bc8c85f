"""The standardized weights of a network's convolutions, brought up to date before a pass.

Where the backend can, all that have to be computed take one launch instead of one each. Those that need no
gradient are kept for the next pass, in the store of :mod:`bitfast.ops.kept_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from bitfast.backends import requested_backends, select_backend, use_backend
from bitfast.inference_tensors import make_ordinary
from bitfast.kernels.device_cache import is_capturing
from bitfast.layers import WeightStandardizedConv2d
from bitfast.ops.common import autocast_dtype
from bitfast.ops.kept_weights import Source, kept_weights
from bitfast.ops.weight_standardization import (
    OP,
    standardizes_together,
    weight_standardization_all,
)

Weights = dict[nn.Module, Tensor]
"""The standardized weight of each convolution."""

Made = TypeVar("Made")


def recorded_weights(
    convolutions: Sequence[WeightStandardizedConv2d], channels_last: bool
) -> Weights:
    """Return the weights that autograd or a compiler sees computed, where it pays to compute them together.

    Args:
        convolutions: Those that are not among the results standardize their weights when they are run.
        channels_last: The layout of the results; else that of each weight.
    """
    together = [
        convolution
        for convolution in convolutions
        if _has_plain_weight(convolution) and standardizes_together(convolution.weight)
    ]
    by_eps: dict[float, list[WeightStandardizedConv2d]] = {}
    for convolution in together:
        by_eps.setdefault(convolution.eps, []).append(convolution)
    results: Weights = {}
    for eps, members in by_eps.items():
        weights = list(dict.fromkeys(member.weight for member in members))  # some may be tied
        standardized = weight_standardization_all(weights, eps, channels_last=channels_last)
        by_weight = dict(zip(weights, standardized, strict=True))
        results |= {member: by_weight[member.weight] for member in members}
    return results


def standardized_weights(
    convolutions: Sequence[WeightStandardizedConv2d], channels_last: bool
) -> Weights:
    """Return the weights that a pass begins with: recorded where they need a gradient, else kept.

    Args:
        convolutions: Those whose weight is not there yet, or is no plain parameter, are left to themselves.
        channels_last: The layout of the results; else that of each weight.
    """
    # Neither a compiler nor the replay of a graph sees whether parameters change.
    if torch.compiler.is_compiling() or is_capturing():
        return recorded_weights(convolutions, channels_last)
    plain = [convolution for convolution in convolutions if _has_plain_weight(convolution)]
    recorded: list[WeightStandardizedConv2d] = []
    others: list[WeightStandardizedConv2d] = []
    for convolution in plain:
        needs_gradient = torch.is_grad_enabled() and convolution.weight.requires_grad
        (recorded if needs_gradient else others).append(convolution)
    # Who records a weight is going to change it.
    kept_weights.drop(convolution.weight for convolution in recorded)
    return recorded_weights(recorded, channels_last) | kept_standardized(others, channels_last)


def kept_standardized(
    convolutions: Sequence[WeightStandardizedConv2d], channels_last: bool
) -> Weights:
    """Return the standardized weights without gradients; kept, but for those of inference mode."""
    for convolution in convolutions:
        make_ordinary(convolution.weight)
    convolutions = [c for c in convolutions if not c.weight.is_inference()]
    results: Weights = {}
    missing: dict[tuple[float, torch.dtype | None], list[WeightStandardizedConv2d]] = {}
    for convolution in convolutions:
        found = kept_weights.find(convolution.weight, form_of(convolution, channels_last))
        if found is not None:
            results[convolution] = found
        else:
            kind = convolution.eps, autocast_dtype(convolution.weight)
            missing.setdefault(kind, []).append(convolution)
    for (eps, dtype), members in missing.items():
        results |= _keep(members, eps, dtype, channels_last)
    return results


def form_of(convolution: WeightStandardizedConv2d, channels_last: bool) -> tuple[object, ...]:
    """Return under what a standardized weight is kept."""
    weight = convolution.weight
    backend = select_backend(OP, weight.device.type, weight.dtype)
    return OP, backend, convolution.eps, autocast_dtype(weight) or weight.dtype, channels_last


def _keep(
    convolutions: Sequence[WeightStandardizedConv2d],
    eps: float,
    dtype: torch.dtype | None,
    channels_last: bool,
) -> Weights:
    """Standardize the weights of these convolutions, each once, and keep the results."""
    weights = list(dict.fromkeys(convolution.weight for convolution in convolutions))
    sources = [Source.of(weight) for weight in weights]
    standardized = make_for_keeping(
        lambda: weight_standardization_all(weights, eps, dtype, channels_last), weights[0].device
    )
    by_weight = dict(zip(weights, standardized, strict=True))
    if all(type(result) is Tensor for result in standardized):  # not, for instance, a fake one
        forms = {c.weight: form_of(c, channels_last) for c in convolutions}
        for weight, source in zip(weights, sources, strict=True):
            kept_weights.keep(source, weight, forms[weight], by_weight[weight])
    return {convolution: by_weight[convolution.weight] for convolution in convolutions}


def make_for_keeping(make: Callable[[], Made], device: torch.device) -> Made:
    """Return what ``make`` returns, of ordinary tensors that no graph's memory holds, complete for all streams.

    No graph may be recorded meanwhile.
    """
    if device.type != "cuda":
        # Not as inference tensors: autograd could not save those if it uses these weights later.
        with torch.inference_mode(False), torch.no_grad():
            return make()
    demands = dict(requested_backends())

    def make_elsewhere() -> Made:
        with torch.no_grad(), torch.cuda.device(device):
            if demands:
                with use_backend(**demands):
                    made = make()
            else:
                made = make()
            torch.cuda.current_stream().synchronize()
            return made

    # torch.compile's graphs serve this thread from their memory, also in calls that they do not record.
    torch.cuda.current_stream(device).synchronize()
    with ThreadPoolExecutor(1) as other_thread:
        return other_thread.submit(make_elsewhere).result()


def _has_plain_weight(convolution: WeightStandardizedConv2d) -> bool:
    """Whether the convolution's weight is a plain parameter that has contents."""
    weight = convolution._parameters.get("weight")
    return (
        convolution.standardizes
        and type(weight) is nn.Parameter
        and not weight.is_meta
        and weight.dim() == 4
        and 0 not in weight.shape
    )


__all__ = [
    "Weights",
    "form_of",
    "kept_standardized",
    "make_for_keeping",
    "recorded_weights",
    "standardized_weights",
]
