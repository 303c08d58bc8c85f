"""Which convolutions are fused with norms on a GPU, and why: arithmetic on shapes."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest
import torch

from bitfast import BitConfig, BitModel, cli
from bitfast.execution.cuda_choice import TABLE, Choices, Facts, choose
from bitfast.execution.shapes import shapes_of
from bitfast.execution.steps import IMAGES, Convolve, Steps


@lru_cache
def steps_of(**settings: Any) -> Steps:
    with torch.device("meta"):
        model = BitModel(BitConfig(**settings)).eval().bfloat16()
    steps = model.plans.steps(model)
    assert steps is not None
    return steps


def choices_of(
    batch: int, size: int = 224, dtype: torch.dtype = torch.bfloat16, is_demanded: bool = False, **settings: Any
) -> tuple[Steps, Choices]:  # fmt: skip
    steps = steps_of(**settings)
    shapes = shapes_of(steps.all(), IMAGES, (batch, 3, size, size))
    return steps, choose(steps.blocks(), shapes, dtype, is_demanded)


def fused_stages(steps: Steps, choices: Choices) -> list[int]:
    """The stages all of whose convolutions are fused; those of the others are not, none of them."""
    found = []
    for number, blocks in enumerate(steps.stages, 1):
        members = [s for block in blocks for s in block if isinstance(s, Convolve)]
        fused = {choices.fuses(step) for step in members}
        assert len(fused) == 1
        found += [number] if fused == {True} else []
    return found


@pytest.mark.parametrize(
    ("batch", "size", "stages"),
    [(1, 224, []), (8, 224, [1, 2]), (128, 224, [1, 2]), (1, 448, [1]), (4096, 64, [1, 2]), (1, 1024, [1, 2])],
)  # fmt: skip
def test_large_maps_bound_by_memory_are_fused(batch, size, stages) -> None:
    assert fused_stages(*choices_of(batch, size)) == stages


def test_wide_models_are_bound_by_the_tensor_cores() -> None:
    wide = {"embedding_size": 192, "hidden_sizes": (768, 1536, 3072, 6144)}
    assert fused_stages(*choices_of(128, **wide)) == []


def test_a_demand_fuses_all_that_a_kernel_can_do() -> None:
    steps, choices = choices_of(1, is_demanded=True)
    assert fused_stages(steps, choices) == [1, 2, 3, 4]
    (stem,) = (s for s in steps.stem if isinstance(s, Convolve))
    assert choices.by_result[stem.result] == (False, "it reads the images", "")
    # The norms in front of all but the last, which is applied to the result of the network.
    assert len(choices.norms) == 3 * 16


def test_only_the_first_shortcut_shares_a_launch() -> None:
    """Others have another stride than the first convolution of their block."""
    steps, choices = choices_of(8)
    block = steps.stages[0][0]
    assert choices.partners == {block[0].result: block[1]}
    shared = {value: choice.shared for value, choice in choices.by_result.items() if choice.shared}
    assert shared == {
        block[
            0
        ].result: "in one launch with the block's first, so that what both read is read once",
        block[1].result: "in one launch with the shortcut's, so that what both read is read once",
    }


def test_what_no_launch_normalizes() -> None:
    """The last fused block's result is normalized by a launch: its readers are cuDNN's."""
    steps, choices = choices_of(8)
    border = steps.outputs[2]
    assert border not in choices.norms
    fused = [s for s in steps.all() if isinstance(s, Convolve) and choices.fuses(s)]
    assert {s.source for s in fused} == set(choices.norms)


def test_every_row_can_decide() -> None:
    facts = [
        Facts("there is no kernel", True, 1, 1.0),
        Facts(None, True, 1, 1000.0),
        Facts(None, False, 65, 1.0),
        Facts(None, False, 66, 151.0),
        Facts(None, False, 66, 150.0),
    ]
    assert [next(n for n, row in enumerate(TABLE) if row.holds(f)) for f in facts] == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_env_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--plan"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    at = lines.index("batch 128")
    assert lines[at + 1] == (
        "stage 1, block 1     all     its block is bound by memory, at 64 FLOPs a byte: norms of their own"
        " would cross it twice more; the first and the shortcut's share a launch"
    )
    assert lines[at + 8].startswith(
        "stage 4, blocks 2-3  none    its block is bound by the tensor cores, at 544"
    )
    assert cli.main(["env", "--plan", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["plan"]
    assert rows[0] == {
        "batch": 1, "stage": 1, "blocks": [1, 3], "fused": "none", "shares_a_launch": False,
        "reasons": ["too few tiles of 64 pixels for 132 multiprocessors: a map of its block has 49"],
    }  # fmt: skip
