"""Writing the vectors as Parquet, .npy or safetensors: streamed, and all files or none."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitfast.checkpoints.files import remove_leftovers, replace_files
from bitfast.embedding.store import Store

ROWS_OF_A_GROUP = 4096
"""Rows of a Parquet file's row group, at least: 32 MiB of 2048 float32 numbers each."""

TENSOR_NAME = "embeddings"
"""Of the vectors in a safetensors file."""


@dataclass(frozen=True)
class Table:
    """What is to be written.

    Attributes:
        store: Holds the rows.
        dimension: Of each vector.
        dtype: float32 or float16.
        about: The model, the layer and the version, for the file's metadata.
    """

    store: Store
    dimension: int
    dtype: np.dtype
    about: Mapping[str, str]

    @property
    def shape(self) -> tuple[int, int]:
        """(images, dimension)."""
        return self.store.counts()[0], self.dimension


def write(table: Table, path: Path) -> None:
    """Write the table in the format that the path's suffix names, and the files beside it.

    Raises:
        OSError: a file cannot be written; all are as they were before.
    """
    writers: dict[str, Callable[[Path], None]] = {}
    stale = []
    names, failed = names_path(path), failed_path(path)
    if path.suffix != ".parquet":
        writers[names.name] = lambda file: _write_names(table, file)
    if table.store.counts()[1]:
        writers[failed.name] = lambda file: _write_failures(table, file)
    else:
        stale.append(failed.name)
    # The last that is renamed into place: where it is, the others are.
    writers[path.name] = lambda file: WRITERS[path.suffix](table, file)
    for name in writers:
        remove_leftovers(path.with_name(name))
    replace_files(path.parent, writers, stale)


def names_path(path: Path) -> Path:
    """Return where the names of the rows stand, for the formats that have no place for them."""
    return path.with_name(f"{path.name}.names.json")


def failed_path(path: Path) -> Path:
    """Return where the table of failed images stands."""
    return path.with_name(f"{path.name}.failed.csv")


# ---- the formats --------------------------------------------------------------------------------


def _write_parquet(table: Table, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = pa.from_numpy_dtype(table.dtype)
    schema = pa.schema(
        [
            pa.field("name", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(number, table.dimension), nullable=False),
        ],
        metadata={"bitfast": json.dumps(table.about)},
    )
    # Neither dictionaries nor compression make numbers like these smaller.
    with pq.ParquetWriter(path, schema, use_dictionary=False, compression="none") as writer:

        def write_group(names: list[str], vectors: list[bytes]) -> None:
            numbers = pa.array(np.frombuffer(b"".join(vectors), table.dtype))
            embeddings = pa.FixedSizeListArray.from_arrays(numbers, table.dimension)
            writer.write_table(pa.table([pa.array(names, pa.string()), embeddings], schema))

        names: list[str] = []
        vectors: list[bytes] = []
        for some_names, some_vectors in table.store.vectors():
            names += some_names
            vectors.append(some_vectors)
            if len(names) >= ROWS_OF_A_GROUP:
                write_group(names, vectors)
                names, vectors = [], []
        if names:
            write_group(names, vectors)


def _write_npy(table: Table, path: Path) -> None:
    descr = np.lib.format.dtype_to_descr(table.dtype)
    header = {"descr": descr, "fortran_order": False, "shape": table.shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _, vectors in table.store.vectors():
            file.write(vectors)


def _write_safetensors(table: Table, path: Path) -> None:
    # By hand, since safetensors' own function wants the whole tensor in memory.
    # https://github.com/huggingface/safetensors#format
    size = table.shape[0] * table.shape[1] * table.dtype.itemsize
    dtype = {"float32": "F32", "float16": "F16"}[table.dtype.name]
    tensor = {"dtype": dtype, "shape": table.shape, "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": dict(table.about), TENSOR_NAME: tensor}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, vectors in table.store.vectors():
            file.write(vectors)


WRITERS: Mapping[str, Callable[[Table, Path], None]] = {
    ".parquet": _write_parquet,
    ".npy": _write_npy,
    ".safetensors": _write_safetensors,
}
"""By suffix; ``bitfast.embedding.arguments.SUFFIXES`` names the same."""


def _write_names(table: Table, path: Path) -> None:
    # One name a line, and all of it one JSON list.
    with path.open("w", encoding="ascii", newline="\n") as file:
        separator = "[\n"
        for name in table.store.names():
            file.write(separator + json.dumps(name))
            separator = ",\n"
        file.write("\n]\n" if separator == ",\n" else "[]\n")


def _write_failures(table: Table, path: Path) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "error"])
        writer.writerows(table.store.failures())
