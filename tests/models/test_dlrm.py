from typing import Any, Literal

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import JaggedTensor

from tests.conftest import MAX_HISTORY, SCHEMA, make_requests
from torchrec_amort import (
    AmortizedDLRM,
    AmortizedDLRMTrain,
    InputError,
    ModelConfig,
    RequestBatch,
    RequestSchema,
    build_model,
)
from torchrec_amort.models.build import ENCODERS

Interaction = Literal["dot", "dcn"]
shapes = st.lists(st.tuples(st.integers(0, MAX_HISTORY), st.integers(1, 5)), min_size=1, max_size=4)
interactions = st.sampled_from(["dot", "dcn"])
# `matches` reads one feature of events, and these have more: test_towers.py has it.
READERS = [word for word in ENCODERS if word not in ("none", "matches")]
encoders = st.sampled_from(READERS)


def make_model(**changes: Any) -> AmortizedDLRM:
    sizes: dict[str, Any] = {"embedding_dim": 8, "dense_layers": [6], "over_layers": [16]}
    config = ModelConfig(**sizes, history_length=MAX_HISTORY, **changes)
    model = build_model(SCHEMA, config, seed=0).double().eval()
    assert isinstance(model, AmortizedDLRM)
    # TorchRec's collections return float32 whatever the tables are: the arithmetic after them is in float64.
    for arch in (model.sparse_arch, model.request_sparse_arch):
        assert arch is not None
        arch.register_forward_hook(lambda _, args, output: output.double())
    if model.history_embedding_collection is not None:
        model.history_embedding_collection.float().register_forward_hook(
            lambda _, args, output: {
                key: JaggedTensor(rows.values().double(), lengths=rows.lengths()) for key, rows in output.items()
            }
        )
    return model


def make_batch(requests: list[dict[str, Any]]) -> RequestBatch:
    batch = RequestBatch.from_requests(requests, SCHEMA)
    batch.request_dense, batch.candidate_dense = batch.request_dense.double(), batch.candidate_dense.double()
    return batch


