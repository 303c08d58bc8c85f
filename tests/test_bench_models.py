"""Whole models as contestants: in processes of their own, checked, and listed if they are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitfast.bench import model_contest, models, peers
from bitfast.bench.limits import Limits
from bitfast.bench.models import Contestant, ModelCase
from bitfast.bench.rows import FAILED, MISSING, TIMED, Row
from bitfast.bench.workers import Work, Worker, WorkerError
from tests.tiny_models import TINY

LIMITS = Limits({"float32": 1e9, "bfloat16": 1e9}, 1e9)
OURS = Contestant("bitfast", "bitfast")
RUNTIME = Contestant("ONNX Runtime", "onnxruntime")


def tiny(*contestants: Contestant, **settings: Any) -> ModelCase:
    return ModelCase("tiny", TINY, (2, 3, 32, 32), 1, (models.BASELINE, *contestants), **settings)


@pytest.fixture
def nothing_else_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"transformers": "4.56.2", "onnxruntime": None, "openvino": None, "torchvision": None}
    monkeypatch.setattr(peers, "installed", lambda: missing)
    monkeypatch.setattr(peers, "export", lambda model, x, path: path.touch())


@pytest.mark.usefixtures("nothing_else_installed")
def test_a_contest() -> None:
    done: list[str] = []
    case = tiny(RUNTIME, OURS)
    theirs, missing, ours = model_contest.run(case, LIMITS, 3, done.append)
    assert len(done) == model_contest.steps(case, 3)
    assert (missing.status, missing.note) == (MISSING, "pip install onnxruntime")
    assert missing.seconds is None
    assert (theirs.status, ours.status) == (TIMED, TIMED), ours.note
    assert theirs.ratio == 1
    for row in (theirs, ours):
        assert row.error is not None
        assert row.allowed_error is not None
        assert 0 < row.error <= row.allowed_error < 1e-3
        assert row.first_result is not None
        assert row.first_result > 0
        assert row.peak_memory is not None
        assert row.peak_memory > 2**25
        assert row.fraction is not None
        assert row.fraction > 0
        assert row.limit == "arithmetic"


# ---- with processes that only seem to be some ---------------------------------------------------


class Pretender:
    """Answers like a worker, at once: with what float64 gave, changed as ``change`` says."""

    first_result = 1.0
    peak_memory = 2**30
    change = staticmethod(lambda work, result: result)
    oracle: list[torch.Tensor]

    def __init__(self, work: Work, folder: Path) -> None:
        result = torch.cat(self.oracle).float().numpy()
        np.save(work["output"], self.change(work, result))

    def __enter__(self) -> Pretender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        pass

    def time(self, calls: int) -> float:
        return calls * 0.1


def pretend(monkeypatch: pytest.MonkeyPatch, case: ModelCase, change: Any) -> dict[str, Row]:
    real = models.prepare

    def prepare(case: ModelCase, folder: Path) -> models.Prepared:
        prepared = real(case, folder)
        Pretender.oracle = prepared.oracle
        return prepared

    monkeypatch.setattr(Pretender, "change", staticmethod(change))
    monkeypatch.setattr(model_contest, "prepare", prepare)
    monkeypatch.setattr(model_contest, "Worker", Pretender)
    return {row.contestant: row for row in model_contest.run(case, LIMITS, 2)}


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(work: Work, result: np.ndarray) -> np.ndarray:
        return result * (1.1 if work["package"] == "bitfast" else 1)

    rows = pretend(monkeypatch, tiny(OURS), change)
    assert rows["transformers"].seconds == pytest.approx(0.1)
    assert rows["bitfast"].status == FAILED
    assert "error 1.0e-01 against float64, allowed" in rows["bitfast"].note
    assert rows["bitfast"].seconds is None


def test_the_others_go_on_where_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(work: Work, result: np.ndarray) -> np.ndarray:
        if work["package"] == "transformers":
            raise WorkerError("the process died")
        return result

    rows = pretend(monkeypatch, tiny(OURS), change)
    assert rows["transformers"].note == "the process died: not timed"
    assert rows["bitfast"].seconds == pytest.approx(0.1)
    assert rows["bitfast"].ratio is None


def test_gradients_are_what_is_compared_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pretend(monkeypatch, tiny(OURS, is_training=True), lambda work, result: result)
    parameters = sum(t.numel() for t in Pretender.oracle)
    assert parameters == 1 * sum(p.numel() for p in models_of_tiny().parameters())
    assert rows["bitfast"].status == TIMED


def models_of_tiny() -> torch.nn.Module:
    import transformers

    return transformers.BitForImageClassification(transformers.BitConfig(**TINY))


def test_without_transformers_everything_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda: dict.fromkeys(peers.PEERS))
    rows = model_contest.run(tiny(OURS), LIMITS, 2)
    assert [row.status for row in rows] == [MISSING, MISSING]
    assert "pip install transformers==4.56.2" in rows[0].note


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    np.save(tmp_path / "input.npy", np.zeros((1, 3, 8, 8), np.float32))
    work: Work = {
        "package": "nothing", "dtype": "float32", "form": "eager", "architecture": "", "threads": 1,
        "is_training": False, "folder": "", "onnx": "", "input": str(tmp_path / "input.npy"), "grad": "",
        "output": "",
    }  # fmt: skip
    with pytest.raises(WorkerError, match="KeyError: 'nothing'"):
        Worker(work, tmp_path / "folder")


def test_the_exported_network_is_the_same_one() -> None:
    model = models_of_tiny().eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x).logits
        peers.standardize(model)
        assert not any(type(m).__name__ == "WeightStandardizedConv2d" for m in model.modules())
        torch.testing.assert_close(peers.Outputs(model)(x), (expected,))
