"""``python -m bench.traffic``: kernel launches and bytes of the weights and norms of R50x1, as Markdown.

Counted, not measured: from the launches as they are planned for an H100, which say what each reads and
writes. Beside them stand the floor, which comes from the shapes alone, and the same work in plain PyTorch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod

import torch

from bitfast.kernels.launch import Launch

from .shapes import Dtypes, Norm, all_weights_launch, norm_launches, shapes_of
from .tables import table

NORMS, WEIGHTS = shapes_of("R50x1", 224)
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


@dataclass(frozen=True)
class Cost:
    """Launches, and bytes read and written."""

    launches: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.launches + other.launches, self.bytes + other.bytes)


@dataclass(frozen=True)
class Row:
    """One line of a table: what is done, at which batch size (0: it does not matter), at which cost."""

    work: str
    batch: int
    ours: Cost
    floor: int
    plain: Cost


Pass = tuple[Cost, int, Cost]
"""What one pass costs: ours, the floor in bytes, and plain PyTorch."""


def row(work: str, batch: int, passes: Iterable[Pass]) -> Row:
    """Return the sum over passes."""
    ours, floor, plain = zip(*passes, strict=True)
    return Row(work, batch, sum(ours, Cost()), sum(floor), sum(plain, Cost()))


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
    numel = sum(map(prod, WEIGHTS))
    parameters = 2 if backward else 1
    ours = cost_of([all_weights_launch(WEIGHTS, DTYPES, backward=backward)])
    if backward:  # the gradients are concatenated first
        ours += Cost(1, 2 * COMPUTE * numel)
    standardization, cast = (parameters + 1) * PARAMETER, PARAMETER + COMPUTE
    plain = Cost(2 * len(WEIGHTS), numel * (standardization + cast))
    return ours, numel * (parameters * PARAMETER + COMPUTE), plain


def weight_rows() -> list[Row]:
    """Return the rows of the weights, which do not depend on the batch."""
    forward, backward = weight_pass(False), weight_pass(True)
    return [
        Row("inference, weights kept", 0, Cost(), 0, forward[2]),
        row("training, forward", 0, [forward]),
        row("training, forward and backward", 0, [forward, backward]),
    ]


def norm_rows() -> list[Row]:
    """Return the rows of the norms."""
    rows = []
    for batch in BATCHES:
        forward, backward = norm_pass(batch, False), norm_pass(batch, True)
        rows.append(row("inference, or training forward", batch, [forward]))
        rows.append(row("training, forward and backward", batch, [forward, backward]))
    return rows


def markdown(rows: list[Row]) -> list[str]:
    """Return rows as a table."""

    def megabytes(count: int) -> str:
        return f"{count / 1e6:,.1f} MB" if count else "0"

    heads = ["pass", "batch", "launches", "bytes", "floor", "bytes / floor"]
    heads += ["plain launches", "plain bytes", "plain / floor"]
    lines = []
    for r in rows:
        ratios = [f"{c.bytes / r.floor:.2f}" if r.floor else "-" for c in (r.ours, r.plain)]
        ours = r.ours.launches, megabytes(r.ours.bytes), megabytes(r.floor), ratios[0]
        plain = r.plain.launches, megabytes(r.plain.bytes), ratios[1]
        lines.append((r.work, r.batch or "any", *ours, *plain))
    return table(heads, lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    weights, norms = weight_rows(), norm_rows()
    if parser.parse_args(arguments).json:
        tables = {"weights": [asdict(r) for r in weights], "norms": [asdict(r) for r in norms]}
        print(json.dumps(tables, indent=1))
        return
    lines = ["# Bytes and launches", "", *NOTES.splitlines(), ""]
    lines += ["## Weight preparation", "", *markdown(weights), ""]
    lines += ["## The 49 norms", "", *markdown(norms)]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
