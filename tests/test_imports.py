"""How the modules of the package depend on one another."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"bitfast": "bitfast", "kernels": "bitfast.kernels", "bench": "bitfast.bench"}
"""Where the modules of each package stand."""

ROOMS = (
    ("bitfast.kernels", "bitfast.reference"),
    ("bitfast.ops",),
    ("bitfast.layers", "bitfast.blocks", "bitfast.network", "bitfast.pooling"),
    ("bitfast.execution",),
    ("bitfast.models", "bitfast.in_place", "bitfast.graphs", "bitfast.images"),
    ("bitfast.commands",),
    ("bitfast.finetuning", "bitfast.embedding", "bitfast.serving"),
    ("bitfast.bench",),
    ("bitfast.cli",),
)
"""As docs/architecture.md draws them, the lowest first: none knows those that come after it."""


def _files() -> dict[str, Path]:
    files = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join([package, *parts]).removesuffix(".__init__")] = path
    return files


FILES = _files()


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a module is imported, functions' bodies and what only type checkers see left out."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        blocks = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(statement, "handlers", [])]
        for block in blocks:
            yield from _statements(block)


def imports_of(name: str, source: str, is_package: bool) -> set[str]:
    """The modules of the package that a module of it imports when it is imported."""
    found: set[str] = set()
    package = name.split(".") if is_package else name.split(".")[:-1]
    for statement in _statements(ast.parse(source).body):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            around = package[: len(package) - statement.level + 1] if statement.level else []
            base = ".".join([*around, *([statement.module] if statement.module else [])])
            for alias in statement.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in FILES else base)
    return {each for each in found if each in FILES} - {name}


GRAPH = {
    name: imports_of(name, path.read_text(), path.name == "__init__.py")
    for name, path in FILES.items()
}


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle; none if there are no such."""
    left = dict(graph)
    while True:
        free = [name for name, imported in left.items() if not imported & left.keys()]
        if not free:
            return sorted(left)
        for name in free:
            del left[name]


def test_there_is_no_cycle():
    # A package's own file may import what is in the package, which does not import that file by name.
    assert cycle_in(GRAPH) == []


def test_cycles_are_found():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert imports_of("bitfast.ops.eager", "from . import common\nimport torch", False) == {
        "bitfast.ops.common"
    }
    assert imports_of(
        "bitfast.x", "try:\n    from bitfast import cli\nexcept E:\n    pass", False
    ) == {"bitfast.cli"}
    assert imports_of("bitfast.x", "def f():\n    from bitfast import cli", False) == set()


def test_no_room_knows_those_above_it():
    def room_of(name: str) -> int | None:
        parts = name.split(".")
        prefixes = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return next((k for k, room in enumerate(ROOMS) if set(prefixes) & set(room)), None)

    upward = [
        (name, other)
        for name, imported in GRAPH.items()
        for other in imported
        if (here := room_of(name)) is not None and (there := room_of(other)) is not None
        if there > here
    ]
    assert upward == []


@pytest.mark.parametrize(
    "name",
    sorted(
        n
        for n in FILES
        if n.count(".") and not n.startswith("bitfast.bench") and not n.endswith("__main__")
    ),
)
def test_no_module_is_hidden_by_something_of_its_name(name):
    pytest.importorskip(name, exc_type=ImportError)
    package, _, last = name.rpartition(".")
    found = getattr(sys.modules[package], last)
    assert isinstance(found, ModuleType), found
