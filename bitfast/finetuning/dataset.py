"""Labelled images to fine-tune on: opened, divided into training and validation, read one by one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from bitfast.finetuning import draws
from bitfast.finetuning.draws import Purpose
from bitfast.finetuning.forms import MISSING, TRAINING, VALIDATION, Records, read_records
from bitfast.finetuning.sources import ImageFiles, Source
from bitfast.images.files import NEVER_DECODED, decode_image, describe

VALID_FRACTION = 0.1
"""Of each class, held out for validation where the data have no split of their own."""

SCAN_THREADS = 8
IMAGES_PER_TASK = 256
"""Whose headers a thread reads before it reports."""

SHOWN = 5
"""Names in a message."""


class Problem(NamedTuple):
    """An image that was left out: its name, as in the data, and why."""

    name: str
    reason: str


class Dataset:
    """Images and their labels. Images are decoded when they are read; only names, labels and sizes are kept.

    Pickled, it is opened again by whoever unpickles it (a worker process).

    Args:
        source: Holds the images, perhaps among others.
        rows: Which of the source's images these are, int64, (N,).
        labels: Index of each image's class, int64, (N,).
        sizes: (height, width) of each image in pixels as it is stored, int32, (N, 2).
        lengths: Bytes of each image as it is stored, int64, (N,).
    """

    def __init__(
        self,
        source: Source,
        rows: np.ndarray,
        labels: np.ndarray,
        sizes: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        self._source, self._rows = source, rows
        self.labels, self.sizes, self.lengths = labels, sizes, lengths

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._rows)

    @property
    def names(self) -> list[str]:
        """The name of each image: its path as in the data (relative to them), or its row."""
        return self._source.names(self._rows)

    def name(self, index: int) -> str:
        """Return the name of one image."""
        return self._source.names(self._rows[index : index + 1])[0]

    def read(self, index: int) -> Image.Image:
        """Return an image, decoded, in mode "RGB".

        It is not turned as its EXIF data say: neither do ``bitfast classify`` nor the image processors,
        given a PIL image.

        Raises:
            Exception: whatever Pillow raises where the image is broken; see ``images.files.describe``.
        """
        file, _ = self._source.open(int(self._rows[index]))
        return decode_image(file).convert("RGB")

    def select(self, which: np.ndarray) -> Dataset:
        """Return some of the images, by a mask or by indices."""
        parts = (self._rows, self.labels, self.sizes, self.lengths)
        return Dataset(self._source, *(part[which] for part in parts))

    def fingerprint(self) -> str:
        """Return a hash of names, labels, sizes and numbers of bytes: other data, another fingerprint.

        It does not depend on where the data lie, nor on their time stamps.
        """
        names = b"\0".join(map(os.fsencode, self.names))
        digest = hashlib.sha256(names)
        for part in (self.labels, self.sizes.astype(np.int64), self.lengths):
            digest.update(np.ascontiguousarray(part, "<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Splits:
    """What a model is trained on and measured with.

    Attributes:
        classes: Names, in the order of the labels.
        training: At least one image.
        validation: May be empty.
        problems: Images left out because they cannot be read or have no label.
        notes: What else the user should know, a line each.
    """

    classes: tuple[str, ...]
    training: Dataset
    validation: Dataset
    problems: list[Problem]
    notes: list[str]


def open_splits(
    data: Path,
    *,
    valid: Path | None = None,
    valid_fraction: float = VALID_FRACTION,
    per_class: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Splits:
    """Open labelled images, look at the header of each, and divide them into training and validation.

    Args:
        data: A folder with a folder of images per class (or ``train`` and, if they exist, ``valid``, ``val``,
            ``validation`` or ``test`` with these in them); a CSV or Parquet file; or a folder that
            ``datasets`` saved.
        valid: The same, for validation.
        valid_fraction: Of each class, held out for validation if neither ``valid`` nor ``data`` has any:
            rounded, but of two images or more at least one, and never all. 0: nothing.
        per_class: Training images of each class, drawn by the seed from what is not for validation; None: all.
        seed: Decides what is held out and drawn; from 0 to 2**63 - 1.
        progress: Called with (images looked at, of how many).

    Raises:
        OSError: ``data`` or ``valid`` cannot be read.
        ValueError: they are not as described, or what they hold is of no use; the message says why.
    """
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction must be from 0 to below 1, got {valid_fraction}")
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    problems: list[Problem] = []
    parts, notes = read_records(data)
    if valid is not None:
        theirs, more = read_records(valid)
        parts[VALIDATION] = theirs.get(VALIDATION, theirs[TRAINING])
        notes += more
    classes = parts[TRAINING].classes
    if len(classes) < 2:
        what = f"only {classes[0]!r}" if classes else "none"
        raise ValueError(f"{data}: images of at least two classes are needed, got {what}")
    _check_names(classes, data)
    if VALIDATION in parts:
        parts[VALIDATION] = _in_classes(parts[VALIDATION], classes, valid or data)
    for split, records in parts.items():
        labelled = _without_missing_labels(records, problems)
        parts[split] = _without_duplicates(labelled, classes, notes)
    if VALIDATION in parts:
        parts[TRAINING] = _without_images_of(parts[TRAINING], parts[VALIDATION], notes)

    scanned = _scan(parts, problems, progress)
    training, validation = scanned[TRAINING], scanned.get(VALIDATION)
    if not len(training):
        raise ValueError(f"{data}: there is no training image left: {_first(problems, notes)}")
    if validation is None:
        training, validation = _hold_out(training, len(classes), valid_fraction, seed)
    elif not len(validation):
        raise ValueError(
            f"{valid or data}: there is no image for validation: {_first(problems, notes)}"
        )
    if per_class is not None:
        training = _draw(training, len(classes), per_class, seed)
    _note_counts(classes, training, validation, per_class, notes)
    return Splits(classes, training, validation, problems, notes)


# ---- which images -------------------------------------------------------------------------------


def _check_names(classes: tuple[str, ...], path: Path) -> None:
    """Refuse names that files of text cannot have; they would come to light when the model is written."""
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{path}: the name of the class {name!a} is not Unicode") from error


def _in_classes(records: Records, classes: tuple[str, ...], path: Path) -> Records:
    try:
        return records.with_classes(classes)
    except ValueError as error:
        raise ValueError(
            f"{path}: validation has classes that training does not have: {error}"
        ) from error


def _without_missing_labels(records: Records, problems: list[Problem]) -> Records:
    missing = records.labels == MISSING
    names = records.source.names(records.rows[missing])
    problems += [Problem(name, "no label") for name in names]
    return records.select(~missing)


def _without_duplicates(records: Records, classes: tuple[str, ...], notes: list[str]) -> Records:
    """Leave out files that come twice.

    Raises:
        ValueError: they have different labels.
    """
    paths = _paths(records)
    if len(set(paths)) == len(paths):
        return records
    names = records.source.names(records.rows)
    first: dict[str, int] = {}
    keep = np.ones(len(paths), bool)
    for i, path in enumerate(paths):
        if not names[i]:
            continue  # no path, which is said where the file is opened
        earlier = first.setdefault(path, i)
        if records.labels[i] != records.labels[earlier]:
            labels = [repr(classes[records.labels[j]]) for j in (earlier, i)]
            raise ValueError(f"{path} has different labels: {' and '.join(labels)}")
        keep[i] = earlier == i
    if keep.all():
        return records
    such = paths[keep.argmin()]
    notes.append(f"images that come twice, used once: {(~keep).sum()}, such as {such}")
    return records.select(keep)


def _without_images_of(records: Records, others: Records, notes: list[str]) -> Records:
    """Leave out of training what is in validation."""
    taken = set(_paths(others))
    keep = np.array([path not in taken for path in _paths(records)] or True, bool)
    if keep.all():
        return records
    notes.append(f"images for validation as well, not trained on: {(~keep).sum()}")
    return records.select(keep)


def _paths(records: Records) -> list[str]:
    source = records.source
    return source.absolute(records.rows) if isinstance(source, ImageFiles) else []


def _members(dataset: Dataset, classes: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each class and the indices of its images."""
    by_class = np.argsort(dataset.labels, kind="stable")
    ends = np.cumsum(np.bincount(dataset.labels, minlength=classes))[:-1]
    yield from enumerate(np.split(by_class, ends))


