"""Weight standardization in Triton: of one weight, and of all weights of a model in one launch.

For all weights a table drives the grid: a row per weight holds its address and how it is computed, a row per
program which filters of which weight it computes. The results are in one buffer. The kernels are in
``weight_standardization_tiles``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import weight_standardization_tiles as kernels
from .device_cache import DeviceCache
from .launch import Launch, ceil_div, prepare

WARPS = 8
"""Per program: 32 numbers of a tile in each thread."""

BACKWARD_WARPS = 16
"""Per program: 16 numbers of each of two tiles."""

SEGMENT_FIELDS = ("address", "first_filter", "start", "rows", "inner", "taps", "kind")


class Tile(NamedTuple):
    """One KIND: how many filters a program computes, and the size of a filter that it can hold in registers.

    ``is_looped``: it reads a filter of any size in a loop.
    """

    rows: int
    inner: int
    taps: int
    is_turned: bool
    is_looped: bool = False


KINDS = (
    Tile(32, 256, 1, False),
    Tile(8, 1024, 1, False),
    Tile(2, 4096, 1, False),
    Tile(1, 8192, 1, False),
    Tile(1, 256, 16, True),
    Tile(1, 512, 16, True),
    Tile(1, 0, 0, False, is_looped=True),
    Tile(1, 0, 0, True, is_looped=True),
)
"""In the order of the kernels' numbers."""


class Filters(NamedTuple):
    """A weight as the kernels see it: ``rows`` filters of ``inner * taps`` numbers.

    ``taps`` is 1 if the result keeps the order of the parameter, whatever the size of the filters.
    """

    rows: int
    inner: int
    taps: int

    @property
    def fan_in(self) -> int:
        """Numbers in a filter."""
        return self.inner * self.taps

    @property
    def numel(self) -> int:
        """Numbers in the weight."""
        return self.rows * self.fan_in


def filters_of(weight: Tensor, to_channels_last: bool) -> Filters:
    """Describe a weight (out, in, height, width) that is dense, contiguous or channels_last.

    Args:
        weight: The parameter.
        to_channels_last: The result is channels_last; else it has the layout of ``weight``.
    """
    rows, inner, height, width = weight.shape
    if to_channels_last and weight.is_contiguous() and inner > 1:
        return Filters(rows, inner, height * width)
    return Filters(rows, inner * height * width, 1)


def kind_of(filters: Filters, is_aligned: bool = True) -> int:
    """Return the number of the first KIND that can work on such filters.

    Args:
        filters: Their number and size.
        is_aligned: The weight begins at a multiple of 16 bytes. Triton finds that out by itself where it
            is given the weight, not where a table holds its address.
    """
    is_turned = filters.taps > 1
    # Wide loads and stores need rows that begin at multiples of 16 bytes too.
    is_aligned = is_aligned and filters.inner % 16 == 0
    for number, tile in enumerate(KINDS):
        fits = filters.inner <= tile.inner and filters.taps <= tile.taps and is_aligned
        if tile.is_turned == is_turned and (tile.is_looped or fits):
            return number
    raise AssertionError("unreachable: a loop takes any filter")


# ---- one weight -----------------------------------------------------------------------------------


