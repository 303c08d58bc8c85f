"""Standardizing a model's convolution weights together, before its layers run.

Where the backend can, all weights take one launch instead of one each. Results that need no gradient are
kept for the next forward pass and used again while nothing has changed: see :class:`PreparedWeights`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitfast.backends import select_backend
from bitfast.inference_tensors import make_ordinary
from bitfast.kernels.kept import is_capturing
from bitfast.ops.common import autocast_dtype
from bitfast.ops.weight_standardization import (
    OP,
    standardizes_together,
    weight_standardization_all,
)
from bitfast.optimizer_steps import is_shared, watch_optimizers
from bitfast.torch_state import runs_in_plain_pytorch


class _Prepared(NamedTuple):
    """A standardized weight, and what it was made of."""

    result: Tensor
    weight: nn.Parameter
    version: int | None
    eps: float

    @classmethod
    def of(cls, layer: Any, result: Tensor) -> _Prepared:
        weight = layer.weight
        is_counted = not torch.compiler.is_compiling() and not weight.is_inference()
        return cls(result, weight, weight._version if is_counted else None, layer.eps)

    def is_current(self, layer: Any) -> bool:
        """Say whether nobody, as hooks may, has changed the layer since."""
        weight = layer._parameters.get("weight")
        return bool(
            weight is self.weight
            and layer.eps == self.eps
            and (self.version is None or weight._version == self.version)
        )


class _Current(threading.local):
    """The standardized weights of the forward pass that this thread is in, by layer."""

    def __init__(self) -> None:
        self.by_layer: dict[nn.Module, _Prepared] = {}


_current = _Current()


def prepared_weight(layer: nn.Module) -> Tensor | None:
    """Return the layer's standardized weight if the forward pass has prepared it, else None."""
    prepared = _current.by_layer.get(layer)
    if prepared is None or not (torch.compiler.is_compiling() or prepared.is_current(layer)):
        return None
    return prepared.result


class _Source(NamedTuple):
    """What a kept result was computed from; it is used again only for exactly the same."""

    layer: nn.Module
    weight: nn.Parameter
    address: int
    version: int
    settings: int
    """How often the layer's weight was set."""
    eps: float
    storage: torch.UntypedStorage
    """Held so that no other tensor can come to lie at the same address."""

    @classmethod
    def of(cls, layer: Any) -> _Source:
        weight = layer.weight
        version, settings = weight._version, getattr(layer, "weight_settings", 0)
        return cls(
            layer, weight, weight.data_ptr(), version, settings, layer.eps, weight.untyped_storage()
        )

    def is_current(self) -> bool:
        weight = self.layer._parameters.get("weight")
        return bool(
            weight is self.weight
            and weight.data_ptr() == self.address
            and weight._version == self.version
            and getattr(self.layer, "weight_settings", 0) == self.settings
            and self.layer.eps == self.eps
        )

    def is_keepable(self) -> bool:
        return self.is_current() and not is_shared(self.weight)


Manners = dict[tuple[str, torch.dtype], tuple[Any, ...]]
"""By type of device and dtype of a weight: what besides the weight its result depends on."""


class _Kept(NamedTuple):
    manners: Manners
    sources: tuple[_Source, ...]
    results: dict[nn.Module, _Prepared]

    def serves(self, layers: Sequence[nn.Module], manners: Manners) -> bool:
        return (
            all(self.manners.get(kind) == manner for kind, manner in manners.items())
            and all(layer in self.results for layer in layers)
            and all(source.is_current() for source in self.sources)
        )


