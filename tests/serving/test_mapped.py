import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.quant.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_amort import InputError
from torchrec_amort.serving import mapped as mapped_module
from torchrec_amort.serving.lookup import BagLookup, SequenceLookup
from torchrec_amort.serving.mapped import Files, FilesInFolder, FilesOfProcess, MappedTables

KJT = KeyedJaggedTensor(["a", "b", "c"], torch.tensor([3, 0, 1, 2, 2, 4]), lengths=torch.tensor([1, 2, 0, 1, 1, 1]))


def bags(data_type: DataType, rows: int = 5) -> Any:
    pooled = {"a": PoolingType.SUM, "b": PoolingType.MEAN, "c": PoolingType.SUM}
    tables = [
        EmbeddingBagConfig(
            name=f"table_{name}",
            feature_names=[name],
            num_embeddings=rows,
            embedding_dim=8,
            data_type=data_type,
            pooling=how,
        )
        for name, how in pooled.items()
    ]
    return EmbeddingBagCollection(tables=tables, is_weighted=False, device=torch.device("cpu"))


def sequences(data_type: DataType, rows: int = 5) -> Any:
    tables = [
        EmbeddingConfig(
            name=f"table_{name}", feature_names=[name], num_embeddings=rows, embedding_dim=8, data_type=data_type
        )
        for name in "abc"
    ]
    return EmbeddingCollection(tables=tables, device=torch.device("cpu"))


def looked_up(collection: Any) -> list[Tensor]:
    looked = collection(KJT)
    return [looked.values()] if isinstance(collection, EmbeddingBagCollection) else [looked[k].values() for k in "abc"]


