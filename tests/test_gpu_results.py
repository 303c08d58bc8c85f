"""What the README says of the first run on a GPU is what the report of that run says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
REPORT = json.loads((ROOT / "bench/results/2026-11-26-h100-gpu-report.json").read_text())
FIRST_SCREEN = re.sub(r"\s+", " ", (ROOT / "README.md").read_text().partition("\n## ")[0])


def measured(part: str, contestant: str, **values: Any) -> list[dict[str, Any]]:
    rows = [
        row
        for row in REPORT["rows"]
        if row["part"] == part
        and row["contestant"] == contestant
        and row["status"] == "measured"
        and all(row.get(name) == value for name, value in values.items())
    ]
    assert rows
    return rows


def test_where_it_ran() -> None:
    environment = REPORT["environment"]
    versions = environment["versions"]
    where = (
        f"{environment['cuda']['devices'][0]['name']}, torch {versions['torch']}, triton"
        f" {versions['triton']}, transformers {versions['transformers']}, commit {environment['commit']}"
    )
    assert where in FIRST_SCREEN


@pytest.mark.parametrize(
    ("batch", "row"),
    [
        (128, "17.4 ms | | eager 22.1 ms, in a CUDA graph 8.5 ms | 0.79x, 2.04x"),
        (1, "8.2 ms | | eager 12.4 ms, in a CUDA graph 0.56 ms | 0.66x, 14.6x"),
    ],
)
def test_whole_models(batch: int, row: str) -> None:
    case = f"R50x1 inference batch {batch} bfloat16"
    names = ("transformers eager", "bitfast eager", "bitfast, CUDA graph")
    theirs, eager, graph = (measured("models_eager", name, case=case)[0] for name in names)
    milliseconds = [1e3 * found["seconds"] for found in (theirs, eager, graph)]
    ratios = [theirs["seconds"] / found["seconds"] for found in (eager, graph)]
    stated = [float(number) for number in re.findall(r"([\d.]+)(?: ms|x)", row)]
    for number, exact in zip(stated, [*milliseconds, *ratios], strict=True):
        assert number == pytest.approx(exact, rel=0.01)
    assert row in FIRST_SCREEN


def test_norms_beside_other_ways_to_compute_them() -> None:
    def times(contestant: str) -> dict[str, float]:
        found = measured("group_norm_act", contestant, form="forward", dtype="bfloat16")
        return {row["case"]: row["seconds"] for row in found}

    ours, plain = times("bitfast"), times("torch eager, NCHW")
    ratios = [plain[case] / ours[case] for case in ours]
    assert (
        f"in NCHW took {min(ratios):.1f} to {max(ratios):.1f} times as long as ours" in FIRST_SCREEN
    )
    compiled = times("torch compiled, channels_last")
    assert all(compiled[case] < ours[case] for case in compiled)
    assert "`torch.compile`'s less than ours" in FIRST_SCREEN


def test_kernels() -> None:
    norms = [
        row["ratio"]
        for row in measured("group_norm_act", "bitfast", form="forward", dtype="bfloat16")
    ]
    forward, backward = (
        [
            row["ratio"]
            for row in measured("weight_standardization", "bitfast, one launch", form=form)
        ]
        for form in ("forward", "forward+backward")
    )
    for words, ratios in (
        ("norms {} to {} times", norms),
        ("in one launch {} to {} times", forward),
        ("with their backward {} to {} times", backward),
    ):
        low, high = (f"{function(ratios):.1f}" for function in (min, max))
        assert words.format(low, high) in FIRST_SCREEN, (low, high)
