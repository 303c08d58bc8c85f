"""The accuracy contract forgives an unlucky draw, and no mistake."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.tolerances import Triples, assert_draws_within_contract

Errors = Callable[[int], float]
"""Maps the number of a draw to its error in millionths."""


def drawing(ours: Errors, plain: Errors = lambda _: 1) -> Callable[[], Triples]:
    numbers = iter(range(1000))

    def draw() -> Triples:
        number, oracle = next(numbers), torch.randn(5, dtype=torch.float64)
        actual, expected = (oracle + 1e-6 * error(number) for error in (ours, plain))
        return {"result": (actual.float(), expected.float(), oracle)}

    return draw


@pytest.mark.parametrize(("our_worst", "plain_worst"), [(0, 7), (3, 19), (2, 80)])
def test_an_unlucky_draw_is_forgiven(our_worst, plain_worst, capsys):
    draw = drawing(lambda n: 5 if n == our_worst else 1, lambda n: 5 if n == plain_worst else 1)
    assert_draws_within_contract(draw, 4)
    assert "of 4 draws result: largest error" in capsys.readouterr().out


@pytest.mark.parametrize("every", [1, 2, 5])
def test_mistakes_in_a_part_of_the_draws_are_not_forgiven(every):
    draw = drawing(lambda n: 5 if n % every == every - 1 else 1)
    with pytest.raises(AssertionError, match="result: largest error"):
        assert_draws_within_contract(draw, 5)


def test_a_small_error_in_every_draw_is_not_forgiven():
    with pytest.raises(AssertionError, match="error"):
        assert_draws_within_contract(drawing(lambda _: 3), 4)
