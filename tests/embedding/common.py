"""Images in files and in tar shards, and reading what ``bitfast embed`` wrote."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from tests.cli.common import picture

SUFFIXES = (".parquet", ".npy", ".safetensors")


def save_pictures(folder: Path, count: int) -> list[Path]:
    """Save random pictures of several sizes; return their paths, sorted."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03}.png" for number in range(count)]
    for number, path in enumerate(paths):
        picture(size=(40 + number % 3, 30)).save(path)
    return paths


def png() -> bytes:
    """The bytes of a random picture."""
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    return buffer.getvalue()


def save_shard(path: Path, members: dict[str, bytes | tarfile.TarInfo], **options: object) -> Path:
    """Write a tar file of these members: contents, or headers without any."""
    with tarfile.open(path, "w", **options) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            header = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            header.name = name
            if isinstance(content, bytes):
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
            else:
                archive.addfile(header)
    return path


def read_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    """Return the names and vectors in an output, whatever its format."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        vectors = table["embedding"].combine_chunks()
        width = vectors.type.list_size
        return table["name"].to_pylist(), vectors.flatten().to_numpy().reshape(-1, width)
    names = json.loads(path.with_name(f"{path.name}.names.json").read_text(encoding="ascii"))
    if path.suffix == ".npy":
        return names, np.load(path, allow_pickle=False)
    return names, load_file(path)["embeddings"]


def read_failures(path: Path) -> dict[str, str]:
    """Return the errors by name; none where there is no table of them."""
    table = path.with_name(f"{path.name}.failed.csv")
    if not table.exists():
        return {}
    with table.open(encoding="utf-8", newline="") as file:
        rows = [(row["name"], row["error"]) for row in csv.DictReader(file)]
    assert len(dict(rows)) == len(rows) > 0
    return dict(rows)


def files_in(folder: Path) -> list[str]:
    """The names of all files in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())
