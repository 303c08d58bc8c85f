"""The folder of a run: whether a run may begin or go on there, and what may be removed from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitfast.checkpoints.files import CONFIG_NAME, CheckpointError, read_json
from bitfast.finetuning.card import CARD_NAME
from bitfast.finetuning.checkpoint import CHECKPOINT_NAME, Progress, read_progress
from bitfast.finetuning.errors import UsageError
from bitfast.finetuning.metrics import METRICS_NAME
from bitfast.images.processing_base import CONFIG_NAME as PROCESSOR_NAME

RECORD_NAME = "finetuning.json"
"""Says what a finished run did."""
REPORT_JSON, REPORT_CSV = "report.json", "report.csv"
CURVES, CONFUSION = "curves.png", "confusion.png"

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
OWN = {
    CARD_NAME, CHECKPOINT_NAME, CONFIG_NAME, CONFUSION, CURVES, METRICS_NAME, PROCESSOR_NAME,
    RECORD_NAME, REPORT_CSV, REPORT_JSON,
}  # fmt: skip
TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.(tmp|old)")
"""What ``replace_files`` writes, or keeps, while it renames: left behind by a process that was killed."""


MODEL = (CONFIG_NAME, PROCESSOR_NAME)
"""Without these, and weights, there is no result."""


class FinishedRunError(Exception):
    """The folder holds the result of this very run."""


def make_folder(folder: Path) -> None:
    """Make the folder of a run if it is not there; nothing in it is changed.

    Raises:
        UsageError: it holds something else than a run.
        OSError: it cannot be made or read.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"argument --output: must be a folder, {str(folder)!r} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_foreign_files(
        folder, any((folder / name).exists() for name in (RECORD_NAME, CHECKPOINT_NAME))
    )


def open_folder(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> Progress | None:
    """Return the progress of the run whose folder this is; None: it begins, and there is nothing in its way.

    Args:
        folder: From :func:`make_folder`; no other process may use it, so its metrics are locked.
        settings: What the run is to do.
        overwrite: Remove what an earlier run has left there, but for the metrics, whatever it did.

    Raises:
        FinishedRunError: the run is finished.
        UsageError: the folder holds another run, or a part of a finished one.
        OSError: it cannot be read or written.
    """
    if overwrite:
        _remove_run(folder)
        return None
    _remove_temporary_files(folder)
    if (folder / RECORD_NAME).exists():
        _refuse_other_settings(folder, _recorded_settings(folder), settings)
        _refuse_missing_model(folder)
        (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
        raise FinishedRunError
    try:
        progress = read_progress(folder)
    except CheckpointError as error:
        raise UsageError(f"argument --output: {error}; --overwrite begins anew") from error
    if progress is not None:
        _refuse_other_settings(folder, progress.settings, settings)
    return progress


def _refuse_foreign_files(folder: Path, is_of_a_run: bool) -> None:
    if is_of_a_run:
        return
    # A run that was killed before its first checkpoint has left these at most.
    for path in sorted(folder.iterdir()):
        match = TEMPORARY.fullmatch(path.name)
        if path.name != METRICS_NAME and (match is None or match["name"] != CHECKPOINT_NAME):
            raise UsageError(
                f"argument --output: must be a new or empty folder, or that of an earlier run; "
                f"{str(folder)!r} holds {path.name!r}"
            )


def _recorded_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = read_json(folder / RECORD_NAME)["settings"]
        if isinstance(settings, dict):
            return settings
    except (CheckpointError, KeyError):
        pass
    raise UsageError(
        f"argument --output: {folder / RECORD_NAME} is not of this version; --overwrite begins anew"
    )


def _refuse_missing_model(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    if not names.issuperset(MODEL) or not any(map(WEIGHTS.fullmatch, names)):
        raise UsageError(
            f"argument --output: {str(folder)!r} holds a finished run without its model; "
            "--overwrite begins anew"
        )


def _refuse_other_settings(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    differences = list(_differences(there, here))
    if differences:
        raise UsageError(
            f"argument --output: {str(folder)!r} holds another run ({'; '.join(differences)}). "
            "Choose another folder, or --overwrite"
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for name in [*here, *(there.keys() - here.keys())]:
        if there.get(name) != here.get(name):
            if name in ("training images", "validation images", "base weights", "classes"):
                yield f"other {name}"
            else:
                yield f"{name}: {there.get(name)} there, {here.get(name)} here"


def _remove_run(folder: Path) -> None:
    _remove_temporary_files(folder)
    own = {path.name for path in folder.iterdir() if WEIGHTS.fullmatch(path.name)} | OWN
    # The checkpoint and the record go last: without them nothing says whose the other files are. The model goes
    # first: without it the record does not say that all is there.
    last = [CHECKPOINT_NAME, RECORD_NAME]
    for name in [*MODEL, *(own - {*MODEL, METRICS_NAME, *last}), *last]:
        (folder / name).unlink(missing_ok=True)


def _remove_temporary_files(folder: Path) -> None:
    for path in list(folder.iterdir()):
        match = TEMPORARY.fullmatch(path.name)
        if match and (match["name"] in OWN or WEIGHTS.fullmatch(match["name"])):
            path.unlink()
