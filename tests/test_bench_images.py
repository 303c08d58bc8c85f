"""Image processors as contestants: checked, then timed, and listed if what they need is missing."""

from __future__ import annotations

import pytest

from bitfast import BitImageProcessor
from bitfast.bench import images, peers
from bitfast.bench.images import FAST, OURS, OURS_FAST, PILLOW, SLOW, ImageCase
from bitfast.bench.report import image_table
from bitfast.bench.rows import FAILED, MISSING, TIMED, Row

TWO = ImageCase("512x512", 2, 1)


def run(case: ImageCase = TWO) -> dict[str, Row]:
    return {row.contestant: row for row in images.run(case, 1)}


def test_a_contest() -> None:
    rows = run()
    assert {row.status for row in rows.values()} == {TIMED}, rows
    assert rows[SLOW].ratio == 1
    assert rows[OURS].error == 0
    error, allowed = rows[OURS_FAST].error, rows[OURS_FAST].allowed_error
    assert error is not None
    assert allowed is not None
    assert 0 < error <= allowed
    header, _, line = image_table(list(rows.values()))
    assert "**bitfast**" in header
    assert line.startswith("| 2 512x512, 1 thread |")


def test_a_wrong_processor_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(BitImageProcessor):
        def __init__(self) -> None:
            super().__init__(resample=2)

    monkeypatch.setattr(images, "BitImageProcessor", Wrong)
    rows = run()
    assert rows[OURS].status == FAILED
    assert "0 is allowed: not timed" in rows[OURS].note
    assert rows[OURS].seconds is None
    assert rows[OURS_FAST].status == TIMED


def test_what_is_missing_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda: dict.fromkeys(peers.PEERS))
    rows = run()
    assert (rows[SLOW].status, rows[FAST].status) == (MISSING, MISSING)
    assert "pip install transformers==4.56.2 and pip install torchvision" in rows[FAST].note
    for name in (PILLOW, OURS, OURS_FAST):
        assert rows[name].seconds is not None
        assert rows[name].ratio is None
    assert rows[OURS].note == f"not checked against {SLOW}"


def test_every_case_can_be_drawn() -> None:
    cases = list(images.cases([1, 2]))
    assert len({case.title for case in cases}) == len(cases)
    assert any(case.is_quick for case in cases)
    for case in cases:
        if case.threads == 1:
            assert len(images.draw(case)) == case.batch
