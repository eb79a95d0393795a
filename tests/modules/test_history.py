from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import JaggedTensor

from tests.modules.rows import DIM, jagged, make_both, make_encoder, make_rows, rows_of
from torchrec_amort import AmortizedHistoryArch, HistoryState
from torchrec_amort.modules.encoder import AmortizableEncoder
from torchrec_amort.modules.history import HistoryAttention


def make_arch(attention: HistoryAttention = "full") -> AmortizedHistoryArch:
    arch = make_encoder("append_cross" if attention == "full" else "append_cross_causal")
    assert isinstance(arch, AmortizedHistoryArch)
    return arch


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_an_empty_history_adds_exactly_nothing_forward_and_backward(attention: HistoryAttention) -> None:
    arch = make_arch(attention)
    candidates = make_rows([2, 1], 1)
    values = candidates.values().clone().requires_grad_()
    scores = arch(make_rows([0, 0], 0), JaggedTensor(values, lengths=candidates.lengths()))
    expected = values.detach().clone().requires_grad_()
    rows = expected
    for layer in arch.layers:
        rows = rows + layer.feedforward(layer.feedforward_norm(rows))
    assert torch.equal(scores, arch.output_norm(rows))
    scores.sum().backward()
    arch.output_norm(rows).sum().backward()
    torch.testing.assert_close(values.grad, expected.grad, rtol=0, atol=1e-14)
    for layer in arch.layers:
        for projection in (layer.query, layer.key_value):
            assert projection.weight.grad is not None
            assert not projection.weight.grad.any()
    assert all(torch.isfinite(p.grad).all() for p in arch.parameters() if p.grad is not None)


@pytest.mark.parametrize(("attention", "unchanged"), [("causal", True), ("full", False)])
def test_a_causal_history_can_grow_without_changing_what_was_there(
    attention: HistoryAttention, unchanged: bool
) -> None:
    history = make_rows([6], 0)
    shorter = JaggedTensor(history.values()[:4], lengths=torch.tensor([4]))
    arch = make_arch(attention)
    long_state, short_state = arch.encode_history(history), arch.encode_history(shorter)
    same = [
        torch.allclose(longer[:4], short, rtol=0, atol=1e-12)
        for longer, short in zip(long_state.keys, short_state.keys, strict=True)
    ]
    assert all(same) == unchanged


@pytest.mark.parametrize("name", ["append_cross_causal", "rotary_causal_own"])
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=4), st.integers(0, 2**20))
def test_an_extended_state_is_that_of_the_whole_history(name: str, sizes: list[tuple[int, int]], seed: int) -> None:
    arch = make_encoder(name)
    assert isinstance(arch, AmortizedHistoryArch)
    past, new = make_rows([n for n, _ in sizes], seed), make_rows([n for _, n in sizes], seed + 1)
    whole = jagged([torch.cat(rows) for rows in zip(rows_of(past), rows_of(new), strict=True)])
    extended, expected = arch.extend_history(arch.encode_history(past), new), arch.encode_history(whole)
    assert torch.equal(extended.lengths, expected.lengths)
    for one, other in zip(extended.keys + extended.values, expected.keys + expected.values, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["append_cross", "summary", "mean_pooling", "compressed"])
def test_a_state_whose_events_read_later_ones_is_not_extended(name: str) -> None:
    encoder = make_encoder(name)
    assert isinstance(encoder, AmortizableEncoder)
    with pytest.raises(ValueError, match="encode the whole history again"):
        encoder.extend_history(encoder.encode_history(make_rows([3], 0)), make_rows([1], 1))


def test_a_state_tells_its_bytes_and_offsets() -> None:
    state = make_arch("full").encode_history(make_rows([3, 0, 2], 0))
    assert state.offsets.tolist() == [0, 3, 3, 5]
    assert state.nbytes == 3 * 2 * 5 * DIM * 8 + 3 * 8
    assert state[-1].lengths.tolist() == [2]
    assert state.to("cpu").lengths.tolist() == [3, 0, 2]
    with pytest.raises(ValueError, match="step 2"):
        state[::2]
    with pytest.raises(IndexError):
        state[3]


