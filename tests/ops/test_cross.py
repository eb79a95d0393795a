"""Cross nets by native code, folded here, against the whole cross net of each candidate in plain loops."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from tests.serving.test_native_encoder import DTYPES
from torchrec_amort import AmortizedHistoryArch
from torchrec_amort.bench.timing import threads
from torchrec_amort.serving.native_encoder import NativeEncoder

DIM = 8
# Of the largest logit. Rounding weights and factors to bfloat16 in the float64 loops changed up to 0.015 of it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@dataclass
class Sizes:
    """Of requests, with so many candidates each, and of a model; `over` are outputs of layers, the last ones tasks."""

    candidates: list[int]
    cross_layers: int = 2
    rank: int = 3
    over: list[int] = field(default_factory=lambda: [9, 4, 3])
    request_vectors: int = 3
    slots: int = 2
    has_dense: bool = True
    has_encoder: bool = False


def normal(*shape: int) -> Tensor:
    """Weights that keep numbers of size 1 so."""
    return torch.randn(*shape, dtype=torch.float64) / max(1, shape[-1]) ** 0.5


def even(tensor: Tensor) -> Tensor:
    """Rows and columns become even in number, by zeros."""
    return F.pad(tensor, [end for size in reversed(tensor.shape) for end in (0, size % 2)])


class Problem:
    """A random model in float64, requests and candidates."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, seed: int) -> None:
        torch.manual_seed(seed)
        self.sizes, self.dtype = sizes, dtype
        num_requests, num_candidates = len(sizes.candidates), sum(sizes.candidates)
        self.num_vectors = sizes.has_dense + sizes.slots + sizes.has_encoder
        size = (sizes.request_vectors + self.num_vectors) * DIM
        layers = range(sizes.cross_layers)
        self.down = [normal(sizes.rank, size) for _ in layers]
        self.up = [normal(size, sizes.rank) for _ in layers]
        self.up_bias = [torch.randn(size, dtype=torch.float64) for _ in layers]
        self.over = [(normal(new, old), torch.randn(new).double()) for old, new in pairwise([size, *sizes.over])]
        # The first dense layer has 3 inputs of the request, 1 of the candidate.
        self.dense = [(normal(new, old), torch.randn(new).double()) for old, new in pairwise([4, 6, DIM])]
        self.request_dense = torch.randn(num_requests, 3, dtype=torch.float64)
        self.dense_inputs = torch.randn(num_candidates, 1)
        self.request_vectors = torch.randn(num_requests, sizes.request_vectors, DIM, dtype=torch.float64)
        self.slots = [(torch.randn(11, DIM), torch.randint(11, (num_candidates,))) for _ in range(sizes.slots)]
        self.items = torch.randn(num_candidates, DIM)
        self.arch = AmortizedHistoryArch(DIM, num_heads=2).eval()
        lengths = torch.randint(20, (num_requests,))
        self.history = JaggedTensor(torch.randn(int(lengths.sum()), DIM), lengths=lengths)
        # A request's coordinates are anywhere among those of candidates.
        places = torch.randperm(size)
        self.of_request, self.of_candidate = places.tensor_split([sizes.request_vectors * DIM])

    def logits(self) -> Tensor:
        """Of one candidate after the other."""
        items = JaggedTensor(self.items.double(), lengths=torch.tensor(self.sizes.candidates))
        history = JaggedTensor(self.history.values().double(), lengths=self.history.lengths())
        vectors = copy.deepcopy(self.arch).double()(history, items)
        logits = []
        requests = [request for request, count in enumerate(self.sizes.candidates) for _ in range(count)]
        for candidate, request in enumerate(requests):
            mine = [table[ids[candidate]].double() for table, ids in self.slots]
            if self.sizes.has_dense:
                hidden = torch.cat([self.request_dense[request], self.dense_inputs[candidate].double()])
                for weight, bias in self.dense:
                    hidden = torch.relu(weight @ hidden + bias)
                mine.insert(0, hidden)
            if self.sizes.has_encoder:
                mine.append(vectors[candidate])
            first = torch.zeros(len(self.of_request) + len(self.of_candidate), dtype=torch.float64)
            first[self.of_request] = self.request_vectors[request].flatten()
            first[self.of_candidate] = torch.cat(mine)
            crossed = first
            for down, up, bias in zip(self.down, self.up, self.up_bias, strict=True):
                crossed = first * (up @ (down @ crossed) + bias) + crossed
            for place, (weight, bias) in enumerate(self.over):
                crossed = weight @ (crossed if place == 0 else torch.relu(crossed)) + bias
            logits.append(crossed)
        return torch.stack(logits) if logits else torch.empty(0, self.sizes.over[-1], dtype=torch.float64)

    def terms(self) -> list[Tensor]:
        """What requests add, folded in float64."""
        down, up = [even(weight) for weight in self.down], [even(weight) for weight in self.up]
        weight, bias = self.over[0]
        of_each: list[list[Tensor]] = []
        for vectors in self.request_vectors.flatten(1):
            scale, ups = vectors, torch.empty(len(vectors), 0, dtype=torch.float64)
            terms: list[Tensor] = []
            for place, down_or_over in enumerate([*down, even(weight)]):
                mine = down_or_over[:, self.of_request]
                terms.append(mine @ scale)
                if place > 0:
                    terms.append(mine @ (vectors.unsqueeze(1) * ups))
                if place < len(up):
                    scale = scale + vectors * self.up_bias[place][self.of_request]
                    ups = torch.cat([ups, up[place][self.of_request]], dim=1)
            terms[-2] = terms[-2] + even(bias)
            of_each.append(terms)
        dense = self.request_dense @ self.dense[0][0][:, :3].T + self.dense[0][1]
        return [term.float().contiguous() for term in [dense, *map(torch.stack, zip(*of_each, strict=True))]]

    def native(self) -> Tensor:
        """By the operators."""
        sizes, mine = self.sizes, self.of_candidate
        (first, _), (last, bias) = self.dense
        layers = [first[:, 3:], last, bias] if sizes.has_dense else []
        for down, up, bias in zip(self.down, self.up, self.up_bias, strict=True):
            layers += [down[:, mine], up[mine], bias[mine]]
        (first, _), *others = self.over
        layers += [first[:, mine], *(tensor for layer in others for tensor in layer)]
        tables, ids = [self.dense_inputs, *(table for table, _ in self.slots)], [None, *(ids for _, ids in self.slots)]
        head = (
            [even(tensor).to(self.dtype if tensor.dim() == 2 else torch.float32).contiguous() for tensor in layers],
            2 * sizes.has_dense,
            sizes.cross_layers,
            sizes.over[-1],
            self.terms(),
        )
        num_candidates = torch.tensor(sizes.candidates)
        operators = torch.ops.torchrec_amort
        if not sizes.has_encoder:
            return operators.cross_candidates(*head, tables, ids, num_candidates)
        encoder = NativeEncoder(self.arch, self.dtype)
        states = encoder.of_states([encoder.encode_history(self.history)])
        return operators.cross_history_candidates(
            *head,
            [*tables, self.items],
            [*ids, None],
            num_candidates,
            encoder.weights(),
            encoder.num_heads,
            encoder.epsilon,
            *states,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    st.builds(
        Sizes,
        # Tiles are of 8, 16 and 32 rows.
        candidates=st.lists(st.sampled_from([0, 1, 3, 8, 9, 16, 17, 40]), min_size=1, max_size=4),
        cross_layers=st.integers(1, 3),
        rank=st.integers(1, 9),
        over=st.lists(st.integers(1, 9), min_size=1, max_size=3),
        request_vectors=st.integers(0, 3),
        slots=st.integers(1, 3),
        has_dense=st.booleans(),
        has_encoder=st.booleans(),
    ),
    st.integers(0, 2**20),
)
@torch.inference_mode()
def test_it_is_the_cross_net_of_all_coordinates(dtype: torch.dtype, sizes: Sizes, seed: int) -> None:
    problem = Problem(sizes, dtype, seed)
    expected, have = problem.logits(), problem.native()
    assert have.dtype == torch.float32
    scale = max([1.0, *expected.abs().flatten().tolist()])
    torch.testing.assert_close(have.double() / scale, expected / scale, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_any_number_of_threads_and_rows_computes_the_same(dtype: torch.dtype) -> None:
    problem = Problem(Sizes([40, 3], has_encoder=True), dtype, 0)
    with threads(1):
        expected = problem.native()
    assert torch.equal(problem.native(), expected)
    # The first request's first candidates alone, in smaller tiles.
    for count in (1, 8, 16):
        problem.sizes.candidates = [count, 0]
        slots, items, inputs = problem.slots, problem.items, problem.dense_inputs
        problem.slots = [(table, ids[:count]) for table, ids in slots]
        problem.items, problem.dense_inputs = items[:count], inputs[:count]
        assert torch.equal(problem.native(), expected[:count])
        problem.slots, problem.items, problem.dense_inputs = slots, items, inputs


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_what_is_not_a_number_stays_with_its_candidate(dtype: torch.dtype) -> None:
    problem = Problem(Sizes([5, 20]), dtype, 0)
    problem.dense_inputs[7] = torch.nan
    assert problem.native().isnan().any(1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("dtype", DTYPES[:1])
@given(num_rows=st.integers(0, 3), outputs=st.integers(1, 300), size=st.integers(0, 40), columns=st.integers(1, 40))
@torch.inference_mode()
def test_a_fold_is_the_matrix_times_each_row_times_the_factors(
    dtype: torch.dtype, num_rows: int, outputs: int, size: int, columns: int
) -> None:
    torch.manual_seed(0)
    matrix, rows, factors = normal(outputs, size), torch.randn(num_rows, size), normal(size, columns)
    folded = torch.ops.torchrec_amort.fold(matrix.float(), rows, factors.float())
    expected = torch.stack([matrix @ torch.diag(row) @ factors for row in rows.double()]) if num_rows else folded
    torch.testing.assert_close(folded.double(), expected.double(), rtol=0, atol=1e-5)
