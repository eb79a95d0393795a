import pytest
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort import EventEncoder
from torchrec_amort.modules.padding import Padding

LENGTHS = torch.tensor([3, 0, 1])


def embeddings() -> dict[str, JaggedTensor]:
    torch.manual_seed(0)
    return {name: JaggedTensor(torch.randn(4, 6), lengths=LENGTHS) for name in ("history_item", "history_action")}


def test_an_event_is_its_features_and_its_place_from_the_latest() -> None:
    encoder = EventEncoder(["history_item", "history_action"], embedding_dim=6, max_length=3)
    given = embeddings()
    history = encoder(given)
    for row, place in enumerate([2, 1, 0, 0]):
        expected = sum(jt.values()[row] for jt in given.values()) + encoder.recency.weight[place]
        torch.testing.assert_close(history.values()[row], expected)
    assert history.lengths().tolist() == LENGTHS.tolist()


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


@pytest.mark.parametrize("lengths", [[3, 0, 2], [0, 0], [2, 2], [4], [0]])
def test_padding_and_back(lengths: list[int]) -> None:
    rows = torch.randn(sum(lengths), 5)
    padding = Padding(torch.tensor(lengths))
    padded = padding.pad(rows)
    assert padded.shape == (len(lengths), max(1, *lengths, 0), 5)
    assert torch.equal(padding.unpad(padded), rows)
    for request, length in enumerate(lengths):
        assert float(padded[request, length:].abs().sum()) == 0.0


def test_no_mask_is_needed_where_nothing_is_padded() -> None:
    assert Padding(torch.tensor([2, 2])).key_mask() is None
    mask = Padding(torch.tensor([2, 0])).key_mask()
    assert mask is not None
    assert mask[:, 0, 0].tolist() == [[True, True], [True, True]]
