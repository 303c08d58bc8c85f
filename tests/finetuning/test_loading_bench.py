"""The benchmark of loading images runs, and its figures fit together."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.finetune_loading import Measurement, measure, write_photographs
from bitfast import BitConfig
from bitfast.finetuning.dataset import open_splits
from bitfast.finetuning.recipe import choose_recipe


def test_figures_fit_together(tmp_path: Path) -> None:
    dataset = open_splits(write_photographs(tmp_path, 8), valid_fraction=0).training
    assert set(map(tuple, dataset.sizes.tolist())) == {(400, 500)}
    recipe, _ = choose_recipe(8, dataset.sizes, {"steps": 3, "batch_size": 4, "crop": 32})
    config = BitConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=2)
    measurement = Measurement(dataset, recipe, config, "cpu", torch.float32)
    (row,) = measure(measurement, [0], 2)
    assert row["workers"] == 0
    assert min(row["loading"], row["training"], row["together"]) > 0
    assert 0 < row["waiting"] < 1
