"""Dynamic batches: who goes together, when, in which sizes, and who is left out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import pytest
import torch
from torch import Tensor

from bitfast.serving.batching import MOST_SIZES, Batcher, batch_sizes

SECONDS = 60
LONG = 600.0


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [
        (1, [1]),
        (5, [1, 2, 3, 4, 5]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (9, [1, 2, 4, 8, 9]),
        (32, [1, 2, 4, 8, 16, 32]),
        (256, [1, 4, 8, 16, 32, 64, 128, 256]),
    ],
)
def test_sizes(largest: int, sizes: list[int]) -> None:
    assert batch_sizes(largest) == sizes


@pytest.mark.parametrize("largest", range(1, 600, 7))
def test_there_are_few_sizes(largest: int) -> None:
    sizes = batch_sizes(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == largest
    assert len(sizes) <= MOST_SIZES


class Model:
    """Gives each image its first pixel; remembers its batches; waits at a gate while that is closed."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def __call__(self, batch: Tensor) -> Sequence[float]:
        self.threads.add(threading.get_ident())
        self.batches.append(batch[:, 0, 0, 0].tolist())
        self.entered.release()
        assert self.gate.wait(SECONDS)
        if (batch == 13).any():
            raise RuntimeError("an unlucky number")
        return batch[:, 0, 0, 0].tolist()


@pytest.fixture
def model() -> Iterator[Model]:
    model = Model()
    yield model
    model.gate.set()


def image(value: float, side: int = 2) -> Tensor:
    return torch.full((3, side, side), float(value))


def values(futures: list[Future[float]]) -> list[float]:
    return [future.result(SECONDS) for future in futures]


def test_a_full_batch_starts_at_once(model: Model) -> None:
    batcher = Batcher(model, [1, 2, 4], LONG)
    assert values([batcher.submit(image(n)) for n in range(8)]) == list(range(8))
    assert model.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(model.threads) == 1
    assert model.threads != {threading.get_ident()}
    batcher.close()


def test_an_image_waits_for_others_but_not_forever(model: Model) -> None:
    batcher = Batcher(model, [1, 2, 4], 0.2)
    started = time.monotonic()
    assert values([batcher.submit(image(1))]) == [1]
    assert time.monotonic() - started >= 0.2
    assert model.batches == [[1]]
    batcher.close()


def test_what_comes_while_the_model_runs_goes_together(model: Model) -> None:
    batcher = Batcher(model, [1, 2, 4], 0)
    model.gate.clear()
    first = batcher.submit(image(0))
    assert model.entered.acquire(timeout=SECONDS)
    others = [batcher.submit(image(n)) for n in (1, 2, 3)]
    model.gate.set()
    assert values([first, *others]) == [0, 1, 2, 3]
    # Three are rounded up to four, and the row that fills up is nobody's result.
    assert model.batches == [[0], [1, 2, 3, 0]]
    batcher.close()


def test_only_equal_shapes_go_together_and_the_oldest_first(model: Model) -> None:
    batcher = Batcher(model, [1, 2, 4], 0)
    model.gate.clear()
    first = batcher.submit(image(0))
    assert model.entered.acquire(timeout=SECONDS)
    others = [batcher.submit(image(n, side=2 + n % 2)) for n in (1, 2, 3, 4)]
    model.gate.set()
    assert values([first, *others]) == [0, 1, 2, 3, 4]
    assert model.batches == [[0], [1, 3], [2, 4]]
    batcher.close()


def test_a_full_batch_of_one_shape_does_not_wait_for_another_shape(model: Model) -> None:
    batcher = Batcher(model, [1, 2], LONG)
    lonely = batcher.submit(image(0, side=3))
    assert values([batcher.submit(image(n)) for n in (1, 2)]) == [1, 2]
    assert not lonely.done()
    batcher.close()  # runs what waits
    assert lonely.result(0) == 0


def test_a_cancelled_image_never_reaches_the_model(model: Model) -> None:
    batcher = Batcher(model, [1, 2, 4], 0)
    model.gate.clear()
    first = batcher.submit(image(0))
    assert model.entered.acquire(timeout=SECONDS)
    gone, kept = batcher.submit(image(1)), batcher.submit(image(2))
    assert gone.cancel()
    assert not first.cancel()  # it runs already
    model.gate.set()
    assert values([first, kept]) == [0, 2]
    assert model.batches == [[0], [2]]
    batcher.close()


def test_a_failure_is_told_to_all_of_the_batch_and_to_no_other(model: Model) -> None:
    batcher = Batcher(model, [1, 2], LONG)
    failed = [batcher.submit(image(n)) for n in (12, 13)]
    for future in failed:
        with pytest.raises(RuntimeError, match="an unlucky number"):
            future.result(SECONDS)
    assert values([batcher.submit(image(n)) for n in (1, 2)]) == [1, 2]
    assert batcher.is_alive()
    batcher.close()


def test_no_exception_ends_the_thread(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher(model, [1], 0)

    def leave(batch: Tensor) -> Sequence[float]:
        raise SystemExit(3)

    monkeypatch.setattr(batcher, "_run", leave)
    # As one that an event loop survives.
    with pytest.raises(RuntimeError, match=r"SystemExit\(3\)"):
        batcher.submit(image(1)).result(SECONDS)
    monkeypatch.undo()
    assert values([batcher.submit(image(2))]) == [2]
    batcher.close()


def test_hurry_lets_nothing_wait(model: Model) -> None:
    batcher = Batcher(model, [1, 2, 4], LONG)
    waiting = batcher.submit(image(1))
    batcher.hurry()
    assert waiting.result(SECONDS) == 1
    assert batcher.submit(image(2)).result(SECONDS) == 2
    batcher.close()


def test_close_refuses_more(model: Model) -> None:
    batcher = Batcher(model, [1], 0)
    batcher.close()
    assert not batcher.is_alive()
    with pytest.raises(RuntimeError, match="shuts down"):
        batcher.submit(image(1))


def test_preparation_comes_first_in_the_same_thread(model: Model) -> None:
    threads = []
    batcher = Batcher(model, [1], 0, prepare=lambda: threads.append(threading.get_ident()))
    batcher.submit(image(1)).result(SECONDS)
    assert set(threads) == model.threads
    batcher.close()


def test_a_failed_preparation_is_raised() -> None:
    def prepare() -> None:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        Batcher(Model(), [1], 0, prepare=prepare)


def test_what_a_batch_took_is_observed_without_its_padding(model: Model) -> None:
    seen: list[tuple[int, float]] = []
    done = threading.Event()

    def observe(images: int, seconds: float) -> None:
        seen.append((images, seconds))
        done.set()

    batcher = Batcher(model, [4], 0, observe)
    batcher.submit(image(1)).result(SECONDS)
    assert done.wait(SECONDS)
    assert model.batches == [[1, 0, 0, 0]]
    assert seen[0][0] == 1
    assert seen[0][1] >= 0
    batcher.close()
