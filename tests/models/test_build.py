from typing import Any

import pytest
import torch

from tests.conftest import MAX_HISTORY, SCHEMA, make_requests
from torchrec_amort import AmortizedDLRMTrain, InputError, ModelConfig, RequestBatch, build_model
from torchrec_amort.models.build import ENCODERS, Encoder, build_encoder
from torchrec_amort.models.ranker import encoders_of

SIZES: dict[str, Any] = {"embedding_dim": 8, "history_length": MAX_HISTORY, "dense_layers": [6], "over_layers": [16]}
SHAPES = [(5, 3), (0, 2), (MAX_HISTORY, 1)]


@pytest.mark.parametrize("word", [word for word in ENCODERS if word != "none"])
def test_one_word_chooses_the_encoder_and_training_moves_all_of_it(word: Encoder) -> None:
    # What a candidate does not have would keep events from matching it.
    names = ["history_action", "history_age"] if word == "matches" else []
    model = build_model(SCHEMA, ModelConfig(history=word, leave_out=names, **SIZES), seed=0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters())
    for seed in range(3):
        optimizer.zero_grad()
        requests = make_requests(SHAPES, seed)
        requests[0]["candidate_item"][0] = requests[0]["history_item"][-1]
        loss, _ = AmortizedDLRMTrain(model)(RequestBatch.from_requests(requests, SCHEMA))
        loss.backward()
        optimizer.step()
    still = [n for n, w in model.named_parameters() if torch.equal(w, before[n])]
    # Whether two rows are the same is no matter of degree: their table is not trained by it.
    assert still == (["history_embedding_collection.embeddings.item.weight"] if word == "matches" else [])


@pytest.mark.parametrize(
    ("options", "slots"),
    [
        ({"positions": "rotary"}, 1),
        ({"positions": "none"}, 1),
        ({"history_vectors": 3}, 3),
        ({"history_summary": True}, 2),
        ({"recent_events": 2, "summary_tokens": 3}, 1),
        ({"history": "append_candidate_self", "history_vectors": 2, "history_summary": True}, 3),
    ],
)
def test_options_keep_the_score_a_function_of_history_and_candidate(options: dict[str, Any], slots: int) -> None:
    model = build_model(SCHEMA, ModelConfig(**SIZES, **options), seed=0).eval()
    assert [encoder.num_slots for encoder in encoders_of(model)] == [slots]
    batch = RequestBatch.from_requests(make_requests(SHAPES), SCHEMA)
    torch.testing.assert_close(model(batch), model(batch.to_impressions()), rtol=0, atol=1e-6)


def test_a_model_may_leave_features_out() -> None:
    batch = RequestBatch.from_requests(make_requests(SHAPES), SCHEMA)
    names = ["history_age", "interests"]
    model = build_model(SCHEMA, ModelConfig(leave_out=names, **SIZES), seed=0)
    assert not any("history_age" in key or "interests" in key for key in model.state_dict())
    expected = model(batch)
    for request in (requests := make_requests(SHAPES)):
        request["history_time"] = [0] * len(request["history_time"])
        request["interests"] = [1, 2]
    assert torch.equal(model(RequestBatch.from_requests(requests, SCHEMA)), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leave_out": ["history_item"]}, "'history_item' cannot be left out"),
        ({"leave_out": ["movie_id", "genres"]}, "no feature of kind 'id' or 'ids', and the model reads 1 or more"),
        ({"leave_out": ["liked"]}, "'liked' cannot be left out"),
        ({"leave_out": ["price"]}, "'price' cannot be left out"),
        ({"history": "mean_pooling", "positions": "rotary"}, "which has no model.positions=rotary"),
        ({"history": "concatenation", "history_summary": True}, "which has no model.history_summary=True"),
        ({"history": "target_attention", "recent_events": 5}, "which has no model.recent_events=5"),
        ({"history": "append_self", "history_vectors": 2}, "which has no model.history_vectors=2"),
    ],
)
def test_what_an_encoder_does_not_have_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model(SCHEMA, ModelConfig(**SIZES, **options))


def test_a_model_is_built_on_meta_and_takes_weights_there() -> None:
    device = torch.device("meta")
    model = build_model(SCHEMA, ModelConfig(**SIZES), device=device)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert build_encoder(ModelConfig(**SIZES), device).is_amortizable


def test_one_history_whose_events_are_more_than_items_has_no_matches() -> None:
    with pytest.raises(
        InputError, match=r"one of events, not \['candidate_item'\] with \['history_item', 'history_act"
    ):
        build_model(SCHEMA, ModelConfig(history="matches", **SIZES))
