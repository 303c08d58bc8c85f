"""What the plans of a network consist of."""

from __future__ import annotations

from typing import Any

from torch import nn

from bitfast.execution.plan import Plan
from bitfast.execution.program import Program


def plans_of(network: Any) -> list[Plan]:
    """The plans that were made since the network was read last, oldest first."""
    reading = network.plans._reading
    return [] if reading is None else list(reading.plans.values())


def programs_of(plan: Plan) -> list[Program]:
    """Those for one slice of the images, where they go through in slices."""
    programs: list[Program] = []
    for part in plan.parts:
        adapted = getattr(part, "_programs", {}).values()
        programs += [each.program for each in (part, *adapted) if hasattr(each, "program")]
    return programs


def names_of(plan: Plan) -> list[str]:
    """What the plan's programs call."""
    return [name for program in programs_of(plan) for name in program.names]


def called_by(plan: Plan) -> list[nn.Module]:
    """The modules that are called as they are."""
    return [part.module for part in plan.parts if hasattr(part, "module")]
