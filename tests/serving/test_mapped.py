import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.quant.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_amort import InputError
from torchrec_amort.serving.mapped import MappedTables

KJT = KeyedJaggedTensor(["a", "b", "c"], torch.tensor([3, 0, 1, 2, 2, 4]), lengths=torch.tensor([1, 2, 0, 1, 1, 1]))


def bags(data_type: DataType) -> Any:
    pooled = {"a": PoolingType.SUM, "b": PoolingType.MEAN, "c": PoolingType.SUM}
    tables = [
        EmbeddingBagConfig(
            name=f"table_{name}",
            feature_names=[name],
            num_embeddings=5,
            embedding_dim=8,
            data_type=data_type,
            pooling=how,
        )
        for name, how in pooled.items()
    ]
    return EmbeddingBagCollection(tables=tables, is_weighted=False, device=torch.device("cpu"))


def sequences(data_type: DataType) -> Any:
    tables = [
        EmbeddingConfig(
            name=f"table_{name}", feature_names=[name], num_embeddings=5, embedding_dim=8, data_type=data_type
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
    mapped = MappedTables(tmp_path / "tables")

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
            MappedTables(tmp_path / "tables").fill(collection, "bags", collection.state_dict)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "bags_0: 512 bytes of tables cannot be written" in str(refused.value)
    assert [*tmp_path.rglob("*_0*")] == []
