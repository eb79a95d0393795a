from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort import AmortizedHistoryArch, HistoryState
from torchrec_amort.bench.timing import threads
from torchrec_amort.modules.rivals import MeanPooling
from torchrec_amort.serving.native_encoder import NativeEncoder, why_not_native

# Weights of size 1 make vectors of size 1: bfloat16 has 8 bits, and errors of several layers add up.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            why_not_native(AmortizedHistoryArch(8), dtype) is not None,
            reason=f"no native build for {dtype} on this processor",
        ),
    )
    for dtype in TOLERANCE
]
# Across the sizes of a tile (16 and 32 rows) and of a block of keys (128).
sizes = st.lists(st.tuples(st.integers(0, 150), st.integers(1, 70)), min_size=1, max_size=4)
shapes = st.sampled_from([(8, 2), (24, 3), (32, 2), (128, 4)])
seeds = st.integers(0, 2**20)


@pytest.fixture(autouse=True)
def no_memory_is_zero() -> Iterator[None]:
    """Memory that nobody wrote is NaN: what reads it, if only to multiply it by zero, is found out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_arch(dim: int, heads: int, seed: int, **options: Any) -> AmortizedHistoryArch:
    torch.manual_seed(seed)
    arch = AmortizedHistoryArch(dim, 3, heads, feedforward_dim=dim + 6, **options).eval()
    for norm in (module for module in arch.modules() if isinstance(module, torch.nn.LayerNorm)):
        torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)
        torch.nn.init.normal_(norm.bias, std=0.3)
    return arch


def make_rows(lengths: list[int], dim: int) -> JaggedTensor:
    return JaggedTensor(torch.randn(sum(lengths), dim), lengths=torch.tensor(lengths))


def assert_equal_states(have: HistoryState, expected: HistoryState, dtype: torch.dtype) -> None:
    assert torch.equal(have.lengths, expected.lengths)
    for one, other in zip(have.keys + have.values, expected.keys + expected.values, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@given(sizes, shapes, st.sampled_from(["full", "causal"]), st.sampled_from([1, 2]), seeds)
@torch.inference_mode()
def test_it_is_the_arch(
    dtype: torch.dtype, sizes: list[tuple[int, int]], shape: tuple[int, int], attention: str, vectors: int, seed: int
) -> None:
    arch = make_arch(*shape, seed, history_attention=attention, num_vectors=vectors)
    native = NativeEncoder(arch, dtype)
    history, candidates = (make_rows([size[side] for size in sizes], shape[0]) for side in (0, 1))
    assert_equal_states(native.encode_history(history), arch.encode_history(history), dtype)
    torch.testing.assert_close(native(history, candidates), arch(history, candidates), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@given(sizes, seeds)
@torch.inference_mode()
def test_a_candidate_has_the_same_vector_alone_and_beside_others(
    dtype: torch.dtype, sizes: list[tuple[int, int]], seed: int
) -> None:
    native = NativeEncoder(make_arch(32, 2, seed), dtype)
    history, candidates = (make_rows([size[side] for size in sizes], 32) for side in (0, 1))
    state = native.encode_history(history)
    together: Tensor = native.score_candidates(state, candidates)
    alone, row = [], 0
    for request, (_, m) in enumerate(sizes):
        for _ in range(m):
            one = JaggedTensor(candidates.values()[row : row + 1], lengths=torch.tensor([1]))
            alone.append(native.score_candidates(state[request], one))
            row += 1
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.lists(st.tuples(st.integers(0, 140), st.integers(0, 40)), min_size=1, max_size=3), seeds)
@torch.inference_mode()
def test_an_extended_state_is_that_of_the_whole_history(
    dtype: torch.dtype, sizes: list[tuple[int, int]], seed: int
) -> None:
    native = NativeEncoder(make_arch(32, 2, seed, history_attention="causal"), dtype)
    past, new = (make_rows([size[side] for size in sizes], 32) for side in (0, 1))
    both = zip(past.values().split([n for n, _ in sizes]), new.values().split([n for _, n in sizes]), strict=True)
    whole = JaggedTensor(torch.cat([torch.cat(rows) for rows in both]), lengths=past.lengths() + new.lengths())
    extended = native.extend_history(native.encode_history(past), new)
    expected = native.encode_history(whole)
    for one, other in zip(extended.keys + extended.values, expected.keys + expected.values, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(1, 40), st.integers(1, 8), st.sampled_from(["full", "causal"]), seeds)
@torch.inference_mode()
def test_threads_write_what_one_does(
    dtype: torch.dtype, num_events: int, num_threads: int, attention: str, seed: int
) -> None:
    native = NativeEncoder(make_arch(24, 3, seed, history_attention=attention), dtype)
    history = make_rows([num_events, 3], 24)
    with threads(1):
        expected = native.encode_history(history)
    with threads(num_threads):
        have = native.encode_history(history)
    for one, other in zip(have.keys + have.values, expected.keys + expected.values, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_state_that_grows_leaves_those_before_it_as_they_were(dtype: torch.dtype) -> None:
    native = NativeEncoder(make_arch(32, 2, 0, history_attention="causal"), dtype)
    rows = torch.randn(400, 32)
    whole = lambda n: native.encode_history(JaggedTensor(rows[:n], lengths=torch.tensor([n])))  # noqa: E731
    states = [(7, whole(7))]
    # From each state but the first two go on, of which one takes the room: they do not write over each other.
    for n, more in [(7, 4), (11, 1), (12, 150), (162, 9), (162, 9), (12, 3), (171, 200)]:
        start = next(state for length, state in states if length == n)
        new = JaggedTensor(rows[n : n + more], lengths=torch.tensor([more]))
        other = JaggedTensor(torch.randn(more, 32), lengths=torch.tensor([more]))
        states.append((n + more, native.extend_history(start, new)))
        native.extend_history(start, other)
    for length, state in states:
        expected = whole(length)
        assert torch.equal(state.lengths, expected.lengths)
        for one, same in zip(state.keys + state.values, expected.keys + expected.values, strict=True):
            assert torch.equal(one, same)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_it_reads_states_of_any_layout_and_of_several_pieces(dtype: torch.dtype) -> None:
    arch = make_arch(32, 2, 0)
    native = NativeEncoder(arch, dtype)
    history, candidates = make_rows([5, 0, 40], 32), make_rows([3, 1, 2], 32)
    state = native.encode_history(history)
    expected = native.score_candidates(state, candidates)
    assert torch.equal(native.score_states([state[:2], state[2]], candidates), expected)
    assert torch.equal(native.score_candidates(HistoryState.cat([state[:1], state[1:]]), candidates), expected)
    other = native.score_candidates(arch.encode_history(history), candidates)
    torch.testing.assert_close(other, expected, rtol=0, atol=TOLERANCE[dtype])
    with pytest.raises(ValueError, match="state is of 2 requests, the candidates of 3"):
        native.score_candidates(state[:2], candidates)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_what_is_not_a_number_is_passed_on(dtype: torch.dtype) -> None:
    native = NativeEncoder(make_arch(32, 2, 0), dtype)
    history, candidates = make_rows([20], 32), make_rows([40], 32)
    candidates.values()[7, 3] = torch.nan
    is_nan = native(history, candidates).isnan().any(1)
    assert is_nan.nonzero().flatten().tolist() == [7]
    history.values()[4, 0] = torch.nan
    assert native(history, candidates).isnan().any(1).all()


def test_what_it_cannot_do_is_told() -> None:
    for options in (
        {"rotary": True},
        {"reads_itself": True},
        {"has_summary": True},
        {"recent_events": 3},
        {"feedforward_dim": 7},
    ):
        arch = AmortizedHistoryArch(8, **options)
        reason = why_not_native(arch, torch.float32)
        assert reason is not None
        with pytest.raises(ValueError, match="no native encoder"):
            NativeEncoder(arch)
    assert "MeanPooling" in (why_not_native(MeanPooling(8), torch.float32) or "")
    assert "float64" in (why_not_native(AmortizedHistoryArch(8), torch.float64) or "")
