"""The `Example::` blocks of the package's docstrings, and what they take for given."""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed.checkpoint
from torch import nn
from torch.utils.data import DataLoader
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    KeyedJaggedTensor,
)
from torchrec.datasets.utils import Batch
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

import torchrec_amort
from tests.launch import ROOT
from torchrec_amort import (
    AmortizedEmbeddingBagCollection,
    AmortizedHistoryArch,
    AmortizedScorer,
    Feature,
    HistoryCache,
    HistoryTower,
    ModelConfig,
    RequestBatch,
    RequestSchema,
    Rollout,
    attach_history,
    build_model,
)
from torchrec_amort.data.writer import write_requests
from torchrec_amort.training.bootstrap import UserWeightedMetrics

PUBLISHED = "needs the data set's published files; its tests read them"
COMMAND = "a command, which takes minutes; tests/test_page_commands.py, tests/apps and tests/bench run it on small data"
TRAINING = "needs a training run; the tests of its module make one"
LOG = "needs a log of impressions; the tests of its module write one"
STORE = "asks a store"
RANKS = "needs a process group; the tests of its module make one"
COMPILES = "compiles for half a minute; tests/serving/test_export.py does the same"
SERVER = "starts or asks a server; the tests of its module do, too"
NATIVE = "needs native code, which is built where there is a compiler; the tests of its module run it there"


def _found() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "torchrec_amort").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield from _examples(ast.parse(path.read_text()), module)


