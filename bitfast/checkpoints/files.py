"""Files of a checkpoint: finding them in a folder or on the Hub, and replacing all of them or none."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"

WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
"""The arguments that say where to look for a checkpoint's file."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".npz")
"""Endings of single files that are a checkpoint of timm or of Google."""


class CheckpointError(OSError, ValueError):
    """A checkpoint cannot be found, read or trusted; the message names the file and the reason."""


def locate_file(
    name_or_path: str | os.PathLike[str],
    filename: str,
    *,
    required: bool = True,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
    subfolder: str = "",
) -> Path | None:
    """Return the path of one file of a checkpoint, downloaded if it is on the Hub.

    Args:
        name_or_path: A local folder, or the id of a Hub repository ("google/bit-50").
        filename: The file's name inside the folder or repository.
        required: False: return None if the folder or repository has no such file.
        revision: Branch, tag or commit of the Hub repository.
        cache_dir: Where downloads are kept; by default huggingface_hub's cache.
        force_download: Download again what the cache holds already.
        local_files_only: Look into the cache only.
        token: Hub access token, or True for the one that ``hf auth login`` stored.
        subfolder: Folder inside ``name_or_path``.

    Raises:
        CheckpointError: there is no such folder, repository, revision or (if required) file.
    """
    name = os.fspath(name_or_path)
    if os.path.isdir(name):
        return _locate_in_folder(Path(name), filename, subfolder, required)
    if os.path.exists(name):
        raise CheckpointError(
            f"{name} is a file; expected a folder that contains {filename}, or a weight file of timm or "
            f"Google: {', '.join(WEIGHT_SUFFIXES)}"
        )
    if name.lower().endswith(WEIGHT_SUFFIXES):
        # Not looked up on the Hub, where this cannot be the name of a repository.
        raise CheckpointError(f"there is no file {name}")
    return _locate_on_hub(
        name,
        filename,
        required,
        revision=revision,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
        token=token,
        subfolder=subfolder or None,
    )