@given(shapes, interactions, encoders, st.integers(0, 2**20))
@example([(0, 1), (MAX_HISTORY, 5)], "dot", "append_cross", 0)
@example([(1, 1), (0, 3), (MAX_HISTORY, 1)], "dcn", "append_cross_causal", 0)
def test_scores_are_one_function_of_history_and_candidate(
    sizes: list[tuple[int, int]], interaction: Interaction, encoder: str, seed: int
) -> None:
    model = make_model(interaction=interaction, history=encoder)
    requests = make_requests(sizes, seed)
    batch = make_batch(requests)
    together = model(batch)
    assert together.shape == (sum(m for _, m in sizes), 2)
    alone = torch.cat([model(make_batch([request])) for request in requests])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(together, model(batch.to_impressions()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("encoder", READERS)
@pytest.mark.parametrize("interaction", ["dot", "dcn"])
def test_training_on_impressions_has_the_same_gradients(interaction: Interaction, encoder: str) -> None:
    batch = make_batch(make_requests([(5, 3), (0, 2), (MAX_HISTORY, 1)]))
    gradients = []
    for form in (batch, batch.to_impressions()):
        model = make_model(interaction=interaction, history=encoder)
        loss, _ = AmortizedDLRMTrain(model)(form)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        # Tables add up their gradients in float32.
        tolerance = 1e-8 if "embedding" in name else 1e-12
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=tolerance)


def test_train_returns_what_torchrecs_pipelines_expect() -> None:
    batch = make_batch(make_requests([(5, 3), (0, 2)]))
    loss, (detached, logits_CT, labels_CT) = AmortizedDLRMTrain(make_model())(batch)
    probabilities = torch.sigmoid(logits_CT)
    expected = -(labels_CT * probabilities.log() + (1 - labels_CT) * (1 - probabilities).log()).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert loss.requires_grad
    assert not detached.requires_grad
    assert not logits_CT.requires_grad
    batch.labels = None
    with pytest.raises(ValueError, match="no labels"):
        AmortizedDLRMTrain(make_model())(batch)


@pytest.mark.parametrize("interaction", ["dot", "dcn"])
def test_every_parameter_takes_part_even_if_all_histories_are_empty(interaction: Interaction) -> None:
    model = make_model(interaction=interaction)
    AmortizedDLRMTrain(model)(make_batch(make_requests([(0, 2), (0, 1)])))[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_control_reads_no_history() -> None:
    control = make_model(history="none")
    assert control.history_arch is None
    assert not any("history" in name or "event" in name for name, _ in control.named_parameters())
    requests = make_requests([(5, 3)])
    emptied = [{**r, "history_item": [], "history_action": [], "history_time": []} for r in requests]
    assert torch.equal(control(make_batch(requests)), control(make_batch(emptied)))
    model = make_model()
    assert not torch.allclose(model(make_batch(requests)), model(make_batch(emptied)))


def test_scores_move_with_the_history_and_with_the_request() -> None:
    model = make_model()
    (request,) = make_requests([(5, 3)])
    scores = model(make_batch([request]))
    for changes in (
        {"history_item": [1, 2, 3, 4, 5]},
        {"history_action": [(a + 1) % 6 for a in request["history_action"]]},
        {"time": request["time"] * 2},
        {"user_id": (request["user_id"] + 1) % 20},
        {"hour": 5.0},
    ):
        assert not torch.allclose(model(make_batch([{**request, **changes}])), scores), changes


def test_tables_are_looked_up_at_their_own_batch_sizes() -> None:
    model = make_model()
    rows: dict[str, int] = {}
    assert model.request_sparse_arch is not None
    collections = {
        "request": model.request_sparse_arch.embedding_bag_collection,
        "candidate": model.sparse_arch.embedding_bag_collection,
        "sequences": model.history_embedding_collection,
    }
    for name, collection in collections.items():
        collection.register_forward_pre_hook(lambda _, args, name=name: rows.update({name: args[0].stride()}))
    model(make_batch(make_requests([(5, 3), (2, 4)])))
    assert rows == {"request": 2, "candidate": 7, "sequences": 2}


def test_a_seed_makes_the_weights_and_touches_no_other_random_number() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second, other = (build_model(SCHEMA, ModelConfig(), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(3), expected)
    for (name, parameter), same, different in zip(
        first.named_parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(parameter, same), name
        assert parameter.numel() == 0 or "norm" in name or not torch.equal(parameter, different) or "bias" in name, name


def test_a_model_without_dense_features_scores() -> None:
    features = tuple(f for f in SCHEMA.features if f.kind != "dense")
    schema = RequestSchema("films", features)
    model = build_model(schema, ModelConfig(embedding_dim=8), seed=0).eval()
    batch = RequestBatch.from_requests(make_requests([(5, 3), (0, 1)]), schema)
    torch.testing.assert_close(model(batch), model(batch.to_impressions()), rtol=0, atol=1e-6)


def test_a_history_that_the_data_does_not_have_is_refused() -> None:
    schema = RequestSchema("films", tuple(f for f in SCHEMA.features if f.side != "event"))
    with pytest.raises(InputError, match="no event features: set model.history to none"):
        build_model(schema, ModelConfig())
    assert build_model(schema, ModelConfig(history="none")).history_arch is None


def test_parts_that_do_not_fit_are_refused() -> None:
    model = make_model()
    common: dict[str, Any] = {
        "candidate_embedding_bag_collection": model.sparse_arch.embedding_bag_collection,
        "request_embedding_bag_collection": None,
        "dense_in_features": 2,
        "over_arch_layer_sizes": [4, 1],
    }
    with pytest.raises(ValueError, match="go together"):
        AmortizedDLRM(**common, dense_arch_layer_sizes=[8], history_arch=model.history_arch)
    with pytest.raises(ValueError, match="'movie_id' has embedding_dim 8, but the dense arch ends in 16"):
        AmortizedDLRM(**common, dense_arch_layer_sizes=[16])
    with pytest.raises(ValueError, match="'product'"):
        AmortizedDLRM(**common, dense_arch_layer_sizes=[8], interaction="product")
