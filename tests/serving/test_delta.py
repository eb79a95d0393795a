"""A package, and what changed since it, are the next package, byte by byte."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.conftest import SCHEMA
from tests.serving.test_scorer import make_batch, make_model
from torchrec_amort import AmortizedScorer, InputError, TableConfig, export_package, load_package
from torchrec_amort.serving.delta import apply_delta, write_delta
from torchrec_amort.serving.package import MANIFEST_FILE, PACKAGE_VERSION, TABLES_FILE, checksum, save_tables


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_package(folder: Path, tables: Mapping[str, Tensor], code: bytes, schema: bytes = b"{}") -> Path:
    """What a package is to a delta: tables, other files and their checksums."""
    folder.mkdir(parents=True)
    save_tables(tables, folder / TABLES_FILE)
    (folder / "candidates.pt2").write_bytes(code)
    (folder / "schema.json").write_bytes(schema)
    manifest = {
        "package_version": PACKAGE_VERSION,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "operators": None,
        "sha256": {path.name: checksum(path) for path in folder.iterdir()},
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return folder


@st.composite
def two_tables(draw: st.DrawFn) -> tuple[Tensor | None, Tensor, int]:
    """A table, the same one later, and how many rows of it have changed: some, new ones, all, or of another width."""
    rows, width = draw(st.integers(0, 9)), draw(st.integers(1, 4))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    before = torch.randint(256, (rows, width), generator=seed, dtype=torch.uint8)
    kind = draw(st.sampled_from(["rows", "rows", "rows", "width", "new"]))
    if kind != "rows":
        after = torch.randint(256, (rows + 1, width + 1), generator=seed, dtype=torch.uint8)
        return (before if kind == "width" else None), after, len(after)
    count = draw(st.integers(0, 12))
    after = torch.randint(256, (count, width), generator=seed, dtype=torch.uint8)
    kept = min(rows, count)
    after[:kept] = before[:kept]
    changed = draw(st.sets(st.integers(0, kept - 1))) if kept else set()
    for row in changed:
        after[row, draw(st.integers(0, width - 1))] ^= 1
    return before, after, len(changed) + count - kept


@given(pairs=st.lists(two_tables(), max_size=3), is_same=st.booleans())
@settings(max_examples=25)
def test_base_and_delta_are_the_package(
    pairs: list[tuple[Tensor | None, Tensor, int]], is_same: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("packages")
    before = {f"table_{place}": one for place, (one, _, _) in enumerate(pairs) if one is not None}
    after = {f"table_{place}": other for place, (_, other, _) in enumerate(pairs)}
    base = write_package(folder / "base", before, b"code")
    package = write_package(folder / "package", after, b"code" if is_same else b"other code")
    sizes = write_delta(package, base, folder / "delta")
    assert (sizes.rows, sizes.all_rows) == (sum(changed for *_, changed in pairs), sum(map(len, after.values())))
    assert ((folder / "delta" / "candidates.pt2").exists(), (folder / "delta" / "schema.json").exists()) == (
        not is_same,
        False,
    )
    apply_delta(folder / "delta", base, folder / "again")
    assert files_of(folder / "again") == files_of(package)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("tables", ["int8", "float32"])
def test_a_model_of_larger_tables_is_served_from_what_changed(tables: str, tmp_path: Path) -> None:
    grown = SCHEMA.with_tables({"user_id": TableConfig(rows=30)})
    model, larger = make_model(), make_model(schema=grown)
    with torch.no_grad():
        weights = dict(larger.named_parameters())
        for name, weight in model.named_parameters():
            weights[name][: len(weight)] = weight
        (users,) = (weight for name, weight in weights.items() if name.endswith("user_id.weight"))
        users[3] += 1
    options = {"tables": tables}
    export_package(model, tmp_path / "base", SCHEMA, **options)  # type: ignore[arg-type]
    export_package(larger, tmp_path / "package", grown, **options)  # type: ignore[arg-type]
    sizes = write_delta(tmp_path / "package", tmp_path / "base", tmp_path / "delta")
    assert sizes.rows == 11
    apply_delta(tmp_path / "delta", tmp_path / "base", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "package")
    scores = [
        AmortizedScorer(load_package(tmp_path / name)).score(make_batch([(5, 4), (0, 1)]))
        for name in ("again", "package", "base")
    ]
    assert torch.equal(scores[0], scores[1])
    with pytest.raises(InputError, match=r"delta: has what changed since another package: make the package of both"):
        load_package(tmp_path / "delta")


def test_another_base_and_damage_are_refused(tmp_path: Path) -> None:
    tables = {"film": torch.arange(12, dtype=torch.uint8).reshape(4, 3)}
    base = write_package(tmp_path / "base", tables, b"code")
    other = write_package(tmp_path / "other", tables, b"other code")
    package = write_package(tmp_path / "package", {"film": tables["film"] + 1}, b"new code")
    delta = tmp_path / "delta"
    write_delta(package, base, delta)
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"is since a package with manifest .* apply it to the package that it was"):
        apply_delta(delta, other, out)
    with pytest.raises(InputError, match="no such file: .*package is no delta"):
        apply_delta(package, base, out)
    for name in ("rows.pt", "candidates.pt2", MANIFEST_FILE):
        copy = Path(shutil.copytree(delta, tmp_path / f"damaged {name}"))
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: checksum is .*: the file is damaged"):
            apply_delta(copy, base, out)
    newer = Path(shutil.copytree(delta, tmp_path / "newer"))
    (newer / "delta.json").write_text(
        (delta / "delta.json").read_text().replace('"delta_version": 1', '"delta_version": 9')
    )
    with pytest.raises(InputError, match="delta_version is 9, this torchrec-amort reads 1: export it again"):
        apply_delta(newer, base, out)
    (base / TABLES_FILE).write_bytes(b"damaged")
    with pytest.raises(InputError, match=rf"base/{TABLES_FILE}: checksum is"):
        apply_delta(delta, base, out)
    with pytest.raises(InputError, match="is the package that the delta is since, which it needs"):
        write_delta(package, other, other, overwrite=True)
    assert not out.exists()
