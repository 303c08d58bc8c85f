"""The part of the lowering to a GPU that emits fused convolutions.

Such a convolution reads its source un-normalized, with the factors of the norm; adds the shortcut, in its
memory where that may be overwritten; and where the next norm is applied in reading, too, leaves partials, of
which the next launch makes factors. These numbers lie in one small tensor for the whole pass. Launches follow
each other on one stream, so each may overwrite the partials of the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from bitfast.execution.cuda_choice import cells_of, choose
from bitfast.execution.program import INPUT, Places, ProgramBuilder
from bitfast.execution.setting import Setting
from bitfast.execution.shapes import shapes_of
from bitfast.execution.steps import Block, Convolve, normalized
from bitfast.layers import WeightStandardizedConv2d
from bitfast.ops.norm_convolution import OP
from bitfast.ops.norm_convolution_cuda import (
    Convolution,
    PreparedConvolution,
    factors_shape,
    partials_shape,
    prepare_convolution,
    prepare_factors,
    prepare_partials,
    why_unsuited,
)

ALIGNMENT = 16
"""Bytes that addresses of feature maps are multiples of."""


class _Operands(NamedTuple):
    """Where a launch finds what it reads, and where it leaves partials.

    Attributes:
        x, factors, partials: Places, of a tensor and of two addresses.
        packed: The number of the filters among the weights.
    """

    x: int
    factors: int
    packed: int
    partials: int


class FusedConvolutions:
    """Emits the fused convolutions of a program, whose other steps somebody else emits.

    Args:
        blocks: All blocks of the program.
        builder: Of the program.
        setting: What the program is made for.
        stream: The place of the stream's handle.
        filters: The place of the addresses of all weights.
        number_of: Returns which of these is that of a convolution's packed filters.
        normalize: Emits the launch that normalizes the source of a step, where convolutions do not; returns the
            place of the result.

    Attributes:
        choices: How each convolution is computed.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        builder: ProgramBuilder,
        setting: Setting,
        stream: int,
        filters: int,
        number_of: Callable[[WeightStandardizedConv2d], int],
        normalize: Callable[[Convolve], int],
    ) -> None:
        steps = [step for block in blocks for step in block]
        self.input, self.is_aligned = steps[0].source, False
        self.shapes = shapes_of(steps, self.input, builder.shapes[self.input])
        self.dtype, self.device = setting.compute_dtype, setting.device
        self.prepared: dict[Convolution, PreparedConvolution] = {}
        is_demanded = dict(setting.demands).get(OP) == "native"
        self.choices = choose(blocks, self.shapes, self.dtype, is_demanded, self.why_refused)
        self.builder, self.stream, self.filters = builder, stream, filters
        self.number_of, self.normalize = number_of, normalize
        self.statistics = _Statistics(builder)
        self.factors: dict[int, int] = {}
        """The places of the addresses of factors, by the value that their norm is applied to."""
        self.computed: set[int] = set()
        """Results that the launch of an earlier convolution has computed."""

    def why_refused(self, convolution: Convolution) -> str | None:
        """Return why the kernels cannot do a convolution on this device; if they can, it is prepared."""
        reason = why_unsuited(convolution)
        if reason is not None or convolution in self.prepared:
            return reason
        try:
            self.prepared[convolution] = prepare_convolution(convolution, self.device)
        except RuntimeError as error:
            return f"the kernels refuse it: {error}"
        return None

    def begin(self, places: Places) -> None:
        """Put the addresses of partials and factors into their places, in the first call of a pass."""
        self.statistics.allocate(places, self.device)

    @property
    def is_needed(self) -> bool:
        """Whether any convolution is fused."""
        return any(choice.fuses for choice in self.choices.by_result.values())

    def convolve(self, step: Convolve) -> None:
        """Emit the calls of a fused convolution, unless an earlier one has computed its result."""
        if step.result in self.computed:
            self.free_after(step)
            return
        partner = self.choices.partners.get(step.result)
        main = step if partner is None else partner
        x, factors = self.read(step)
        convolution = self.choices.launches[main.result]
        prepared = self.prepared[convolution]
        partials = self.partials_of(convolution, prepared)
        operands = _Operands(x, factors, self.number_of(main.convolution), partials)
        if partner is not None:
            self.both(step, partner, prepared, operands)
        elif step.shortcut is None:
            self.alone(step, prepared, operands)
        else:
            self.add(step, step.shortcut, prepared, operands)
        if convolution.cell_channels:
            self.make_factors(main.result, prepared.strips)

    def free_after(self, step: Convolve) -> None:
        """Free the places, and the factors, of what no later step reads."""
        self.builder.free_after(step)
        if step.source in self.factors and self.builder.is_last_read(step, normalized(step.source)):
            self.statistics.free_factors(self.factors.pop(step.source))

    # ---- what is read -------------------------------------------------------------------------------------

    def read(self, step: Convolve) -> tuple[int, int]:
        """Return the places of what a step reads and of the address of its factors; emit what makes these."""
        if step.norm is None:
            return self.aligned(step.source), self.statistics.none
        if step.source not in self.choices.norms:
            return self.normalize(step), self.statistics.none
        source = self.aligned(step.source)
        if step.source not in self.factors:
            self.measure(step.source)
        return source, self.factors[step.source]

    def aligned(self, value: int) -> int:
        """Return the place of a value; the input of a program is copied first if the kernels cannot read it."""
        place = self.builder.place(value)
        if value == self.input and not self.is_aligned:
            self.is_aligned = True

            # What a hooked module returns may begin anywhere.
            def call(places: Places) -> None:
                x = places[INPUT]
                if x.data_ptr() % ALIGNMENT:
                    places[INPUT] = x.clone()

            self.builder.emit("align", call)
        return place

    # ---- partials and factors -------------------------------------------------------------------------------

    def partials_of(self, convolution: Convolution, prepared: PreparedConvolution) -> int:
        """Return the place of the address at which a convolution leaves its partials."""
        cell_channels = convolution.cell_channels
        if not cell_channels:
            return self.statistics.none
        images, channels, *_ = prepared.result_shape
        shape = partials_shape(images, prepared.strips, channels, cell_channels)
        return self.statistics.place_of_partials(prod(shape))

    def measure(self, value: int) -> None:
        """Emit the launches that make the factors of a value that no fused convolution has written."""
        stream, source, shape = self.stream, self.builder.place(value), self.shapes[value]
        cell_channels = cells_of(self.choices.norms[value], shape)
        run, strips = prepare_partials(shape, self.dtype, cell_channels, self.device)
        size = prod(partials_shape(shape[0], strips, shape[1], cell_channels))
        partials = self.statistics.place_of_partials(size)

        def call(places: Places) -> None:
            run(places[stream], places[source].data_ptr(), places[partials])

        self.builder.emit("partials", call)
        self.make_factors(value, strips)

    def make_factors(self, value: int, strips: int) -> None:
        """Emit the launch that makes the factors of a value's norm of the partials that were left last."""
        stream, partials = self.stream, self.statistics.partials
        images, channels, *_ = shape = self.shapes[value]
        norm = self.choices.norms[value]
        weight, bias, groups, eps, _ = norm.op_parameters()
        factors = self.statistics.place_of_factors(prod(factors_shape(images, channels)))
        self.factors[value] = factors
        run = prepare_factors(
            images, strips, channels, cells_of(norm, shape), groups, eps, weight.dtype, bias.dtype
        )  # fmt: skip
        addresses = weight.data_ptr(), bias.data_ptr()

        def call(places: Places) -> None:
            run(places[stream], places[partials], *addresses, places[factors])

        self.builder.emit("factors", call)

    # ---- launches -------------------------------------------------------------------------------------------

    def alone(self, step: Convolve, prepared: PreparedConvolution, operands: _Operands) -> None:
        """Emit a convolution with one result, which is not added to anything."""
        run, stream, filters = prepared.run, self.stream, self.filters
        source, factors, packed, partials = operands
        new = self.new(prepared.result_shape)
        self.free_after(step)
        result = self.builder.new(step.result)

        def call(places: Places) -> None:
            made = new()
            run(
                places[stream], places[source].data_ptr(), places[factors],
                places[filters][packed], 0, made.data_ptr(), places[partials], 0, 0,
            )  # fmt: skip
            places[result] = made

        self.builder.emit("norm_convolution", call)

    def add(
        self, step: Convolve, shortcut: int, prepared: PreparedConvolution, operands: _Operands
    ) -> None:
        """Emit a convolution that is added to the shortcut, in its memory if nobody else needs that."""
        run, stream, filters = prepared.run, self.stream, self.filters
        source, factors, packed, partials = operands
        new = self.new(prepared.result_shape)
        residual = self.aligned(shortcut)
        if self.builder.may_overwrite(step, shortcut) and shortcut != step.source:
            total = self.builder.move(step.result, shortcut)
            self.free_after(step)

            def call_in_place(places: Places) -> None:
                address = places[total].data_ptr()
                run(
                    places[stream], places[source].data_ptr(), places[factors],
                    places[filters][packed], address, address, places[partials], 0, 0,
                )  # fmt: skip

            self.builder.emit("norm_convolution_add_", call_in_place)
            return
        self.free_after(step)
        result = self.builder.new(step.result)

        def call(places: Places) -> None:
            made = new()
            run(
                places[stream], places[source].data_ptr(), places[factors],
                places[filters][packed], places[residual].data_ptr(), made.data_ptr(),
                places[partials], 0, 0,
            )  # fmt: skip
            places[result] = made

        self.builder.emit("norm_convolution_add", call)

    def both(
        self, step: Convolve, partner: Convolve, prepared: PreparedConvolution, operands: _Operands
    ) -> None:
        """Emit a launch that computes the result of a later convolution, and second that of this step."""
        run, stream, filters = prepared.run, self.stream, self.filters
        source, factors, packed, partials = operands
        second_packed = self.number_of(step.convolution)
        assert prepared.second_shape is not None
        new, new_second = self.new(prepared.result_shape), self.new(prepared.second_shape)
        self.builder.find_shape(partner)
        self.free_after(step)
        self.computed.add(partner.result)
        second, result = self.builder.new(step.result), self.builder.new(partner.result)

        def call(places: Places) -> None:
            made, second_made, addresses = new(), new_second(), places[filters]
            run(
                places[stream], places[source].data_ptr(), places[factors],
                addresses[packed], 0, made.data_ptr(), places[partials],
                addresses[second_packed], second_made.data_ptr(),
            )  # fmt: skip
            places[result], places[second] = made, second_made

        self.builder.emit("norm_convolution, twice", call)

    def new(self, shape: Sequence[int]) -> Callable[[], Tensor]:
        """Return a function that returns a new feature map of this shape."""
        return partial(
            torch.empty,
            shape,
            dtype=self.dtype,
            device=self.device,
            memory_format=torch.channels_last,
        )


