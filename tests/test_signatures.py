"""Names of the package keep their arguments: `signatures.json` has those that users rely on.

A new argument has a default; none is removed, renamed, moved or loses its default. When an argument is added, write the
file anew: `python -m tests.test_signatures`.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import torchrec_amort

FROZEN = Path(__file__).with_name("signatures.json")
Argument = dict[str, Any]


def signatures() -> dict[str, list[Argument]]:
    """Arguments of all public names, and of the public methods that they have of this package."""
    found = {}
    for name in torchrec_amort.__all__:
        thing = getattr(torchrec_amort, name)
        if inspect.isclass(thing) and issubclass(thing, Exception):
            continue  # made by the package alone
        found[name] = arguments(thing)
        for method in dir(thing) if inspect.isclass(thing) else ():
            attribute = inspect.getattr_static(thing, method)
            function = getattr(attribute, "__func__", attribute)
            is_ours = (getattr(function, "__module__", None) or "").startswith("torchrec_amort.")
            if inspect.isfunction(function) and is_ours and not method.startswith("_"):
                found[f"{name}.{method}"] = arguments(function)
    return found


def arguments(function: Any) -> list[Argument]:
    return [
        {"name": one.name, "kind": one.kind.name, "has_default": one.default is not inspect.Parameter.empty}
        for one in inspect.signature(function).parameters.values()
    ]


def why_incompatible(frozen: list[Argument], have: list[Argument]) -> str | None:
    """What breaks a call that was right with the frozen arguments."""
    now = {one["name"]: one for one in have}
    for one in frozen:
        if one["name"] not in now:
            return f"{one['name']} is gone"
        if one["kind"] != now[one["name"]]["kind"]:
            return f"{one['name']} is {now[one['name']]['kind']}, not {one['kind']}"
        if one["has_default"] and not now[one["name"]]["has_default"]:
            return f"{one['name']} has no default any more"
    known = {one["name"] for one in frozen}
    for one in have:
        if one["name"] not in known and not one["has_default"] and not one["kind"].startswith("VAR"):
            return f"{one['name']} is new and has no default"
    places = [
        [one["name"] for one in of if one["name"] in known and one["kind"] == "POSITIONAL_OR_KEYWORD"]
        for of in (frozen, have)
    ]
    new_places = [one["name"] for one in have if one["kind"] == "POSITIONAL_OR_KEYWORD"][: len(places[0])]
    return None if places[0] == places[1] == new_places else f"places changed: {new_places}, not {places[0]}"


def test_calls_of_public_names_stay_right() -> None:
    have = signatures()
    for name, frozen in json.loads(FROZEN.read_text()).items():
        assert name in have, f"{name} is gone"
        assert why_incompatible(frozen, have[name]) is None, name


def test_all_public_names_are_frozen() -> None:
    assert set(signatures()) == set(json.loads(FROZEN.read_text()))


def before(first: int, *, second: int = 0) -> None: ...


def more(first: int, *, second: int = 0, third: int = 0) -> None: ...


def renamed(one: int, *, second: int = 0) -> None: ...


def needs_more(first: int, *, second: int = 0, third: int) -> None: ...


def moved(third: int = 0, first: int = 0, *, second: int = 0) -> None: ...


def required(first: int, *, second: int) -> None: ...


@pytest.mark.parametrize(("after", "is_compatible"), [(before, True), (more, True), (renamed, False)])
def test_what_breaks_a_call_is_found(after: Any, is_compatible: bool) -> None:
    assert (why_incompatible(arguments(before), arguments(after)) is None) == is_compatible


@pytest.mark.parametrize("after", [needs_more, moved, required])
def test_what_needs_another_call_is_found(after: Any) -> None:
    assert why_incompatible(arguments(before), arguments(after)) is not None


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(of_name)}" for name, of_name in signatures().items()]
    FROZEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
