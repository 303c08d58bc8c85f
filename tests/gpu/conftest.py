"""Everything in this folder needs a GPU; it is collected everywhere and skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    reason = "torch was built without CUDA" if torch.version.cuda is None else "no CUDA device"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))
