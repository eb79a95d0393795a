from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from tests.modules.rows import ENCODERS, make_both, make_encoder
from torchrec_amort import AmortizedHistoryArch
from torchrec_amort.modules.history import HistoryAttention
from torchrec_amort.ops import attention
from torchrec_amort.ops.attention import Backend, JaggedAttention

HEADS, HEAD_DIM = 2, 4
sizes = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=1, max_size=12)
seeds = st.integers(0, 2**20)


@pytest.fixture
def many_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a call cost nothing: every request that differs in length gets a group of its own."""
    monkeypatch.setattr(attention, "PAIRS_OF_A_CALL", 0)


def make_tensors(rows: list[int], keys: list[int], seed: int, with_own: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = [sum(rows), sum(keys), sum(keys), *([sum(rows)] * 2 if with_own else [])]
    return [
        torch.randn(count, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64).requires_grad_()
        for count in counts
    ]


def attend(tensors: list[Tensor], rows: list[int], keys: list[int], causal: bool, backend: Backend) -> Tensor:
    plan = JaggedAttention(torch.tensor(rows), torch.tensor(keys), is_causal=causal, backend=backend)
    queries, keys_NHK, values_NHK, *own = tensors
    return plan(queries, keys_NHK, values_NHK, (own[0], own[1]) if own else None)


def attend_by_loops(tensors: list[Tensor], rows: list[int], keys: list[int], causal: bool) -> Tensor:
    """Row by row and head by head."""
    read = torch.zeros(sum(rows), HEADS, HEAD_DIM, dtype=torch.float64)
    row_ends, key_ends = np.cumsum(rows), np.cumsum(keys)
    for request, (row_end, key_end) in enumerate(zip(row_ends, key_ends, strict=True)):
        for place, row in enumerate(range(row_end - rows[request], row_end)):
            own_key = keys[request] - rows[request] + place
            seen = list(range(key_end - keys[request], key_end))[: own_key + 1 if causal else None]
            for head in range(HEADS):
                pairs = [(tensors[1][key, head], tensors[2][key, head]) for key in seen]
                if len(tensors) > 3:
                    pairs.append((tensors[3][row, head], tensors[4][row, head]))
                weights = [torch.exp(tensors[0][row, head] @ key / HEAD_DIM**0.5).item() for key, _ in pairs]
                for weight, (_, value) in zip(weights, pairs, strict=True):
                    read[row, head] += weight / sum(weights) * value
    return read


@pytest.mark.usefixtures("many_groups")
@pytest.mark.parametrize("backend", ["packed", "padded"])
@given(sizes, st.booleans(), seeds)
def test_every_backend_equals_plain_loops(
    backend: Backend, shapes: list[tuple[int, int]], with_own: bool, seed: int
) -> None:
    rows, keys = ([shape[side] % 6 for shape in shapes[:4]] for side in (0, 1))
    tensors = make_tensors(rows, keys, seed, with_own)
    expected = attend_by_loops(tensors, rows, keys, False)
    torch.testing.assert_close(attend(tensors, rows, keys, False, backend), expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("many_groups")
@pytest.mark.parametrize("backend", ["packed", "padded"])
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), seeds)
def test_causal_attention_equals_plain_loops(backend: Backend, lengths: list[int], seed: int) -> None:
    tensors = make_tensors(lengths, lengths, seed, False)
    expected = attend_by_loops(tensors, lengths, lengths, True)
    torch.testing.assert_close(attend(tensors, lengths, lengths, True, backend), expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("many_groups")
@settings(max_examples=20)
@given(sizes, st.booleans(), seeds)
def test_packed_and_padded_agree_forward_and_backward(shapes: list[tuple[int, int]], with_own: bool, seed: int) -> None:
    rows, keys = ([shape[side] for shape in shapes] for side in (0, 1))
    results = []
    for backend in ("packed", "padded"):
        tensors = make_tensors(rows, keys, seed, with_own)
        read = attend(tensors, rows, keys, False, backend)
        (read.sin().sum() + sum(0 * tensor.sum() for tensor in tensors)).backward()
        results.append([read.detach(), *(tensor.grad for tensor in tensors)])
    for packed, padded in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("many_groups")
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_score_the_same_packed_and_padded(name: str) -> None:
    encoder = make_encoder(name)
    history, candidates = make_both([(9, 2), (0, 3), (1, 1), (40, 5), (7, 2)], 0)
    packed = encoder(history, candidates)
    for module in encoder.modules():
        if hasattr(module, "backend"):
            setattr(module, "backend", "padded")  # noqa: B010
    torch.testing.assert_close(encoder(history, candidates), packed, rtol=0, atol=1e-12)


@given(sizes)
def test_groups_hold_every_request_once_and_waste_less_than_a_call(shapes: list[tuple[int, int]]) -> None:
    rows, keys = (np.array([shape[side] * 10 for shape in shapes]) for side in (0, 1))
    groups = attention._split(rows, keys)
    assert sorted(request for group in groups for request in group.tolist()) == list(range(len(shapes)))
    for group in groups:
        padded = len(group) * rows[group].max() * keys[group].max()
        assert padded - (rows[group] * keys[group]).sum() <= attention.PAIRS_OF_A_CALL


def test_requests_of_one_length_are_one_call_without_copies() -> None:
    plan = JaggedAttention(torch.tensor([3, 3]), torch.tensor([5, 5]))
    (group,) = plan._groups
    assert group.rows.is_dense and group.keys.is_dense
    queries = torch.randn(6, HEADS, HEAD_DIM)
    assert group.rows.pad(queries).data_ptr() == queries.data_ptr()


def varlen_by_loops(
    queries: Tensor, keys: Tensor, values: Tensor, row_ends: Tensor, key_ends: Tensor, *_: int, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """What FlashAttention-2 does for requests that all have keys or are not causal, and what it demands."""
    assert queries.dtype == keys.dtype == values.dtype == torch.bfloat16
    read = torch.zeros_like(queries)
    log_sums = torch.full((HEADS, len(queries)), torch.inf)
    for row, key, row_end, key_end in zip(row_ends, key_ends, row_ends[1:], key_ends[1:], strict=False):
        logits = torch.einsum("rhk,nhk->hrn", queries[row:row_end].float(), keys[key:key_end].float())
        logits *= queries.shape[-1] ** -0.5
        if options["window_size"] == (-1, 0):
            logits += torch.full(logits.shape[1:], -torch.inf).triu(1 + logits.shape[2] - logits.shape[1])
        if key_end > key:
            weights = torch.softmax(logits, dim=-1)
            read[row:row_end] = torch.einsum("hrn,nhk->rhk", weights, values[key:key_end].float()).bfloat16()
            log_sums[:, row:row_end] = torch.logsumexp(logits, dim=-1)
    return (read, log_sums) if options["return_aux"].lse else read


@pytest.mark.parametrize(
    "options", [{}, {"rotary": True}, {"reads_itself": True}, {"rotary": True, "reads_itself": True}], ids=str
)
@pytest.mark.parametrize("history_attention", ["full", "causal"])
def test_under_autocast_every_encoder_takes_variable_length_attention(
    options: dict[str, Any], history_attention: HistoryAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    arch = AmortizedHistoryArch(8 * HEADS, num_heads=HEADS, history_attention=history_attention, **options)
    history, candidates = (
        JaggedTensor(torch.randn(sum(lengths), 8 * HEADS), lengths=torch.tensor(lengths))
        for lengths in ([5, 0, 9, 1], [2, 3, 1, 4])
    )
    calls = []

    def varlen(*args: Any, **keywords: Any) -> Any:
        calls.append(args)
        return varlen_by_loops(*args, **keywords)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = arch(history, candidates)
        monkeypatch.setattr(attention, "_has_flash_attention", lambda device: True)
        monkeypatch.setattr(attention, "varlen_attn", varlen)
        vectors = arch(history, candidates)
    assert len(calls) == 3  # The events' first layer, and both of the candidates'.
    torch.testing.assert_close(vectors, expected, rtol=3e-2, atol=3e-2)


def test_a_key_of_ones_own_has_its_gradient_wherever_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, keys = [3, 2], [4, 0]
    tensors = [tensor.detach().bfloat16().requires_grad_() for tensor in make_tensors(rows, keys, 0, True)]
    attend(tensors, rows, keys, False, "padded").float().sin().sum().backward()
    expected = [tensor.grad for tensor in tensors]
    monkeypatch.setattr(attention, "_has_varlen_kernel", lambda tensors: True)
    for tensor in tensors:
        tensor.grad = None
    attend(tensors, rows, keys, False, "packed").float().sin().sum().backward()
    for tensor, gradient in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_key_of_ones_own_is_read_on_cuda_as_elsewhere() -> None:
    rows, keys = torch.tensor([3, 0, 7, 1], device="cuda"), torch.tensor([5, 2, 0, 90], device="cuda")
    torch.manual_seed(0)
    queries, keys_NHK, values_NHK, *own = (
        torch.randn(count, 2, 64, device="cuda", dtype=torch.bfloat16) for count in (11, 97, 97, 11, 11)
    )
    packed, padded = (
        JaggedAttention(rows, keys, backend=backend)(queries, keys_NHK, values_NHK, (own[0], own[1]))
        for backend in ("packed", "padded")
    )
    torch.testing.assert_close(packed, padded, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("causal", [True, False])
def test_variable_length_attention_on_cuda_equals_padded_attention(causal: bool) -> None:
    rows, keys = [3, 0, 7, 1], [3, 0, 7, 1] if causal else [5, 2, 0, 90]
    torch.manual_seed(0)
    shape = (2, 64)
    results = []
    for backend in ("packed", "padded"):
        torch.manual_seed(0)
        tensors = [
            torch.randn(count, *shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
            for count in (sum(rows), sum(keys), sum(keys))
        ]
        plan = JaggedAttention(
            torch.tensor(rows, device="cuda"), torch.tensor(keys, device="cuda"), is_causal=causal, backend=backend
        )
        queries, keys_NHK, values_NHK = tensors
        read = plan(queries, keys_NHK, values_NHK)
        read.float().sin().sum().backward()
        results.append([read.detach(), *(tensor.grad for tensor in tensors)])
    for packed, padded in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("many_groups")
@pytest.mark.parametrize("backend", ["packed", "padded"])
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=5), seeds)
def test_rows_that_are_the_last_of_the_keys_read_those_up_to_themselves(
    backend: Backend, shapes: list[tuple[int, int]], seed: int
) -> None:
    rows, keys = [new for new, _ in shapes], [new + past for new, past in shapes]
    tensors = make_tensors(rows, keys, seed, False)
    expected = attend_by_loops(tensors, rows, keys, True)
    read = attend(tensors, rows, keys, True, backend)
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-12)
    plan = JaggedAttention(torch.tensor(rows), torch.tensor(keys), is_causal=True, backend=backend)
    by_autograd = torch.autograd.grad(read.sum(), tensors, allow_unused=True)
    with torch.no_grad():
        by_hand = plan.gradients(torch.ones_like(read), tensors)
    for one, other in zip(by_autograd, by_hand, strict=True):
        torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other, rtol=0, atol=1e-12)
