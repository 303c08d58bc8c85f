"""MixUp: pairs of neighbours, one lambda a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfast.finetuning.augmentation import lambda_of, mix


@given(st.integers(1, 9), st.floats(0, 1), st.booleans())
def test_neighbours_are_mixed(count: int, lam: float, channels_last: bool) -> None:
    images = torch.randn(count, 3, 4, 5, dtype=torch.float64)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 6, (count,))
    mixed, probabilities = mix(images, labels, 6, lam)
    partners = [i ^ 1 if i ^ 1 < count else i for i in range(count)]
    expected = lam * images + (1 - lam) * images[partners]
    torch.testing.assert_close(mixed, expected)
    one_hot = torch.eye(6)[labels]
    torch.testing.assert_close(probabilities, lam * one_hot + (1 - lam) * one_hot[partners])
    assert mixed.stride() == images.stride()
    if count % 2:
        assert torch.equal(mixed[-1], images[-1])


@given(st.integers(1, 6), st.integers(1, 13), st.floats(0, 1))
def test_even_parts_are_mixed_as_the_whole(half: int, count: int, lam: float) -> None:
    images, labels = torch.randn(count, 3, 2, 2), torch.randint(0, 3, (count,))
    whole = mix(images, labels, 3, lam)
    size = 2 * half
    parts = [mix(i, j, 3, lam) for i, j in zip(images.split(size), labels.split(size), strict=True)]
    for expected, part in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(part), expected)


def test_images_that_are_given_stay() -> None:
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    copies = images.clone(), labels.clone()
    mix(images, labels, 3, 0.4)
    assert torch.equal(images, copies[0])
    assert torch.equal(labels, copies[1])


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_lambda_has_the_distribution(alpha: float) -> None:
    drawn = np.array([lambda_of(1, step, alpha) for step in range(4000)])
    assert drawn.tolist() == [lambda_of(1, step, alpha) for step in range(4000)]
    assert ((drawn >= 0) & (drawn <= 1)).all()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(drawn.mean() - 0.5) < 5 * (variance / 4000) ** 0.5
    assert abs(drawn.var() - variance) < 0.02
    assert lambda_of(2, 0, alpha) != drawn[0]


def test_without_alpha_nothing_is_mixed() -> None:
    assert lambda_of(1, 2, 0) == 1
