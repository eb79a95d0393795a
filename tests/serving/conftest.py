"""Native code and its users on more than one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from torchrec_amort.bench.timing import threads


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """Native code shares its tiles out among threads, which other tests do without."""
    with threads(2):
        yield
