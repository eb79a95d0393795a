import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SCHEMA
from torchrec_amort import Feature, InputError, RequestSchema

PACKAGE = Path(__file__).resolve().parents[1] / "torchrec_amort"
FLOORS = {
    "schema": 0,
    "progress": 0,
    "files": 1,
    "rows": 1,
    "batch": 2,
    "data": 3,
    "modules": 3,
    "models": 4,
    "training": 5,
    "inference": 5,
    "apps": 6,
}
STRANGERS = [{"data", "models"}, {"data", "modules"}, {"data", "training"}, {"training", "inference"}]


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


def test_survives_json() -> None:
    assert RequestSchema.from_json(SCHEMA.to_json()) == SCHEMA
    record = json.loads(SCHEMA.to_json())
    assert record["format_version"] == 1
    assert record["features"][0] == {"name": "user_id", "side": "request", "kind": "id", "table_size": 20}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a request schema"),
        ("[]", "not a request schema"),
        ('{"format_version": 1}', "not a request schema"),
        ('{"format_version": 7}', "format_version is 7, this torchrec-amort reads up to 1"),
        (SCHEMA.to_json().replace('"kind": "dense"', '"kind": "image"'), "no kind 'image'"),
    ],
)
def test_other_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RequestSchema.from_json(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"side": "request", "kind": "item", "table_size": 3}, "no kind 'item' on side 'request'"),
        ({"side": "request", "kind": "id"}, "needs a table_size of 1 or more"),
        ({"side": "event", "kind": "id", "table_size": 0}, "needs a table_size of 1 or more"),
        ({"side": "candidate", "kind": "dense", "table_size": 3}, "has no table"),
    ],
)
def test_impossible_features_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Feature("feature", **arguments)


def test_impossible_schemas_are_refused() -> None:
    candidate = Feature("candidate_item", "candidate", "item", table_size=5)
    event = Feature("history_item", "event", "item", table_size=6)
    with pytest.raises(InputError, match="table_size is 6 for history_item and 5 for candidate_item"):
        RequestSchema("films", (candidate, event))
    with pytest.raises(InputError, match=r"are \[\], not \['candidate_item'\]"):
        RequestSchema("films", ())
    with pytest.raises(InputError, match="'candidate_item' is there twice"):
        RequestSchema("films", (candidate, candidate))
    with pytest.raises(InputError, match="not .*'history_item'"):
        RequestSchema("films", (candidate, Feature("history_action", "event", "id", table_size=5)))
