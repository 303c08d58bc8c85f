"""A model, images good and bad, and a way to run the command in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bitfast import cli
from tests.cli.common import (
    Run,
    picture,
    save_model,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    picture().save(path)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of images in many modes, and of files that only look like images."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    picture("I;16").save(folder / "16-bit.png")
    picture("P").save(folder / "animation.gif", save_all=True, append_images=[picture("P")])
    picture("CMYK").save(folder / "cmyk.jpg")
    picture("L").save(folder / "gray.png")
    picture("P").save(folder / "palette.PNG")
    picture().save(folder / "rgb.webp")
    picture("RGBA").save(folder / "rgba.png")
    (folder / "empty.png").touch()
    (folder / "link.png").symlink_to("nowhere")
    (folder / "text.png").write_text("not an image")
    picture(size=(300, 300)).save(folder / "truncated.jpg")
    content = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "notes.txt").write_text("not an image, and does not say so")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; returns its status and what it printed."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        status: Any
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = exit_.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call
