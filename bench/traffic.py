"""``python -m bench.traffic``: kernel launches and bytes of the weights and norms of R50x1, as Markdown."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from math import prod
from operator import add
from typing import Any

import torch

from bitfast.kernels.launch import Launch

from .shapes import Dtypes, Norm, all_weights_launch, norm_launches, shapes_of
from .tables import table

NORMS, WEIGHTS = shapes_of("R50x1", 224)
BATCHES = (1, 8, 128)
DTYPES = Dtypes(compute=torch.bfloat16, parameter=torch.float32)
COMPUTE, PARAMETER = DTYPES.compute.itemsize, DTYPES.parameter.itemsize
"""Bytes per element."""

PAGE = """\
# Bytes and launches

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

## Weight preparation

{}

## The 49 norms

{}"""


@dataclass(frozen=True)
class Cost:
    """Launches, and bytes read and written."""

    launches: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.launches + other.launches, self.bytes + other.bytes)


Pass = tuple[Cost, int, Cost]
"""What one pass costs: ours, the floor in bytes, and plain PyTorch."""


@dataclass(frozen=True)
class Row:
    """One line of a table: what is done, at which batch size (0: it does not matter), at which cost."""

    work: str
    batch: int
    ours: Cost
    floor: int
    plain: Cost


def cost_of(launches: Iterable[Launch]) -> Cost:
    """Return what launches cost by their own account."""
    return sum((Cost(1, launch.reads + launch.writes) for launch in launches), Cost())


def norm_floor(norm: Norm, batch: int, backward: bool) -> int:
    """Return the bytes of the feature maps that one norm reads or writes, each counted once."""
    maps = 3 + norm.is_sum_used if backward else 2 + 2 * norm.has_residual
    return maps * batch * norm.numel * COMPUTE


def norm_pass(batch: int, backward: bool) -> Pass:
    """Return what all norms cost; in plain PyTorch as add, group_norm and relu."""
    ours, floor, plain = Cost(), 0, Cost()
    for norm in NORMS:
        ours += cost_of(norm_launches(norm, batch, DTYPES, backward=backward))
        floor += norm_floor(norm, batch, backward)
        forward = [3] * norm.has_residual + [2, 2]
        maps_per_op = [3, 3] + [3] * norm.is_sum_used if backward else forward
        plain += Cost(len(maps_per_op), sum(maps_per_op) * batch * norm.numel * COMPUTE)
    return ours, floor, plain


def weight_pass(backward: bool) -> Pass:
    """Return what all weights cost; in plain PyTorch standardized and cast layer by layer."""
    numel, parameters = sum(map(prod, WEIGHTS)), (1 + backward) * PARAMETER
    ours = cost_of([all_weights_launch(WEIGHTS, DTYPES, backward=backward)])
    if backward:  # the gradients are concatenated first
        ours += Cost(1, 2 * COMPUTE * numel)
    standardization, cast = parameters + PARAMETER, PARAMETER + COMPUTE
    plain = Cost(2 * len(WEIGHTS), numel * (standardization + cast))
    return ours, numel * (parameters + COMPUTE), plain


def training_rows(forward_only: str, batch: int, cost_of_pass: Callable[[bool], Pass]) -> list[Row]:
    """Return the row of the forward pass, and that of both passes."""
    forward = cost_of_pass(False)
    both: Any = map(add, forward, cost_of_pass(True))
    return [Row(forward_only, batch, *forward), Row("training, forward and backward", batch, *both)]


def weight_rows() -> list[Row]:
    """Return the rows of the weights, which do not depend on the batch."""
    kept = Row("inference, weights kept", 0, Cost(), 0, weight_pass(False)[2])
    return [kept, *training_rows("training, forward", 0, weight_pass)]


def norm_rows() -> list[Row]:
    forward = "inference, or training forward"
    rows = (training_rows(forward, batch, partial(norm_pass, batch)) for batch in BATCHES)
    return list(chain(*rows))


def markdown(rows: list[Row]) -> str:
    heads = ["pass", "batch", "launches", "bytes", "floor", "bytes / floor"]
    heads += ["plain launches", "plain bytes", "plain / floor"]
    lines = []
    for r in rows:
        sizes = (r.ours.bytes, r.floor, r.plain.bytes)
        ours, floor, plain = (f"{size / 1e6:,.1f} MB" if size else "0" for size in sizes)
        ratios = [f"{c.bytes / r.floor:.2f}" if r.floor else "-" for c in (r.ours, r.plain)]
        cells = [r.ours.launches, ours, floor, ratios[0], r.plain.launches, plain, ratios[1]]
        lines.append((r.work, r.batch or "any", *cells))
    return "\n".join(table(heads, lines))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    tables = {"weights": weight_rows(), "norms": norm_rows()}
    if parser.parse_args(arguments).json:
        print(json.dumps(tables, default=asdict, indent=1))
    else:
        print(PAGE.format(*map(markdown, tables.values())))


if __name__ == "__main__":
    main()
