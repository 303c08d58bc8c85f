"""Programs: steps lowered to calls that know their kernel, its constants and the places of its operands."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bitfast.blocks import check_summands
from bitfast.execution.setting import Setting
from bitfast.execution.shapes import Shape, shape_after
from bitfast.execution.steps import IMAGES, Convolve, Join, Step, last_reads
from bitfast.layers import DynamicPad2d

Places: TypeAlias = list[Any]
"""The values of a program under execution. Values that are never needed together share a place."""

Call: TypeAlias = Callable[[Places], None]
"""One call of a program: reads from some places and writes to others."""

INPUT, NOTHING, UNUSED, RESERVED = 0, 1, 2, 3
"""The first places: the input, None, results that nobody reads, and the first that a lowering may reserve."""


class Choice(NamedTuple):
    """How a convolution is computed.

    Attributes:
        fuses: Whether it is fused with the norms around it.
        reason: Why.
        shared: With which other convolution it shares a launch, and why; empty if it has its own.
    """

    fuses: bool
    reason: str
    shared: str = ""


class Program(NamedTuple):
    """Calls that compute the values of some steps, without gradients.

    Attributes:
        calls: In order.
        names: What each call does, for people.
        places: How many places they need.
        outputs: The places of the values that are returned.
        takes_any_layout: Whether the input may have any strides; else it must be channels_last.
        choices: How convolutions are computed, by the value that they compute, where the lowering chooses.
    """

    calls: tuple[Call, ...]
    names: tuple[str, ...]
    places: int
    outputs: tuple[int, ...]
    takes_any_layout: bool = False
    choices: Mapping[int, Choice] = {}

    def execute(self, x: Tensor) -> list[Tensor]:
        """Return the outputs for an input."""
        places: Places = [None] * self.places
        places[INPUT] = x
        # No gradients are recorded here, and each operator would spend time to find that out.
        with torch._C._AutoDispatchBelowAutograd():
            for call in self.calls:
                call(places)
        return [places[place] for place in self.outputs]


class ProgramBuilder:
    """Builds a program: gives each value a place as long as it is needed, and says which may be overwritten.

    A call reads its places before it writes to any. So what a step reads for the last time may be freed before
    its result gets a place, and the result may get that very place.

    Args:
        steps: What the program computes; none of them calls a module.
        source: The number of the value that the program is given.
        shape: The shape of that value.
        kept: The values that the program returns.
        shared: Values that must not be overwritten, because others may hold them.
        reserved: How many places the lowering uses for itself.

    Attributes:
        takes_any_layout: Set by a lowering whose calls take the input in any layout, not only channels_last.
        choices: Set by a lowering that chooses; see :class:`Program`.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        source: int,
        shape: Shape,
        kept: Sequence[int],
        shared: Container[int],
        reserved: int = 0,
    ) -> None:
        self.shapes: dict[int, Shape] = {source: shape}
        self.takes_any_layout = False
        self.choices: Mapping[int, Choice] = {}
        self._kept = kept
        self._shared = shared
        self._calls: list[Call] = []
        self._names: list[str] = []
        self._places: dict[int, int] = {source: INPUT}
        self._moments: dict[int, int] = {}
        self._free: list[int] = []
        self._size = RESERVED + reserved
        self._dead = dict(zip(map(id, steps), last_reads(steps, set(kept)), strict=True))

    def emit(self, name: str, call: Call) -> None:
        """Append a call."""
        self._calls.append(call)
        self._names.append(name)

    def find_shape(self, step: Step) -> bool:
        """Note the shape of a step's result; return whether its branch and its shortcut differ in shape.

        Raises:
            ValueError: They cannot be added.
        """
        shape = shape_after(step, self.shapes[step.source])
        is_uneven = False
        if isinstance(step, (Convolve, Join)) and step.shortcut is not None:
            shortcut = self.shapes[step.shortcut]
            if shape != shortcut:  # somebody has changed a convolution
                check_summands(shape, shortcut)
                is_uneven, shape = True, shortcut
        self.shapes[step.result] = shape
        return is_uneven

    def pad_before(self, step: Convolve, setting: Setting) -> Callable[[Tensor], Tensor] | None:
        """Return a function that pads the source of a convolution; None if it needs no padding."""
        pad = step.convolution.pad
        if not isinstance(pad, DynamicPad2d):
            return None
        dtype = setting.dtype if step.source == IMAGES else setting.compute_dtype
        return pad.prepared(self.shapes[step.source], setting.device.type, dtype)

    def has(self, value: int) -> bool:
        """Whether a value has been computed and still has its place."""
        return value in self._places

    def place(self, value: int) -> int:
        """Return the place of a value."""
        return self._places[value]

    def moments(self, value: int) -> int:
        """Return the place of a value's moments; :data:`NOTHING` (which holds None) if there are none."""
        return self._moments.get(value, NOTHING)

    def new(self, value: int) -> int:
        """Give a value a new place; return it."""
        self._places[value] = place = self._new_place()
        return place

    def new_moments(self, value: int) -> int:
        """Give the moments of a value a new place; return it."""
        self._moments[value] = place = self._new_place()
        return place

    def reserve(self) -> int:
        """Return a place that no value gets, for the lowering itself."""
        self._size += 1
        return self._size - 1

    def _new_place(self) -> int:
        return self._free.pop() if self._free else self.reserve()

    def move(self, value: int, other: int) -> int:
        """Give a value the place of another, which it overwrites; return it."""
        place = self._places.pop(other)
        self.free(other)
        self._places[value] = place
        return place

    def put(self, value: int, place: int) -> int:
        """Give a value a place that :meth:`take` has returned; return it."""
        self._places[value] = place
        return place

    def take(self, value: int) -> int:
        """Remove a value and return its place, which is not given away before it is freed."""
        return self._places.pop(value)

    def free_place(self, place: int) -> None:
        """Free a place that :meth:`take` has returned."""
        self._free.append(place)

    def is_last_read(self, step: Step, value: int) -> bool:
        """Whether no later step reads a value."""
        return value in self._dead[id(step)]

    def may_overwrite(self, step: Step, value: int) -> bool:
        """Whether a step may write over a value."""
        return self.is_last_read(step, value) and value not in self._shared

    def free_after(self, step: Step) -> None:
        """Free the places of the values that no later step reads."""
        for value in self._dead[id(step)]:
            self.free(value)

    def free(self, value: int) -> None:
        """Free the places of a value and of its moments, if it has any."""
        self._free += [
            p for d in (self._places, self._moments) if (p := d.pop(value, None)) is not None
        ]

    def program(self) -> Program:
        """Return the program."""
        outputs = tuple(self._places[value] for value in self._kept)
        return Program(
            tuple(self._calls), tuple(self._names), self._size, outputs, self.takes_any_layout, self.choices
        )  # fmt: skip


__all__ = ["NOTHING", "RESERVED", "UNUSED", "Call", "Choice", "Places", "Program", "ProgramBuilder"]
