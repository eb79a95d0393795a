"""What the rest of PyTorch makes of the encoders: compile, export, trace, autocast, meta device."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_map_only
from torchrec.sparse.jagged_tensor import JaggedTensor

from tests.modules.rows import AMORTIZABLE, DIM, ENCODERS, make_both, make_encoder
from torchrec_amort import AmortizedHistoryArch, HistoryState
from torchrec_amort.modules.encoder import AmortizableEncoder


@pytest.mark.parametrize("name", ENCODERS)
def test_compiles_into_one_graph_forward_and_backward(name: str) -> None:
    torch._dynamo.reset()
    encoder = make_encoder(name)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    for sizes in ([(5, 2), (0, 3), (9, 1)], [(1, 1), (30, 4)]):
        history, candidates = make_both(sizes, 0)
        results = []
        for function in (encoder, compiled):
            inputs = [rows.values().clone().requires_grad_() for rows in (history, candidates)]
            scores = function(
                JaggedTensor(inputs[0], lengths=history.lengths()),
                JaggedTensor(inputs[1], lengths=candidates.lengths()),
            )
            encoder.zero_grad()
            (scores.sin().sum() + 0 * inputs[1].sum()).backward()
            results.append([scores.detach(), *(i.grad for i in inputs), *(p.grad for p in encoder.parameters())])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["append_cross", "append_cross_causal"])
def test_compiles_with_inductor(name: str) -> None:
    torch._dynamo.reset()
    encoder = make_encoder(name).float()
    compiled = torch.compile(encoder, fullgraph=True)
    history, candidates = (
        JaggedTensor(rows.values().float(), lengths=rows.lengths()) for rows in make_both([(5, 2), (0, 3), (9, 1)], 0)
    )
    torch.testing.assert_close(compiled(history, candidates), encoder(history, candidates))


class EncodeHistory(nn.Module):
    """Phase one on plain tensors."""

    def __init__(self, encoder: AmortizableEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, events_ND: Tensor, lengths_B: Tensor) -> tuple[Any, ...]:
        state = self.encoder.encode_history(JaggedTensor(events_ND, lengths=lengths_B))
        return state.keys, state.values, state.lengths, state.summary


class ScoreCandidates(nn.Module):
    """Phase two on plain tensors."""

    def __init__(self, encoder: AmortizableEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        lengths_B: Tensor,
        summary_BD: Tensor | None,
        candidates_CD: Tensor,
        num_candidates_B: Tensor,
    ) -> Tensor:
        state = HistoryState(tuple(keys), tuple(values), lengths_B, summary_BD)
        return self.encoder.score_candidates(state, JaggedTensor(candidates_CD, lengths=num_candidates_B))


def export(module: nn.Module, *inputs: Any) -> nn.Module:
    """The exported module, the first size of every tensor dynamic."""
    shapes = tree_map_only(Tensor, lambda _: {0: Dim.AUTO}, inputs)
    exported: nn.Module = torch.export.export(module, inputs, dynamic_shapes=shapes).module()
    return exported


@pytest.mark.parametrize("name", AMORTIZABLE)
def test_both_phases_export_with_any_number_of_requests_events_and_candidates(name: str) -> None:
    encoder = make_encoder(name)
    assert isinstance(encoder, AmortizableEncoder)
    history, candidates = make_both([(5, 2), (3, 3)], 0)
    first = export(EncodeHistory(encoder), history.values(), history.lengths())
    state = first(history.values(), history.lengths())
    second = export(ScoreCandidates(encoder), *state, candidates.values(), candidates.lengths())
    for sizes in ([(5, 2), (3, 3)], [(30, 17), (0, 1), (7, 2)], [(4, 100), (1, 1)]):
        history, candidates = make_both(sizes, 1)
        state = first(history.values(), history.lengths())
        scores = second(*state, candidates.values(), candidates.lengths())
        torch.testing.assert_close(scores, encoder(history, candidates), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ENCODERS)
def test_autocast_to_bfloat16_stays_near_and_finite(name: str) -> None:
    encoder = make_encoder(name).float()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    history, candidates = (
        JaggedTensor(rows.values().float(), lengths=rows.lengths()) for rows in make_both([(5, 2), (0, 3), (9, 1)], 0)
    )
    history.values().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        scores = encoder(history, candidates)
    scores.float().sum().backward()
    expected = encoder(history, candidates)
    torch.testing.assert_close(scores.float(), expected, rtol=5e-2, atol=5e-2)
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


def test_a_seed_decides_the_initial_weights() -> None:
    def weights(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return list(AmortizedHistoryArch(DIM, recent_events=4, num_vectors=2).state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


def test_is_built_on_the_meta_device_without_memory() -> None:
    arch = AmortizedHistoryArch(
        DIM, rotary=True, num_vectors=2, has_summary=True, recent_events=4, device=torch.device("meta")
    )
    assert {parameter.device.type for parameter in arch.parameters()} == {"meta"}
    weights = AmortizedHistoryArch(DIM, rotary=True, num_vectors=2, has_summary=True, recent_events=4).state_dict()
    arch.load_state_dict(weights, assign=True)
    history, candidates = make_both([(5, 2)], 0)
    arch.double()(history, candidates)
