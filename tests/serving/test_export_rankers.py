"""Packages of any ranker score as it does; what a package cannot hold is refused."""

from pathlib import Path

import pytest
import torch
from torchrec.models.dlrm import DLRM

from tests.models.strangers import MODELS, NUM_DENSE, TABLES, make_bags, make_events
from tests.models.test_rankers import SIZES, make_batch, make_ranker, make_tower
from tests.serving.test_serving_rankers import make_two_towers, with_users
from torchrec_amort import (
    AmortizedHistoryArch,
    AmortizedScorer,
    Feature,
    HistoryCache,
    HistoryTower,
    InputError,
    RequestSchema,
    ResidualHistory,
    export_package,
    load_package,
)
from torchrec_amort.models.ranker import Ranker
from torchrec_amort.modules.events import EventEncoder

ROWS = {name: rows for name, (rows, _) in TABLES.items()}
SCHEMA = RequestSchema(
    "strangers",
    (
        Feature("user", "request", "id", ROWS["user"]),
        Feature("country", "request", "id", ROWS["country"]),
        Feature("hour", "request", "dense"),
        Feature("item", "candidate", "id", ROWS["item"]),
        Feature("tags", "candidate", "ids", ROWS["tags"]),
        Feature("price", "candidate", "dense"),
        Feature("age", "candidate", "dense"),
        Feature("candidate_item", "candidate", "item", ROWS["item"]),
        Feature("history_item", "event", "item", ROWS["item"]),
        Feature("label", "candidate", "label"),
    ),
)


def assert_package_scores_as(ranker: Ranker, folder: Path) -> None:
    export_package(ranker, folder, SCHEMA, tables="float32")
    batch = with_users(make_batch(SIZES))
    with torch.no_grad():
        expected = ranker(batch.to_impressions())
    package = load_package(folder)
    for scorer in (AmortizedScorer(package, 3), AmortizedScorer(package, cache=HistoryCache(2**20))):
        for _ in range(2):
            torch.testing.assert_close(scorer.score(batch), expected, rtol=0, atol=2e-6)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("shared", [False, True], ids=["own events", "shared table"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "DIN"])
def test_a_package_scores_as_the_ranker(name: str, shared: bool, tmp_path: Path) -> None:
    assert_package_scores_as(make_ranker(name, make_tower(shared, width=16 if name == "MMoE" else 8)), tmp_path / "p")


@pytest.mark.usefixtures("uncompiled")
def test_a_package_has_every_tower(tmp_path: Path) -> None:
    ranker = make_two_towers()
    with pytest.raises(
        InputError, match="MeanPooling, HistorySimilarity, HistoryMatches can be, TargetAttention cannot"
    ):
        export_package(ranker, tmp_path / "p", SCHEMA)
    towers = [make_tower(name="clicks"), make_tower(name="buys")]
    assert_package_scores_as(make_ranker("DLRM", *towers), tmp_path / "p")
    assert sorted(path.name for path in (tmp_path / "p").glob("history_*")) == ["history_0.pt2", "history_1.pt2"]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("places", [1, 3])
def test_a_package_of_short_histories(places: int, tmp_path: Path) -> None:
    events = EventEncoder(["history_item"], 8, places)
    tower = HistoryTower("clicks", AmortizedHistoryArch(8, 1, 2), events=make_events(), event_encoder=events)
    ranker = make_ranker("DLRM", tower)
    export_package(ranker, tmp_path / "p", SCHEMA, tables="float32")
    batch = make_batch(SIZES).keep_latest(places)
    with torch.no_grad():
        scores = AmortizedScorer(load_package(tmp_path / "p")).score(batch)
        torch.testing.assert_close(scores, ranker(batch), rtol=0, atol=2e-6)


@pytest.mark.slow
def test_a_compiled_package_scores_as_the_ranker(tmp_path: Path) -> None:
    assert_package_scores_as(make_ranker("MMoE", make_tower(width=16)), tmp_path / "p")


def test_what_looks_ids_up_elsewhere_is_refused(tmp_path: Path) -> None:
    residual = ResidualHistory(DLRM(make_bags(), NUM_DENSE, [8], [8, 1]), make_tower())
    with pytest.raises(InputError, match=r"model\.sparse_arch\.emb.* looks ids up outside of its collection"):
        export_package(residual, tmp_path / "p", SCHEMA)
    assert not list(tmp_path.iterdir())
