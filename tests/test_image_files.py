"""Finding image files by name, folder and pattern."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bitfast.images.files import find_images, image_extensions, printable


def names(candidates: list[Any], folder: Path) -> list[str]:
    return [os.path.relpath(candidate.path, folder) for candidate in candidates]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "sub/c.png", "sub/deep/d.tiff", ".hidden.png", ".git/e.png"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "tree" / "notes.txt").touch()
    (tmp_path / "tree" / "void").mkdir()
    return tmp_path / "tree"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["."], ["a.JPG", "b.png", "sub/c.png", "sub/deep/d.tiff"]),
        (["b.png", "a.JPG"], ["b.png", "a.JPG"]),
        (["notes.txt"], ["notes.txt"]),
        (["sub", "."], ["sub/c.png", "sub/deep/d.tiff", "a.JPG", "b.png"]),
        (["*.png"], ["b.png"]),
        (["**/*.png"], ["b.png", "sub/c.png"]),
        (["s*"], ["sub/c.png", "sub/deep/d.tiff"]),
        (["?.[pJ]*"], ["a.JPG", "b.png"]),
        (["**"], ["a.JPG", "b.png", "notes.txt", "sub/c.png", "sub/deep/d.tiff"]),
        (["b.png", "./b.png", "sub/../b.png", "*.png"], ["b.png"]),
    ],
    ids=str,
)
def test_arguments(
    tree: Path, arguments: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    candidates = find_images(arguments)
    assert names(candidates, tree) == expected
    assert not any(candidate.problem for candidate in candidates)


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("*.bmp", "nothing matches"),
        ("missing.png", "no such file or folder"),
        ("", "no such file or folder"),
        ("void", "the folder holds no image files"),
        ("v*", "the folders that match hold no image files"),
    ],
)
def test_arguments_that_lead_nowhere(
    tree: Path, argument: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    (candidate,) = find_images([argument])
    assert (candidate.path, candidate.problem) == (argument, problem)


def test_a_file_may_be_named_like_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "[1].png"
    path.touch()
    (candidate,) = find_images([str(path)])
    assert (candidate.path, candidate.problem) == (str(path), None)


def test_folders_that_cannot_be_listed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if os.path.basename(path) == "sub":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    candidates = find_images([str(tree)])
    assert names(candidates, tree) == ["a.JPG", "b.png", "sub"]
    assert candidates[-1].problem == "Permission denied"


def test_extensions() -> None:
    extensions = image_extensions()
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif", ".gif", ".bmp"} <= extensions
    # What Pillow only writes, or only recognises.
    assert not {".pdf", ".h5", ".mpg", ".grib", ".txt"} & extensions


def test_printable() -> None:
    assert printable("Möwe 犬") == "Möwe 犬"
    assert printable("\udcff") == "\\udcff"
    assert printable("a\x1b\n") == "a\\x1b\\n"
