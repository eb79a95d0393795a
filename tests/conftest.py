"""Requests, schemas and small data folders that the tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Read when torch is loaded, here and in the commands that tests launch. What is compared exactly adds up in one order,
# so on one thread; threads of tests that ask for more must not spin on cores that others are at work on.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.data.writer import write_requests
from torchrec_amort.schema import AGE_BUCKETS, KINDS_OF_IDS, Feature, RequestSchema, TableConfig

TESTS = Path(__file__).parent
# What takes long starts first: a long file that starts last is what the end waits for.
FIRST = ("test_page_commands.py", "training", "serving", "bench", "modules", "apps", "data")

settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("default")
torch.set_num_threads(1)

NUM_ITEMS = 40
MAX_HISTORY = 8

SCHEMA = RequestSchema(
    dataset="films",
    features=(
        Feature("user_id", "request", "id", table_size=20),
        Feature("interests", "request", "ids", table_size=7),
        Feature("hour", "request", "dense"),
        Feature("movie_id", "candidate", "id", table_size=NUM_ITEMS, column="candidate_item"),
        Feature("genres", "candidate", "ids", table_size=5),
        Feature("price", "candidate", "dense"),
        Feature("candidate_item", "candidate", "item", table_size=NUM_ITEMS),
        Feature("history_item", "event", "item", table_size=NUM_ITEMS),
        Feature("history_action", "event", "id", table_size=6),
        Feature("history_age", "event", "age", table_size=AGE_BUCKETS, column="history_time"),
        Feature("liked", "candidate", "label"),
        Feature("bought", "candidate", "label"),
    ),
)

HASHED_TABLES = {"user_id": 11, "interests": 5, "movie_id": 13, "genres": 4, "item": 17, "history_action": 3}
HASHED = SCHEMA.with_tables({name: TableConfig(rows=rows, vocabulary="hash") for name, rows in HASHED_TABLES.items()})


def make_request(random: np.random.Generator, events: int, candidates: int) -> dict[str, Any]:
    """A random request with as many events and candidates as wanted."""
    time = 1_000_000
    return {
        "request_id": int(random.integers(2**40)),
        "user": int(random.integers(10)),
        "time": time,
        "user_id": int(random.integers(20)),
        "interests": random.integers(7, size=random.integers(4)).tolist(),
        "hour": float(random.random()),
        "candidate_item": random.integers(NUM_ITEMS, size=candidates).tolist(),
        "genres": [random.integers(5, size=random.integers(4)).tolist() for _ in range(candidates)],
        "price": random.random(candidates).tolist(),
        "history_item": random.integers(NUM_ITEMS, size=events).tolist(),
        "history_action": random.integers(6, size=events).tolist(),
        "history_time": sorted((time - random.integers(1, 10**6, size=events)).tolist()),
        "liked": random.integers(2, size=candidates).astype(float).tolist(),
        "bought": random.integers(2, size=candidates).astype(float).tolist(),
    }


def make_requests(shapes: list[tuple[int, int]], seed: int = 0) -> list[dict[str, Any]]:
    """Random requests of the given numbers of events and candidates."""
    random = np.random.default_rng(seed)
    return [make_request(random, events, candidates) for events, candidates in shapes]


def spread_ids(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same requests with other ids, of any int64, but for the unknown one."""

    def spread(ids: Any) -> Any:
        return [spread(i) for i in ids] if isinstance(ids, list) else (ids * 0xD1342543DE82EF95 + 2**63) % 2**64 - 2**63

    columns = {f.source for f in SCHEMA.features if f.kind in KINDS_OF_IDS}
    return [{k: spread(v) if k in columns else v for k, v in request.items()} for request in requests]


def with_weights(batch: RequestBatch, weigh: Callable[[Tensor], Tensor]) -> RequestBatch:
    """The same batch, whose ids have the weights that a function gives them."""

    def weighted(kjt: KeyedJaggedTensor) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(
            kjt.keys(), kjt.values(), weights=weigh(kjt.values()), lengths=kjt.lengths(), stride=kjt.stride()
        )

    return replace(
        batch,
        request_sparse=weighted(batch.request_sparse),
        candidate_sparse=weighted(batch.candidate_sparse),
        sequences=weighted(batch.sequences),
    )


def make_table(num_requests: int, seed: int = 0, first_id: int = 0) -> pa.Table:
    """A table of random requests with request ids from the first one on."""
    random = np.random.default_rng(seed)
    shapes = [(int(random.integers(MAX_HISTORY + 1)), int(random.integers(1, 5))) for _ in range(num_requests)]
    requests = [{**r, "request_id": i} for i, r in enumerate(make_requests(shapes, seed), first_id)]
    return pa.Table.from_pylist(requests, SCHEMA.arrow_schema())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of what takes long first; `--no-loadscope-reorder` has pytest-xdist keep to it."""

    def place(item: pytest.Item) -> int:
        file_or_folder = item.path.relative_to(TESTS).parts[0]
        return FIRST.index(file_or_folder) if file_or_folder in FIRST else len(FIRST)

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A host's GPU is for tests marked `gpu`; the others, their fixtures and the commands they launch do without."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("gpu") is None:
            # The variable is for processes that start now: this one has asked CUDA by then.
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)


@pytest.fixture
def schema() -> RequestSchema:
    return SCHEMA


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of random requests."""
    folder = tmp_path_factory.mktemp("data") / "films"
    sizes = {"train": 600, "validation": 60, "test": 90}
    splits = {split: [make_table(n, seed, 1000 * seed)] for seed, (split, n) in enumerate(sizes.items())}
    write_requests(folder, SCHEMA, splits)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets, where the machine has one: `TORCHREC_AMORT_DATA`, or beside the clone."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TORCHREC_AMORT_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no public data at {folder}; set TORCHREC_AMORT_DATA")
    return folder


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of programs as torch.export traces them: compiling takes long and is tested elsewhere."""

    def save(program: torch.export.ExportedProgram, package_path: str) -> None:
        torch.export.save(program, package_path)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", save)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: torch.export.load(path).module())