def test_the_last_layer_does_not_query_the_history() -> None:
    arch = make_arch("full")
    calls = []
    for depth, layer in enumerate(arch.layers):
        layer.query.register_forward_hook(lambda *_, depth=depth: calls.append(depth))
    arch.encode_history(make_rows([3], 0))
    assert calls == [0, 1]


def test_a_summary_needs_all_of_the_last_layer_and_is_worked_out_once_a_request() -> None:
    arch = make_encoder("summary")
    assert isinstance(arch, AmortizedHistoryArch)
    calls = []
    for layer in arch.layers:
        layer.query.register_forward_hook(lambda _, args, output: calls.append(len(output)))
    history, candidates = make_both([(3, 4), (0, 2)], 0)
    state = arch.encode_history(history)
    assert calls == [3, 3, 3]
    assert state.summary is not None
    assert state.summary.shape == (2, DIM)
    assert not state.summary[1].any()
    rows = arch.score_candidates(state, candidates)
    assert torch.equal(rows[:, DIM:], state.summary.repeat_interleave(torch.tensor([4, 2]), dim=0))
    assert calls == [3, 3, 3, 6, 6, 6]


def test_a_compressed_history_costs_no_more_than_its_bound() -> None:
    arch = make_encoder("compressed")
    assert isinstance(arch, AmortizedHistoryArch)
    state = arch.encode_history(make_rows([3, 4, 400], 0))
    assert state.lengths.tolist() == [3, 5, 5]


def test_rotary_positions_depend_on_distance_alone() -> None:
    arch = make_encoder("rotary")
    history, candidates = make_both([(5, 2)], 0)
    swapped = JaggedTensor(history.values().flip(0), lengths=history.lengths())
    assert not torch.allclose(arch(history, candidates), arch(swapped, candidates))
    plain = make_encoder("append_cross")
    torch.testing.assert_close(plain(history, candidates), plain(swapped, candidates), rtol=0, atol=1e-12)


def test_states_of_different_encoders_are_not_put_together() -> None:
    history = make_rows([3], 0)
    states = {}
    for name in ("append_cross", "summary", "mean_pooling"):
        encoder: Any = make_encoder(name)
        states[name] = encoder.encode_history(history)
    with pytest.raises(ValueError, match="1 of 2 states have a summary"):
        HistoryState.cat([states["append_cross"], states["summary"]])
    with pytest.raises(ValueError, match=r"one number of layers, not \[1, 3\]"):
        HistoryState.cat([states["append_cross"], states["mean_pooling"]])


@pytest.mark.parametrize(
    ("options", "extendable"),
    [
        ({"history_attention": "causal"}, True),
        ({"history_attention": "causal", "rotary": True}, True),
        ({}, False),
        ({"history_attention": "causal", "recent_events": 3}, False),
        ({"history_attention": "causal", "has_summary": True}, False),
    ],
)
def test_only_a_plain_causal_state_can_be_extended(options: dict[str, Any], extendable: bool) -> None:
    assert AmortizedHistoryArch(DIM, **options).is_extendable is extendable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embedding_dim": 10, "num_heads": 4}, "10 is not a multiple of num_heads 4"),
        ({"embedding_dim": 8, "num_layers": 0}, "num_layers is 0"),
        ({"embedding_dim": 8, "history_attention": "both"}, "'both'"),
        ({"embedding_dim": 8, "num_vectors": 0}, "num_vectors is 0"),
        ({"embedding_dim": 6, "num_heads": 2, "rotary": True}, "a head has 3 entries"),
        ({"embedding_dim": 8, "recent_events": 0}, "recent_events is 0"),
        ({"embedding_dim": 8, "recent_events": 2, "summary_tokens": 0}, "summary_tokens is 0"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AmortizedHistoryArch(**arguments)
