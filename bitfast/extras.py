"""The packages that only some commands need: saying which of them are missing, and how to get them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "finetune": ("matplotlib", "pyarrow", "tqdm"),
    "embed": ("pyarrow", "tqdm"),
    "ray": ("pyarrow", "ray"),
    "serve": ("fastapi", "prometheus_client", "python_multipart", "ray", "uvicorn"),
}
"""The modules that each extra of pyproject.toml brings, of those that bitfast imports itself."""


class MissingExtraError(ImportError):
    """Packages of an optional extra are not installed; the message says how to install them."""


def require_extra(what: str, extra: str) -> None:
    """Check that the packages of an extra are installed, without importing them.

    Args:
        what: What needs them, such as ``"bitfast embed --ray"``.
        extra: A key of ``EXTRAS``.

    Raises:
        MissingExtraError: some are not.
    """
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{what} needs {', '.join(missing)}, not installed here: pip install 'bitfast[{extra}]'"
        )
