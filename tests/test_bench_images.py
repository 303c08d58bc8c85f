"""Image processors as contestants: checked, then timed, and listed if what they need is missing."""

from __future__ import annotations

from functools import partial

import pytest

from bitfast import BitImageProcessor
from bitfast.bench import contest, images, peers
from bitfast.bench.images import FAST, OURS, OURS_FAST, PILLOW, SLOW, TORCHVISION
from bitfast.bench.report import image_table
from bitfast.bench.rows import FAILED, MISSING, TIMED, Row

SMALL = ((12, 9), (8, 11), (20, 20))
"""(8, 11) is cropped by one and a half on each side."""


def run() -> dict[str, Row]:
    make = partial(images.cpu_problem, ((512, 512),) * 2, 2)
    rows = contest.run(images.case_of("2 512x512", make, 2, 1, False), None, 1)
    return {row.contestant: row for row in rows}


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
    assert "allowed 0.0e+00: not timed" in rows[OURS].note
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


@pytest.mark.parametrize("are_there", [False, True])
def test_the_contest_of_a_gpu(are_there: bool) -> None:
    make = partial(images.gpu_problem, SMALL, 3, 8, "cpu", are_there)
    rows = contest.run(images.case_of("3 small ones", make, 3, 1, False), None, 1)
    assert [row.contestant for row in rows] == [FAST, TORCHVISION, OURS_FAST]
    assert {row.contestant: row.note for row in rows if row.status != TIMED} == {}
    assert rows[2].error == 0


def test_every_batch_can_be_drawn() -> None:
    for sizes in images.SIZES.values():
        for batch in images.BATCHES:
            assert len(images.photographs(sizes, batch)) == batch
