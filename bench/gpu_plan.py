"""What the GPU report runs, in which order, and how long each part may take. Needs nothing but Python.

First every kernel is proved, those of Triton while the extension is built; then times are taken, by one part at
a time; then come the tests and the sanitizer, which find the kernels in Triton's cache; at last what takes long
to compile. Up to there the limits add up to the whole time, so that no part can take another's.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SECONDS = 475.0
"""Of the whole report: eight minutes, with what Python needs to start and stop."""

SMOKE_PATIENCE = 6
"""How many times as long a smoke run may take, whose kernels are interpreted on whatever CPU there is."""

TRITON_PROOFS = ("norms_held", "norms_shared_out", "norms_streamed", "weights")
"""Of ``bench.sanitizer_cases``: they need no extension. Several, for most of their time goes into compiling."""

KERNEL_TESTS = [
    "tests/test_group_norm_act_kernels.py",
    "tests/test_resize_normalize_kernels.py",
    "tests/test_weight_standardization_kernels.py",
]
TEST_PROCESSES = 8


@dataclass
class Part:
    """One process of the report.

    Attributes:
        name: For people.
        command: What runs.
        seconds: Its time limit.
        environment: Variables beside those of every part.
        is_optional: Running out of time is no failure.
        skipped: Why it cannot run here, or "".
        instead_of: It runs only if the part of this name has failed; or "".
        junit: Where pytest leaves its results, or None.
        rows: Where the part leaves its rows.
    """

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    is_optional: bool = False
    skipped: str = ""
    instead_of: str = ""
    junit: Path | None = None
    rows: Path | None = None


class Plan:
    """The parts, in groups: those of a group run side by side, one group after the other."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder

    def groups(self) -> list[list[Part]]:
        """Return all parts. Times are taken by one part at a time; checks may share the GPU."""
        kernels, models = "bench.gpu_kernels", "bench.gpu_models"
        building: list[list[Part]] = [[], [], []]
        if self.options.build:
            building = [[self.install()], [self.build("cuda", 95)], [self.build("cpu", 60)]]
        groups = [
            building[0],
            [
                *building[1],
                self.module("environment", "bench.gpu_device", 30),
                *(self.proof(cases, 95) for cases in TRITON_PROOFS),
            ],
            building[2],
            # These need the extension.
            [self.proof("paddings", 15), self.proof("images", 15)],
            [self.module("ceilings", "bench.gpu_device", 12)],
            [self.module("weight_standardization", kernels, 30)],
            [self.module("models_eager", models, 72)],
            [self.module("group_norm_act", kernels, 45)],
            [self.module("same_padding", kernels, 15)],
            [self.module("images", "bench.gpu_images", 30)],
            [self.module("dispatch", "bench.gpu_device", 15)],
            [self.tests(90), self.sanitizer("memcheck", 90), self.sanitizer("racecheck", 90)],
            [self.module("models_compiled", models, 130, is_optional=True)],
            [self.module("models_peers", models, 80, is_optional=True)],
            [self.module("models_autotuned", models, 240, is_optional=True)],
        ]
        if self.options.smoke:
            groups[-1][0].skipped = "a smoke run generates no code: see models_compiled"
        only = self.options.only
        if only:
            groups = [[part for part in group if part.name in only] for group in groups]
        if self.options.smoke:
            for part in (part for group in groups for part in group):
                part.seconds *= SMOKE_PATIENCE
        return [[self.spoilt(part) for part in group] for group in groups if group]

    def module(self, name: str, module: str, seconds: float, *, is_optional: bool = False) -> Part:
        """Return a part that is a part of one of our modules."""
        rows = self.folder / f"{name}.jsonl"
        command = [sys.executable, "-m", module, "--part", name, "--rows", str(rows)]
        return Part(name, [*command, *self.device()], seconds, is_optional=is_optional, rows=rows)

    def proof(self, cases: str, seconds: float) -> Part:
        """Return a part that runs some of our kernels once and compares them with the reference."""
        takes_long = self.options.smoke and cases == "norms_streamed"
        skipped = "a smoke run leaves out what the interpreter takes long for" if takes_long else ""
        return Part(f"proof_{cases}", self.cases(cases), seconds, skipped=skipped)

    def cases(self, *names: str) -> list[str]:
        """Return the command that runs every variant of these kernels, or of all."""
        only = [word for name in names for word in ("--only", name)]
        return [sys.executable, "-m", "bench.sanitizer_cases", *only, *self.device()]

    def tests(self, seconds: float) -> Part:
        """Return a part that runs the GPU tests and those of the kernels, in several processes."""
        junit = self.folder / "tests.xml"
        paths = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/gpu/test_*.py"))
        paths += [path for path in KERNEL_TESTS if (ROOT / path).exists()]
        if self.options.smoke:
            paths = paths[:1]  # skipped without a GPU, at once
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
        skipped = "" if paths else "the tests are not in this checkout"
        return Part(
            "tests",
            [*command, f"--junitxml={junit}", *paths],
            seconds,
            skipped=skipped,
            junit=junit,
        )

    def sanitizer(self, tool: str, seconds: float) -> Part:
        """Return a part that runs every kernel under compute-sanitizer, compiled by the proofs before."""
        name = f"sanitizer_{tool}"
        if self.options.smoke:
            return Part(
                name, [], seconds, skipped="a smoke run runs the cases unwatched: see proof_"
            )
        found = shutil.which("compute-sanitizer")
        command = [
            str(found),
            "--tool", tool, "--error-exitcode", "9", "--print-limit", "20",
            # Calls that torch makes to ask what the driver can do are no errors of ours.
            *(["--report-api-errors", "no"] if tool == "memcheck" else []),
            *self.cases(),
        ]  # fmt: skip
        # Without torch's cache every tensor is an allocation of its own, whose ends are watched.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        skipped = "" if found else "compute-sanitizer is not installed"
        return Part(name, command, seconds, environment, skipped=skipped)

    def device(self) -> list[str]:
        """Return the options that say where a part computes."""
        return ["--device", self.options.device, *(["--smoke"] if self.options.smoke else [])]

    def spoilt(self, part: Part) -> Part:
        """Return the part, or one that fails in its place if a test asks for that."""
        if part.name in self.options.sabotage:
            part.command = [sys.executable, "-c", "raise RuntimeError('sabotaged')"]
        return part

    def install(self) -> Part:
        """Return the part that installs all but the extension, so that the Triton kernels can run."""
        command = [
            sys.executable,
            "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
            "--editable", str(ROOT),
        ]  # fmt: skip
        pip = {"PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        return Part("install", command, 20, {**pip, "BITFAST_EXTENSION": "none"})

    def build(self, choice: str, seconds: float) -> Part:
        """Return the part that builds the extension where it is imported from; "cpu" if "cuda" fails."""
        command = [
            sys.executable, "setup.py", "--quiet", "build_ext", "--inplace",
            "--build-temp", str(self.folder / f"build_{choice}"),
        ]  # fmt: skip
        instead_of = "build_cuda" if choice == "cpu" else ""
        environment = {"BITFAST_EXTENSION": choice}
        return Part(f"build_{choice}", command, seconds, environment, instead_of=instead_of)
