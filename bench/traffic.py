"""``python -m bench.traffic``: kernel launches and bytes of the weights and norms of R50x1, as Markdown.

Counted, not measured: from the launches as they are planned for an H100, which say what each reads and
writes. Beside them stand the floor, which comes from the shapes alone, and the same work in plain PyTorch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from math import prod
from typing import Any, NamedTuple

import torch

from bitfast.kernels.launch import Launch

from .shapes import (
    Dtypes,
    Norm,
    all_weights_launch,
    norm_launches,
    shapes_of,
)

MODEL, IMAGE_SIZE = "R50x1", 224
BATCHES = (1, 8, 128)
DTYPES = Dtypes(compute=torch.bfloat16, parameter=torch.float32)
COMPUTE, PARAMETER = DTYPES.compute.itemsize, DTYPES.parameter.itemsize
"""Bytes per element."""

NOTES = """\
R50x1 at 224x224, channels_last, bfloat16 with float32 parameters, launches as planned for an H100. Written
by `python -m bench.traffic > bench/TRAFFIC.md`: counted from the launches, not measured.

- **bytes**: what must come from and go to device memory. A launch that reads a tensor twice counts it once
  where its plan keeps it in registers or in the L2 cache, and two launches that read it count it twice.
- **floor**: every tensor read once and written once, from the shapes alone. Of a norm: x, the residual, the sum
  and the result; backward, the gradients of the result, of the sum where it is used elsewhere too, and of
  x, and x. Numbers per channel and group are left out.
- **plain PyTorch**: one launch per op, each reading its inputs once and writing its output once, which
  favours it: `group_norm` takes several launches and reads x twice where x exceeds the cache, and autocast
  runs it in float32. Per norm: add (with a residual), group_norm, relu; backward, those of relu and
  group_norm, and the addition of two gradients where the sum is used twice. Per weight: the
  standardization in float32 (as `batch_norm`) and the cast to bfloat16; backward, those of both. Without
  a cache, inference does this in every pass.
- The backward pass of the weights begins with a concatenation of the 53 gradients, which torch does in one
  launch (`torch.cat`); it is counted among ours, and not in the floor. Not counted on either side: changes of
  layout that convolutions ask for.