def _hold_out(
    dataset: Dataset, classes: int, fraction: float, seed: int
) -> tuple[Dataset, Dataset]:
    held_out = np.zeros(len(dataset), bool)
    for label, members in _members(dataset, classes):
        count = round(fraction * len(members)) if fraction else 0
        if fraction and len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        elif len(members) == 1:
            count = 0
        drawn = draws.order(seed, Purpose.HOLD_OUT, label, len(members))[:count]
        held_out[members[drawn]] = True
    return dataset.select(~held_out), dataset.select(held_out)


def _draw(dataset: Dataset, classes: int, count: int, seed: int) -> Dataset:
    drawn = [
        members[draws.order(seed, Purpose.FEW_SHOT, label, len(members))[:count]]
        for label, members in _members(dataset, classes)
    ]
    return dataset.select(np.sort(np.concatenate(drawn)))


def _note_counts(
    classes: tuple[str, ...],
    training: Dataset,
    validation: Dataset,
    per_class: int | None,
    notes: list[str],
) -> None:
    def note(names: list[str], what: str) -> None:
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            notes.append(f"{what}: {', '.join(names[:SHOWN])}{more}")

    counts = np.bincount(training.labels, minlength=len(classes))
    measured = np.bincount(validation.labels, minlength=len(classes))
    names = list(enumerate(classes))
    note([name for i, name in names if not counts[i]], "classes without a training image")
    if per_class is not None:
        few = [f"{name} ({counts[i]})" for i, name in names if 0 < counts[i] < per_class]
        note(few, f"classes with fewer than {per_class} training images")
    if len(validation):
        note(
            [name for i, name in names if not measured[i]],
            "classes without an image for validation",
        )


