"""What a run finds out: a row per contestant of a case, and the report that holds them all."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bitfast.commands import environment

from .cases import place_of
from .limits import Limits

FORMAT = 3
"""Of the JSON."""

TIMED, FAILED, MISSING, SKIPPED = "timed", "failed", "not installed", "skipped"


@dataclass(frozen=True)
class Row:
    """One contestant of one case.

    Attributes:
        kind, op, case, device, threads, is_quick: Of the case; see ``Case``.
        contestant: By whom it was computed, in which dtype and form.
        dtype: In which it computes.
        status: :data:`TIMED`, :data:`FAILED`, :data:`MISSING` or :data:`SKIPPED`; only the first has times.
        note: Why there are none, or what else is to be known.
        seconds, quartiles: Per call, the median and the quartiles over the rounds.
        ratio, ratio_quartiles: The baseline's time over this one's.
        error, allowed_error: Relative to float64: the largest of the results', and what is allowed. For
            images the largest difference from the processor of transformers that is replaced.
        bytes, flops: The least that must be moved, and the operations; 0 where the case is not about them.
        fraction: Of the machine's limit.
        limit: Which limit that is, "arithmetic" or "copy".
        first_result: Seconds from constructing to the first result, compilation included.
        peak_memory: Bytes, of a process that does nothing else, or of a GPU.
    """

    kind: str
    op: str
    case: str
    device: str
    threads: int
    contestant: str
    dtype: str
    status: str = TIMED
    note: str = ""
    is_quick: bool = False
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    error: float | None = None
    allowed_error: float | None = None
    bytes: int = 0
    flops: int = 0
    fraction: float | None = None
    limit: str | None = None
    first_result: float | None = None
    peak_memory: int | None = None

    @property
    def is_ours(self) -> bool:
        """Whether bitfast computed it."""
        return self.contestant.startswith("bitfast")

    @property
    def spread(self) -> float:
        """The distance of a time's quartiles over the median; 0 without a time."""
        if self.seconds is None or self.quartiles is None:
            return 0.0
        return (self.quartiles[1] - self.quartiles[0]) / self.seconds

    @property
    def title(self) -> str:
        """The case in one line."""
        return f"{self.op}: {self.case}, {place_of(self.threads)}"


@dataclass
class Report:
    """Everything that a run finds out.

    Attributes:
        machine: Processor, GPU, versions, commit, date, and how many processes were busy at the start.
        limits: By thread count; those of a GPU by 0.
        peers: The version of each other runtime, or None: it is not installed.
        rows: In the order of the cases.
    """

    machine: dict[str, Any]
    limits: dict[int, Limits] = field(default_factory=dict)
    peers: dict[str, str | None] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write JSON, whole or not at all."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read JSON.

        Raises:
            ValueError: it is of another format.
        """
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not of format {FORMAT}: make it anew with bitfast bench")
        return cls(
            content["machine"],
            {int(threads): Limits(**limits) for threads, limits in content["limits"].items()},
            content["peers"],
            [Row(**row) for row in content["rows"]],
        )


def cases_of(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows by title of their case, in order."""
    by_title: dict[str, list[Row]] = {}
    for row in rows:
        by_title.setdefault(row.title, []).append(row)
    return by_title


# ---- the machine --------------------------------------------------------------------------------


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe what the figures are measured on and with."""
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
        found |= {
            "gpu": gpu.name,
            "multiprocessors": gpu.multi_processor_count,
            "l2_bytes": gpu.L2_cache_size,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def commit(checkout: Path | None = None) -> str | None:
    """Return the commit of a checkout (None: that of this file), "-dirty" if it has changes, or None.

    Where there is only a copy, without git's history, the variable BITFAST_COMMIT may say it.
    """
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    folder = Path(__file__).resolve().parent if checkout is None else checkout / "bench"
    tracked = ["git", "ls-files", "--error-unmatch", "registry.py"]
    try:
        # An installation may lie within somebody else's checkout.
        subprocess.run(tracked, cwd=folder, capture_output=True, check=True)
        finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BITFAST_COMMIT") if checkout is None else None
    return finished.stdout.strip()
