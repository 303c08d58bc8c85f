"""The forms that labelled images come in, each read into :class:`Records`: which images, which labels."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bitfast.checkpoints.files import read_json, resolve_relative
from bitfast.finetuning.sources import (
    BYTES_PER_BATCH,
    ArrowImages,
    ImageFiles,
    PackedImages,
    Source,
    is_binary,
    map_arrow_files,
)
from bitfast.images.files import find_images

TRAINING, VALIDATION = "training", "validation"
SPLITS = {
    "train": TRAINING,
    "training": TRAINING,
    "valid": VALIDATION,
    "val": VALIDATION,
    "validation": VALIDATION,
    "test": VALIDATION,
}
"""What the names of splits mean. Of several for validation the first in this order is taken."""

IMAGE_COLUMNS = ("image", "img", "path", "image_path", "file", "file_name", "filename")
LABEL_COLUMNS = ("label", "labels", "class", "target")
SPLIT_COLUMN = "split"

MISSING = -1
"""The label of an image that has none."""

FORMS = (
    "a folder with a folder of images per class, a CSV or Parquet file with the columns path and label, or "
    "a folder that datasets saved"
)


@dataclass(frozen=True)
class Records:
    """Images and labels of one split.

    Attributes:
        source: The images.
        rows: Which of the source's images they are, int64, (N,).
        labels: Indices of classes, int64, (N,), or ``MISSING``.
        classes: Their names.
        fixed: Whether the data say which classes there are, and in which order, rather than the labels.
    """

    source: Source
    rows: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    fixed: bool = False

    def select(self, which: np.ndarray) -> Records:
        """Return some of the records, by a mask or by indices."""
        return Records(self.source, self.rows[which], self.labels[which], self.classes, self.fixed)

    def with_classes(self, classes: tuple[str, ...]) -> Records:
        """Return them with the labels that they have among other classes.

        Raises:
            ValueError: an image is of a class that is not among them; the message names it.
        """
        places = {name: place for place, name in enumerate(classes)}
        used = np.unique(self.labels[self.labels != MISSING])
        unknown = [self.classes[label] for label in used if self.classes[label] not in places]
        if unknown:
            raise ValueError(f"{', '.join(map(repr, unknown))}")
        new = np.array([places.get(name, MISSING) for name in self.classes] + [MISSING], np.int64)
        return Records(self.source, self.rows, new[self.labels], classes, self.fixed)

    def without_absent_classes(self) -> Records:
        """Return them with only those classes that they have images of, unless the data fix the classes."""
        if self.fixed:
            return self
        used = np.unique(self.labels[self.labels != MISSING])
        return self.with_classes(tuple(self.classes[label] for label in used))


def read_records(path: Path) -> tuple[dict[str, Records], list[str]]:
    """Return the records of each split (``TRAINING`` and, if the data have one, ``VALIDATION``), and notes.

    Raises:
        OSError: something cannot be read.
        ValueError: it has none of the forms.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_file():
        ending = path.suffix.lower()
        if ending == ".csv":
            return _read_csv(path)
        if ending in (".parquet", ".pq"):
            return _read_parquet(path)
        raise ValueError(f"{path} must be {FORMS}")
    if (path / "dataset_dict.json").is_file():
        return _read_dataset_dict(path)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return {TRAINING: _read_saved_dataset(path)}, []
    return _read_folder(path)


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Return a key by which "class 10" comes after "class 9"."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


# ---- folders ------------------------------------------------------------------------------------


def _read_folder(path: Path) -> tuple[dict[str, Records], list[str]]:
    folders = _folders(path)
    # A folder "train" may also be a class of vehicles, with images rather than classes in it.
    if folders and all(folder.lower() in SPLITS and _folders(path / folder) for folder in folders):
        chosen, notes = _choose_splits(folders, path)
        if TRAINING in chosen:
            read = {split: _read_classes(path / name) for split, name in chosen.items()}
            parts = {split: records for split, (records, _) in read.items()}
            return parts, notes + [note for _, more in read.values() for note in more]
    records, notes = _read_classes(path)
    return {TRAINING: records}, notes