def is_weight_file(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether this is a file of weights, rather than a folder, a JSON file or a name on the Hub."""
    path = Path(name_or_path)
    return path.suffix.lower() in WEIGHT_SUFFIXES and path.is_file()


def _locate_in_folder(folder: Path, filename: str, subfolder: str, required: bool) -> Path | None:
    path = resolve_relative(folder, Path(subfolder, filename).as_posix(), follow_links=False)
    if path.is_file():
        return path
    if required:
        raise CheckpointError(f"{folder / subfolder} contains no file {filename}")
    return None


def _locate_on_hub(repo_id: str, filename: str, required: bool, **options: Any) -> Path | None:
    # Imported here: it costs a third of a second, and local checkpoints do not need it.
    import huggingface_hub
    from huggingface_hub import errors

    what = f"{filename} of {repo_id!r}"
    try:
        return Path(huggingface_hub.hf_hub_download(repo_id, filename, **options))
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{repo_id!r} is neither a local folder nor the id of a Hub repository: {error}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if not required:
            return None
        raise CheckpointError(
            f"{what} is not in the local cache (and {repo_id!r} is not a local folder), "
            f"and it could not be downloaded: {error}"
        ) from error
    except errors.EntryNotFoundError as error:
        if not required:
            return None
        raise CheckpointError(f"the Hub repository {repo_id!r} has no file {filename}") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"cannot download {what}: the repository is gated; ask for access on its Hub page and "
            f"pass token=... ({error})"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"cannot download {what}: there is no such local folder and no such Hub repository, or "
            f"it is private and token=... is missing ({error})"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"cannot download {what}: the repository has no revision {options.get('revision')!r}"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"cannot download {what}: {error}") from error


def resolve_relative(folder: Path, name: str, *, follow_links: bool = True) -> Path:
    """Return ``folder / name`` after making sure that it lies inside ``folder``.

    Args:
        folder: The checkpoint's folder.
        name: A relative path, as an index file gives it; not to be trusted.
        follow_links: Also refuse a symbolic link that leads out of the folder. Links into the blobs
            of the Hub cache, which is how a downloaded snapshot looks, are followed.

    Raises:
        CheckpointError: the path is absolute, climbs out of the folder or links out of it.
    """
    relative = Path(name)
    if relative.is_absolute() or relative.drive or "\\" in name or ".." in relative.parts:
        raise CheckpointError(f"{folder}: refused the path {name!r}, which is outside the folder")
    path = folder / relative
    if follow_links and not _leads_inside(folder, path):
        raise CheckpointError(f"{folder}: refused {name!r}, a link to outside the folder")
    return path


def _leads_inside(folder: Path, path: Path) -> bool:
    target = path.resolve()
    if target.is_relative_to(folder.resolve()):
        return True
    # Hub cache: models--OWNER--NAME/{snapshots/COMMIT/FILE -> blobs/HASH}.
    for parent in [folder.absolute(), *folder.absolute().parents]:
        if parent.parent.name == "snapshots":
            return target.is_relative_to(parent.parent.parent.resolve() / "blobs")
    return False


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def write_json_atomically(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as JSON; on any failure the file keeps its previous content."""
    write_text_atomically(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text``; on any failure the file keeps its previous content."""
    path = Path(path)
    replace_files(path.parent, {path.name: text_writer(text)})


def text_writer(text: str) -> Callable[[Path], None]:
    """Return a writer for :func:`replace_files` that writes ``text``."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8", newline="\n")

    return write


def replace_files(
    folder: Path, writers: Mapping[str, Callable[[Path], None]], stale: Iterable[str] = ()
) -> None:
    """Write several files of a folder, all of them or, on any failure, none.

    Every file is first written in full, to disk, beside its destination; only then are they renamed
    into place, in order; the stale files go last.

    Args:
        folder: An existing folder.
        writers: For each file name, a function that writes the file's content to the path given.
        stale: Names of files of an earlier save that the new ones replace.

    Raises:
        OSError: a file cannot be written; the folder is as it was before.
    """
    for name in writers:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"cannot write {folder / name}: it is a folder")
    staged: dict[str, Path] = {}
    try:
        for name, write in writers.items():
            staged[name] = _hidden_sibling(folder / name, "tmp")
            write(staged[name])
            _flush_to_disk(staged[name])
        _rename_into_place(folder, staged)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)
    for name in stale:
        (folder / name).unlink(missing_ok=True)


def _rename_into_place(folder: Path, staged: Mapping[str, Path]) -> None:
    """Rename every staged file to its name; if one fails, put the previous files back."""
    if len(staged) == 1:
        # This needs no second name, which a process that is killed would leave behind.
        [(name, path)] = staged.items()
        os.replace(path, folder / name)
        return
    previous: dict[Path, Path | None] = {}
    try:
        for name, path in staged.items():
            target = folder / name
            previous[target] = _keep(target) if target.exists() else None
            os.replace(path, target)
    except BaseException:
        for target, kept in previous.items():
            if kept is None:
                target.unlink(missing_ok=True)
            else:
                os.replace(kept, target)
                # Renaming a hard link onto itself leaves both names.
                kept.unlink(missing_ok=True)
        raise
    for kept in previous.values():
        if kept is not None:
            kept.unlink(missing_ok=True)


def _keep(path: Path) -> Path:
    """Give the file a second, hidden name, by which it can be restored."""
    kept = _hidden_sibling(path, "old")
    try:
        os.link(path, kept)
    except OSError:
        # A file system without hard links: the name is free for a moment.
        os.replace(path, kept)
    return kept


def remove_leftovers(path: Path) -> None:
    """Delete what a process that was killed while it wrote this file has left beside it."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


def _hidden_sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.{suffix}")


def _flush_to_disk(path: Path) -> None:
    # Some network file systems have no fsync; the rename is still atomic there.
    with path.open("rb+") as file, contextlib.suppress(OSError):
        os.fsync(file.fileno())