def _first(problems: list[Problem], notes: list[str]) -> str:
    shown = [f"{problem.name}: {problem.reason}" for problem in problems] + notes
    return "; ".join(shown[:2]) or "there are none"


# ---- the headers of all images ------------------------------------------------------------------


def _scan(
    parts: dict[str, Records],
    problems: list[Problem],
    progress: Callable[[int, int], None] | None,
) -> dict[str, Dataset]:
    """Read the header of each image; leave out, and report, what is none."""
    total = sum(len(records.rows) for records in parts.values())
    done = 0
    scanned = {}
    with ThreadPoolExecutor(SCAN_THREADS, "scan") as pool:
        try:
            for split, records in parts.items():
                chunks = [
                    records.rows[start : start + IMAGES_PER_TASK]
                    for start in range(0, len(records.rows), IMAGES_PER_TASK)
                ]
                sources = [records.source] * len(chunks)
                headers: list[tuple[int, int, int]] = []
                for rows, (found, bad) in zip(
                    chunks, pool.map(_read_headers, sources, chunks), strict=True
                ):
                    headers += found
                    problems += bad
                    done += len(rows)
                    if progress is not None:
                        progress(done, total)
                scanned[split] = _as_dataset(records, headers)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return scanned


def _as_dataset(records: Records, headers: list[tuple[int, int, int]]) -> Dataset:
    table = np.array(headers, np.int64).reshape(-1, 3)
    good = table[:, 0] > 0
    kept = records.select(good)
    return Dataset(
        kept.source, kept.rows, kept.labels, table[good, :2].astype(np.int32), table[good, 2]
    )


def _read_headers(
    source: Source, rows: np.ndarray
) -> tuple[list[tuple[int, int, int]], list[Problem]]:
    """Return (height, width, bytes) of each image, 0 for what is none, and what is wrong with these."""
    headers, problems = [], []
    for row in rows.tolist():
        try:
            file, length = source.open(row)
            with Image.open(file) as image:
                if image.format in NEVER_DECODED:
                    raise OSError(f"Pillow does not decode the format {image.format}")
                headers.append((image.height, image.width, length))
        except Exception as error:  # broken files make Pillow raise nearly anything
            headers.append((0, 0, 0))
            problems.append(Problem(source.names(np.array([row]))[0], describe(error)))
    return headers, problems
