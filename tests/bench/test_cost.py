import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort import AmortizedHistoryArch
from torchrec_amort.bench.cost import encoder_flops, fit
from torchrec_amort.bench.timing import Times, peak_memory


def rows(count: int) -> JaggedTensor:
    return JaggedTensor(torch.randn(count, 16), lengths=torch.tensor([count]))


@pytest.mark.parametrize("cached", [False, True])
def test_flops_are_those_that_torch_counts(cached: bool) -> None:
    arch = AmortizedHistoryArch(16, num_layers=3, num_heads=2, feedforward_dim=24).eval()
    history, candidates = rows(7), rows(5)
    state = arch.encode_history(history)
    # The counter sees the products of plain attention, not those of a fused kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        arch.score_candidates(state if cached else arch.encode_history(history), candidates)
    expected = encoder_flops(7, 5, dim=16, width=24, layers=3, cached=cached)
    assert counter.get_total_flops() == expected


@given(st.tuples(*(st.floats(0.001, 1) for _ in range(5))))
def test_the_cost_model_finds_the_coefficients_that_made_the_points(truth: tuple[float, ...]) -> None:
    a, b, c, d, e = truth
    shapes = [(n, m) for n in (1, 3, 8, 20) for m in (1, 5, 15)]
    model = fit([(n, m, a + b * n + c * m + d * n * m + e * n * n) for n, m in shapes])
    assert model.error < 1e-6
    assert model(11, 7) == pytest.approx(a + b * 11 + c * 7 + d * 77 + e * 121, rel=1e-4)


def test_no_work_costs_less_than_nothing() -> None:
    points = [(n, m, 10.0 + n - 0.01 * m) for n in (10, 20, 40) for m in (10, 20, 40)]
    assert min(fit(points).coefficients) >= 0
    with pytest.raises(ValueError, match="3 points cannot tell 5 coefficients"):
        fit(points[:3])


def test_peak_memory_is_what_is_held_at_once() -> None:
    size = 2**24
    peak = peak_memory(lambda: torch.ones(size // 4).sum())
    if peak is None:
        pytest.skip("no /proc/self/clear_refs on this system")
    assert size * 0.9 < peak < size * 1.5


def test_times_do_not_count_the_warmup() -> None:
    times = Times(warmup=2)
    for _ in range(5):
        times.take({"a": lambda: sum(range(1000)), "b": lambda: None})
    assert times.turns("a") == 3
    assert times.percentile("a", 50) == times.median("a") > 0
    assert times.cores("a") > 0
