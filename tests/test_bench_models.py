"""Whole models as contestants: in processes of their own, checked, and listed if they are missing."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch

from bitfast.bench import contest, models, peers, workers
from bitfast.bench.cases import Case, Running
from bitfast.bench.limits import Limits
from bitfast.bench.models import BASELINE, Entry, Network
from bitfast.bench.rows import FAILED, MISSING, TIMED, Row
from bitfast.bench.workers import Work, WorkerError, begin_process
from tests.tiny_models import TINY

LIMITS = Limits({"float32": 1e9, "bfloat16": 1e9}, 1e9)
OURS = Entry("bitfast", "bitfast")
RUNTIME = Entry("ONNX Runtime", "onnxruntime")


def tiny(*entries: Entry, **settings: Any) -> Case:
    return Network(TINY, 2, 32, 32, **settings).case("tiny", (BASELINE, *entries))


@pytest.fixture
def nothing_else_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"transformers": "4.56.2", "onnxruntime": None, "openvino": None, "torchvision": None}
    monkeypatch.setattr(peers, "installed", lambda: missing)
    monkeypatch.setattr(peers, "export", lambda model, x, path: path.touch())


@pytest.mark.usefixtures("nothing_else_installed")
def test_a_contest() -> None:
    done: list[str] = []
    theirs, missing, ours = contest.run(tiny(RUNTIME, OURS), LIMITS, 3, None, done.append)
    assert done == ["transformers", "ONNX Runtime", "bitfast", *["in turns"] * 3]
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


def test_contestants_of_a_gpu_share_this_process() -> None:
    """With a CPU in its place: what a GPU's case checks and times, as far as it can be run here."""
    entries = (
        OURS,
        Entry("channels_last", "transformers", is_channels_last=True),
        Entry("bitfast autocast", "bitfast", "bfloat16", "autocast"),
    )
    network = Network(TINY, 5, 32, 32, checked=2)
    with network.case("tiny", entries).open() as problem, ExitStack() as stack:
        assert problem.flops > 0
        for each in problem.contestants:
            assert each.work is not None
            running = models.begin_here({**each.work, "device": "cpu", "threads": 0}, stack)
            assert running.results[0].numel() == 2 * TINY["num_labels"]
            error, allowed = problem.judge(each.name, each.dtype, running.results)
            assert error is not None
            assert allowed is not None
            assert 0 < error < allowed
            assert running.time(1) > 0


def test_gradients_of_a_gpu_are_those_of_the_checked_images() -> None:
    network = Network(TINY, 5, 32, 32, checked=2, is_training=True)
    with network.case("tiny", (BASELINE, OURS)).open() as problem, ExitStack() as stack:
        for each in problem.contestants:
            assert each.work is not None
            with torch.enable_grad():
                running = models.begin_here(each.work, stack)
            error, _ = problem.judge(each.name, each.dtype, running.results)
            assert error is not None
            assert error < 1e-4


# ---- with processes that only seem to be some ---------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, case: Case, change: Any) -> dict[str, Row]:
    """Run a case whose contestants answer at once: with what float64 gave, changed as ``change`` says."""

    def begin(oracle: list[torch.Tensor], work: Work, _: Any, __: ExitStack) -> Running:
        result = change(work, torch.cat(oracle).float())
        return Running([result], lambda calls: 0.1 * calls, lambda: [], 1.0, 2**30)

    real = models.exact_results

    def exact_results(*arguments: Any) -> list[torch.Tensor]:
        oracle = real(*arguments)
        monkeypatch.setattr(models, "begin_process", partial(begin, oracle))
        return oracle

    monkeypatch.setattr(models, "exact_results", exact_results)
    return {row.contestant: row for row in contest.run(case, LIMITS, 2)}


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(work: Work, result: torch.Tensor) -> torch.Tensor:
        return result * (1.1 if work["package"] == "bitfast" else 1)

    rows = pretend(monkeypatch, tiny(OURS), change)
    assert rows["transformers"].seconds == pytest.approx(0.1)
    assert rows["bitfast"].status == FAILED
    assert "error 1.0e-01, allowed" in rows["bitfast"].note
    assert rows["bitfast"].seconds is None


def test_the_others_go_on_where_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(work: Work, result: torch.Tensor) -> torch.Tensor:
        if work["package"] == "transformers":
            raise WorkerError("the process died")
        return result

    rows = pretend(monkeypatch, tiny(OURS), change)
    assert rows["transformers"].note == "WorkerError: the process died"
    assert rows["bitfast"].seconds == pytest.approx(0.1)
    assert rows["bitfast"].ratio is None


def test_gradients_are_what_is_compared_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def change(work: Work, result: torch.Tensor) -> torch.Tensor:
        sizes.append(result.numel())
        return result

    rows = pretend(monkeypatch, tiny(OURS, is_training=True), change)
    assert sizes == [sum(p.numel() for p in models_of_tiny().parameters())] * 2
    assert rows["bitfast"].status == TIMED


def models_of_tiny() -> torch.nn.Module:
    import transformers

    return transformers.BitForImageClassification(transformers.BitConfig(**TINY))


def test_without_transformers_everything_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda: dict.fromkeys(peers.PEERS))
    rows = contest.run(tiny(OURS), LIMITS, 2)
    assert [row.status for row in rows] == [MISSING, MISSING]
    assert "pip install transformers==4.56.2" in rows[0].note


def test_a_process_that_fails_says_why() -> None:
    with ExitStack() as stack, pytest.raises(WorkerError, match="KeyError: 'nothing'"):
        begin_process({"package": "nothing", "threads": 1}, None, stack)


def test_a_process_runs_a_case_of_the_registry() -> None:
    """As that of another commit does, which begins with the bitfast that it finds first."""
    work = {
        "package": "case", "device": "cpu", "threads": 1, "contestant": "bitfast", "root": str(workers.ROOT),
        "case": "dispatch: same_pad of one pixel, 1 thread",
    }  # fmt: skip
    with ExitStack() as stack:
        running = begin_process(work, None, stack)
        assert [result.shape for result in running.results] == [(1, 1, 2, 2)]
        assert 0 < running.time(10) < 1


def test_the_exported_network_is_the_same_one() -> None:
    model = models_of_tiny().eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x).logits
        peers.standardize(model)
        assert not any(type(m).__name__ == "WeightStandardizedConv2d" for m in model.modules())
        torch.testing.assert_close(peers.Outputs(model)(x), (expected,))
