"""What many tests need of the machine or the build, as marks that skip them where it is not there."""

from __future__ import annotations

import pytest

from bitfast import extension

NEEDS_EXTENSION = pytest.mark.skipif(
    extension.CPU.problem is not None, reason=f"no extension: {extension.CPU.problem}"
)
