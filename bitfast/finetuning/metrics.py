"""``metrics.jsonl``: one JSON object for each step, and one for each evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from bitfast.finetuning.errors import UsageError

METRICS_NAME = "metrics.jsonl"


class MetricsLog:
    """Rows that are added to a file, which belongs to this process until it is closed.

    Args:
        path: The file; made if it is not there.

    Raises:
        OSError: it cannot be written.
        UsageError: another process has it open in the same way.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 -- closed by __exit__
        try:
            _lock(self._file, path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def cut(self, size: int) -> None:
        """Keep that many bytes: what an interrupted run wrote after its last checkpoint goes.

        Raises:
            OSError: it cannot be written.
            UsageError: there are fewer.
        """
        there = os.fstat(self._file.fileno()).st_size
        if there < size:
            raise UsageError(
                f"argument --output: {self._path} has only {there} of the {size} bytes that the checkpoint "
                "needs; --overwrite begins anew"
            )
        self._file.truncate(size)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row.

        Raises:
            OSError: there is no space for it.
        """
        line = (json.dumps(row) + "\n").encode()
        while line:
            line = line[self._file.write(line) :]

    def sync(self) -> int:
        """Wait until all rows are on the disk; return how many bytes they are."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _lock(file: Any, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"argument --output: another process is fine-tuning into {str(path.parent)!r}"
        ) from error
    except OSError:
        pass  # a file system without locks
