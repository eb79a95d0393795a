"""All predictions of a split in one file, written without holding them."""

from __future__ import annotations

import tempfile
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch.distributed as dist

from torchrec_amort.batch import RequestBatch
from torchrec_amort.files import new_file
from torchrec_amort.training.processes import gather_on_first, is_first
from torchrec_amort.training.spill import MOST_ROWS


class PredictionFile:
    """Logits, labels, users and requests of all candidates, kept on each rank's disk until rank 0 writes them.

    All ranks make one, and write it, together.

    Args:
        num_tasks: T.

    Example::

        predictions = PredictionFile(num_tasks=1)
        predictions.add(logits_CT, batch)
        predictions.write("predictions-test.npz")
        np.load("predictions-test.npz")["logits"]
    """

    def __init__(self, num_tasks: int) -> None:
        of_tasks, whose = np.dtype((np.float32, (num_tasks,))), np.dtype(np.int64)
        self._dtypes = {"logits": of_tasks, "labels": of_tasks, "users": whose, "requests": whose}
        self._files = {name: tempfile.TemporaryFile() for name in self._dtypes}  # noqa: SIM115 - until it is written
        self._num_rows = self._num_requests = 0

    def add(self, logits_CT: np.ndarray, batch: RequestBatch) -> None:
        """Take in a batch, with labels and users."""
        assert batch.labels is not None
        assert batch.users is not None
        sizes_B = batch.num_candidates.numpy()
        arrays = {
            "logits": logits_CT,
            "labels": batch.labels.cpu().numpy(),
            "users": np.repeat(batch.users.cpu().numpy(), sizes_B),
            "requests": np.repeat(np.arange(self._num_requests, self._num_requests + len(sizes_B)), sizes_B),
        }
        for name, array in arrays.items():
            self._files[name].write(np.ascontiguousarray(array, self._dtypes[name].base).data)
        self._num_rows += len(logits_CT)
        self._num_requests += len(sizes_B)

    def write(self, path: str | Path) -> None:
        """Leave the arrays in an npz file, whole or not at all; those of rank 0 come first.

        Args:
            path: the file, of which rank 0 makes one.
        """
        sizes: list[tuple[int, int]] = [(0, 0)] * dist.get_world_size()
        dist.all_gather_object(sizes, (self._num_rows, self._num_requests))
        if not is_first():
            for name in self._dtypes:
                deque(self._pieces(name, sizes), maxlen=0)
            return
        with new_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name, dtype in self._dtypes.items():
                shape = (sum(rows for rows, _ in sizes), *dtype.shape)
                header = {"descr": np.lib.format.dtype_to_descr(dtype.base), "fortran_order": False, "shape": shape}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    for piece in self._pieces(name, sizes):
                        member.write(piece.data)

    def _pieces(self, name: str, sizes: list[tuple[int, int]]) -> Iterator[np.ndarray]:
        """What all ranks have of an array, some rows at a time, on rank 0; the others give theirs and get nothing."""
        dtype, file = self._dtypes[name], self._files[name]
        requests_before = sum(requests for _, requests in sizes[: dist.get_rank()])
        file.seek(0)
        for rank, (rows, _) in enumerate(sizes):
            for start in range(0, rows, MOST_ROWS):
                mine = None
                if rank == dist.get_rank():
                    count = min(MOST_ROWS, rows - start)
                    mine = np.frombuffer(file.read(count * dtype.itemsize), dtype.base)
                    mine = mine + requests_before if name == "requests" else mine
                yield from (piece for piece in gather_on_first(mine) if piece is not None)
