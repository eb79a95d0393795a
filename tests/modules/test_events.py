import pytest
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort import EventEncoder

LENGTHS = torch.tensor([3, 0, 1])


def embeddings() -> dict[str, JaggedTensor]:
    torch.manual_seed(0)
    return {name: JaggedTensor(torch.randn(4, 6), lengths=LENGTHS) for name in ("history_item", "history_action")}


def test_an_event_is_its_features_and_its_place_from_the_latest() -> None:
    encoder = EventEncoder(["history_item", "history_action"], embedding_dim=6, max_length=3)
    given = embeddings()
    history = encoder(given)
    assert encoder.recency is not None
    for row, place in enumerate([2, 1, 0, 0]):
        expected = sum(jt.values()[row] for jt in given.values()) + encoder.recency.weight[place]
        torch.testing.assert_close(history.values()[row], expected)
    assert history.lengths().tolist() == LENGTHS.tolist()


def test_of_a_product_the_first_feature_counts_by_the_others() -> None:
    encoder = EventEncoder(["history_item", "history_action"], embedding_dim=6, combine="product")
    given = embeddings()
    item, action = (given[name].values() for name in encoder.features)
    torch.testing.assert_close(encoder(given).values(), item * (1 + action))
    alone = EventEncoder(["history_item"], embedding_dim=6, combine="product")
    assert torch.equal(alone(given).values(), item)


def test_an_older_event_in_front_changes_no_later_one() -> None:
    encoder = EventEncoder(["history_item"], embedding_dim=6, max_length=4)
    rows = torch.randn(4, 6)
    longer = encoder({"history_item": JaggedTensor(rows, lengths=torch.tensor([4]))})
    shorter = encoder({"history_item": JaggedTensor(rows[1:], lengths=torch.tensor([3]))})
    assert torch.equal(longer.values()[1:], shorter.values())


def test_a_history_over_the_limit_is_refused_by_name_and_numbers() -> None:
    encoder = EventEncoder(["history_item"], embedding_dim=6, max_length=2)
    with pytest.raises(ValueError, match="request 0 has a history of 3 events.*places for 2"):
        encoder(embeddings())


def test_without_places_a_history_may_have_any_length_and_any_order_of_time() -> None:
    encoder = EventEncoder(["history_item"], embedding_dim=6)
    rows = torch.randn(300, 6)
    assert torch.equal(encoder({"history_item": JaggedTensor(rows, lengths=torch.tensor([300]))}).values(), rows)
    assert list(encoder.parameters()) == []
