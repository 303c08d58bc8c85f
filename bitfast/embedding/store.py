"""What has been embedded so far: a file beside the output, from which an interrupted run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SECONDS_BETWEEN_COMMITS = 1.0
"""A run that is killed loses no more than the work of about this time."""


class StoreError(OSError):
    """The file cannot be used or written; the message says which and why."""


@dataclass
class BatchResult:
    """What came of one batch.

    Attributes:
        number: Of the batch, from 0.
        names: Of the images that have a vector, in the order of the input.
        vectors: Their vectors, shape (N, D), float32 or float16.
        failures: (name, error) of the others, in the order of the input.
    """

    number: int
    names: list[str]
    vectors: np.ndarray
    failures: list[tuple[str, str]]


class Store:
    """The results of batches, by number, in an SQLite file. What is in it survives any kind of death.

    A context manager, which closes the file, and makes a StoreError of an error of SQLite.

    Args:
        path: Made if there is none.
        settings: What the results depend on, by the name that the user knows it by.
        overwrite: Begin anew where the file holds results of other settings.

    Raises:
        StoreError: it belongs to other settings, is being written by another process, or is no such file.
    """

    def __init__(self, path: Path, settings: Mapping[str, str], overwrite: bool = False) -> None:
        self.path = path
        self._committed = time.monotonic()
        try:
            self._connection = self._open()
            begun = dict(self._connection.execute("SELECT name, value FROM settings"))
            if begun and begun != settings:
                if not overwrite:
                    raise StoreError(_difference(path, begun, settings))
                self._connection.execute("DELETE FROM batches")
                self._connection.execute("DELETE FROM settings")
            self._connection.executemany(
                "INSERT OR REPLACE INTO settings VALUES (?, ?)", settings.items()
            )
            self._connection.commit()
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=0)
        # The lock is held until the file is closed, so that no second process writes to it.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT)"
        )
        connection.execute(
            "CREATE TABLE IF NOT EXISTS batches (number INTEGER PRIMARY KEY, count INTEGER,"
            " failed INTEGER, names TEXT, failures TEXT, vectors BLOB)"
        )
        return connection

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with contextlib.suppress(sqlite3.Error):  # the disk may be full
            self._connection.commit()
        self._connection.close()
        if isinstance(error, sqlite3.Error):
            raise self._failure(error) from error

    def add(self, result: BatchResult) -> None:
        """Keep a result; one that is there already stays."""
        row = (
            result.number,
            len(result.names),
            len(result.failures),
            json.dumps(result.names),
            json.dumps(result.failures),
            result.vectors.tobytes(),
        )
        self._connection.execute("INSERT OR IGNORE INTO batches VALUES (?, ?, ?, ?, ?, ?)", row)
        if time.monotonic() - self._committed >= SECONDS_BETWEEN_COMMITS:
            self._connection.commit()
            self._committed = time.monotonic()

    def numbers(self) -> set[int]:
        """Return the numbers of the batches that are there."""
        return {number for (number,) in self._connection.execute("SELECT number FROM batches")}

    def counts(self) -> tuple[int, int]:
        """Return how many images have a vector, and how many failed."""
        sums = "SELECT TOTAL(count), TOTAL(failed) FROM batches"
        count, failed = self._connection.execute(sums).fetchone()
        return int(count), int(failed)

    def vectors(self) -> Iterator[tuple[list[str], bytes]]:
        """Yield the names and the vectors' bytes of each batch, in the batches' order."""
        rows = self._select("names, vectors")
        return ((json.loads(names), vectors) for names, vectors in rows)

    def names(self) -> Iterator[str]:
        """Yield the names of all images that have a vector, in the order of the vectors."""
        return (name for (names,) in self._select("names") for name in json.loads(names))

    def failures(self) -> Iterator[tuple[str, str]]:
        """Yield (name, error) of all other images, in the order of the input."""
        rows = self._select("failures")
        return ((name, error) for (pairs,) in rows for name, error in json.loads(pairs))

    def _select(self, columns: str) -> Iterator[tuple[Any, ...]]:
        return self._connection.execute(f"SELECT {columns} FROM batches ORDER BY number")

    def remove(self) -> None:
        """Close and delete the file."""
        self._connection.close()
        for path in (self.path, journal_of(self.path)):
            path.unlink(missing_ok=True)

    def _failure(self, error: sqlite3.Error) -> StoreError:
        # Of the class OperationalError are a lock, a full disk, a folder that is not there.
        message = str(error)
        if "locked" in message:
            message = "another process is writing to it"
        elif not isinstance(error, sqlite3.OperationalError):
            message += "; delete it to begin anew"
        return StoreError(f"{os.fspath(self.path)!r} cannot be used: {message}")


def journal_of(path: Path) -> Path:
    """Return the path of the file from which SQLite undoes what a killed process had half written."""
    return path.with_name(f"{path.name}-journal")


def _difference(path: Path, begun: Mapping[str, str], settings: Mapping[str, str]) -> str:
    differing = [
        f"{name} {begun.get(name)} then, {settings.get(name)} now"
        for name in dict.fromkeys([*settings, *begun])
        if begun.get(name) != settings.get(name)
    ]
    return (
        f"{os.fspath(path)!r} holds an unfinished run of other settings: {'; '.join(differing)}. "
        "Give the same again to go on, or --overwrite to begin anew"
    )
