"""Models small enough for checkpoint tests, of bitfast and of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import bitfast.modeling
from bitfast.configuration import BitConfig

CLASSES = ["BitModel", "BitForImageClassification", "BitBackbone"]
TINY: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "num_groups": 2,
    "num_labels": 3,
}


def ours(name: str, **settings: Any) -> Any:
    return getattr(bitfast.modeling, name)(BitConfig(**{**TINY, **settings}))


def theirs(name: str, **settings: Any) -> Any:
    return getattr(transformers, name)(transformers.BitConfig(**{**TINY, **settings}))


def our_class(name: str) -> Any:
    return getattr(bitfast.modeling, name)


def their_class(name: str) -> Any:
    return getattr(transformers, name)


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


def file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SAVING = [
    {},
    {"max_shard_size": 5000},
    {"safe_serialization": False},
    {"safe_serialization": False, "max_shard_size": "5KB"},
    {"variant": "fp16", "max_shard_size": 5000},
]
