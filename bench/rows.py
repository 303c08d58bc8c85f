"""What a run finds out: a row per contestant of a case, and the report that holds them all."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bitfast.commands import environment

from .base import ROOT, git
from .cases import place_of
from .limits import Limits

FORMAT = 3
"""Of the JSON."""

EVERYBODY = "all"
"""The contestant of a case that was skipped, or failed as a whole."""
TIMED, FAILED, MISSING, SKIPPED = "timed", "failed", "not installed", "skipped"


@dataclass(frozen=True)
class Row:
    """One contestant of one case; what :class:`~.cases.Case` has as well means the same."""

    kind: str
    op: str
    case: str
    device: str
    threads: int
    contestant: str  # by whom it was computed, in which dtype and form
    dtype: str  # in which that was
    status: str = TIMED  # with others there are no times
    note: str = ""  # why there are no times, or what else is to be known
    is_quick: bool = False
    seconds: float | None = None  # per call, the median over the rounds
    quartiles: tuple[float, float] | None = None
    ratio: float | None = None  # the baseline's time over this one's
    ratio_quartiles: tuple[float, float] | None = None
    # Relative to float64, of the worst result; of images the largest difference from the processor of
    # transformers that is replaced.
    error: float | None = None
    allowed_error: float | None = None
    bytes: int = 0  # the least that must be moved; 0: the case is not about them
    flops: int = 0  # 0: it is not about arithmetic
    fraction: float | None = None  # of the machine's limit
    limit: str | None = None  # which that is, "arithmetic" or "copy"
    predicted_cycles: float | None = (
        None  # of a multiprocessor, by the model that kernels choose by
    )
    first_result: float | None = None  # seconds from constructing to it, compilation included
    peak_memory: int | None = None  # bytes, of a process that does nothing else, or of a GPU

    @property
    def is_ours(self) -> bool:
        return self.contestant.startswith("bitfast")

    @property
    def spread(self) -> float:
        """The distance of a time's quartiles over the median; 0 without a time."""
        if self.seconds is None or self.quartiles is None:
            return 0.0
        return (self.quartiles[1] - self.quartiles[0]) / self.seconds

    @property
    def title(self) -> str:
        return f"{self.op}: {self.case}, {place_of(self.threads)}"


@dataclass
class Report:
    """Everything that a run finds out."""

    machine: dict[str, Any]  # see :func:`machine`
    limits: dict[int, Limits] = field(default_factory=dict)  # by thread count; of a GPU by 0
    peers: dict[str, str | None] = field(default_factory=dict)  # versions; None: not installed
    rows: list[Row] = field(default_factory=list)  # in the order of the cases

    @property
    def versions(self) -> dict[str, str | None]:
        return {**self.machine["versions"], **self.peers}

    def of_kind(self, *kinds: str) -> list[Row]:
        return [row for row in self.rows if row.kind in kinds]

    def write(self, path: Path) -> None:
        """Write JSON, whole or not at all."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read JSON; of another format it raises a ValueError."""
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not of format {FORMAT}: make it anew with bitfast bench")
        limits = {int(threads): Limits(**each) for threads, each in content["limits"].items()}
        rows = [Row(**row) for row in content["rows"]]
        return cls(content["machine"], limits, content["peers"], rows)


def cases_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows by title of their case, in order."""
    by_title: dict[str, list[Row]] = {}
    for row in rows:
        by_title.setdefault(row.title, []).append(row)
    return by_title


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe what is measured on and with, and how many processes were busy at the start."""
    found = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "cpu": environment.cpu_model(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": environment.versions(),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "multiprocessors": gpu.multi_processor_count}
        found |= {"l2_bytes": gpu.L2_cache_size, "cudnn": torch.backends.cudnn.version()}
    return found


def commit() -> str | None:
    """Return the commit of this checkout, "-dirty" if it has changes, or None.

    Where there is only a copy, without git's history, the variable BITFAST_COMMIT may say it.
    """
    try:
        # An installation may lie within somebody else's checkout.
        git(ROOT, "ls-files", "--error-unmatch", "bench/registry.py")
        return git(ROOT, "describe", "--always", "--dirty", "--exclude", "*")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BITFAST_COMMIT")
