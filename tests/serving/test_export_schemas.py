"""Packages of models of schemas of any features score as these models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torchrec import JaggedTensor

from tests.models.test_towers import SMALL, assert_same, model_of, models
from tests.schemas import THREE, Shapes, make_requests, shapes
from torchrec_amort import (
    AmortizedScorer,
    Feature,
    HistoryCache,
    InputError,
    RequestBatch,
    RequestSchema,
    export_package,
    load_package,
)
from torchrec_amort.models.build import ModelConfig, TowerConfig
from torchrec_amort.models.ranker import ModelRanker
from torchrec_amort.ops import native
from torchrec_amort.serving.served import Served

SIZES: Shapes = [((5, 3, 3), 4), ((0, 0, 0), 1), ((0, 2, 0), 2), ((1, 0, 4), 1)]
# Towers of three encoders, with lengths of their own.
CONFIG = ModelConfig(
    **SMALL,
    history_length=6,
    towers={
        "clicks": TowerConfig(),
        "buys": TowerConfig(length=3, encoder="mean_pooling", positions="none"),
        "views": TowerConfig(length=4, encoder="append_cross_causal"),
    },
)
# A history that is encoded, and candidates that are compared with it and with another one.
COMPARED = ModelConfig(
    **SMALL,
    history_length=6,
    history_windows=[1, 3],
    towers={
        "clicks": TowerConfig(),
        "alike": TowerConfig(history="clicks", features=["clicks_content", "clicks_tags"], encoder="similarity"),
        "seen": TowerConfig(history="views", features=["views_film"], encoder="matches", vectors=2),
    },
)


@pytest.fixture(params=["native", pytest.param("eager", marks=pytest.mark.slow)])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages with native operators where there is a build, and without any."""
    if request.param == "eager":
        monkeypatch.setattr(native, "load_library", lambda: None)
    elif native.why_no_build(torch.empty(0), torch.float32) is not None:
        pytest.skip("no native build for this processor")


def assert_package_scores_as(ranker: ModelRanker, schema: RequestSchema, folder: Path, sizes: Shapes) -> Served:
    export_package(ranker, folder, schema, tables="float32", overwrite=True)
    package, requests = load_package(folder), make_requests(schema, sizes, 0)
    batch = replace(RequestBatch.from_requests(requests, schema), users=torch.arange(len(sizes)))
    with torch.no_grad():
        expected = ranker(batch.to_impressions())
    assert_same(AmortizedScorer(package).score(requests), expected)
    cached = AmortizedScorer(package, 2, HistoryCache(2**20) if schema.histories else None)
    for _ in range(2):
        assert_same(cached.score(batch), expected)
    return package


@pytest.mark.usefixtures("programs", "uncompiled")
def test_a_package_of_three_histories_scores_as_the_model(tmp_path: Path) -> None:
    ranker = model_of(THREE, CONFIG)
    package = assert_package_scores_as(ranker, THREE, tmp_path / "p", SIZES)
    for scorer in (AmortizedScorer(package), AmortizedScorer(ranker), AmortizedScorer(ranker, backend="eager")):
        assert_other_numbers_are_told(scorer)


def assert_other_numbers_are_told(scorer: AmortizedScorer) -> None:
    batch = RequestBatch.from_requests(make_requests(THREE, SIZES, 0), THREE)
    for name, tower in {"clicks_content": "clicks", "content": "clicks", "buys_price": "buys"}.items():
        numbers = batch.dense_sequences[name]
        have = numbers.values().shape[1]
        for values, message in (
            (numbers.values().repeat(1, 2), rf"{have * 2} numbers for each entry, but tower '{tower}' reads {have}"),
            (numbers.values().double(), r"is torch\.float64, but the scorer reads torch\.float32"),
        ):
            other = {**batch.dense_sequences, name: JaggedTensor(values, lengths=numbers.lengths())}
            with pytest.raises(InputError, match=rf"batch: dense_sequences\['{name}'\] .*{message}"):
                scorer.score(replace(batch, dense_sequences=other))
    with pytest.raises(InputError, match="request_dense has 0 columns and candidate_dense 2, but the model reads"):
        scorer.score(replace(batch, candidate_dense=batch.candidate_dense.repeat(1, 2)))
    with pytest.raises(InputError, match=r"candidate_dense is torch\.float64, but the scorer reads torch\.float32"):
        scorer.score(replace(batch, candidate_dense=batch.candidate_dense.double()))


@pytest.mark.usefixtures("uncompiled")
def test_a_package_compares_candidates_with_histories_as_the_model(tmp_path: Path) -> None:
    assert_package_scores_as(model_of(THREE, COMPARED), THREE, tmp_path / "p", SIZES)


@pytest.mark.usefixtures("uncompiled")
def test_a_package_reads_all_kinds_of_numbers_of_requests_and_candidates(tmp_path: Path) -> None:
    numbers = (
        Feature("my_vector", "request", "vector", size=2),
        Feature("my_age", "request", "age"),
        Feature("of_vector", "candidate", "vector", size=3),
        Feature("of_age", "candidate", "age"),
        *(Feature(f"{side}_number", side, "dense") for side in ("request", "candidate")),
    )
    film = Feature("film", "candidate", "id", 30)
    schema = RequestSchema("films", (film, *numbers, Feature("liked", "candidate", "label")))
    assert_package_scores_as(model_of(schema, ModelConfig(**SMALL, history="none")), schema, tmp_path / "p", SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, COMPARED], ids=["encoded", "compared"])
def test_a_compiled_package_of_three_histories_scores_as_the_model(tmp_path: Path, config: ModelConfig) -> None:
    assert_package_scores_as(model_of(THREE, config), THREE, tmp_path / "p", SIZES)


exportable = models().filter(lambda model: model[1].history != "target_attention")


@pytest.mark.slow
@pytest.mark.usefixtures("programs", "uncompiled")
@given(exportable, shapes())
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_package_of_any_schema_scores_as_the_model(
    tmp_path: Path, model: tuple[RequestSchema, ModelConfig], sizes: Shapes
) -> None:
    schema, config = model
    assert_package_scores_as(model_of(schema, config), schema, tmp_path / "p", [*sizes, *SIZES])