def _examples(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            found = re.search(r"Example::\n\n((?:    .*\n?|\n)+)", ast.get_docstring(child) or "")
            if found:
                yield f"{name}.{child.name}", textwrap.dedent(found.group(1))
            if isinstance(child, ast.ClassDef):
                yield from _examples(child, f"{name}.{child.name}")


EXAMPLES = dict(_found())


def _not_run() -> dict[str, str]:
    modules = {
        "data.ebnerd": PUBLISHED,
        "data.ebnerd_counters": PUBLISHED,
        "data.ebnerd_features": PUBLISHED,
        "data.ebnerd_files": PUBLISHED,
        "data.kuairand": PUBLISHED,
        "data.mind": PUBLISHED,
        "data.mind_news": PUBLISHED,
        "data.mind_tsv": PUBLISHED,
        "data.movielens": PUBLISHED,
        "training.average": TRAINING,
        "training.checkpoint": TRAINING,
        "training.warm_start": TRAINING,
        "serving.native_encoder": NATIVE,
    }
    names = {
        "bench.arms.load_arm": TRAINING,
        "bench.load.measure_load": COMMAND,
        "data.events.Events": LOG,
        "data.impressions.to_requests": LOG,
        "data.log.ImpressionLog": LOG,
        "serving.delta.read_delta": COMPILES,
        "serving.delta.write_delta": COMPILES,
        "serving.export.export_package": COMPILES,
        "serving.package.load_package": COMPILES,
        "serving.package.read_package": COMPILES,
        "serving.server.access.Access": SERVER,
        "serving.server.endpoint.Endpoint": SERVER,
        "serving.server.grpc_server.GrpcServer": SERVER,
        "serving.server.rest.rest_app": SERVER,
        "serving.server.run.ScoringServer": SERVER,
        "serving.server.fleet.Fleet": SERVER,
        "serving.server.fleet.Link": SERVER,
        "serving.server.watch.Watch": SERVER,
        "serving.server.traces.Traces": SERVER,
        "serving.history_tier.HistoryTier": SERVER,
        "serving.shared_histories.SharedHistoryStore": SERVER,
        "serving.mapped.MappedTables": "needs tables; tests/serving/test_mapped.py has some",
        "serving.server.memory.refuse_without_room": COMPILES,
        "serving.server.opener.Opener": COMPILES,
        "serving.server.client.ScoringClient": SERVER,
        "serving.server.client.ScoringClient.score": SERVER,
        "serving.server.client.ScoringClient.submit": SERVER,
        "models.graft.old_optimizer_state_dict": RANKS,
        "stores.Stored": STORE,
        "training.lock.run_lock": TRAINING,
        "training.optimizers.LearningRates": TRAINING,
        "training.predictions.PredictionFile": RANKS,
        "training.processes.StopRequests": "ends when the process is told to stop",
    }
    reasons = {f"torchrec_amort.{name}": reason for name, reason in names.items()}
    for example in EXAMPLES:
        module = example.removeprefix("torchrec_amort.").rsplit(".", 1)[0]
        if module in modules:
            reasons[example] = modules[module]
        elif example.endswith(".main"):
            reasons[example] = COMMAND
    return reasons


NOT_RUN = _not_run()

SCHEMA = RequestSchema(
    "films",
    (
        Feature("user_id", "request", "id", table_size=100),
        Feature("candidate_id", "candidate", "id", table_size=50, column="candidate_item"),
        Feature("candidate_item", "candidate", "item", table_size=50),
        Feature("history_item", "event", "item", table_size=50),
        Feature("liked", "candidate", "label"),
    ),
)


def _table(num_requests: int, num_events: int, first: int = 0) -> pa.Table:
    random = np.random.default_rng(0)
    rows = [
        {
            "request_id": row,
            "user": row % 9,
            "time": row,
            "user_id": row % 9,
            "candidate_item": random.integers(50, size=3).tolist(),
            "history_item": random.integers(50, size=num_events).tolist(),
            "liked": [1.0, 0.0, 0.0],
        }
        for row in range(first, first + num_requests)
    ]
    return pa.Table.from_pylist(rows, SCHEMA.arrow_schema())


def _bags(feature: str) -> EmbeddingBagCollection:
    table = EmbeddingBagConfig(name=feature, feature_names=[feature], num_embeddings=100, embedding_dim=32)
    return EmbeddingBagCollection(tables=[table])


def _sequences(tables: dict[str, list[str]]) -> EmbeddingCollection:
    configs = [
        EmbeddingConfig(name=name, feature_names=features, num_embeddings=50, embedding_dim=32)
        for name, features in tables.items()
    ]
    return EmbeddingCollection(tables=configs)


def _rows(lengths: list[int]) -> JaggedTensor:
    return JaggedTensor(torch.randn(sum(lengths), 32), lengths=torch.tensor(lengths))


@cache
def _given() -> dict[str, Any]:
    """What examples take for given: a trained model, a batch of its requests, and so on."""
    torch.manual_seed(0)
    model = build_model(SCHEMA, ModelConfig(), seed=0).eval()
    batch = RequestBatch.from_arrow(_table(8, 4), SCHEMA)
    ids_N = torch.tensor([3, 4, 8])
    scorer = AmortizedScorer(model, cache=HistoryCache(max_bytes=2**20))
    rollout = Rollout(scorer.score, control=model, reference=model, experiment="amortized-1", share=0.5)
    users = np.repeat(np.arange(10), 4)
    scores, labels = np.random.default_rng(0).random(users.size), np.tile([1.0, 0.0], users.size // 2)
    return {
        "partial": partial,
        "Path": Path,
        "DataLoader": DataLoader,
        "EmbeddingCollection": EmbeddingCollection,
        "EmbeddingConfig": EmbeddingConfig,
        "JaggedTensor": JaggedTensor,
        "np": np,
        "torch": torch,
        "write_requests": write_requests,
        "schema": SCHEMA,
        "trained": SCHEMA,
        "model": model,
        "compiled": model,
        "batch": batch,
        "batches": [batch] * 5,
        "old": model,
        "rollout": rollout,
        "scorer": scorer,
        "arch": AmortizedHistoryArch(32, history_attention="causal").eval(),
        "history": _rows([3, 0, 2]),
        "new_events": _rows([1, 1, 0]),
        "candidates": _rows([1, 1, 2]),
        "candidate_ebc": _bags("candidate_id"),
        "request_ebc": _bags("user_id"),
        "history_ec": _sequences({"item": ["history_item", "candidate_item"]}),
        "ids_N": ids_N,
        "lengths_B": torch.tensor([2, 1]),
        "files": ["part-00000.parquet"],
        "train_table": _table(20, 4),
        "test_table": _table(5, 4),
        "bounds": {"train": (0, 12), "test": (12, 20)},
        "columns": lambda start, stop: _table(20, 4).slice(start, stop - start).drop_columns("request_id").to_pydict(),
        "scores": scores,
        "logits": scores,
        "labels": labels,
        "users": users,
        "requests": users,
        "num_users": 10,
    }


def _of_a_dlrm() -> dict[str, Any]:
    """A DLRM with its checkpoint, and a batch in which all that it reads is on the candidates' side."""
    dlrm = DLRM(_bags("user"), 2, [32], [64, 1]).eval()
    torch.save(dlrm.state_dict(), "dlrm.pt")
    lengths = torch.tensor([2, 1, 2, 1])
    batch = RequestBatch(
        request_dense=torch.empty(2, 0),
        candidate_dense=torch.rand(3, 2),
        request_sparse=KeyedJaggedTensor.empty(),
        candidate_sparse=KeyedJaggedTensor(["user"], torch.tensor([7, 7, 9]), lengths=torch.ones(3, dtype=torch.int64)),
        sequences=KeyedJaggedTensor(["history_item", "candidate_item"], torch.arange(6), lengths=lengths),
        num_candidates=torch.tensor([2, 1]),
    )
    events = _sequences({"item": ["history_item", "candidate_item"]})
    tower = HistoryTower("clicks", AmortizedHistoryArch(32), events=events)
    return {"dlrm": dlrm, "tower": tower, "history_embedding_collection": events, "batch": batch}


def _of_a_collection() -> dict[str, Any]:
    """Bags of requests, a history, and a model that is called otherwise than TorchRec's."""
    given, lengths = _of_a_dlrm(), torch.ones(2, dtype=torch.int64)
    tables = [
        EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=10, embedding_dim=32)
        for name in ("user", "country", "tag")
    ]
    bags, batch = EmbeddingBagCollection(tables=tables), given["batch"]
    ids = {name: JaggedTensor(torch.tensor([7, 9]), lengths=lengths) for name in ("user", "country")}
    batch.request_sparse = KeyedJaggedTensor.from_jt_dict(ids)
    batch.candidate_sparse = KeyedJaggedTensor(["tag"], torch.arange(3), lengths=torch.ones(3, dtype=torch.int64))
    return {**given, "ebc": bags, "SimpleDeepFMNN": SimpleDeepFMNN, "batch": batch}


class _Reversed(nn.Module):
    """A model that takes ids first and returns more than its logits."""

    def __init__(self, dlrm: DLRM) -> None:
        super().__init__()
        self.dlrm = dlrm

    def forward(self, sparse: Any, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.dlrm(dense, sparse)
        return logits, logits.sigmoid()


def _of_a_model() -> dict[str, Any]:
    """A model that is built on histories and called in another way."""
    given = _of_a_collection()
    sparse = AmortizedEmbeddingBagCollection(given["ebc"], [given["tower"]], ["user", "country"])
    return {"model": _Reversed(DLRM(sparse, 2, [32], [64, 1])), "batch": given["batch"]}


def _of_tables() -> dict[str, Any]:
    """What steps tables, and a model that nothing else trains."""
    return {
        "apply_optimizer_in_backward": apply_optimizer_in_backward,
        "RowWiseAdagrad": RowWiseAdagrad,
        "model": build_model(SCHEMA, ModelConfig(), seed=0),
    }


def _of_impressions() -> dict[str, Any]:
    """Impressions of the requests 0 to 7, one after the other."""
    request_ids = torch.arange(24) % 8
    ids = {"user": request_ids, "country": request_ids % 3, "item": torch.arange(24)}
    ids |= {name: request_ids + 1 for name in ("clicked_item", "clicked_time", "bought_item")}
    lengths = torch.ones(len(ids) * 24, dtype=torch.int64)
    features = KeyedJaggedTensor(list(ids), torch.cat(list(ids.values())), lengths=lengths)
    return {
        "impressions": Batch(torch.rand(24, 2), features, torch.arange(24) % 2),
        "request_ids": request_ids,
        "weights_of_impressions_C": torch.rand(24),
    }


def _of_a_graft() -> dict[str, Any]:
    """A trained DLRM with its checkpoint, and a history for it."""
    given = _of_a_dlrm()
    trained, events = given["dlrm"], _sequences({"item": ["history_item", "candidate_item"]})
    torch.distributed.checkpoint.save({"model": trained.state_dict()}, checkpoint_id="old", no_dist=True)
    tower = HistoryTower("clicks", AmortizedHistoryArch(32), events=events)
    sparse = AmortizedEmbeddingBagCollection(trained.sparse_arch.embedding_bag_collection, [tower])
    model = DLRM(sparse, 2, [32], [64, 1])
    return {"trained": trained, "tower": tower, "model": model, "batch": given["batch"], "DLRM": DLRM}


def _of_an_attached() -> dict[str, Any]:
    """A DLRM with history attached, and a checkpoint under the names of version 0.1."""
    given = _of_a_dlrm()
    model = attach_history(given["dlrm"], given["history_embedding_collection"], AmortizedHistoryArch(32))
    saved = {old: model.state_dict()[new] for old, new in model.renamed().items()}
    torch.distributed.checkpoint.save({"model": saved}, checkpoint_id="old", no_dist=True)
    return {"model": model}


def _of_actions() -> dict[str, Any]:
    """Events with an action each."""
    keys = ["history_item", "history_action"]
    sequences = KeyedJaggedTensor(keys, torch.tensor([3, 4, 1, 2]), lengths=torch.tensor([2, 2]))
    collection = _sequences({name: [name] for name in keys})
    return {"history_embedding_collection": collection, "batch": type("Batch", (), {"sequences": sequences})}


def _of_seconds() -> dict[str, Any]:
    """Seconds of each request, and whose requests they are."""
    seconds = np.linspace(1, 2, 18)
    return {"seconds": seconds, "s": seconds, "t": 2 * seconds, "users": np.repeat(np.arange(9), 2), "num_users": 9}


def _of_models() -> dict[str, Any]:
    """Metrics of some seeds of two models."""
    users, random = np.repeat(np.arange(1209), 2), np.random.default_rng(0)
    ours, theirs = (
        [UserWeightedMetrics(random.random(users.size), np.tile([1.0, 0.0], 1209), users, users) for _ in range(2)]
        for _ in range(2)
    )
    return {"ours": ours, "theirs": theirs}


SPECIAL = {
    "torchrec_amort.batch.RequestBatch.from_impressions": _of_impressions,
    "torchrec_amort.batch.RequestBatch.impression_order": _of_impressions,
    "torchrec_amort.models.attach.attach_history": _of_a_dlrm,
    "torchrec_amort.models.attach.AttachedDLRM.renamed": _of_an_attached,
    "torchrec_amort.models.collection.AmortizedEmbeddingBagCollection": _of_a_collection,
    "torchrec_amort.models.ranker.ModelRanker": _of_a_model,
    "torchrec_amort.models.residual.ResidualHistory": _of_a_dlrm,
    "torchrec_amort.models.tables.tables_of": _of_tables,
    "torchrec_amort.models.graft.graft": _of_a_graft,
    "torchrec_amort.models.graft.old_state_dict": _of_a_graft,
    "torchrec_amort.modules.events.EventEncoder": _of_actions,
    "torchrec_amort.modules.tower.HistoryTower": _of_a_dlrm,
    "torchrec_amort.training.bootstrap.UserWeightedCosts": _of_seconds,
    "torchrec_amort.training.bootstrap.paired_differences": _of_models,
    "torchrec_amort.training.bootstrap.paired_ratios": _of_seconds,
}


def namespace_of(name: str, folder: Path) -> dict[str, Any]:
    """What an example finds: its module, the public names, what is given, and a data folder.

    Args:
        name: of the example.
        folder: the working folder, empty.
    """
    source = ROOT / "torchrec_amort"
    parts = name.split(".")
    while not (source.parent / "/".join(parts)).with_suffix(".py").exists():
        parts.pop()
    module = importlib.import_module(".".join(parts))
    public = {word: getattr(torchrec_amort, word) for word in torchrec_amort.__all__}
    for data in re.findall(r'"(data/movielens-1m)"|load\("(data/films)"\)', EXAMPLES[name])[:1]:
        write_requests(folder / "".join(data), SCHEMA, {"train": [_table(64, 100)], "test": [_table(128, 100, 64)]})
    given = _given() | (SPECIAL[name]() if name in SPECIAL else {})
    return {**vars(module), **public, **given, "__name__": "example"}
