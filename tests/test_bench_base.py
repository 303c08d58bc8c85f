"""Another commit is checked out beside this one, with its own packages, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.base import environment_of, git, worktree_of

AGES = "import bitfast, bitfast.kernels as k, bitfast.bench as b; print(bitfast.AGE, k.AGE, b.AGE)"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With a commit "old"."""
    root = tmp_path / "repository"
    for name in ("bitfast", "kernels", "bench", "csrc"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text("AGE = 'old'")
    (root / "setup.py").write_text("open('bitfast/_native.so', 'w').write('built')")
    (root / ".gitignore").write_text("*.so")
    author = ("-c", "user.name=x", "-c", "user.email=x")
    for command in (["init"], ["add", "."], [*author, "commit", "-m", "x"], ["tag", "old"]):
        git(root, *command)
    (root / "bitfast/_native.so").write_text("copied")
    return root


def test_all_three_packages_are_those_of_the_commit(repository: Path) -> None:
    for name in ("bitfast", "kernels", "bench"):
        (repository / name / "__init__.py").write_text("AGE = 'new'")
    with worktree_of("old", repository) as folder:
        command = [sys.executable, "-c", AGES]
        ages = subprocess.check_output(command, cwd=folder, env=environment_of(folder), text=True)
    assert ages.split() == ["old"] * 3


@pytest.mark.parametrize(("changed", "found"), [("kernels", "copied"), ("csrc", "built")])
def test_other_sources_are_built(repository: Path, changed: str, found: str) -> None:
    (repository / changed / "__init__.py").write_text("AGE = 'new'")
    with worktree_of("old", repository) as folder:
        assert (folder / "bitfast/_native.so").read_text() == found


def test_a_failure_leaves_nothing_behind(repository: Path) -> None:
    with pytest.raises(KeyboardInterrupt), worktree_of("old", repository) as folder:
        raise KeyboardInterrupt
    assert not folder.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_what_is_no_commit_is_named(repository: Path) -> None:
    with pytest.raises(ValueError, match="no commit '--force'"), worktree_of("--force", repository):
        pass
    outside = repository.parent
    with pytest.raises(ValueError, match="is no git checkout"), worktree_of("old", outside):
        pass
