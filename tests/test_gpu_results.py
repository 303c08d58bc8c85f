"""What the documentation says of the first run on a GPU is what the report of that run says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
REPORT = json.loads((ROOT / "bench/results/2026-11-26-h100-gpu-report.json").read_text())
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
SECTION = re.sub(r"\s+", " ", PAGE.partition("\n## NVIDIA H100\n")[2].partition("\n## ")[0])


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
    assert where in SECTION


@pytest.mark.parametrize("pass_", ["inference", "training"])
def test_whole_models(pass_: str) -> None:
    lines = [
        line.strip("|").split("|")
        for line in PAGE.splitlines()
        if line.startswith(f"| {pass_} batch")
    ]
    stated = {case.strip(): cells for case, *cells in lines}
    rows = [row for row in measured("models_eager", "bitfast eager") if pass_ in row["case"]]
    assert {f"R50x1 {case}" for case in stated} == {row["case"] for row in rows}
    for case, cells in stated.items():
        names = ("transformers eager", "bitfast eager", "bitfast, CUDA graph")
        contestants = [name for name, cell in zip(names, cells, strict=True) if cell.strip()]
        assert len(contestants) == (3 if pass_ == "inference" else 2)
        seconds = [
            measured("models_eager", name, case=f"R50x1 {case}")[0]["seconds"]
            for name in contestants
        ]
        exact = [1e3 * seconds[0]]
        for own in seconds[1:]:
            exact += [1e3 * own, seconds[0] / own]
        numbers = [float(number) for number in re.findall(r"([\d.]+)(?: ms|x)", " ".join(cells))]
        assert numbers == pytest.approx(exact, rel=0.01)


def test_norms_beside_other_ways_to_compute_them() -> None:
    def times(contestant: str) -> dict[str, float]:
        found = measured("group_norm_act", contestant, form="forward", dtype="bfloat16")
        return {row["case"]: row["seconds"] for row in found}

    ours, plain = times("bitfast"), times("torch eager, NCHW")
    ratios = [plain[case] / ours[case] for case in ours]
    low, high = min(ratios), max(ratios)
    assert f"in NCHW took {low:.1f} to {high:.1f} times as long as bitfast" in SECTION
    compiled = times("torch compiled, channels_last")
    assert all(compiled[case] < ours[case] for case in compiled)
    assert "code from `torch.compile` took less time than bitfast" in SECTION


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
        ("norms, forward, in bfloat16: {} to {} times", norms),
        ("in one launch: {} to {} times", forward),
        ("with their backward pass {} to {} times", backward),
    ):
        low, high = (f"{function(ratios):.1f}" for function in (min, max))
        assert words.format(low, high) in SECTION, (low, high)