"""


class Cost(NamedTuple):
    """Launches, and bytes read and written."""

    launches: int = 0
    bytes: int = 0

    def __add__(self, other: Any) -> Cost:
        return Cost(self.launches + other.launches, self.bytes + other.bytes)


def total(costs: Iterable[Cost]) -> Cost:
    """Return the sum."""
    return sum(costs, Cost())


class Row(NamedTuple):
    """One line of a table: what is done, at which batch size (0: it does not matter), at which cost."""

    work: str
    batch: int
    ours: Cost
    floor: int
    plain: Cost


# ---- norms ----------------------------------------------------------------------------------------


def cost_of(launches: Iterable[Launch]) -> Cost:
    """Return what launches cost by their own account."""
    return total(Cost(1, launch.reads + launch.writes) for launch in launches)


def norm_floor(norm: Norm, batch: int, backward: bool) -> int:
    """Return the bytes of the feature maps that one norm reads or writes, each counted once."""
    maps = 3 + norm.is_sum_used if backward else 2 + 2 * norm.has_residual
    return maps * batch * norm.numel * COMPUTE


def plain_norm(norm: Norm, batch: int, backward: bool) -> Cost:
    """Return what add, group_norm and relu cost as ops of their own."""
    forward_ops = [3] * norm.has_residual + [2, 2]
    maps_per_op = [3, 3] + [3] * norm.is_sum_used if backward else forward_ops
    return Cost(len(maps_per_op), sum(maps_per_op) * batch * norm.numel * COMPUTE)


def norm_row(work: str, batch: int, passes: tuple[bool, ...]) -> Row:
    """Return the row of all norms; ``passes`` says of each pass whether it is the backward one."""
    each = [(norm, backward) for norm in shapes_of(MODEL, IMAGE_SIZE).norms for backward in passes]
    return Row(
        work,
        batch,
        total(cost_of(norm_launches(n, batch, DTYPES, backward=backward)) for n, backward in each),
        sum(norm_floor(norm, batch, backward) for norm, backward in each),
        total(plain_norm(norm, batch, backward) for norm, backward in each),
    )


# ---- weights --------------------------------------------------------------------------------------


def weight_floor(backward: bool) -> int:
    """Return the bytes of all weights and their results or gradients, each counted once."""
    numel = sum(prod(shape) for shape in shapes_of(MODEL, IMAGE_SIZE).weights)
    return numel * (2 * PARAMETER + COMPUTE if backward else PARAMETER + COMPUTE)


def plain_weights(backward: bool) -> Cost:
    """Return what standardization and cast, layer by layer, cost as ops of their own."""
    shapes = shapes_of(MODEL, IMAGE_SIZE).weights
    numel = sum(prod(shape) for shape in shapes)
    standardization = (3 if backward else 2) * PARAMETER
    return Cost(2 * len(shapes), numel * (standardization + PARAMETER + COMPUTE))


def our_weights(backward: bool) -> Cost:
    """Return what the one launch costs; backward, with the concatenation of the gradients before it."""
    shapes = shapes_of(MODEL, IMAGE_SIZE).weights
    cost = cost_of([all_weights_launch(shapes, DTYPES, backward=backward)])
    if backward:
        cost += Cost(1, 2 * COMPUTE * sum(prod(shape) for shape in shapes))
    return cost


def weight_row(work: str, passes: tuple[bool, ...]) -> Row:
    """Return the row of all weights; ``passes`` says of each pass whether it is the backward one."""
    return Row(
        work,
        0,
        total(our_weights(backward) for backward in passes),
        sum(weight_floor(backward) for backward in passes),
        total(plain_weights(backward) for backward in passes),
    )


# ---- the tables -----------------------------------------------------------------------------------


def weight_rows() -> list[Row]:
    """Return the rows of the weights, which do not depend on the batch."""
    cached = Row("inference, weights kept", 0, Cost(), 0, plain_weights(False))
    forward = weight_row("training, forward", (False,))
    return [cached, forward, weight_row("training, forward and backward", (False, True))]


def norm_rows() -> list[Row]:
    """Return the rows of the norms."""
    return [
        row
        for batch in BATCHES
        for row in (
            norm_row("inference, or training forward", batch, (False,)),
            norm_row("training, forward and backward", batch, (False, True)),
        )
    ]


def table(rows: list[Row]) -> str:
    """Return rows as a Markdown table."""
    lines = [
        "| pass | batch | launches | bytes | floor | bytes / floor | plain launches | plain bytes |"
        " plain / floor |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.work} | {row.batch or 'any'} | {row.ours.launches} | {megabytes(row.ours.bytes)}"
            f" | {megabytes(row.floor)} | {ratio(row.ours.bytes, row.floor)} | {row.plain.launches}"
            f" | {megabytes(row.plain.bytes)} | {ratio(row.plain.bytes, row.floor)} |"
        )
    return "\n".join(lines)


def megabytes(count: int) -> str:
    """Return a number of bytes in megabytes."""
    return f"{count / 1e6:,.1f} MB" if count else "0"


def ratio(count: int, floor: int) -> str:
    """Return how far a number of bytes is above the floor."""
    return f"{count / floor:.2f}" if floor else "-"


def markdown() -> str:
    """Return the whole page."""
    sections = ["# Bytes and launches", NOTES.rstrip()]
    sections += ["## Weight preparation", table(weight_rows())]
    sections += ["## The 49 norms", table(norm_rows())]
    return "\n\n".join(sections)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    options = parser.parse_args(arguments)
    if options.json:
        tables = {"weights": weight_rows(), "norms": norm_rows()}
        print(
            json.dumps({name: [as_json(row) for row in t] for name, t in tables.items()}, indent=1)
        )
    else:
        print(markdown())


def as_json(row: Row) -> dict[str, Any]:
    """Return a row with names."""
    return {**row._asdict(), "ours": row.ours._asdict(), "plain": row.plain._asdict()}


if __name__ == "__main__":
    main()
