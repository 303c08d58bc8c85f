"""Images and a network for runs of a few steps, and what such a run leaves when nothing happens to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.common import save_model
from tests.finetuning.runs import run, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "colors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def whole(images: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(images, folder, base) == 0
    return folder
