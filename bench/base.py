"""Another commit of bitfast, to be measured beside this one: in a worktree of its own, removed afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def worktree_of(revision: str, root: Path = ROOT) -> Iterator[Path]:
    """Within the block, there is a checkout of a commit that Python can import; see :func:`environment_of`.

    The compiled extension is a copy of this checkout's if that is made of the same sources; otherwise it is
    built. Where this checkout has none, the other has none.

    Args:
        revision: Whatever names a commit to git.
        root: This checkout.

    Yields:
        Its folder.

    Raises:
        ValueError: there is no such commit, or ``root`` is no git checkout of bitfast.
        subprocess.CalledProcessError: the extension cannot be built.
    """
    commit = commit_of(revision, root)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "base"
        git(root, "worktree", "add", "--quiet", "--detach", str(folder), commit)
        try:
            for package in ("kernels", "bench"):
                (folder / "bitfast" / package).symlink_to(folder / package)
            provide_extension(folder, root)
            yield folder
        finally:
            git(root, "worktree", "remove", "--force", str(folder))


def environment_of(folder: Path) -> dict[str, str]:
    """Return the environment in which a Python that is started in that folder imports that checkout's bitfast.

    (An editable installation would provide its own kernels and bench, but links lead to those of the folder.)
    """
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def commit_of(revision: str, root: Path) -> str:
    """Return a commit's full name."""
    try:
        git(root, "ls-files", "--error-unmatch", "setup.py")
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(f"{root} is no git checkout of bitfast") from None
    try:
        return git(root, "rev-parse", "--verify", revision + "^{commit}")
    except subprocess.CalledProcessError:
        raise ValueError(f"there is no commit {revision!r} in {root}") from None


def git(root: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.check_output(command, cwd=root, stderr=subprocess.PIPE, text=True).strip()


def provide_extension(folder: Path, root: Path) -> None:
    """Copy the compiled extension from ``root``, or build one of the same halves."""
    libraries = list((root / "bitfast").glob("_native*.so"))
    if sources(folder) == sources(root):
        for library in libraries:
            shutil.copy2(library, folder / "bitfast")
    elif libraries:
        has_cuda = any("_cuda" in library.name for library in libraries)
        environment = {**os.environ, "BITFAST_EXTENSION": "cuda" if has_cuda else "cpu"}
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        print("building the extension of the other commit: its sources differ", file=sys.stderr)
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=sys.stderr)


def sources(root: Path) -> dict[str, bytes]:
    """Return what the extension is made of, by name."""
    return {path.name: path.read_bytes() for path in (root / "setup.py", *root.glob("csrc/*.*"))}