def forward_launch(
    weight: Tensor,
    eps: float,
    to_channels_last: bool,
    *,
    result: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> Launch:
    """Return the launch that fills ``result``, in its own dtype, and the statistics (out,), float32."""
    filters = filters_of(weight, to_channels_last)
    kind = kind_of(filters)
    return Launch(
        kernels.forward_kernel,
        ceil_div(filters.rows, KINDS[kind].rows),
        {
            "weight": weight, "result": result, "mean": mean, "rstd": rstd,
            "rows": filters.rows, "inner": filters.inner, "taps": filters.taps, "eps": eps,
        },
        {"KIND": kind, "ROWS": KINDS[kind].rows},
        WARPS,
        weight.nbytes,
        result.nbytes + mean.nbytes + rstd.nbytes,
    )  # fmt: skip


def backward_launch(
    grad: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    from_channels_last: bool,
    *,
    grad_weight: Tensor,
) -> Launch:
    """Return the launch that fills ``grad_weight``, which has the layout and dtype of ``weight``.

    ``from_channels_last`` says that ``grad`` is channels_last; else it has the layout of ``weight``.
    """
    filters = filters_of(weight, from_channels_last)
    kind = kind_of(filters)
    return Launch(
        kernels.backward_kernel,
        ceil_div(filters.rows, KINDS[kind].rows),
        {
            "grad": grad, "weight": weight, "mean": mean, "rstd": rstd, "grad_weight": grad_weight,
            "rows": filters.rows, "inner": filters.inner, "taps": filters.taps,
        },
        {"KIND": kind, "ROWS": KINDS[kind].rows},
        BACKWARD_WARPS,
        grad.nbytes + weight.nbytes + mean.nbytes + rstd.nbytes,
        grad_weight.nbytes,
    )  # fmt: skip


# ---- all weights ----------------------------------------------------------------------------------


class Table(NamedTuple):
    """The table that drives the one launch: (weights, 7) int64 and (programs, 2) int32, on the device."""

    segments: Tensor
    programs: Tensor


def table_of(
    weights: Sequence[Tensor], starts: Sequence[int], to_channels_last: bool
) -> Table | None:
    """Return the table for these weights, which is built once as long as their addresses and shapes stay.

    None if it is not built yet, and cannot be because a CUDA graph is being recorded.

    Args:
        weights: Dense, contiguous or channels_last.
        starts: Where each begins in the buffer of results: a multiple of 16 elements.
        to_channels_last: The results are channels_last; else they have the layouts of the weights.
    """
    filters = tuple(filters_of(weight, to_channels_last) for weight in weights)
    addresses = tuple(weight.data_ptr() for weight in weights)
    return table_at(filters, addresses, tuple(starts), weights[0].device)


def table_at(
    filters: tuple[Filters, ...],
    addresses: tuple[int, ...],
    starts: tuple[int, ...],
    device: torch.device,
) -> Table | None:
    """Return :func:`table_of` for weights of which filters and addresses are known."""
    return _tables.get(filters, addresses, starts, device)


def _new_table(
    filters: tuple[Filters, ...],
    addresses: tuple[int, ...],
    starts: tuple[int, ...],
    device: torch.device,
) -> Table:
    segments, programs = [], []
    first_filter = 0
    for number, (f, address, start) in enumerate(zip(filters, addresses, starts, strict=True)):
        kind = kind_of(f, address % 16 == 0)
        segments.append((address, first_filter, start, f.rows, f.inner, f.taps, kind))
        programs += [(number, row) for row in range(0, f.rows, KINDS[kind].rows)]
        first_filter += f.rows
    # Long filters first: the last programs to finish should be short ones.
    programs.sort(key=lambda program: -filters[program[0]].fan_in)
    return Table(
        torch.tensor(segments, dtype=torch.int64, device=device),
        torch.tensor(programs, dtype=torch.int32, device=device),
    )


_tables = DeviceCache(_new_table, most=256)


def forward_all_launches(
    weights: Sequence[Tensor],
    starts: Sequence[int],
    eps: float,
    to_channels_last: bool,
    *,
    result: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> list[Launch]:
    """Return the one launch of :func:`forward_all_launch`; without a table, one for each weight."""
    table = table_of(weights, starts, to_channels_last)
    if table is not None:
        return [forward_all_launch(table, weights, eps, result=result, mean=mean, rstd=rstd)]
    return [
        forward_launch(
            weight, eps, to_channels_last, result=result[place], mean=mean[rows], rstd=rstd[rows]
        )
        for weight, place, rows in _in_turn(weights, starts)
    ]


def backward_all_launches(
    grad: Tensor,
    weights: Sequence[Tensor],
    starts: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    from_channels_last: bool,
    *,
    grad_weight: Tensor,
) -> list[Launch]:
    """Return the one launch of :func:`backward_all_launch`; without a table, one for each weight."""
    table = table_of(weights, starts, from_channels_last)
    if table is not None:
        return [backward_all_launch(table, grad, weights, mean, rstd, grad_weight=grad_weight)]
    return [
        backward_launch(
            grad[place], weight, mean[rows], rstd[rows], from_channels_last, grad_weight=grad_weight[place]
        )
        for weight, place, rows in _in_turn(weights, starts)
    ]  # fmt: skip


def _in_turn(
    weights: Sequence[Tensor], starts: Sequence[int]
) -> Iterator[tuple[Tensor, slice, slice]]:
    """Yield each weight, its place in a buffer of all, and its filters among all."""
    first_filter = 0
    for weight, start in zip(weights, starts, strict=True):
        end = first_filter + weight.shape[0]
        yield weight, slice(start, start + weight.numel()), slice(first_filter, end)
        first_filter = end


def forward_all_launch(
    table: Table,
    weights: Sequence[Tensor],
    eps: float,
    *,
    result: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> Launch:
    """Return the launch that fills the buffer ``result`` and the statistics of all filters.

    Args:
        table: Of ``weights``.
        weights: Of one dtype, on one device.
        eps: Added to each variance.
        result: The buffer, of any dtype.
        mean, rstd: One per filter, float32.
    """
    numel = sum(weight.numel() for weight in weights)
    return Launch(
        kernels.forward_all_kernel,
        table.programs.shape[0],
        {
            "programs": table.programs, "segments": table.segments, "like": weights[0],
            "result": result, "mean": mean, "rstd": rstd, "eps": eps,
        },
        {"FIELDS": len(SEGMENT_FIELDS)},
        WARPS,
        numel * weights[0].element_size() + table.segments.nbytes + table.programs.nbytes,
        numel * result.element_size() + mean.nbytes + rstd.nbytes,
    )  # fmt: skip


def backward_all_launch(
    table: Table,
    grad: Tensor,
    weights: Sequence[Tensor],
    mean: Tensor,
    rstd: Tensor,
    *,
    grad_weight: Tensor,
) -> Launch:
    """Return the launch that fills the buffer ``grad_weight``, weight after weight as in ``grad``."""
    numel = sum(weight.numel() for weight in weights)
    return Launch(
        kernels.backward_all_kernel,
        table.programs.shape[0],
        {
            "programs": table.programs, "segments": table.segments, "grad": grad,
            "like": weights[0], "mean": mean, "rstd": rstd, "grad_weight": grad_weight,
        },
        {"FIELDS": len(SEGMENT_FIELDS)},
        BACKWARD_WARPS,
        numel * (weights[0].element_size() + grad.element_size()) + 2 * mean.nbytes
        + table.segments.nbytes + table.programs.nbytes,
        numel * weights[0].element_size(),
    )  # fmt: skip


# ---- all weights, prepared ------------------------------------------------------------------------


def prepare_forward_all(
    table: Table, dtype: torch.dtype, result_dtype: torch.dtype, eps: float
) -> Callable[[int, Table, int, int, int], None]:
    """Return a function that launches :func:`forward_all_launch`, prepared.

    It takes the stream, a table, and the addresses of result, mean and rstd, multiples of 16 bytes. The table's
    device must be the current one, now and at each call, and the stream its current stream (see
    ``launch.PreparedLaunch``).

    Args:
        table: A table of as many programs as those of the calls.
        dtype: Of the weights.
        result_dtype: Of the results.
        eps: Added to each variance.
    """
    like, result, statistic = _examples(dtype, result_dtype, torch.float32)
    launch = prepare(
        forward_all_launch(table, [like], eps, result=result, mean=statistic, rstd=statistic)
    )

    def run(stream: int, table: Table, result: int, mean: int, rstd: int) -> None:
        segments, programs = table
        launch(stream, programs.data_ptr(), segments.data_ptr(), 0, result, mean, rstd)

    return run


def prepare_backward_all(
    table: Table, dtype: torch.dtype, grad_dtype: torch.dtype
) -> Callable[[int, Table, int, int, int, int], None]:
    """Return a function that launches :func:`backward_all_launch`, prepared; see :func:`prepare_forward_all`.

    It takes the stream, a table, and the addresses of grad, mean, rstd and grad_weight.
    """
    like, grad, statistic = _examples(dtype, grad_dtype, torch.float32)
    launch = prepare(
        backward_all_launch(table, grad, [like], statistic, statistic, grad_weight=like)
    )

    def run(stream: int, table: Table, grad: int, mean: int, rstd: int, grad_weight: int) -> None:
        segments, programs = table
        launch(stream, programs.data_ptr(), segments.data_ptr(), grad, 0, mean, rstd, grad_weight)

    return run


def _examples(*dtypes: torch.dtype) -> list[Tensor]:
    return [torch.empty(16, dtype=dtype, device="meta") for dtype in dtypes]
