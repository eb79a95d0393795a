import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from tests.modules.rows import (
    AMORTIZABLE,
    DIM,
    ENCODERS,
    LIMIT,
    NOT_AMORTIZABLE,
    encode_all,
    jagged,
    make_both,
    make_encoder,
    make_rows,
    rows_of,
)
from torchrec_amort import HistoryEncoder, HistoryState
from torchrec_amort.modules.encoder import AmortizableEncoder

shapes = st.lists(st.tuples(st.integers(0, LIMIT), st.integers(1, 6)), min_size=1, max_size=5)
seeds = st.integers(0, 2**20)
every_encoder = pytest.mark.parametrize("name", ENCODERS)
every_amortizable = pytest.mark.parametrize("name", AMORTIZABLE)


def amortizable(name: str) -> AmortizableEncoder:
    encoder = make_encoder(name)
    assert isinstance(encoder, AmortizableEncoder)
    return encoder


def score_alone(encoder: HistoryEncoder, history: JaggedTensor, candidates: JaggedTensor) -> Tensor:
    """Each candidate of each request scored by itself."""
    scores = []
    for events, of_request in zip(rows_of(history), rows_of(candidates), strict=True):
        scores += [encoder(jagged([events]), jagged([candidate[None]])) for candidate in of_request]
    return torch.cat(scores)


def assert_same(scores: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(scores, expected, rtol=0, atol=atol)


@every_encoder
@settings(max_examples=6)
@given(shapes, seeds)
@example([(0, 1), (1, 1), (LIMIT, 6)], 0)
@example([(0, 2), (0, 1)], 0)
def test_equals_the_oracle_of_plain_loops(name: str, sizes: list[tuple[int, int]], seed: int) -> None:
    encoder = make_encoder(name, seed)
    history, candidates = make_both(sizes, seed)
    assert_same(encoder(history, candidates), encode_all(encoder, history, candidates), 1e-10)


@every_encoder
def test_gradients_equal_those_of_the_oracle(name: str) -> None:
    encoder = make_encoder(name)
    history, candidates = make_both([(5, 2), (0, 2), (1, 1)], 0)
    candidates.values().requires_grad_()
    numeric = copy.deepcopy(encoder)
    rows_CD = encoder(history, candidates)
    weights = torch.linspace(-1, 1, rows_CD.numel(), dtype=torch.float64).view_as(rows_CD)
    ((rows_CD * weights).sum() + 0 * candidates.values().sum()).backward()
    # The oracle is made of numbers: its derivative is a difference quotient.
    for (parameter_name, parameter), other in zip(encoder.named_parameters(), numeric.parameters(), strict=True):
        place = parameter.numel() // 2
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                other.view(-1)[place] += step
                values.append(float((encode_all(numeric, history, candidates) * weights).sum()))
                other.view(-1)[place] -= step
        quotient = (values[0] - values[1]) / 2e-5
        assert parameter.grad is not None, parameter_name
        assert float(parameter.grad.view(-1)[place]) == pytest.approx(quotient, rel=1e-5, abs=1e-7), parameter_name


@every_encoder
def test_gradients_by_events_and_candidates_are_those_of_differences(name: str) -> None:
    encoder = make_encoder(name)
    history, candidates = make_both([(4, 2), (0, 2), (1, 1)], 0)

    def score(events_ND: Tensor, candidates_CD: Tensor) -> Tensor:
        rows: Tensor = encoder(
            JaggedTensor(events_ND, lengths=history.lengths()),
            JaggedTensor(candidates_CD, lengths=candidates.lengths()),
        )
        return rows

    inputs = (history.values().requires_grad_(), candidates.values().requires_grad_())
    assert torch.autograd.gradcheck(score, inputs, fast_mode=True)


@every_encoder
@settings(max_examples=15)
@given(shapes, seeds)
def test_a_candidate_scores_the_same_alone_and_beside_others(
    name: str, sizes: list[tuple[int, int]], seed: int
) -> None:
    encoder = make_encoder(name)
    history, candidates = make_both(sizes, seed)
    assert_same(encoder(history, candidates), score_alone(encoder, history, candidates))


@every_encoder
@settings(max_examples=15)
@given(shapes, seeds)
def test_permuted_candidates_have_permuted_scores(name: str, sizes: list[tuple[int, int]], seed: int) -> None:
    encoder = make_encoder(name)
    history, candidates = make_both(sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(m, generator=generator) for _, m in sizes]
    permuted = jagged([rows[order] for rows, order in zip(rows_of(candidates), orders, strict=True)])
    scores = encoder(history, candidates).split([m for _, m in sizes])
    expected = torch.cat([rows[order] for rows, order in zip(scores, orders, strict=True)])
    assert_same(encoder(history, permuted), expected)


@every_encoder
@settings(max_examples=15)
@given(st.integers(0, LIMIT), st.integers(1, 4), st.integers(0, 3 * LIMIT), seeds)
def test_a_longer_or_shorter_request_in_the_batch_changes_nothing(
    name: str, events: int, num_candidates: int, other_events: int, seed: int
) -> None:
    encoder = make_encoder(name)
    history, candidates = make_both([(events, num_candidates)], seed)
    others = make_both([(other_events, 3)], seed + 2)
    together = [jagged([*rows_of(a), *rows_of(b)]) for a, b in zip((history, candidates), others, strict=True)]
    assert_same(encoder(*together)[:num_candidates], encoder(history, candidates))


@every_encoder
def test_swapping_a_candidate_changes_no_other_ones_score_or_gradient(name: str) -> None:
    encoder = make_encoder(name)
    history, candidates = make_both([(5, 3), (2, 2)], 0)
    swapped = JaggedTensor(candidates.values().clone(), lengths=candidates.lengths())
    swapped.values()[1] = torch.linspace(-3, 7, DIM)
    results = []
    others = [0, 2, 3, 4]
    for rows in (candidates, swapped):
        values = rows.values().clone().requires_grad_()
        scores = encoder(history, JaggedTensor(values, lengths=rows.lengths()))
        (scores[others].sum() + 0 * values.sum()).backward()
        assert values.grad is not None
        results.append((scores.detach(), values.grad))
    for before, after in zip(*results, strict=True):
        assert_same(before[others], after[others])
    # The history has neither the one nor the other item.
    assert torch.allclose(results[0][0][1], results[1][0][1]) == (name in ("mean_pooling", "matches"))
    assert float(results[0][1][1].abs().max()) == 0.0


@every_encoder
@pytest.mark.parametrize("lengths", [[0, 0], [3, 0], [2, 5]])
def test_every_parameter_takes_part_in_every_step(name: str, lengths: list[int]) -> None:
    encoder = make_encoder(name)
    history, candidates = make_rows(lengths, 0), make_rows([1, 2], 1)
    history.values().requires_grad_()
    encoder(history, candidates).sum().backward()
    gradients = {parameter_name: p.grad for parameter_name, p in encoder.named_parameters()}
    assert [parameter_name for parameter_name, gradient in gradients.items() if gradient is None] == []
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values() if gradient is not None)


