"""Few images are enough: a network that knows the digits 0 to 4 is transferred to 5 to 9, and to photographs.

``python -m bench.transfer`` is the longer comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import transfer
from bench.transfer import Budget
from tests.picture_sets import digits, faces

BUDGET = Budget(steps=60, batch_size=16, learning_rate=0.02)
MARGIN = 0.1
"""By which another way to transfer may be better: images enough for an accuracy to be sure to about 5 %."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """What is small is not faster with more, which other tests may need."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def knows_some_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return transfer.make_base(tmp_path_factory.mktemp("base"), epochs=6)


def test_from_some_digits_to_the_others(knows_some_digits: Path, tmp_path: Path) -> None:
    others = [(image, name) for image, name in digits() if name in "56789"]
    train, test = transfer.write_halves(others, tmp_path)
    here = (knows_some_digits, train, test, 5, 0, BUDGET)
    accuracy, _ = transfer.fine_tune(*here)
    by_trainer, _ = transfer.trainer(*here)
    by_probe, _ = transfer.probe(*here)
    assert accuracy > 0.6  # by chance: 0.2
    assert accuracy > by_trainer - MARGIN
    assert accuracy > by_probe - MARGIN


def test_from_digits_to_photographs(knows_some_digits: Path, tmp_path: Path) -> None:
    train, test = transfer.write_halves(faces(), tmp_path)
    here = (knows_some_digits, train, test, 10, 0, BUDGET)
    accuracy, _ = transfer.fine_tune(*here)
    by_probe, _ = transfer.probe(*here)
    assert accuracy > 0.75  # by chance: 0.5
    assert accuracy > by_probe - MARGIN


def test_the_table() -> None:
    rows = [
        transfer.Row("faces", 1, seed, way, accuracy, seconds, 2 * seconds)
        for way, seconds in (("fine-tuning", 1.0), ("Trainer", 2.0), ("probe", 0.1))
        for seed, accuracy in enumerate((0.5, 0.7))
    ]
    assert transfer.table(rows).splitlines()[-1] == (
        "| faces | 1 | 60.0 ± 14.1 % | 60.0 ± 14.1 % | 60.0 ± 14.1 % | 1.0 s | 2.0 s | 2.0 s | 4.0 s |"
    )
