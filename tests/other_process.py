"""What must be looked at in a process without Triton's interpreter, which conftest.py sets up in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def without_interpreter() -> dict[str, str]:
    """The environment of this process, but that Triton compiles its kernels."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def printed_by(module: str) -> Any:
    """Run ``python -m module`` without a GPU; return the JSON in the last line that it prints."""
    process = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env={**without_interpreter(), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])
