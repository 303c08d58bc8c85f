"""The filters of resize_normalize on a device: computed and copied there once for each line of pixels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from bitfast.ops.staging import upload

MOST_NUMBERS = 2**23
"""When a device holds so many numbers of one filter, it forgets them, and begins anew with those in use."""

FEWEST_NUMBERS = 2**16
"""What memory is reserved for at first."""

FIELDS = (
    "in_size", "out_size", "first", "count", "starts", "weights", "taps", "first_input", "end_of_inputs",
)  # fmt: skip
"""The fields of a line: its size before and after, the first output that is wanted, and how many; where its
``count`` starts and its weights (taps, count) begin among all numbers; how many inputs each output has, and the
range of the inputs that are read."""


class Plan(NamedTuple):
    """What ``bitfast::resize_plan.native`` returns.

    Attributes:
        tables: The tables of both passes, on the CPU: bytes.
        between: The buffer between the passes, on the device.
        places: Where the tables are (first segments, first programs, second segments, second programs), and how
            many programs either pass has.
        missing: Lines whose filters are unknown, four numbers each. If there are any, the rest is empty.
    """

    tables: Tensor
    between: Tensor
    places: list[int]
    missing: list[int]


class Filters(NamedTuple):
    """Lines whose filters are on a device.

    Attributes:
        table: int64 (lines, FIELDS), on the CPU.
        numbers: int32, on the device: their starts and weights, the first ``used`` of them.
    """

    table: Tensor
    numbers: Tensor
    used: int


class FilterStore:
    """The filters on one device of all lines that have been asked for. Threads may share it.

    What a call has got stays as it is while others add more: lines are only ever added behind it.
    """

    def __init__(self, resample: int, device: torch.device) -> None:
        self._resample, self._device = resample, device
        self._lock = threading.Lock()
        self._latest = self._nothing()

    def plan(self, make: Callable[[Tensor], Plan]) -> tuple[Plan, Tensor]:
        """Return a plan, and the numbers of filters that it refers to.

        Args:
            make: Returns the plan, given a table of known lines.
        """
        known = self._latest
        plan = make(known.table)
        if not plan.missing:
            return plan, known.numbers
        with self._lock:
            known = self._latest if self._latest.used <= MOST_NUMBERS else self._nothing()
            missing = make(known.table).missing  # another thread may have added some
            if missing:
                known = self._latest = self._with_more(known, missing)
        return make(known.table), known.numbers

    def _nothing(self) -> Filters:
        with torch.inference_mode(False):  # they outlive the mode they are made in
            table = torch.empty((0, len(FIELDS)), dtype=torch.int64, device="cpu")
            numbers = torch.empty(FEWEST_NUMBERS, dtype=torch.int32, device=self._device)
        return Filters(table, numbers, 0)

    def _with_more(self, known: Filters, lines: list[int]) -> Filters:
        with torch.inference_mode(False):
            table, more = torch.ops.bitfast.resize_filters.native(
                known.table, lines, self._resample, known.used
            )
            numbers, used = known.numbers, known.used + more.numel()
            if used > numbers.numel():
                numbers = numbers.new_empty(max(used, 2 * numbers.numel()))
                numbers[: known.used] = known.numbers[: known.used]
            # On the stream that it is read on: kernels that were launched before do not read here.
            numbers[known.used : used] = upload([more], self._device)[0]
        return Filters(table, numbers, used)


@lru_cache(maxsize=16)
def filter_store(resample: int, device: torch.device, stream: int) -> FilterStore:
    """Return the filters of a kind on a device. On another stream their copy may not be done yet."""
    return FilterStore(resample, device)
