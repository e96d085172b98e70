"""Where things live: which folders of the package may import which, so that arrows run one way."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "src" / "nobackprop"
# What each folder or module may import of the package; whoever is named later may import what is named before.
ARROWS = {
    "mistakes": [],
    "places": [],
    "core": ["mistakes"],
    "rules": ["mistakes", "core"],
    "records": ["mistakes", "places"],
    "data": ["mistakes", "core", "records"],
    "training": ["mistakes", "core", "rules", "records", "data"],
    "composing": ["mistakes", "places"],
    "sweeps": ["mistakes", "places", "records", "training"],
    "papers": ["mistakes", "places", "records", "composing", "training", "sweeps"],
    "quick_start": [],
    "usage": ["places", "composing"],
    "cli": ["mistakes", "places", "records", "composing", "training", "sweeps", "quick_start", "usage"],
    "__main__": ["cli"],
    "interface": ["mistakes", "places", "records", "data", "training", "composing", "papers", "cli"],
    "__init__": ["mistakes", "core", "rules", "records", "data", "training", "interface"],
}
FILES = sorted(PACKAGE.rglob("*.py"))


def box(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """The names that a module imports, also within functions, each as its parts."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write imports in full"
            yield from ((*(node.module or "").split("."), alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    own = box(path)
    found = {name[1] for name in imported(path) if name[0] == "nobackprop"} - {own}
    assert found <= {*ARROWS[own]}, f"{own} may import {ARROWS[own]}"


def test_there_is_no_circle_and_no_folder_without_arrows() -> None:
    names = list(ARROWS)
    assert all(names.index(other) < names.index(name) for name, others in ARROWS.items() for other in others)
    assert {box(path) for path in FILES} == {*ARROWS}


@pytest.mark.parametrize("name", ["mistakes", "core", "rules"])
def test_the_core_imports_torch_alone(name: str) -> None:
    allowed = {"nobackprop", "torch", *sys.stdlib_module_names}
    for path in (path for path in FILES if box(path) == name):
        tops = {parts[0] for parts in imported(path)}
        assert tops <= allowed, path
