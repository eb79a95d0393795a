import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from tests.oracle import encode
from torchrec_amort import AmortizedHistoryArch, HistoryState
from torchrec_amort.modules.history import HistoryAttention

DIM = 8
LIMIT = 9

attentions = st.sampled_from(["full", "causal"])
shapes = st.lists(st.tuples(st.integers(0, LIMIT), st.integers(1, 6)), min_size=1, max_size=5)
seeds = st.integers(0, 2**20)


def make_arch(attention: HistoryAttention, seed: int = 0) -> AmortizedHistoryArch:
    torch.manual_seed(seed)
    arch = AmortizedHistoryArch(DIM, num_layers=3, num_heads=2, history_attention=attention).double()
    for parameter in arch.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return arch


def make_rows(lengths: list[int], seed: int) -> JaggedTensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), DIM, generator=generator, dtype=torch.float64)
    return JaggedTensor(values, lengths=torch.tensor(lengths))


def rows_of(jagged: JaggedTensor) -> list[Tensor]:
    return list(jagged.values().split(jagged.lengths().tolist()))


def jagged(rows: list[Tensor]) -> JaggedTensor:
    return JaggedTensor(torch.cat(rows), lengths=torch.tensor([len(row) for row in rows]))


def score_alone(arch: AmortizedHistoryArch, history: JaggedTensor, candidates: JaggedTensor) -> Tensor:
    """Each candidate of each request scored by itself."""
    scores = []
    for events, of_request in zip(rows_of(history), rows_of(candidates), strict=True):
        scores += [arch(jagged([events]), jagged([candidate[None]])) for candidate in of_request]
    return torch.cat(scores)


@given(shapes, attentions, seeds)
@example([(0, 1), (1, 1), (LIMIT, 6)], "full", 0)
@example([(0, 1), (1, 1), (LIMIT, 6)], "causal", 0)
def test_equals_the_oracle_of_plain_loops(sizes: list[tuple[int, int]], attention: HistoryAttention, seed: int) -> None:
    arch = make_arch(attention, seed)
    history = make_rows([n for n, _ in sizes], seed)
    candidates = make_rows([m for _, m in sizes], seed + 1)
    expected = [
        encode(arch, list(events), candidate)
        for events, of_request in zip(rows_of(history), rows_of(candidates), strict=True)
        for candidate in of_request
    ]
    difference = (arch(history, candidates) - torch.stack(expected)).abs().max()
    assert difference <= 1e-10


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_gradients_equal_those_of_the_oracle(attention: HistoryAttention) -> None:
    arch = make_arch(attention)
    history, candidates = make_rows([4, 0, 1], 0), make_rows([2, 2, 1], 1)
    numeric = copy.deepcopy(arch)
    weights = torch.linspace(-1, 1, 5 * DIM, dtype=torch.float64).view(5, DIM)
    (arch(history, candidates) * weights).sum().backward()
    # The oracle is made of numbers: its derivative is a difference quotient.
    for (name, parameter), other in zip(arch.named_parameters(), numeric.parameters(), strict=True):
        place = parameter.numel() // 2
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                other.view(-1)[place] += step
                rows = [
                    encode(numeric, list(events), candidate)
                    for events, of_request in zip(rows_of(history), rows_of(candidates), strict=True)
                    for candidate in of_request
                ]
                values.append(float((torch.stack(rows) * weights).sum()))
                other.view(-1)[place] -= step
        quotient = (values[0] - values[1]) / 2e-5
        assert parameter.grad is not None, name
        assert float(parameter.grad.view(-1)[place]) == pytest.approx(quotient, rel=1e-5, abs=1e-7), name


@given(shapes, attentions, seeds)
def test_a_candidate_scores_the_same_alone_and_beside_others(
    sizes: list[tuple[int, int]], attention: HistoryAttention, seed: int
) -> None:
    arch = make_arch(attention)
    history = make_rows([n for n, _ in sizes], seed)
    candidates = make_rows([m for _, m in sizes], seed + 1)
    torch.testing.assert_close(arch(history, candidates), score_alone(arch, history, candidates), rtol=0, atol=1e-12)


