"""A report as JSON, Markdown, charts, and in the README."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bitfast.bench import charts, readme
from bitfast.bench.cases import OURS, PLAIN
from bitfast.bench.limits import Limits
from bitfast.bench.report import documentation, markdown
from bitfast.bench.rows import EVERYBODY, FAILED, MISSING, SKIPPED, Report, Row

ROOT = Path(__file__).parent.parent


def model_row(contestant: str, milliseconds: float, dtype: str = "float32") -> Row:
    seconds = milliseconds / 1e3
    return Row(
        "model", "inference", "net batch 8", "cpu", 2, contestant, dtype, seconds=seconds, flops=10**9,
        quartiles=(0.9 * seconds, 1.1 * seconds), ratio=0.4 / seconds, ratio_quartiles=(0.95, 3.5),
        error=2.5e-6, allowed_error=1e-4, fraction=0.5, limit="arithmetic", first_result=1.25,
        peak_memory=700 * 2**20,
    )  # fmt: skip


def op_row(contestant: str, microseconds: float) -> Row:
    seconds = microseconds / 1e6
    return Row(
        "op", "group_norm_act", "8x64x7x7 float32 NCHW", "cpu", 2, contestant, "float32", is_quick=True,
        bytes=10**6,
        seconds=seconds, quartiles=(seconds, seconds), ratio=2.0, ratio_quartiles=(1.9, 2.1),
        error=1e-7, allowed_error=1e-6, fraction=0.25, limit="copy", note="backend: native",
    )  # fmt: skip


@pytest.fixture
def report() -> Report:
    rows = [
        model_row("transformers", 400),
        model_row("transformers bfloat16", 300, "bfloat16"),
        dataclasses.replace(
            model_row("transformers compiled", 1),
            status=FAILED,
            note="wrong | a\nlot",
            seconds=None,
        ),
        Row(
            "model",
            "inference",
            "net batch 8",
            "cpu",
            2,
            "OpenVINO",
            "float32",
            MISSING,
            "pip install openvino",
        ),
        model_row("bitfast", 100),
        model_row("bitfast bfloat16", 50, "bfloat16"),
        op_row(PLAIN, 200),
        op_row(f"{PLAIN} compiled", 150),
        op_row(OURS, 100),
    ]
    machine = {
        "date": "2026-01-02", "commit": "abc", "cpu": "a processor", "cores": 2, "capability": "AVX512",
        "system": "Linux", "load": 0.1, "versions": {"torch": "2.13.0", "triton": None},
    }  # fmt: skip
    limits = {2: Limits({"float32": 5e11, "bfloat16": 1e12}, 4e10, {"copy of 1 MiB": 4e10})}
    return Report(machine, limits, {"transformers": "4.56.2", "openvino": None}, rows)


def test_json_keeps_everything(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.write(path)
    assert list(tmp_path.iterdir()) == [path]
    read = Report.read(path)
    assert read.limits == report.limits
    assert markdown(read) == markdown(report)


def test_an_older_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"machine": {}, "rows": []}')
    with pytest.raises(ValueError, match=r"old\.json is not of format 3"):
        Report.read(path)


def test_markdown(report: Report) -> None:
    text = markdown(report)
    assert "a processor (2 cores, AVX512), 2026-01-02, commit abc" in text
    assert "torch 2.13.0, transformers 4.56.2." in text
    assert "Not installed: openvino." in text
    assert "500 GFLOP/s in float32, 1000 GFLOP/s in bfloat16, copying 40.0 GB/s" in text
    assert "## inference: net batch 8, 2 threads" in text
    lines = text.splitlines()
    assert (
        "| **bitfast** | 100 ms (90-110) | 4.00x (0.95-3.50) | 50 % (10 GFLOP/s) | 2.5e-06 | 1.2 s | 700 MiB |"
        in lines
    )
    assert "| OpenVINO | not installed | | | | | pip install openvino |" in lines
    assert "| transformers compiled | failed | | | | | wrong / a lot |" in lines
    assert (
        "| group_norm_act | 8x64x7x7 float32 NCHW | 200 us (200-200) | 100 us (100-100) "
        "| 2.00x (1.90-2.10) | 25 % (10 GB/s) | 1.0e-07, 1.0e-07 | native "
        "| plain PyTorch compiled 150 us, 2.00x |" in lines
    )
    # Every line of a table has as many cells as its head.
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables} == {8, 10}


def test_fused_convolutions_have_a_table_of_their_own(report: Report) -> None:
    about = ("op", "norm_convolution", "128x64x56x56 1x1", "cuda", 0)
    report.rows += [
        Row(
            *about, OURS, "bfloat16", seconds=2e-4, quartiles=(2e-4, 2e-4), ratio=4.0, fraction=0.8,
            limit="copy", bytes=500_000_000, flops=13_200_000_000, error=1e-3, note="backend: native",
        ),
        Row(*about, f"{OURS}, with the factors", "bfloat16", FAILED, "statistics: wrong"),
        Row("op", "norm_convolution", "another", "cuda", 0, EVERYBODY, "bfloat16", SKIPPED, "no GPU"),
    ]  # fmt: skip
    lines = markdown(report).splitlines()
    assert (
        "| 128x64x56x56 1x1 | **bitfast** | 200 us | 4.00x | 2500 | 66 | 80 % (copy) | 1.0e-03 | |"
        in lines
    )
    assert (
        "| 128x64x56x56 1x1 | **bitfast, with the factors** | failed | | | | | | statistics: wrong |"
        in lines
    )
    assert "| another | all | skipped | | | | | | no GPU |" in lines
    assert sum("128x64x56x56" in line for line in lines) == 2


def test_charts(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    paths = charts.draw(report, tmp_path / "charts")
    assert [path.name for path in paths] == [
        "inference-net-batch-8-2-threads.png",
        "op-group_norm_act.png",
    ]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert path.stat().st_size > 5000


# ---- the documentation ------------------------------------------------------------------------------


def test_the_documentation_says_what_its_json_says() -> None:
    assert [page.relative_to(ROOT) for page in readme.PAGES] == [
        Path("README.md"),
        Path("docs/performance.md"),
    ]
    assert readme.main(["--check"]) == 0, "run make readme-table"


def test_tables_of_the_documentation(report: Report) -> None:
    lines = documentation(report)
    assert "| | transformers | transformers compiled | OpenVINO | **bitfast** |" in lines
    assert (
        "| inference: net batch 8, 2 threads, float32 "
        "| 400 ms, 1.00x | failed | not installed | 100 ms, 4.00x |" in lines
    )
    assert (
        "| inference: net batch 8, 2 threads, bfloat16 | 300 ms, 1.33x | | | 50 ms, 8.00x |"
        in lines
    )
    assert (
        "| group_norm_act: 8x64x7x7 float32 NCHW | 200 us | 100 us | 2.00x (1.90-2.10) | 25 % |"
        in lines
    )


def test_a_page_that_disagrees_is_renewed(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.write(tmp_path / "new.json")
    page = tmp_path / "page.md"
    line = readme.Line(
        "a net", "inference: net batch 8, 2 threads", "transformers bfloat16", "bitfast bfloat16"
    )
    monkeypatch.setattr(readme, "FOLDER", tmp_path)
    monkeypatch.setattr(readme, "PAGES", [page])
    monkeypatch.setattr(readme, "SUMMARY", [line])
    old = (
        "before\n<!-- benchmark: new.json -->\n| 1 |\n<!-- end -->\nbetween\n"
        "<!-- summary: new.json new.json -->\n<!-- end -->\nafter\n"
    )
    page.write_text(old)
    assert readme.main(["--check"]) == 1
    assert page.read_text() == old
    assert readme.main([]) == 0
    assert readme.main(["--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- benchmark: new.json -->\na processor")
    assert "\n| a net | CPU, 2 threads | 300 ms | 50 ms | 6.00x |\n<!-- end -->\nafter\n" in text
    with pytest.raises(ValueError, match="no <!-- benchmark"):
        readme.renew("nothing")
