"""Native code and its users on more than one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from torchrec_amort.bench.timing import threads


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """Native code shares its tiles out among threads, which other tests do without."""
    with threads(2):
        yield


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of programs as torch.export traces them: compiling takes long and is tested elsewhere."""

    def save(program: torch.export.ExportedProgram, package_path: str) -> None:
        torch.export.save(program, package_path)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", save)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: torch.export.load(path).module())
