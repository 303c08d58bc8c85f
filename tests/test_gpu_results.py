"""What the documentation says of the first run on a GPU is what the report of that run says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bitfast.bench.rows import TIMED, Report, Row

ROOT = Path(__file__).parent.parent
REPORT = Report.read(ROOT / "bench/results/2026-11-26-h100-gpu-report.json")
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
SECTION = re.sub(r"\s+", " ", PAGE.partition("\n## NVIDIA H100\n")[2].partition("\n## ")[0])
NORMS, WEIGHTS = "group_norm_act", "weight_standardization_all"


def timed(op: str, contestant: str, text: str = "") -> list[Row]:
    rows = [
        row
        for row in REPORT.rows
        if (row.op, row.contestant, row.status) == (op, contestant, TIMED) and text in row.case
    ]
    assert rows
    return rows


def seconds_of(row: Row) -> float:
    assert row.seconds is not None
    return row.seconds


def test_where_it_ran() -> None:
    machine = REPORT.machine
    versions = machine["versions"]
    where = (
        f"{machine['gpu']}, torch {versions['torch']}, triton {versions['triton']}, "
        f"transformers {versions['transformers']}, commit {machine['commit']}"
    )
    assert where in SECTION


@pytest.mark.parametrize("pass_", ["inference", "training"])
def test_whole_models(pass_: str) -> None:
    lines = [
        line.strip("|").split("|")
        for line in PAGE.splitlines()
        if line.startswith(f"| {pass_} batch")
    ]
    stated = {case.strip().removeprefix(f"{pass_} "): cells for case, *cells in lines}
    assert {f"R50x1 224x224 {case}" for case in stated} == {r.case for r in timed(pass_, "bitfast")}
    names = ["transformers", "bitfast", "bitfast, CUDA graph"][: 3 if pass_ == "inference" else 2]
    for case, cells in stated.items():
        rows = [timed(pass_, name, f"224x224 {case}")[0] for name in names]
        theirs = seconds_of(rows[0])
        exact = [1e3 * theirs]
        for row in rows[1:]:
            exact += [1e3 * seconds_of(row), theirs / seconds_of(row)]
        numbers = [float(number) for number in re.findall(r"([\d.]+)(?: ms|x)", " ".join(cells))]
        assert numbers == pytest.approx(exact, rel=0.01)


def test_norms_beside_other_ways_to_compute_them() -> None:
    def times(contestant: str) -> dict[str, float]:
        found = timed(NORMS, contestant, " bfloat16")
        return {r.case: seconds_of(r) for r in found if "with" not in r.case and "+" not in r.case}

    ours, plain = times("bitfast"), times("plain PyTorch NCHW")
    ratios = [plain[case] / ours[case] for case in ours]
    low, high = min(ratios), max(ratios)
    assert f"in NCHW took {low:.1f} to {high:.1f} times as long as bitfast" in SECTION
    compiled = times("plain PyTorch compiled")
    assert all(compiled[case] < ours[case] for case in compiled)
    assert "code from `torch.compile` took less time than bitfast" in SECTION


def test_kernels() -> None:
    def ratios(op: str, text: str, unlike: str) -> str:
        found = [row.ratio for row in timed(op, "bitfast", text) if unlike not in row.case]
        return f"{min(r for r in found if r):.1f} to {max(r for r in found if r):.1f} times"

    norms = [r for r in timed(NORMS, "bitfast", " bfloat16") if not re.search(r"with|\+", r.case)]
    low, high = (function(row.ratio or 0.0 for row in norms) for function in (min, max))
    assert f"forward, in bfloat16: {low:.1f} to {high:.1f} times as fast" in SECTION
    assert f"in one launch: {ratios(WEIGHTS, 'R50x1', '+')} as fast" in SECTION
    assert f"with their backward pass {ratios(WEIGHTS, '+', 'nothing')}" in SECTION
