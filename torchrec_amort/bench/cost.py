"""What the encoder's arithmetic costs, and a model of latency fitted to measured points.

Letters: n events and m candidates of a request, D model dimension, W width of the feed-forward networks, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def encoder_flops(
    n: int, m: int, *, dim: int, width: int, layers: int, cached: bool = False, causal: bool = False
) -> int:
    """Floating-point operations of matrix products that encoding one request needs, a multiply and an add being two.

    Args:
        n: events.
        m: candidates.
        dim: D.
        width: W.
        layers: L.
        cached: whether the history's keys and values are there.
        causal: whether an event reads itself and older ones only.

    Example::

        encoder_flops(256, 512, dim=128, width=256, layers=2)  # 453 million
    """
    row = 2 * dim * dim + 2 * dim * width
    candidates = layers * m * (row + 2 * n * dim)
    if cached:
        return 2 * candidates
    read = n * (n + 1) if causal else 2 * n * n
    # The last layer's events have keys and values only.
    history = layers * n * 2 * dim * dim + (layers - 1) * (n * row + read * dim)
    return 2 * (candidates + history)


TERMS = ("1", "n", "m", "nm", "nn")


@dataclass(frozen=True)
class CostModel:
    """Milliseconds of a request as a + b n + c m + d n m + e n n.

    Args:
        coefficients: a, b, c, d and e; none is below 0.
        error: median over the points of the relative difference of model and measurement.
    """

    coefficients: tuple[float, ...]
    error: float

    def __call__(self, n: float, m: float) -> float:
        """Milliseconds of a request of n events and m candidates."""
        return float((_terms(np.array([[n, m]])) @ np.array(self.coefficients))[0])

    @property
    def by_term(self) -> dict[str, float]:
        """The coefficients by what they are multiplied with: see `TERMS`."""
        return dict(zip(TERMS, self.coefficients, strict=True))

    def error_on(self, points: Sequence[tuple[int, int, float]]) -> float:
        """Median of the relative difference of model and measurement on other points than those it was fitted to."""
        return float(np.median([abs(self(n, m) / time - 1) for n, m, time in points]))


def fit(points: Sequence[tuple[int, int, float]]) -> CostModel:
    """Fit a cost model to measured points, so that relative errors are small.

    Args:
        points: events, candidates and milliseconds of each.

    Raises:
        ValueError: there are fewer points than coefficients.

    Example::

        model = fit([(64, 64, 0.9), (64, 512, 3.1), (256, 64, 1.6), (256, 512, 5.1), (1024, 64, 6.9), (1024, 512, 11)])
        model(512, 512)
    """
    terms = _terms(np.array([[n, m] for n, m, _ in points], dtype=np.float64))
    times = np.array([time for _, _, time in points])
    # Without events, there is nothing that n could cost.
    needed = int(terms.any(axis=0).sum())
    if len(points) < needed:
        raise ValueError(f"{len(points)} points cannot tell {needed} coefficients: measure more lengths")
    # Least squares, and again without the terms that came out below zero, which no work costs.
    kept = list(range(terms.shape[1]))
    while True:
        solution = np.linalg.lstsq(terms[:, kept] / times[:, None], np.ones_like(times), rcond=None)[0]
        if (solution >= 0).all():
            break
        kept.pop(int(np.argmin(solution * np.abs(terms[:, kept]).mean(0))))
    coefficients = np.zeros(terms.shape[1])
    coefficients[kept] = solution
    error = float(np.median(np.abs(terms @ coefficients / times - 1)))
    return CostModel(tuple(coefficients.tolist()), error)


def _terms(points: np.ndarray) -> np.ndarray:
    n, m = points[:, 0], points[:, 1]
    return np.stack([np.ones_like(n, dtype=np.float64), n, m, n * m, n * n], axis=1)