@pytest.mark.parametrize("data_type", [DataType.INT8, DataType.FP32])
@pytest.mark.parametrize("make", [bags, sequences])
def test_tables_are_read_from_files_that_the_first_one_writes(
    tmp_path: Path, make: Callable[[DataType], Any], data_type: DataType
) -> None:
    filled = make(data_type)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, table in filled.state_dict().items():
        rows = torch.rand(5, table.shape[1] // 4, generator=generator)
        weights[name] = rows.view(torch.uint8)[:, : table.shape[1]].contiguous()
    filled.load_state_dict(weights)
    mapped = MappedTables(FilesInFolder(tmp_path / "tables"))

    first, second = make(data_type), make(data_type)
    mapped.fill(first, "bags", lambda: weights)
    files = {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}

    def refuse() -> dict[str, Tensor]:
        raise AssertionError("weights are there already")

    mapped.fill(second, "bags", refuse)
    for collection in (first, second):
        for have, expected in zip(looked_up(collection), looked_up(filled), strict=True):
            assert torch.equal(have.nan_to_num(), expected.nan_to_num())
        for name, table in collection.state_dict().items():
            assert torch.equal(table, weights[name])
    # What one writes, others do not read.
    first.load_state_dict({name: torch.zeros_like(table) for name, table in weights.items()})
    assert torch.equal(looked_up(second)[0].nan_to_num(), looked_up(filled)[0].nan_to_num())
    assert {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()} == files


def test_tables_that_have_no_room_leave_nothing_behind(tmp_path: Path) -> None:
    collection = bags(DataType.FP32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As a full disk: files end before the tables do.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(InputError) as refused:
            MappedTables(FilesInFolder(tmp_path / "tables")).fill(collection, "bags", collection.state_dict)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "bags_0: 512 bytes of tables cannot be written" in str(refused.value)
    assert [*tmp_path.rglob("*_0*")] == []


def random_weights(collection: Any, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = collection.state_dict()
    return {name: torch.randint(256, table.shape, generator=generator).to(table.dtype) for name, table in state.items()}


def kernels_of(collection: Any) -> Any:
    """What a lookup reads of a collection, in one collection or in a copy of it."""
    lookup: Any = BagLookup if isinstance(collection, EmbeddingBagCollection) else SequenceLookup
    made = lookup(collection.eval(), "tables")
    return (made._bags if lookup is BagLookup else made._collection)._emb_modules


def mappings_of(weights: Tensor) -> tuple[dict[str, int], int]:
    """Bytes that are mapped of each file, and those that were copied from it."""
    start, stop = weights.data_ptr(), weights.data_ptr() + weights.numel()
    sizes, own, is_within = dict[str, int](), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split(maxsplit=5)
        if "-" in first:
            of_line = [int(address, 16) for address in first.split("-")]
            is_within = of_line[0] < stop and of_line[1] > start
            if is_within:
                inode = rest[3]
                sizes[inode] = sizes.get(inode, 0) + min(of_line[1], stop) - max(of_line[0], start)
        elif is_within and first == "Anonymous:":
            own += int(rest[0]) * 1024
    return sizes, own


@given(data=st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_versions_that_differ_in_rows_share_all_other_pages(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = data.draw(st.sampled_from([bags, sequences]))
    data_type, num_rows = data.draw(st.sampled_from([DataType.INT8, DataType.FP32])), data.draw(st.integers(1, 4000))
    monkeypatch.setattr(mapped_module, "_MOST_RUNS", data.draw(st.sampled_from([1, 2, 1024])))
    folder = tmp_path_factory.mktemp("tables")
    in_folder = data.draw(st.booleans())

    def files(version: int) -> Files:
        return FilesInFolder(folder / f"{version}") if in_folder else FilesOfProcess()

    def room(size: int) -> None:
        taken.append(size)

    taken: list[int] = []
    versions = [make(data_type, num_rows)]
    expected = [random_weights(versions[0], 0)]
    mapped = [MappedTables(files(0))]
    mapped[0].fill(versions[0], "tables", lambda: expected[0])
    for version in range(1, 4):
        after = {name: table.clone() for name, table in expected[-1].items()}
        changed = {}
        for name, table in after.items():
            places = torch.tensor(
                sorted(data.draw(st.sets(st.integers(0, num_rows - 1), max_size=6))), dtype=torch.int64
            )
            table[places] ^= 255
            changed[name] = {"places": places, "rows": table[places]}
        expected.append(after)
        versions.append(make(data_type, num_rows))
        mapped.append(MappedTables(files(version)))
        mapped[-1].fill_changed(versions[-1], "tables", mapped[-2], changed, room)
    again = make(data_type, num_rows)
    MappedTables(mapped[-1].files).map(again, "tables")
    for collection, weights in zip([*versions, again], [*expected, expected[-1]], strict=True):
        for name, table in collection.state_dict().items():
            assert torch.equal(table, weights[name])
        for kernels in kernels_of(collection):
            assert mappings_of(kernels.weights_host)[1] == 0
    assert len(taken) == 3


@pytest.mark.parametrize("in_folder", [True, False])
def test_a_row_that_has_changed_takes_a_page(tmp_path: Path, in_folder: bool) -> None:
    def files(version: str) -> Files:
        return FilesInFolder(tmp_path / version) if in_folder else FilesOfProcess()

    monday, tuesday = (MappedTables(files(name)) for name in ("monday", "tuesday"))
    before, after = sequences(DataType.FP32, 10_000), sequences(DataType.FP32, 10_000)
    weights = random_weights(before, 0)
    monday.fill(before, "events", lambda: weights)
    none = torch.zeros(0, dtype=torch.int64)
    changed = {name: {"places": none, "rows": table[none]} for name, table in weights.items()}
    place = torch.tensor([5_000])
    changed["embeddings.table_b.weight"] = {"places": place, "rows": torch.zeros(1, 32, dtype=torch.uint8)}
    tuesday.fill_changed(after, "events", monday, changed, lambda _: None)
    looked_up(after)
    (kernels,) = kernels_of(after)
    size = kernels.weights_host.numel()
    sizes, own = mappings_of(kernels.weights_host)
    # Of the file that Monday's tables are in, all but a page.
    assert sorted(sizes.values()) == [4096, size - 4096] and own == 0
    assert max(sizes, key=sizes.__getitem__) in mappings_of(kernels_of(before)[0].weights_host)[0]
    if in_folder:
        assert FilesInFolder(tmp_path / "tuesday").needed() == {tmp_path / "monday"}
        assert (tmp_path / "tuesday" / "events_0.pages").stat().st_size == 4096
        # What these pages are of is gone: the file is not there.
        (tmp_path / "monday" / "events_0").unlink()
        assert not tuesday.has(sequences(DataType.FP32, 10_000), "events")


def test_a_system_that_gives_no_more_mappings_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monday, before, after = (
        MappedTables(FilesInFolder(tmp_path / "monday")),
        bags(DataType.FP32, 10_000),
        bags(DataType.FP32, 10_000),
    )
    monday.fill(before, "bags", before.state_dict)
    monkeypatch.setattr(mapped_module, "_libc", SimpleNamespace(mmap=lambda *_: 2**64 - 1))
    rows = {"places": torch.tensor([0]), "rows": torch.zeros(1, 32, dtype=torch.uint8)}
    changed = dict.fromkeys(before.state_dict(), rows)
    with pytest.raises(InputError, match="pages of tables cannot be mapped .*: make the package of both by torchrec"):
        MappedTables(FilesInFolder(tmp_path / "tuesday")).fill_changed(after, "bags", monday, changed, lambda _: None)
