"""The standardized weights of a network's convolutions, brought up to date before a pass.

Where the backend can, one launch standardizes all of them. Those that need no gradient are kept for the next
pass, in the store of :mod:`bitfast.ops.kept_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from bitfast.backends import requested_backends, select_backend, use_backend
from bitfast.inference_tensors import make_ordinary
from bitfast.kernels.device_cache import is_capturing
from bitfast.layers import WeightStandardizedConv2d
from bitfast.ops.common import autocast_dtype
from bitfast.ops.kept_weights import Source, kept_weights
from bitfast.ops.norm_convolution import OP as NORM_CONVOLUTION
from bitfast.ops.norm_convolution_cuda import pack_filters
from bitfast.ops.stem import OP as STEM
from bitfast.ops.stem import prepare_filters
from bitfast.ops.weight_standardization import (
    OP,
    standardizes_together,
    weight_standardization,
    weight_standardization_all,
)

Weights = dict[nn.Module, Tensor]
"""The standardized weight of each convolution."""

Made = TypeVar("Made")


def recorded_weights(
    convolutions: Sequence[WeightStandardizedConv2d], channels_last: bool
) -> Weights:
    """Standardize weights so that autograd or a compiler can follow, where one launch for all of them pays.

    Args:
        convolutions: Those that are not among the results standardize their weights themselves.
        channels_last: Whether the results are channels_last; else each has the layout of its weight.
    """
    plain = [convolution for convolution in convolutions if _has_plain_weight(convolution)]
    # Asked once for all weights of a kind: there may be hundreds.
    kinds = {(weight.device, weight.dtype): weight for weight in (c.weight for c in plain)}
    pays = {kind: standardizes_together(weight) for kind, weight in kinds.items()}
    together = [c for c in plain if pays[c.weight.device, c.weight.dtype]]
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
    """Return the standardized weights for a pass: recorded by autograd where they need a gradient, else kept.

    Args:
        convolutions: Those whose weight is no plain parameter, or has no contents, are left to themselves.
        channels_last: Whether the results are channels_last; else each has the layout of its weight.
    """
    if torch.compiler.is_compiling():
        return recorded_weights(convolutions, channels_last)
    plain = [convolution for convolution in convolutions if _has_plain_weight(convolution)]
    recorded: list[WeightStandardizedConv2d] = []
    others: list[WeightStandardizedConv2d] = []
    for convolution in plain:
        needs_gradient = torch.is_grad_enabled() and convolution.weight.requires_grad
        (recorded if needs_gradient else others).append(convolution)
    if is_capturing():
        # The replay of a graph does not see whether parameters have changed: nothing kept is used. But weights
        # go together as in the passes before: launches need what those have copied to the device.
        return recorded_weights(recorded, channels_last) | recorded_weights(others, channels_last)
    # A weight that needs a gradient is about to be changed by an optimizer.
    kept_weights.drop(convolution.weight for convolution in recorded)
    return recorded_weights(recorded, channels_last) | kept_standardized(others, channels_last)


def kept_standardized(
    convolutions: Sequence[WeightStandardizedConv2d], channels_last: bool
) -> Weights:
    """Return the standardized weights, without gradients. All but inference tensors are kept."""

    def make(weights: list[Tensor], eps: float, dtype: torch.dtype | None) -> list[Tensor]:
        return weight_standardization_all(weights, eps, dtype, channels_last)

    return _kept(
        convolutions,
        lambda convolution: autocast_dtype(convolution.weight),
        lambda convolution: form_of(convolution, channels_last),
        make,
    )


def kept_packed_filters(
    convolutions: Sequence[WeightStandardizedConv2d], dtype: torch.dtype
) -> Weights:
    """Return the standardized weights as the CUDA kernels of ``norm_convolution`` take them.

    Those that are not kept yet are standardized together.

    Args:
        convolutions: With square filters. Those whose weight is an inference tensor are left out.
        dtype: Of the results.
    """

    def form(convolution: WeightStandardizedConv2d) -> tuple[object, ...]:
        weight = convolution.weight
        backend = select_backend(OP, weight.device.type, weight.dtype)
        return NORM_CONVOLUTION, backend, convolution.eps, dtype

    def make(weights: list[Tensor], eps: float, dtype: torch.dtype | None) -> list[Tensor]:
        return [pack_filters(each) for each in weight_standardization_all(weights, eps, dtype)]

    return _kept(convolutions, lambda _: dtype, form, make)


def kept_stem_filters(
    convolution: WeightStandardizedConv2d, dtype: torch.dtype, padding: tuple[int, ...]
) -> Tensor:
    """Return the standardized weight as the op ``stem`` takes it for this padding, from the kept weights.

    The weight must not be an inference tensor.
    """
    weight, eps = convolution.weight, convolution.eps
    backend = select_backend(OP, weight.device.type, weight.dtype)

    def make() -> Tensor:
        return make_for_keeping(
            lambda: prepare_filters(weight_standardization(weight, eps, dtype), padding),
            weight.device,
        )

    return kept_weights.get(weight, (STEM, backend, eps, dtype, padding[2] % 2), make)


def form_of(convolution: WeightStandardizedConv2d, channels_last: bool) -> tuple[object, ...]:
    """Return the key under which a standardized weight is kept."""
    weight = convolution.weight
    backend = select_backend(OP, weight.device.type, weight.dtype)
    return OP, backend, convolution.eps, autocast_dtype(weight) or weight.dtype, channels_last


def _kept(
    convolutions: Sequence[WeightStandardizedConv2d],
    dtype_of: Callable[[WeightStandardizedConv2d], torch.dtype | None],
    form: Callable[[WeightStandardizedConv2d], Hashable],
    make: Callable[[list[Tensor], float, torch.dtype | None], list[Tensor]],
) -> Weights:
    """Return a form of the weights; those that are not kept yet are made together, and kept.

    Args:
        convolutions: Those whose weight is an inference tensor are left out.
        dtype_of: Returns the dtype that is asked for, or None.
        form: Returns the key under which a weight's form is kept.
        make: Makes the form of weights that share eps and the dtype that is asked for.
    """
    for convolution in convolutions:
        make_ordinary(convolution.weight)
    results: Weights = {}
    missing: dict[tuple[float, torch.dtype | None], list[WeightStandardizedConv2d]] = {}
    for convolution in convolutions:
        if convolution.weight.is_inference():
            continue
        found = kept_weights.find(convolution.weight, form(convolution))
        if found is not None:
            results[convolution] = found
        else:
            kind = convolution.eps, dtype_of(convolution)
            missing.setdefault(kind, []).append(convolution)
    for (eps, dtype), members in missing.items():
        forms = {member.weight: form(member) for member in members}  # each weight once
        weights = list(forms)
        sources = [Source.of(weight) for weight in weights]
        made = make_for_keeping(partial(make, weights, eps, dtype), weights[0].device)
        by_weight = dict(zip(weights, made, strict=True))
        if all(type(result) is Tensor for result in made):  # not, for instance, a fake one
            for weight, source in zip(weights, sources, strict=True):
                kept_weights.keep(source, weight, forms[weight], by_weight[weight])
        results |= {member: by_weight[member.weight] for member in members}
    return results


def make_for_keeping(make: Callable[[], Made], device: torch.device) -> Made:
    """Return what ``make`` returns: ordinary tensors, not in the memory of a CUDA graph, ready for all streams.

    No graph may be recorded meanwhile.
    """
    if device.type != "cuda":
        # Not as inference tensors, which autograd could not save later.
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

    # In another thread: torch.compile's graphs give this one their memory, even when they record nothing.
    torch.cuda.current_stream(device).synchronize()
    with ThreadPoolExecutor(1) as other_thread:
        return other_thread.submit(make_elsewhere).result()


def _has_plain_weight(convolution: WeightStandardizedConv2d) -> bool:
    """Whether the convolution standardizes its weight, and that is a plain parameter with contents."""
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
    "kept_packed_filters",
    "kept_standardized",
    "kept_stem_filters",
    "make_for_keeping",
    "recorded_weights",
    "standardized_weights",
]
