"""Evaluates predictions that no model made, as many as are asked for at least: `scored.py FOLDER CANDIDATES [--save]`.

Labels are drawn, and scores are normal around them, so that the AUC of all, and of each user, is near a known value.
Scores are rounded to float16, so that a tally of all their values gives the exact one.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.modules.losses import LossConfig, TaskLossConfig
from torchrec_amort.training.evaluation import Evaluation, Slicing
from torchrec_amort.training.predictions import PredictionFile
from torchrec_amort.training.processes import gather_on_first, process_group

TASKS = ("liked", "watched")
LOSS = LossConfig(tasks={"watched": TaskLossConfig(kind="squared")})
POSITIVE_RATE = 0.2
# Of two normal distributions that are 1 apart.
AUC = 0.7602499
CANDIDATES_OF_REQUEST = 20
# By the users' last digit, of which those from 7 on are told together.
BY_USER = Slicing(
    10,
    lambda batch: (batch.users.numpy() if batch.users is not None else np.zeros(0, dtype=np.int64)) % 10,
    lambda _: [*((str(digit), np.array([digit])) for digit in range(7)), ("others", np.arange(7, 10))],
)


def batch_of(num_candidates: np.ndarray, labels_CT: np.ndarray, users_B: np.ndarray) -> RequestBatch:
    """Requests of nothing but labels and users."""
    none = torch.empty(int(num_candidates.sum()), 0), KeyedJaggedTensor.empty()
    return RequestBatch(
        request_dense=torch.empty(len(num_candidates), 0),
        candidate_dense=none[0],
        request_sparse=none[1],
        candidate_sparse=none[1],
        sequences=none[1],
        num_candidates=torch.from_numpy(num_candidates),
        labels=torch.from_numpy(labels_CT),
        users=torch.from_numpy(users_B),
    )


def batches(candidates: int, of_batch: int) -> Iterator[tuple[np.ndarray, RequestBatch]]:
    """This rank's share of them: logits, and their requests."""
    for place in range(dist.get_rank(), -(-candidates // of_batch), dist.get_world_size()):
        random = np.random.default_rng(place)
        sizes = random.integers(1, 2 * CANDIDATES_OF_REQUEST, size=of_batch // CANDIDATES_OF_REQUEST)
        # As many as are asked for, in the last request.
        sizes = np.append(sizes[np.cumsum(sizes) < of_batch], of_batch)
        sizes[-1] -= sizes[:-1].sum()
        labels = (random.random(of_batch, dtype=np.float32) < POSITIVE_RATE).astype(np.float32)
        scores = random.standard_normal(of_batch, dtype=np.float32) + labels
        # What the score tells of the label.
        logits = np.log(POSITIVE_RATE / (1 - POSITIVE_RATE)) + scores - 0.5
        targets = random.random(of_batch, dtype=np.float32)
        logits_CT = np.stack([logits.astype(np.float16), scores], axis=1, dtype=np.float32)
        users = random.integers(max(10, candidates // 100), size=len(sizes))
        yield logits_CT, batch_of(sizes, np.stack([labels, targets], axis=1), users)


def main(folder: Path, candidates: int, save: bool) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    evaluation, predictions = Evaluation(TASKS, LOSS, {"user": BY_USER}), PredictionFile(len(TASKS))
    tally = np.zeros((2, 2**16), dtype=np.int64)
    for logits_CT, batch in batches(candidates, min(2**17, candidates // 50)):
        evaluation.add(logits_CT, batch)
        assert batch.labels is not None
        bits, labels = logits_CT[:, 0].astype(np.float16).view(np.uint16), batch.labels[:, 0].numpy()
        for label in (0, 1):
            tally[label] += np.bincount(bits[labels == label], minlength=2**16)
        if save:
            predictions.add(logits_CT, batch)
    result = evaluation.result()
    if save:
        predictions.write(folder / "predictions.npz")
    peaks = gather_on_first((before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    tallies = gather_on_first(tally)
    if peaks:
        np.save(folder / "tally.npy", sum(tallies))
        (folder / "result.json").write_text(json.dumps({**asdict(result), "peak_kb": peaks}))


if __name__ == "__main__":
    with process_group():
        main(Path(sys.argv[1]), int(sys.argv[2]), "--save" in sys.argv)
