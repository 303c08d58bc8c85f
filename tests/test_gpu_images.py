"""The part of the GPU report about images, in its smoke mode."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_images
from bench.gpu_timing import Session, WrongResultError
from bench.torchvision_import import import_torchvision


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = folder / "rows.jsonl"
    gpu_images.images(Session("images", "cpu", True, True, rows, math.inf))
    return [json.loads(line) for line in rows.read_text().splitlines()]


@pytest.mark.parametrize("rounded", [math.floor, round])
def test_each_is_compared_with_its_own_crop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounded: Callable[[float], int]
) -> None:
    """transformers 4.56 rounds where the crop begins, transformers 5 cuts the half off."""
    if import_torchvision() is None:
        pytest.skip("torchvision is not installed; transformers' fast processors need it")
    from transformers import BitImageProcessorFast

    def center_crop(self: Any, image: Any, size: Any, **_: Any) -> Any:
        begin = [rounded((n - size["height"]) / 2) for n in image.shape[-2:]]
        rows, columns = (slice(b, b + size["height"]) for b in begin)
        return image[..., rows, columns]

    monkeypatch.setattr(BitImageProcessorFast, "center_crop", center_crop)
    monkeypatch.setattr(gpu_images, "SMALL", ((12, 9), (8, 11), (20, 20)))  # one begins at 1.5
    rows = rows_of(tmp_path)
    assert {row["contestant"] for row in rows} >= {"transformers fast", "bitfast fast"}
    assert {row["status"] for row in rows} == {"checked"}, rows


@pytest.mark.parametrize(("name", "off_by"), [("torchvision", 0.3), ("bitfast fast", 1e-6)])
def test_what_is_wrong_is_found(name: str, off_by: float) -> None:
    expected = torch.zeros(2, 3, 4, 4)
    assert gpu_images.check(name, expected, expected) == 0
    with pytest.raises(WrongResultError, match="differs from Pillow"):
        gpu_images.check(name, expected + off_by, expected)
