"""Steps lowered to calls: each knows its kernel, its constants and the places of what it reads and makes."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bitfast.blocks import check_summands
from bitfast.execution.setting import Setting
from bitfast.execution.shapes import Shape, shape_after
from bitfast.execution.steps import IMAGES, Convolve, Join, Step, last_reads
from bitfast.layers import DynamicPad2d

Places: TypeAlias = list[Any]
"""What a running program holds; values that are never alive together share a place."""

Call: TypeAlias = Callable[[Places], None]

INPUT, NOTHING, UNUSED, RESERVED = 0, 1, 2, 3
"""The first places: the program's input, None, what nobody reads, and the first that a lowering may reserve."""


class Program(NamedTuple):
    """Calls that compute the values of some steps, without gradients.

    Attributes:
        calls: In order. None of them decides anything.
        names: What each is, for people.
        places: How many places they need.
        outputs: The places of what is returned.
    """

    calls: tuple[Call, ...]
    names: tuple[str, ...]
    places: int
    outputs: tuple[int, ...]

    def execute(self, x: Tensor) -> list[Tensor]:
        """Return the outputs for an input."""
        places: Places = [None] * self.places
        places[INPUT] = x
        # Nobody below needs autograd, and each operator's question for it costs time.
        with torch._C._AutoDispatchBelowAutograd():
            for call in self.calls:
                call(places)
        return [places[place] for place in self.outputs]


class ProgramBuilder:
    """Lays out a program: where each value stands, how long, and who may overwrite it.

    A call reads its places before it writes to any, so that what a step reads for the last time may be buried
    before its result gets a place, and the result takes that.

    Args:
        steps: What the program computes; none of them calls a module.
        source: The value that it is given.
        shape: Of that.
        kept: The values that it returns.
        shared: Values that nothing may overwrite, because somebody else may see them.
        reserved: How many places the lowering uses for itself.
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
        """Note the shape of a step's result; return whether its branch differs from its shortcut in shape.

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
        """Return what pads the source of a convolution; None if nothing has to."""
        pad = step.convolution.pad
        if not isinstance(pad, DynamicPad2d):
            return None
        dtype = setting.dtype if step.source == IMAGES else setting.compute_dtype
        return pad.prepared(self.shapes[step.source], setting.device.type, dtype)

    def has(self, value: int) -> bool:
        """Whether a value has been computed and is still there."""
        return value in self._places

    def place(self, value: int) -> int:
        """Return where a value stands."""
        return self._places[value]

    def moments(self, value: int) -> int:
        """Return where the moments of a value stand, or where nothing does."""
        return self._moments.get(value, NOTHING)

    def new(self, value: int) -> int:
        """Give a value a place."""
        self._places[value] = place = self._new_place()
        return place

    def new_moments(self, value: int) -> int:
        """Give the moments of a value a place."""
        self._moments[value] = place = self._new_place()
        return place

    def _new_place(self) -> int:
        if self._free:
            return self._free.pop()
        self._size += 1
        return self._size - 1

    def move(self, value: int, other: int) -> int:
        """Let a value stand in the place of another, which it overwrites."""
        place = self._places.pop(other)
        self.free(other)
        self._places[value] = place
        return place

    def put(self, value: int, place: int) -> int:
        """Let a value stand where :meth:`take` has taken another away."""
        self._places[value] = place
        return place

    def take(self, value: int) -> int:
        """Take a value away and return its place, which nobody gets before it is put or freed."""
        return self._places.pop(value)

    def free_place(self, place: int) -> None:
        """Free a place that was taken."""
        self._free.append(place)

    def is_last_read(self, step: Step, value: int) -> bool:
        """Whether nobody reads a value after a step."""
        return value in self._dead[id(step)]

    def may_overwrite(self, step: Step, value: int) -> bool:
        """Whether a step may write over a value."""
        return self.is_last_read(step, value) and value not in self._shared

    def free_after(self, step: Step) -> None:
        """Free the places of what nobody reads after a step."""
        for value in self._dead[id(step)]:
            self.free(value)

    def free(self, value: int) -> None:
        """Free the places of a value and of its moments, if it has any."""
        self._free += [
            p for d in (self._places, self._moments) if (p := d.pop(value, None)) is not None
        ]

    def program(self) -> Program:
        """Return what was laid out."""
        outputs = tuple(self._places[value] for value in self._kept)
        return Program(tuple(self._calls), tuple(self._names), self._size, outputs)


__all__ = ["NOTHING", "RESERVED", "UNUSED", "Call", "Places", "Program", "ProgramBuilder"]
