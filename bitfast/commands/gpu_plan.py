"""What ``bitfast env --plan`` says: which convolutions a GPU computes fused with their norms, and why.

The choices are arithmetic on shapes (:mod:`bitfast.execution.cuda_choice`): no GPU is needed to see them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from bitfast.configuration import BitConfig
from bitfast.execution.cuda_choice import choose
from bitfast.execution.program import Choice
from bitfast.execution.shapes import shapes_of
from bitfast.execution.steps import IMAGES, Convolve
from bitfast.modeling import BitModel

BATCHES = (1, 8, 128)

IMAGE = (3, 224, 224)

DTYPE = torch.bfloat16

TITLE = (
    "Convolutions of R50x1 at 224x224 in bfloat16 that would be fused with norms on a GPU, if the native\n"
    "norm_convolution were enabled there"
)


def describe() -> list[dict[str, Any]]:
    """Return what is chosen for R50x1, ready for JSON: one row for blocks in a row that are alike."""
    with torch.device("meta"):
        model = BitModel(BitConfig()).eval().to(DTYPE)
    steps = model.plans.steps(model)
    assert steps is not None
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        shapes = shapes_of(steps.all(), IMAGES, (batch, *IMAGE))
        chosen = choose(steps.blocks(), shapes, DTYPE, is_demanded=False).by_result
        for stage, blocks in enumerate(steps.stages, 1):
            members = [
                _summary([chosen[step.result] for step in block if isinstance(step, Convolve)])
                for block in blocks
            ]
            last = 0
            for summary, alike in itertools.groupby(members):
                first, last = last + 1, last + len(list(alike))
                rows.append({"batch": batch, "stage": stage, "blocks": [first, last], **summary})
    return rows


def _summary(choices: Sequence[Choice]) -> dict[str, Any]:
    """Return what the row of a block says about its convolutions."""
    count = sum(choice.fuses for choice in choices)
    words = {0: "none", len(choices): "all"}
    return {
        "fused": words.get(count, f"{count} of {len(choices)}"),
        "reasons": list(dict.fromkeys(choice.reason for choice in choices)),
        "shares_a_launch": any(choice.shared for choice in choices),
    }


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return what :func:`describe` returned, for people."""
    lines = [TITLE]
    for batch, members in itertools.groupby(rows, lambda row: row["batch"]):
        lines.append(f"  batch {batch}")
        lines += [f"    {_line(row)}" for row in members]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    first, last = row["blocks"]
    blocks = f"block {first}" if first == last else f"blocks {first}-{last}"
    shared = ["the first and the shortcut's share a launch"] if row["shares_a_launch"] else []
    reasons = "; ".join([*row["reasons"], *shared])
    return f"stage {row['stage']}, {blocks:<10}  {row['fused']:<6}  {reasons}"


__all__ = ["as_text", "describe"]