def _read_classes(path: Path) -> tuple[Records, list[str]]:
    notes: list[str] = []
    names: list[str] = []
    labels: list[int] = []
    classes: list[str] = []
    folders = _folders(path)
    if not folders:
        raise ValueError(f"{path} has no folder per class in it; it must be {FORMS}")
    for folder in folders:
        found = find_images([str(path / folder)])
        files = [os.path.relpath(file.path, path) for file in found if file.problem is None]
        notes += [f"{file.path}: {file.problem}" for file in found if file.problem is not None]
        if files:
            labels += [len(classes)] * len(files)
            classes.append(folder)
            names += sorted(files, key=natural_order)
    beside = sum(file.is_file() and not file.name.startswith(".") for file in path.iterdir())
    if beside:
        notes.append(f"{path}: files in no class's folder, not used: {beside}")
    rows = np.arange(len(names))
    return Records(ImageFiles(path, names), rows, np.array(labels, np.int64), tuple(classes)), notes


def _folders(path: Path) -> list[str]:
    names = [file.name for file in path.iterdir() if file.is_dir() and file.name[0] != "."]
    return sorted(names, key=natural_order)


def _choose_splits(names: list[str], path: Path) -> tuple[dict[str, str], list[str]]:
    """Return the name of the split that is trained on, and of that which is for validation, if any."""
    chosen: dict[str, str] = {}
    notes = []
    known = {name.lower(): name for name in names}
    for lower, split in SPLITS.items():
        if lower in known:
            name = known.pop(lower)
            if split in chosen:
                notes.append(f"{path}: the split {name!r} is not used")
            else:
                chosen[split] = name
    notes += [f"{path}: the split {name!r} is not used" for name in known.values()]
    return chosen, notes


# ---- tables -------------------------------------------------------------------------------------


def _read_csv(path: Path) -> tuple[dict[str, Records], list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            image = _find_column(path, header, {}, "Image", IMAGE_COLUMNS)
            label = _find_column(path, header, {}, "ClassLabel", LABEL_COLUMNS)
            split = next((name for name in header if name.lower() == SPLIT_COLUMN), None)
            names = [name for name in (image, label, split) if name is not None]
            columns: dict[str, list[str | None]] = {name: [] for name in names}
            places = [(header.index(name), columns[name]) for name in names]
            for row in reader:
                if not row:
                    continue  # an empty line
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {len(header)} values are expected, got {len(row)}"
                    )
                for place, column in places:
                    column.append(row[place] or None)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable CSV file in UTF-8: {error}") from error
    table = pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()})
    return _split(
        path, table, split, _files(path, table.column(image)), _labels(path, table, label, {})
    )


def _read_parquet(path: Path) -> tuple[dict[str, Records], list[str]]:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            features = _features((schema.metadata or {}).get(b"huggingface"))
            image = _find_column(path, schema.names, features, "Image", IMAGE_COLUMNS)
            label = _find_column(path, schema.names, features, "ClassLabel", LABEL_COLUMNS)
            split = next((name for name in schema.names if name.lower() == SPLIT_COLUMN), None)
            table = file.read([name for name in (label, split) if name is not None])
            labels = _labels(path, table, label, features)
            kind = schema.field(image).type
            source: Source
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                source = _files(path, file.read([image]).column(0))
            else:
                _check_image_column(path, image, kind)
                source = PackedImages(_column_in_batches(file, image), path.parent)
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
    return _split(path, table, split, source, labels)


def _column_in_batches(file: Any, name: str) -> Iterator[pa.Array]:
    for batch in file.iter_batches(BYTES_PER_BATCH, columns=[name]):
        yield batch.column(0)


def _files(path: Path, column: pa.ChunkedArray) -> ImageFiles:
    names = ["" if name is None else name for name in column.to_pylist()]
    address = next((name for name in names if re.match(r"[a-zA-Z][\w+.-]*://", name)), None)
    if address is not None:
        raise ValueError(f"{path}: images must be local files, got the address {address!r}")
    return ImageFiles(path.parent, names)


def _split(
    path: Path,
    table: pa.Table,
    column: str | None,
    source: Source,
    labels: tuple[np.ndarray, tuple[str, ...], bool],
) -> tuple[dict[str, Records], list[str]]:
    """Divide a table by its column of splits, if it has one."""
    codes, classes, fixed = labels
    records = Records(source, np.arange(len(codes)), codes, classes, fixed)
    if column is None:
        return {TRAINING: records}, []
    values = table.column(column).cast(pa.string())
    names = sorted({str(name) for name in values.unique().to_pylist()})
    chosen, notes = _choose_splits(names, path)
    if TRAINING not in chosen:
        raise ValueError(f"{path}: the column {column!r} must hold 'train', got {', '.join(names)}")
    masks = {
        split: pc.equal(values, name).fill_null(False).to_numpy() for split, name in chosen.items()
    }
    return {
        split: records.select(mask).without_absent_classes() for split, mask in masks.items()
    }, notes


