"""The plans of a network, by setting. A plan is kept as long as modules and parameters stay unchanged."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import getitem, is_
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from bitfast.execution.graph import (
    CudaRecording,
    GraphedPlan,
    Recorder,
    is_recorded_by_others,
    may_replay,
)
from bitfast.execution.guard import StructureGuard, outer_modules
from bitfast.execution.plan import Plan, Request, make_plan
from bitfast.execution.setting import Setting
from bitfast.execution.shapes import Shape, shapes_of
from bitfast.execution.steps import IMAGES, Steps, steps_of
from bitfast.watching import is_every_module_watched

MOST_PLANS = 16
"""Plans that a network keeps, those made last; those that run as CUDA graphs do not count."""

MOST_GRAPHS = 8
"""Settings of a network that run as CUDA graphs, at most."""

PlanKey: TypeAlias = tuple[Setting, Request]


class _Reading(NamedTuple):
    """A network as it was read, and the plans that were made of it."""

    steps: Steps | None
    structure: StructureGuard
    recomputations: list[Any]
    plans: OrderedDict[PlanKey, Plan]
    owners: tuple[list[dict[str, Any]], list[str]]
    """Where the network's parameters are: for each, the dictionary that holds it, and its name there."""


_numbers = itertools.count()
_all_plans: weakref.WeakValueDictionary[str, Plans] = weakref.WeakValueDictionary()


def plans_named(name: str) -> Plans:
    """Return the plans of that name. Compiled programs refer to a network by it."""
    plans = _all_plans.get(name)
    if plans is None:
        raise RuntimeError(
            f"the network of this compiled program ({name}) is gone; compile it again"
        )
    return plans


class Plans:
    """The plans of one network. A copy of the network starts without any.

    Attributes:
        name: Unique among the networks of this process.
        slice_bytes: See :func:`~bitfast.execution.plan.make_plan`; of the plans that are made from now on.

    Args:
        network: A ``ForwardPass``.
        recorder: Records plans as graphs.
    """

    def __init__(self, network: Any, recorder: Recorder = CudaRecording) -> None:
        self.name = f"network {next(_numbers)}"
        _all_plans[self.name] = self
        self.slice_bytes: int | None = None
        self._network = weakref.ref(network)
        self._reading: _Reading | None = None
        self._lock = threading.Lock()
        self._recorder = recorder
        self._recorded: list[PlanKey] | None = None
        self._graphed: OrderedDict[PlanKey, None] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def clear(self) -> None:
        """Forget all plans, and free their memory."""
        self._reading = None

    @property
    def network(self) -> Any:
        """The network."""
        return self._network()

    def is_current(self) -> bool:
        """Whether the network's modules are what they were when it was read last."""
        reading = self._reading
        return reading is not None and reading.structure.holds()

    def made(self) -> list[Plan]:
        """Return the plans that were made since the network was read last, oldest first."""
        reading = self._reading
        return [] if reading is None else list(reading.plans.values())

    def steps(self, network: Any) -> Steps | None:
        """Return the steps of the network; None if a module around the stages has to be called."""
        # Read anew: a compiler guards what it reads, hooks of the whole process leave no trace in the modules,
        # and a replica (as of DataParallel) has modules of its own.
        is_temporary = torch.compiler.is_compiling() or is_every_module_watched()
        if is_temporary or self._network() is not network:
            return _steps_of(network)
        return self._read(network).steps

    def read(self, network: Any) -> Steps | None:
        """Return the steps as they were read last; a compiler that traces this does not guard what was read."""
        return self._read(network).steps

    def shapes(self, request: Request, images: Shape) -> list[Shape]:
        """Return the shapes of the wanted outputs, and of the result unless it is one of them."""
        reading = self._reading
        assert reading is not None
        assert reading.steps is not None
        steps = reading.steps.up_to(request.last, (), request.is_normed)
        shapes = shapes_of(steps.all(), IMAGES, images)
        values = [steps.outputs[number] for number in request.wanted]
        return [shapes[value] for value in dict.fromkeys([*values, steps.result])]

    def are_parameters(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the parameters of the network, in order."""
        owners = self._read(self._network()).owners
        return all(map(is_, tensors, map(getitem, *owners)))

    def _read(self, network: Any) -> _Reading:
        recomputations = list(map(_recomputation, network.stages_in_order()))
        reading = self._reading
        if (
            reading is None
            or reading.recomputations != recomputations
            or not reading.structure.holds()
        ):
            steps = _steps_of(network)
            stem, stages = network.stem_and_stages()
            norm = network.final_norm()
            outer = outer_modules(network, [stem, *stages, norm])
            inner = (
                [module for part in (stem, *stages, norm) for module in part.modules()]
                if steps is None
                else [*steps.read, *steps.unusual]
            )
            reading = _Reading(
                steps, StructureGuard(inner, outer), recomputations, OrderedDict(), _owners(network)
            )
            self._reading = reading
        return reading

    def find(
        self, network: Any, images: Tensor, setting: Setting, request: Request
    ) -> Plan | GraphedPlan | None:
        """Return the plan for a setting and a request, made if need be; None if there cannot be one.

        Raises:
            TypeError, ValueError: The network cannot take such images.
        """
        if self._network() is not network:
            return None
        reading = self._read(network)
        key = setting, request
        plan = reading.plans.get(key)
        if plan is None or not plan.holds():
            if is_recorded_by_others():  # what a plan keeps must not lie in that graph's memory
                return None
            plan = make_plan(network, reading.steps, images, setting, request, self.slice_bytes)
            if plan is None:
                return None
            self._keep(reading.plans, key, plan)
        if plan.calls_modules:  # a graph would call them only once, while it is recorded
            return plan
        if self._recorded is not None:
            self._add_graph(reading, key)
        if key in self._graphed and may_replay():
            return plan.graphed(images, self._recorder)
        return plan

    def _keep(self, plans: OrderedDict[PlanKey, Plan], key: PlanKey, plan: Plan) -> None:
        with self._lock:
            plans[key] = plan
            plans.move_to_end(key)
            if len(plans) > MOST_PLANS + len(self._graphed):
                plans.pop(next(k for k in plans if k not in self._graphed))

    # ---- CUDA graphs -----------------------------------------------------------------------------------

    @contextmanager
    def recording(self) -> Iterator[list[PlanKey]]:
        """Within the block, let every setting that the network meets run as a CUDA graph from then on.

        Yields:
            The settings and requests met so far.
        """
        recorded: list[PlanKey] = []
        self._recorded = recorded
        try:
            yield recorded
        finally:
            self._recorded = None

    def _add_graph(self, reading: _Reading, key: PlanKey) -> None:
        with self._lock:
            assert self._recorded is not None
            self._recorded.append(key)
            self._graphed[key] = None
            self._graphed.move_to_end(key)
            if len(self._graphed) > MOST_GRAPHS:
                oldest, _ = self._graphed.popitem(last=False)
                reading.plans.pop(oldest, None)

    def release_graphs(self) -> None:
        """Let no setting run as a CUDA graph any more."""
        with self._lock:
            self._graphed.clear()
        self.clear()


def _owners(network: nn.Module) -> tuple[list[dict[str, Any]], list[str]]:
    owners, names, seen = [], [], set()
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                owners.append(module._parameters)
                names.append(name)
    return owners, names


def _recomputation(stage: Any) -> Any:
    return getattr(stage, "recomputation", None)


def _steps_of(network: Any) -> Steps | None:
    stem, stages = network.stem_and_stages()
    return steps_of(stem, stages, network.final_norm(), network.containers())


__all__ = ["Plans", "plans_named"]
