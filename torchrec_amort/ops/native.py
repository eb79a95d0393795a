"""The operators of operators.cpp, `torch.ops.torchrec_amort`, where they were built."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from torchrec_amort.ops.cores import usable_cores

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, eq=False)
class EmbeddingRows:
    """Rows of embeddings, which may be left where they are until they are read.

    Args:
        table: float32 [T, D].
        ids: int64 [R], its rows in turn; None if they are the table itself.
    """

    table: Tensor
    ids: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """R. Not a `len`, of which torch.export would make a constant."""
        return self.table.shape[0] if self.ids is None else self.ids.shape[0]

    def tensor(self) -> Tensor:
        """[R, D]."""
        return self.table if self.ids is None else self.table.index_select(0, self.ids)


@cache
def load_library(folder: Path = _FOLDER) -> str | None:
    """Make the operators known to PyTorch.

    Args:
        folder: where the library is.

    Returns:
        str: the library's name, which tells the torch that it was built for; None if none was built.

    Raises:
        RuntimeError: it was built for another torch only. That is mended, and not served by PyTorch instead.

    Example::

        has_operators = load_library() is not None
    """
    name = f"_native_torch{torch.__version__.partition('+')[0]}.so"
    if (folder / name).exists():
        torch.ops.load_library(str(folder / name))
        torch.ops.torchrec_amort.limit_threads(usable_cores())
        return name
    if others := sorted(folder.glob("_native_torch*.so")):
        raise RuntimeError(
            f"{others[0]}: built for another torch than this one, {torch.__version__}: build it again: "
            "pip install --no-build-isolation -e . in a checkout, or install the package anew"
        )
    return None


def why_no_build(weight: Tensor, dtype: torch.dtype) -> str | None:
    """Why native code cannot multiply weights here, or None if it can.

    Args:
        weight: one of them.
        dtype: of the products.

    Raises:
        RuntimeError: the build is for another torch.
    """
    if weight.device.type != "cpu":
        return f"the weights are on {weight.device}"
    if weight.dtype != torch.float32:
        return f"the weights are {weight.dtype}"
    if load_library() is None or not torch.ops.torchrec_amort.multiplies(dtype):
        return (
            f"no build for this processor multiplies {dtype}: it needs x86-64, and a compiler and torch when installed"
        )
    return None