@given(shapes, attentions, seeds)
def test_permuted_candidates_have_permuted_scores(
    sizes: list[tuple[int, int]], attention: HistoryAttention, seed: int
) -> None:
    arch = make_arch(attention)
    history = make_rows([n for n, _ in sizes], seed)
    candidates = make_rows([m for _, m in sizes], seed + 1)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(m, generator=generator) for _, m in sizes]
    permuted = jagged([rows[order] for rows, order in zip(rows_of(candidates), orders, strict=True)])
    scores = arch(history, candidates).split([m for _, m in sizes])
    expected = torch.cat([rows[order] for rows, order in zip(scores, orders, strict=True)])
    torch.testing.assert_close(arch(history, permuted), expected, rtol=0, atol=1e-12)


@given(st.integers(0, LIMIT), st.integers(1, 4), st.integers(0, 3 * LIMIT), attentions, seeds)
def test_a_longer_or_shorter_request_in_the_batch_changes_nothing(
    events: int, num_candidates: int, other_events: int, attention: HistoryAttention, seed: int
) -> None:
    arch = make_arch(attention)
    history, candidates = make_rows([events], seed), make_rows([num_candidates], seed + 1)
    other_history, other_candidates = make_rows([other_events], seed + 2), make_rows([3], seed + 3)
    together = arch(
        jagged([*rows_of(history), *rows_of(other_history)]),
        jagged([*rows_of(candidates), *rows_of(other_candidates)]),
    )
    torch.testing.assert_close(together[:num_candidates], arch(history, candidates), rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_swapping_a_candidate_changes_no_other_ones_score_or_gradient(attention: HistoryAttention) -> None:
    arch = make_arch(attention)
    history, candidates = make_rows([5, 2], 0), make_rows([3, 2], 1)
    swapped = JaggedTensor(candidates.values().clone(), lengths=candidates.lengths())
    swapped.values()[1] = 7.0
    results = []
    for rows in (candidates, swapped):
        values = rows.values().clone().requires_grad_()
        scores = arch(history, JaggedTensor(values, lengths=rows.lengths()))
        scores[[0, 2, 3, 4]].sum().backward()
        results.append((scores.detach(), values.grad))
    others = [0, 2, 3, 4]
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(before[others], after[others], rtol=0, atol=1e-12)
        assert before is not None
    assert not torch.allclose(results[0][0][1], results[1][0][1])
    assert float(results[0][1][1].abs().max()) == 0.0


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


@pytest.mark.parametrize("attention", ["full", "causal"])
@pytest.mark.parametrize("lengths", [[0, 0], [3, 0], [2, 5]])
def test_every_parameter_takes_part_in_every_step(attention: HistoryAttention, lengths: list[int]) -> None:
    arch = make_arch(attention)
    arch(make_rows(lengths, 0), make_rows([1, 2], 1)).sum().backward()
    assert [name for name, p in arch.named_parameters() if p.grad is None] == []


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


@given(shapes, attentions, seeds)
def test_states_are_cut_and_put_together_without_a_change(
    sizes: list[tuple[int, int]], attention: HistoryAttention, seed: int
) -> None:
    arch = make_arch(attention)
    history = make_rows([n for n, _ in sizes], seed)
    candidates = make_rows([m for _, m in sizes], seed + 1)
    state = arch.encode_history(history)
    assert len(state) == len(sizes)
    cut = [state[i] for i in range(len(sizes))]
    again = HistoryState.cat(cut)
    assert again.nbytes == state.nbytes == sum(part.nbytes for part in cut)
    expected = arch.score_candidates(state, candidates)
    assert torch.equal(arch.score_candidates(again, candidates), expected)
    assert torch.equal(arch(history, candidates), expected)
    half = len(sizes) // 2
    starts = [0, half, len(sizes)]
    parts = [
        arch.score_candidates(state[start:stop], jagged(rows_of(candidates)[start:stop]))
        for start, stop in pairwise(starts)
        if start < stop
    ]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-12)


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


def test_a_state_of_other_requests_is_refused() -> None:
    arch = make_arch("full")
    state = arch.encode_history(make_rows([3, 1], 0))
    with pytest.raises(ValueError, match="of 2 requests, the candidates of 1"):
        arch.score_candidates(state, make_rows([2], 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embedding_dim": 10, "num_heads": 4}, "10 is not a multiple of num_heads 4"),
        ({"embedding_dim": 8, "num_layers": 0}, "num_layers is 0"),
        ({"embedding_dim": 8, "history_attention": "both"}, "'both'"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AmortizedHistoryArch(**arguments)
