"""What is wrong is not timed, and the arithmetic of what is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast.bench import contest, models, op_problems, ops, registry, timing
from bitfast.bench.accuracy import (
    OURS,
    Float64Judge,
    Verdict,
    WrongResultError,
    allowed_error,
    check,
    overall_error,
    relative_error,
)
from bitfast.bench.cases import PLAIN, Case, Contestant, NotInstalledError, Problem, Running, called
from bitfast.bench.limits import Limits
from bitfast.bench.rows import FAILED, MISSING, SKIPPED, TIMED, Row
from bitfast.bench.workers import Base

LIMITS = Limits({"float32": 2e9, "bfloat16": 4e9}, 1e9)
GOOD = torch.linspace(1, 2, 50)


def case_of(plain: Callable[[], Tensor], ours: Callable[[], Tensor], **options: Any) -> Case:
    contestants = [
        Contestant(
            name, "float32", called(lambda _, f=function: f()), "a note" * (function is ours)
        )
        for name, function in (("plain PyTorch", plain), ("bitfast", ours))
    ]
    problem = Problem(contestants, Float64Judge([GOOD.double()]), 200)
    return Case("op", "op", "case", "float32", lambda: nullcontext(problem), threads=1, **options)


def run(plain: Callable[[], Tensor], ours: Callable[[], Tensor], **options: Any) -> tuple[Row, Row]:
    first, second = contest.run(case_of(plain, ours, **options), LIMITS, 3)
    return first, second


def test_right_results_are_timed() -> None:
    plain, ours = run(lambda: GOOD, lambda: GOOD.clone())
    assert (plain.status, ours.status) == (TIMED, TIMED)
    assert plain.ratio == 1
    assert ours.seconds is not None
    assert ours.quartiles is not None
    assert plain.seconds is not None
    assert ours.ratio == pytest.approx(plain.seconds / ours.seconds)
    assert ours.quartiles[0] <= ours.seconds <= ours.quartiles[1]
    assert ours.fraction == pytest.approx(200 / ours.seconds / 1e9)
    assert (ours.limit, ours.note, ours.bytes) == ("copy", "a note", 200)


def broken() -> Tensor:
    raise RuntimeError("out of order")


def missing() -> Tensor:
    raise NotInstalledError("pip install it")


@pytest.mark.parametrize(
    ("ours", "status", "note"),
    [
        (lambda: GOOD * (1 + 1e-5), FAILED, "error 1.0e-05, allowed"),
        (lambda: GOOD * torch.nan, FAILED, "error nan, allowed"),
        (lambda: GOOD[:-1], FAILED, "shape (49,) is not (50,)"),
        (broken, FAILED, "RuntimeError: out of order"),
        (missing, MISSING, "pip install it"),
    ],
)
def test_what_is_wrong_or_missing_is_not_timed(
    ours: Callable[[], Tensor], status: str, note: str
) -> None:
    plain, wrong = run(lambda: GOOD, ours)
    assert plain.status == TIMED
    assert wrong.status == status
    assert note in wrong.note
    assert wrong.seconds is wrong.ratio is wrong.fraction is None


def test_where_plain_pytorch_is_wrong_ours_has_no_ratio() -> None:
    plain, ours = run(lambda: GOOD + 1, lambda: GOOD)
    assert (plain.status, ours.status) == (FAILED, TIMED)
    assert ours.seconds is not None
    assert ours.ratio is None


def test_the_other_commit_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(work: dict[str, Any], checkout: Any, stack: Any) -> Running:
        assert (work["case"], work["contestant"]) == ("op: case, 1 thread", "bitfast")
        seconds = 0.1 if checkout else 0.05
        return Running([GOOD], lambda calls: seconds * calls, lambda: [])

    monkeypatch.setattr("bitfast.bench.workers.begin_process", begin)
    case = case_of(lambda: GOOD, lambda: GOOD)
    rows = contest.run(case, LIMITS, 2, Base("v1", "/nowhere"))  # type: ignore[arg-type]
    assert [row.contestant for row in rows] == ["plain PyTorch", "bitfast", "bitfast at v1"]
    assert [row.seconds for row in rows[1:]] == pytest.approx([0.05, 0.1])
    assert rows[2].ratio is not None


def test_what_must_be_compiled_is_left_out_of_a_quick_run() -> None:
    case = case_of(lambda: GOOD, lambda: GOOD)
    with case.open() as problem:
        slow = Contestant("compiled", "float32", called(lambda _: broken()), is_compiled=True)
        problem.contestants.append(slow)
    assert len(contest.run(case, None, 1)) == 3
    assert [row.status for row in contest.run(case, None, 1, is_quick=True)] == [TIMED, TIMED]


def test_a_case_that_was_not_begun_has_a_row() -> None:
    row = contest.not_run(case_of(lambda: GOOD, lambda: GOOD), SKIPPED, "out of time")
    assert (row.status, row.note, row.title) == (SKIPPED, "out of time", "op: case, 1 thread")


def test_a_case_that_fails_as_a_whole_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> dict[str, list[float]]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(contest, "take_turns", fail)
    (row,) = contest.run(case_of(lambda: GOOD, lambda: GOOD), LIMITS, 1)
    assert (row.contestant, row.status, row.note) == ("all", FAILED, "RuntimeError: out of memory")


def test_what_cannot_be_captured_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    synchronizing = GOOD.clone()

    def replay(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
        if calls[0]() is synchronizing:
            raise RuntimeError("it synchronizes")
        return [0.5, 1.0, 1.5]

    monkeypatch.setattr("bitfast.bench.cases.kernel_samples", replay)
    case = case_of(lambda: synchronizing, lambda: GOOD, clock="kernels")
    plain, ours = contest.run(case, None, 1)
    assert (plain.status, plain.note) == (FAILED, "not captured: RuntimeError: it synchronizes")
    assert (ours.status, ours.seconds, ours.ratio) == (TIMED, 1.0, None)


def test_the_rule() -> None:
    rounding = torch.finfo(torch.float32).eps / 2
    assert allowed_error("float32", 1e-6, OURS, 1e-4) == 2e-6 + rounding
    assert allowed_error("float32", None, OURS, 1e-4) == 1e-4
    check(Verdict(1.0, 1.0))
    check(Verdict(None, None))
    for error in (1.1, float("nan"), float("inf")):
        with pytest.raises(WrongResultError):
            check(Verdict(error, 1.0))
    with pytest.raises(WrongResultError):
        relative_error(GOOD, GOOD[1:])


def test_a_yardstick_is_that_of_its_dtype_and_of_each_result() -> None:
    judge = Float64Judge([GOOD.double(), GOOD.double()], {"float32": 1e-2, "bfloat16": 1e-1})
    off = [GOOD * (1 + 1e-3), GOOD * (1 + 1e-5)]
    assert judge("theirs", "float32", off) == Verdict(pytest.approx(1e-3, rel=0.01), 1e-2)
    worst = judge("bitfast", "float32", off[::-1])
    assert worst.error == pytest.approx(1e-3, rel=0.01)  # of the second, whose yardstick has 1e-5
    assert worst.allowed == pytest.approx(2e-5, rel=0.02)
    assert judge("peer", "float32", off).allowed == pytest.approx(4e-3, rel=0.01)
    assert judge("bitfast", "bfloat16", off).allowed == 1e-1


def test_several_results_count_alike_whatever_their_size() -> None:
    large, small = torch.ones(10_000).double(), torch.full((2,), 1e-6).double()
    wrong = torch.cat([large, 2 * small])
    assert overall_error([wrong], [large, small]) == [pytest.approx(0.5**0.5)]
    with pytest.raises(WrongResultError, match="10001 numbers instead of 10002"):
        overall_error([wrong[1:]], [large, small])


def test_the_limit_is_the_one_that_binds() -> None:
    def row(dtype: str, **counts: int) -> Row:
        bare = Row("op", "op", "case", "cpu", 1, "bitfast", dtype, seconds=2.0, **counts)
        return contest._with_fraction(bare, LIMITS)

    assert (row("float32", flops=10**9).fraction, row("float32", flops=10**9).limit) == (
        0.25,
        "arithmetic",
    )
    assert row("bfloat16", flops=10**9, bytes=10**8).fraction == 0.125
    assert (row("bfloat16", flops=1, bytes=10**9).fraction, row("float32", bytes=1).limit) == (
        0.5,
        "copy",
    )
    assert row("float32").fraction is None


# ---- times --------------------------------------------------------------------------------------


def test_contestants_take_turns() -> None:
    calls: list[str] = []

    def timer(name: str) -> timing.Timer:
        def take(count: int) -> float:
            calls.append(name)
            return count * timing.SHORTEST_SAMPLE

        return take

    rounds: list[int] = []
    samples = timing.take_turns({"a": timer("a"), "b": timer("b")}, 3, lambda: rounds.append(1))
    assert samples == {name: pytest.approx([timing.SHORTEST_SAMPLE] * 3) for name in "ab"}
    assert len(rounds) == 3
    warmed_up = calls[4:]
    assert warmed_up == [*"aabb", *"bbaa", *"aabb"]


def test_short_calls_are_repeated() -> None:
    assert timing.calls_per_sample(lambda count: count * timing.SHORTEST_SAMPLE / 7.5) == 7
    assert timing.calls_per_sample(lambda count: count * 10.0) == 1


def test_the_summary() -> None:
    summary = timing.summarize([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 4.0, 6.0, 8.0, 20.0])
    assert summary == (3.0, (2.0, 4.0), 2.0, (2.0, 2.0))
    assert timing.summarize([1.0], None) == (1.0, (1.0, 1.0), None, None)


def test_kernels_of_all_input_sets_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    called_with: list[int] = []

    def replay(function: Callable[[], None], rep: int, return_mode: str) -> list[float]:
        function()
        assert return_mode == "all"
        return [6.0, 12.0]

    monkeypatch.setattr("triton.testing.do_bench_cudagraph", replay)
    samples = timing.kernel_samples([lambda n=n: called_with.append(n) for n in range(3)])
    assert called_with == [0, 1, 2]
    assert samples == pytest.approx([0.002, 0.004])


# ---- the registry -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_two_rows_have_one_title(device: str) -> None:
    titles = [case.title for case in registry.cases(device, [1, 2])]
    assert len(titles) == len(set(titles))


def test_every_op_has_quick_cases() -> None:
    cases = list(ops.cases("cpu", 2))
    assert {c.op for c in cases if c.is_quick} == {c.op for c in cases} - {"weight_standardization"}


def test_a_yardstick_comes_before_what_it_measures() -> None:
    def first_of_each_dtype(entries: Sequence[models.Entry]) -> set[str]:
        return {entry.package for entry in {e.dtype: e for e in reversed(entries)}.values()}

    lists = (models.EVERYBODY, models.IN_PLACE, models.TRAINING, models.gpu_entries("bfloat16"))
    assert all(first_of_each_dtype(entries) == {"transformers"} for entries in lists)


@pytest.mark.parametrize(
    "case", [c for c in ops.cases("cpu", 1) if c.is_quick], ids=lambda c: c.title
)
def test_the_contestants_of_a_quick_case_are_right(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "take_turns", lambda *_: {})
    assert {
        row.contestant: row.note for row in contest.run(case, None, 1) if row.status == FAILED
    } == {}


TINY = {"group_norm_act": (2, 32, 3, 5), "same_padding": (2, 3, 8, 10)}


@pytest.mark.parametrize(
    "family",
    [ops.NORM, ops.RESIDUAL_NORM, ops.NORM_TRAINING, ops.POOL, ops.PAD],
    ids=lambda f: f"{f.op} {f.form}",
)
def test_compiled_contestants_of_a_gpu_case_are_right(
    family: op_problems.Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compiled(f, backend="aot_eager", **options)
    )
    monkeypatch.setattr(contest, "take_turns", lambda *_: {})
    inputs = op_problems.Inputs(TINY[family.op], torch.float32, "channels_last")
    rows = contest.run(family.case(inputs, 1, is_compiled=True), None, 1)
    assert [row.contestant for row in rows] == [PLAIN, op_problems.COMPILED, "bitfast"]
    assert {row.contestant: row.note for row in rows if row.status == FAILED} == {}


def test_weights_of_one_dtype_become_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "all_weights", lambda inputs: [inputs.feature_maps() for _ in "ab"])
    monkeypatch.setattr(contest, "take_turns", lambda *_: {})
    for is_training in (False, True):
        family = ops.weights_family(
            "weight_standardization_all", "", is_training=is_training,
            source=torch.float32, dtype=torch.bfloat16,
        )  # fmt: skip
        case = family.case(op_problems.Inputs((4, 3, 3, 3), torch.bfloat16, "NCHW"), 1)
        assert "float32 to bfloat16" in case.title
        with registry.opened(case) as problem:
            numel = 2 * 4 * 27
            assert problem.bytes == numel * (4 + 2) * (1 + is_training) + numel * 4 * is_training
        assert {row.note for row in contest.run(case, None, 1) if row.status == FAILED} == set()