@every_amortizable
@settings(max_examples=15)
@given(shapes, seeds)
def test_states_are_cut_and_put_together_without_a_change(name: str, sizes: list[tuple[int, int]], seed: int) -> None:
    encoder = amortizable(name)
    history, candidates = make_both(sizes, seed)
    state = encoder.encode_history(history)
    assert len(state) == len(sizes)
    cut = [state[i] for i in range(len(sizes))]
    again = HistoryState.cat(cut)
    assert again.nbytes == state.nbytes == sum(part.nbytes for part in cut)
    expected = encoder.score_candidates(state, candidates)
    assert torch.equal(encoder.score_candidates(again, candidates), expected)
    assert torch.equal(encoder(history, candidates), expected)
    half = len(sizes) // 2
    parts = [
        encoder.score_candidates(state[start:stop], jagged(rows_of(candidates)[start:stop]))
        for start, stop in pairwise([0, half, len(sizes)])
        if start < stop
    ]
    assert_same(torch.cat(parts), expected)


@every_amortizable
@settings(max_examples=15)
@given(st.integers(0, LIMIT), st.integers(1, 7), st.integers(1, 7), seeds)
def test_micro_batches_of_candidates_score_the_same(name: str, n: int, m: int, size: int, seed: int) -> None:
    encoder = amortizable(name)
    history, candidates = make_both([(n, m)], seed)
    state = encoder.encode_history(history)
    parts = [encoder.score_candidates(state, jagged([rows])) for rows in candidates.values().split(size)]
    assert_same(torch.cat(parts), encoder(history, candidates))


@every_amortizable
def test_a_state_of_other_requests_is_refused(name: str) -> None:
    encoder = amortizable(name)
    state = encoder.encode_history(make_rows([3, 1], 0))
    with pytest.raises(ValueError, match="of 2 requests, the candidates of 1"):
        encoder.score_candidates(state, make_rows([2], 1))


def first_events(encoder: HistoryEncoder, history: JaggedTensor, candidate: Tensor) -> Tensor:
    """The rows of the first layer's events, after it, in a sequence with a candidate."""
    rows: list[Tensor] = []
    layers: Any = encoder.layers
    hook = layers[0].register_forward_hook(lambda _, args, output: rows.append(output))
    encoder(history, jagged([candidate[None]]))
    hook.remove()
    return rows[0][: len(history.values())]


@pytest.mark.parametrize("name", NOT_AMORTIZABLE)
def test_events_that_see_the_candidate_cannot_be_encoded_once(name: str) -> None:
    encoder = make_encoder(name)
    assert not encoder.is_amortizable
    history, candidates = make_both([(4, 2)], 0)
    encoded = [first_events(encoder, history, candidate) for candidate in candidates.values()]
    # Reusing the events of one candidate for another would use rows that are wrong by this much.
    assert float((encoded[0] - encoded[1]).abs().max()) > 1e-2


def test_events_of_append_cross_are_the_same_for_every_candidate() -> None:
    encoder = make_encoder("append_cross")
    assert encoder.is_amortizable
    history, candidates = make_both([(4, 2)], 0)
    encoded = [first_events(encoder, history, candidate) for candidate in candidates.values()]
    assert torch.equal(*encoded)


@pytest.mark.parametrize("name", ["mean_pooling", "similarity"])
def test_long_histories_are_averaged_in_float32_where_rows_are_of_half_precision(name: str) -> None:
    encoder = make_encoder(name)
    history, candidates = make_rows([3000, 2000], 0), make_rows([2, 2], 1)
    history, candidates = (
        JaggedTensor(rows.values().abs().bfloat16(), lengths=rows.lengths()) for rows in (history, candidates)
    )
    exact = encoder(*(JaggedTensor(rows.values().double(), lengths=rows.lengths()) for rows in (history, candidates)))
    told = encoder.bfloat16()(history, candidates)
    torch.testing.assert_close(told.double(), exact, rtol=0.02, atol=0.02)