class PreparedWeights:
    """The standardized weights of one model; the model owns it, copies of the model start without any.

    Results that autograd records are computed in each forward pass. Others are kept, which costs one copy
    of the weights in the dtype of computation, and computed again when a parameter was changed in place (by
    ``load_state_dict``, ``copy_``...), stepped by an optimizer, replaced, moved or converted, or when the
    dtype, layout or backend asked for differs. :meth:`drop` forgets them; models call it when they are
    moved, converted or switched between training and evaluation.

    Writing through ``parameter.data`` or the array of ``parameter.detach().numpy()``, and the replay of a CUDA
    graph that trains, escape torch's own count of changes. After those call ``model.eval()``
    again, which drops what was kept.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedWeights:
        return PreparedWeights()

    def __reduce__(self) -> tuple[type[PreparedWeights], tuple[()]]:
        return PreparedWeights, ()

    def drop(self) -> None:
        """Forget what was kept, and free its memory."""
        self._kept = None

    def drop_if_from(self, weights: set[int]) -> None:
        """Forget what was kept if any of it comes from the parameters with these ids."""
        kept = self._kept
        if kept is not None and any(id(source.weight) in weights for source in kept.sources):
            self.drop()

    @contextmanager
    def prepared(self, layers: Sequence[Any], channels_last: bool) -> Iterator[None]:
        """Within the block, :func:`prepared_weight` serves these layers in this thread.

        Args:
            layers: Convolutions with an ``eps``. Those whose weight is computed or brought by somebody
                else when the layer is called (hooks, parametrizations, sharding) are left to themselves.
            channels_last: The layout of the results; else that of each weight.
        """
        outer = _current.by_layer
        _current.by_layer = {**outer, **self._prepare(layers, channels_last)}
        try:
            yield
        finally:
            _current.by_layer = outer

    def _prepare(self, layers: Sequence[Any], channels_last: bool) -> dict[nn.Module, _Prepared]:
        if runs_in_plain_pytorch():  # what is computed belongs to who transforms or traces the call
            return {}
        if torch.compiler.is_compiling():
            # A compiler sees the parameters, not whether they change: it computes them every time.
            together = [layer for layer in layers if standardizes_together(layer.weight)]
            return _standardize(together, channels_last)
        layers = [layer for layer in layers if _has_plain_weight(layer)]
        recorded = [
            layer for layer in layers if torch.is_grad_enabled() and layer.weight.requires_grad
        ]
        # Who records a weight is going to change it.
        self.drop_if_from({id(layer.weight) for layer in recorded})
        results = _standardize(
            [layer for layer in recorded if standardizes_together(layer.weight)], channels_last
        )
        keepable = [layer for layer in layers if layer not in set(recorded)]
        return results | self._keep(keepable, channels_last)

    def _keep(self, layers: Sequence[Any], channels_last: bool) -> dict[nn.Module, _Prepared]:
        """Return the kept results of these layers, after bringing them up to date."""
        for layer in layers:
            make_ordinary(layer.weight)
        layers = [layer for layer in layers if not layer.weight.is_inference()]
        if not layers:
            return {}
        manners = _manners(layers, channels_last)
        kept = self._kept
        if kept is not None and kept.serves(layers, manners):
            return kept.results
        sources = tuple(_Source.of(layer) for layer in layers)
        # Not as inference tensors: autograd could not save those if it uses these weights later.
        with torch.inference_mode(False), torch.no_grad():
            results = _standardize(layers, channels_last)
        if is_capturing():
            return results  # a replayed graph computes them again
        tensors = [prepared.result for prepared in results.values()]
        _wait_for(tensors)
        # A weight that another thread changed meanwhile, or that is not really there, is not kept; nor is one
        # that other processes may change.
        if all(source.is_keepable() for source in sources) and all(
            type(result) is Tensor for result in tensors
        ):
            watch_optimizers(self)
            self._kept = _Kept(manners, sources, results)
        return results


# ---- helpers --------------------------------------------------------------------------------------


def _standardize(layers: Sequence[Any], channels_last: bool) -> dict[nn.Module, _Prepared]:
    """Standardize the weights of these layers; a weight that several share, once."""
    by_eps: dict[float, list[Any]] = {}
    for layer in layers:
        by_eps.setdefault(layer.eps, []).append(layer)
    results: dict[nn.Module, _Prepared] = {}
    for eps, members in by_eps.items():
        weights = list(dict.fromkeys(layer.weight for layer in members))
        standardized = weight_standardization_all(weights, eps, channels_last=channels_last)
        by_weight = dict(zip(weights, standardized, strict=True))
        results |= {layer: _Prepared.of(layer, by_weight[layer.weight]) for layer in members}
    return results


def _has_plain_weight(layer: nn.Module) -> bool:
    """Say whether the layer's weight is there already, before the layer is called."""
    weight = layer._parameters.get("weight")
    return (
        type(weight) is nn.Parameter
        and not weight.is_meta
        and weight.dim() == 4
        and 0 not in weight.shape
        and not layer._forward_pre_hooks
        and "forward" not in layer.__dict__
        and not getattr(layer, "is_lent", False)
    )


def _manners(layers: Sequence[Any], channels_last: bool) -> Manners:
    """Return the backend, the autocast dtype and the layout for each kind of weight in these layers."""
    examples = {(layer.weight.device.type, layer.weight.dtype): layer.weight for layer in layers}
    return {
        kind: (select_backend(OP, *kind), autocast_dtype(weight), channels_last)
        for kind, weight in examples.items()
    }


def _wait_for(results: Any) -> None:
    """Wait until the results are there: other threads may use them on other streams."""
    for device in {result.device for result in results if result.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
