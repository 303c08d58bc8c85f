"""What a command says where the packages of its extra are missing."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import tomllib

from bitfast.extras import EXTRAS, MissingExtraError, require_extra

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
BROUGHT_ALONG = {"fastapi": "ray[serve]", "uvicorn": "ray[serve]"}
"""Modules that come with what an extra names."""


def test_installed_extras_are_not_complained_about():
    for extra in EXTRAS:
        require_extra("bitfast", extra)


def test_missing_packages_are_named_with_the_way_to_get_them(monkeypatch):
    find_spec = importlib.util.find_spec

    def without_pyarrow(name: str, *rest: Any) -> Any:
        return None if name == "pyarrow" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without_pyarrow)
    with pytest.raises(MissingExtraError) as caught:
        require_extra("bitfast embed", "embed")
    assert str(caught.value) == (
        "bitfast embed needs pyarrow, not installed here: pip install 'bitfast[embed]'"
    )


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_the_modules_that_are_asked_for(extra):
    wanted = PROJECT["project"]["optional-dependencies"][extra]
    brought = {re.split(r"[<>=!~ ;]", each)[0] for each in wanted}
    brought |= {each.split("[")[0] for each in brought}
    for module in EXTRAS[extra]:
        assert BROUGHT_ALONG.get(module, module.replace("_", "-")) in brought
