"""Imports only go down the floors of the house, which docs/contributing.md draws."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "torchrec_amort"
FLOORS = {
    "errors": 0,
    "garbage": 0,
    "hashing": 0,
    "jagged_ids": 0,
    "progress": 0,
    "versions": 0,
    "times": 1,
    "stores": 1,
    "files": 2,
    "lock": 3,
    "lists": 1,
    "schema": 3,
    "bounds": 4,
    "grouping": 4,
    "columns": 4,
    "checks": 4,
    "config": 5,
    "rows": 5,
    "batch": 6,
    "data": 7,
    "ops": 7,
    "modules": 8,
    "models": 9,
    "training": 10,
    "serving": 10,
    "jobs": 11,
    "bench": 12,
    "apps": 13,
}
STRANGERS = [{"data", "ops"}, {"data", "models"}, {"data", "modules"}, {"data", "training"}, {"training", "serving"}]


def imports_of(path: Path) -> set[str]:
    """The rooms of this package that a file imports from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchrec_amort"):
            module = node.module or ""
            names |= {module} if "." in module else {f"{module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("torchrec_amort.")}
    return {name.split(".")[1] for name in names}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_floors(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for other in imports_of(path) - {room}:
        assert FLOORS[other] < FLOORS[room], f"{room} imports {other}"
        assert {room, other} not in STRANGERS, f"{room} imports {other}"


def test_torchx_components_import_no_sibling() -> None:
    assert imports_of(PACKAGE.parent / "torchx_components" / "amort.py") == set()