def _find_column(
    path: Path, names: list[str], features: Mapping[str, Any], kind: str, usual: tuple[str, ...]
) -> str:
    """Return the column of images or labels: by its feature, as ``datasets`` has it, or by its name."""
    lower = {name.lower(): name for name in reversed(names)}
    by_name = [lower[name] for name in usual if name in lower]
    by_feature = [name for name in names if _is_feature(features.get(name), kind)]
    if len(by_feature) > 1:
        by_feature = [name for name in by_name if name in by_feature][:1] or by_feature
    if len(by_feature) == 1:
        return by_feature[0]
    if by_name and not by_feature:
        return by_name[0]
    what = "images" if kind == "Image" else "labels"
    problem = "several columns" if by_feature else "no column"
    raise ValueError(
        f"{path} has {problem} of {what}; one must be named {' or '.join(usual)}; "
        f"it has {', '.join(names) or 'none'}"
    )


def _is_feature(feature: Any, kind: str) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == kind


def _features(metadata: bytes | None) -> Mapping[str, Any]:
    """Return the features that ``datasets`` describes in the metadata of a file; none if there are none."""
    try:
        features = json.loads(metadata or b"{}")["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _labels(
    path: Path, table: pa.Table, name: str, features: Mapping[str, Any]
) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """Return labels, the names of classes, and whether the data say which these are."""
    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    classes = features[name].get("names") if _is_feature(features.get(name), "ClassLabel") else None
    if classes is not None and pa.types.is_integer(column.type):
        codes = column.cast(pa.int64()).fill_null(MISSING).to_numpy()
        if len(codes) and not MISSING <= codes.min() <= codes.max() < len(classes):
            raise ValueError(
                f"{path}: labels must be from 0 to {len(classes) - 1}, got {codes.min()} to {codes.max()}"
            )
        return codes, tuple(map(str, classes)), True
    if not any(
        is_kind(column.type)
        for is_kind in (
            pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean,
        )
    ):  # fmt: skip
        raise ValueError(
            f"{path}: the labels in {name!r} must be text or integers, got {column.type}"
        )
    texts = column.cast(pa.string())
    names = sorted((text for text in texts.unique().to_pylist() if text), key=natural_order)
    codes = pc.index_in(texts, value_set=pa.array(names, pa.string())).fill_null(MISSING)
    return codes.to_numpy().astype(np.int64), tuple(names), False


def _check_image_column(path: Path, name: str, kind: pa.DataType) -> None:
    if is_binary(kind):
        return
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
        return
    raise ValueError(
        f"{path}: the images in {name!r} must be paths, bytes or structs of bytes and path, got {kind}"
    )


# ---- folders of `datasets` ----------------------------------------------------------------------


def _read_dataset_dict(path: Path) -> tuple[dict[str, Records], list[str]]:
    names = read_json(path / "dataset_dict.json").get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path / 'dataset_dict.json'} must hold a list of splits")
    chosen, notes = _choose_splits(names, path)
    if TRAINING not in chosen:
        raise ValueError(f"{path} has no split 'train', but {', '.join(names) or 'none'}")
    folders = {split: resolve_relative(path, name) for split, name in chosen.items()}
    return {split: _read_saved_dataset(folder) for split, folder in folders.items()}, notes


def _read_saved_dataset(path: Path) -> Records:
    listed = read_json(path / "state.json").get("_data_files")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path / 'state.json'} must list the data files")
    files = [resolve_relative(path, str(file["filename"])) for file in listed]
    features = read_json(path / "dataset_info.json").get("features")
    features = features if isinstance(features, dict) else {}
    try:
        table = map_arrow_files(files)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: the data files cannot be read: {error}") from error
    image = _find_column(path, table.column_names, features, "Image", IMAGE_COLUMNS)
    label = _find_column(path, table.column_names, features, "ClassLabel", LABEL_COLUMNS)
    labels, classes, fixed = _labels(path, table, label, features)
    kind = table.schema.field(image).type
    source: Source
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        source = _files(path / "state.json", table.column(image))
    else:
        _check_image_column(path, image, kind)
        source = ArrowImages(files, image)
    return Records(source, np.arange(len(labels)), labels, classes, fixed)