class _Statistics:
    """Memory of a pass for the numbers that launches hand to later ones: one tensor of float32.

    Attributes:
        none: The place of the address of what is not there.
        partials: The place of the address of partials.
    """

    def __init__(self, builder: ProgramBuilder) -> None:
        self._builder = builder
        self._memory, self.none, self.partials = (builder.reserve() for _ in range(3))
        self._factors: list[int] = []
        self._free: list[int] = []
        self._size_of_partials = self._size_of_factors = 0

    def place_of_partials(self, count: int) -> int:
        """Return the place of the address of partials, which are to hold so many numbers."""
        self._size_of_partials = max(self._size_of_partials, _whole_lines(count))
        return self.partials

    def place_of_factors(self, count: int) -> int:
        """Return the place of an address of factors of so many numbers, which nobody else uses now."""
        self._size_of_factors = max(self._size_of_factors, _whole_lines(count))
        if not self._free:
            self._factors.append(self._builder.reserve())
            self._free.append(self._factors[-1])
        return self._free.pop()

    def free_factors(self, place: int) -> None:
        """Let others have the memory of factors, once all launches emitted so far have read them."""
        self._free.append(place)

    def allocate(self, places: Places, device: torch.device) -> None:
        """Allocate the memory of a pass, and put all addresses into their places."""
        places[self.none] = 0
        count = self._size_of_partials + len(self._factors) * self._size_of_factors
        memory = torch.empty(count, dtype=torch.float32, device=device)
        places[self._memory], address = memory, memory.data_ptr()
        places[self.partials] = address
        address += self._size_of_partials * memory.itemsize
        for place in self._factors:
            places[place] = address
            address += self._size_of_factors * memory.itemsize


def _whole_lines(count: int) -> int:
    """Return a multiple of 64 numbers, 256 bytes: the allocations of torch begin at such addresses."""
    return -(-count // 64) * 64


__all__ = ["FusedConvolutions"]
