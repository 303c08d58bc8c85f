"""What is wrong is not timed, and the arithmetic of what is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitfast.bench import contest, models, registry, timing
from bitfast.bench.accuracy import (
    OURS,
    WrongResultError,
    allowed_error,
    check,
    overall_error,
    relative_error,
)
from bitfast.bench.limits import Limits
from bitfast.bench.registry import Case, Problem
from bitfast.bench.rows import FAILED, TIMED, Row

LIMITS = Limits({"float32": 2e9, "bfloat16": 4e9}, 1e9)
GOOD = torch.linspace(1, 2, 50)


def run(plain: Callable[[], Tensor], ours: Callable[[], Tensor]) -> tuple[Row, Row]:
    problem = Problem({registry.PLAIN: plain, registry.OURS: ours}, GOOD.double, 200, "native")
    case = Case("op", "case", torch.float32, lambda: problem)
    first, second = contest.run(case, torch.get_num_threads(), LIMITS, 3)
    return first, second


def test_right_results_are_timed() -> None:
    plain, ours = run(lambda: GOOD, lambda: GOOD.clone())
    assert (plain.status, ours.status) == (TIMED, TIMED)
    assert plain.ratio == 1
    assert ours.seconds is not None
    assert ours.quartiles is not None
    assert ours.ratio is not None
    assert plain.seconds is not None
    assert ours.ratio == pytest.approx(plain.seconds / ours.seconds)
    assert ours.quartiles[0] <= ours.seconds <= ours.quartiles[1]
    assert ours.fraction == pytest.approx(200 / ours.seconds / 1e9)
    assert (ours.limit, ours.note) == ("copy", "backend: native")


def broken() -> Tensor:
    raise RuntimeError("out of order")


@pytest.mark.parametrize(
    ("ours", "note"),
    [
        (lambda: GOOD * (1 + 1e-5), "error 1.0e-05 against float64, allowed"),
        (lambda: GOOD * torch.nan, "error nan against float64"),
        (lambda: GOOD[:-1], "shape (49,) is not (50,)"),
        (broken, "RuntimeError: out of order"),
    ],
)
def test_a_wrong_result_is_not_timed(ours: Callable[[], Tensor], note: str) -> None:
    plain, wrong = run(lambda: GOOD, ours)
    assert plain.status == TIMED
    assert wrong.status == FAILED
    assert note in wrong.note
    assert wrong.seconds is wrong.ratio is wrong.fraction is None


def test_where_plain_pytorch_is_wrong_ours_has_no_ratio() -> None:
    plain, ours = run(lambda: GOOD + 1, lambda: GOOD)
    assert (plain.status, ours.status) == (FAILED, TIMED)
    assert ours.seconds is not None
    assert ours.ratio is None


def test_the_rule() -> None:
    rounding = torch.finfo(torch.float32).eps / 2
    assert allowed_error(torch.float32, 1e-6, OURS) == 2e-6 + rounding
    assert allowed_error(torch.float32, None, OURS) == 1e-4
    check(1.0, 1.0)
    for error in (1.1, float("nan"), float("inf")):
        with pytest.raises(WrongResultError):
            check(error, 1.0)
    with pytest.raises(WrongResultError):
        relative_error(GOOD, GOOD[1:])


def test_several_results_count_alike_whatever_their_size() -> None:
    large, small = torch.ones(10_000).double(), torch.full((2,), 1e-6).double()
    wrong = torch.cat([large, 2 * small])
    assert overall_error(wrong, [large, small]) == pytest.approx(0.5**0.5)
    with pytest.raises(WrongResultError, match="10001 numbers instead of 10002"):
        overall_error(wrong[1:], [large, small])


def test_fractions_of_the_limits() -> None:
    assert LIMITS.arithmetic_fraction(1e9, "float32", 1.0) == 0.5
    assert LIMITS.arithmetic_fraction(1e9, "bfloat16", 1.0) == 0.25
    assert LIMITS.copy_fraction(5e8, 2.0) == 0.25


# ---- times --------------------------------------------------------------------------------------


def test_contestants_take_turns() -> None:
    calls: list[str] = []

    def timer(name: str) -> timing.Timer:
        def run(count: int) -> float:
            calls.append(name)
            return count * timing.SHORTEST_SAMPLE

        return run

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


# ---- the registries -----------------------------------------------------------------------------


def test_no_two_rows_have_one_title() -> None:
    titles = [case.title for case in registry.cases()]
    titles += [case.title for case in models.cases([1, 2])]
    assert len(titles) == len(set(titles))


def test_every_op_has_quick_cases_of_it() -> None:
    cases = list(registry.cases())
    assert {c.op for c in cases if c.is_quick} == {c.op for c in cases} - {"weight_standardization"}


def test_a_yardstick_comes_before_what_it_measures() -> None:
    for case in models.cases([2]):
        first = {c.dtype: c for c in reversed(case.contestants)}
        assert first == {dtype: models.YARDSTICKS[dtype] for dtype in first}


def test_the_quick_case_compiles_nothing() -> None:
    (case,) = (case for case in models.cases([2]) if case.is_quick)
    assert any(contestant.form == "compiled" for contestant in case.contestants)
    assert not any(contestant.form == "compiled" for contestant in case.quick().contestants)


@pytest.mark.parametrize("case", [c for c in registry.cases() if c.is_quick], ids=lambda c: c.title)
def test_the_contestants_of_a_quick_case_are_right(case: Case) -> None:
    torch.manual_seed(0)  # as a run does
    with torch.set_grad_enabled(case.is_training):
        found = contest.checked_errors(case.make(), case.dtype)
    assert {name: checked.problem for name, checked in found.items() if checked.problem} == {}
