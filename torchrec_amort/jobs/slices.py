"""Ways to tell the requests of a split apart, so that metrics are told of each kind of them.

Shape suffixes: B requests; C candidates; F fine buckets of a slicing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist

from torchrec_amort.batch import RequestBatch
from torchrec_amort.data.counts import TRAIN
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.errors import InputError
from torchrec_amort.schema import KINDS_OF_IDS, Feature, RequestSchema
from torchrec_amort.training.evaluation import FINE_SCORES, Slicing, in_equal_parts, score_of, sortable
from torchrec_amort.training.processes import sum_over_ranks

HISTORY_LENGTH = "history_length"
UNKNOWN_CANDIDATES = "unknown_candidates"
# Tables whose ids are told apart.
MOST_IDS = 2**16
# The most frequent ones, beside the rest.
NUM_IDS = 10
NUM_QUANTILES = 5


def slicings(
    names: list[str],
    schema: RequestSchema,
    data: str,
    history_length: int | Mapping[str, int] | None,
    batch_size: int,
) -> dict[str, Slicing]:
    """The ways to slice that are asked for. All ranks call it together.

    Args:
        names: `history_length`, `unknown_candidates`, or features of requests: ids or numbers.
        schema: what the model reads.
        data: prepared data folder, whose training split is read for `unknown_candidates`.
        history_length: events that the model reads.
        batch_size: of that reading.

    Raises:
        InputError: there is no such way.
    """
    found = {}
    for name in names:
        if name == HISTORY_LENGTH:
            found[name] = _by_history_length()
        elif name == UNKNOWN_CANDIDATES:
            found[name] = _by_unknown_candidates(schema, data, history_length, batch_size)
        else:
            found[name] = _by_feature(name, schema)
    return found


def _by_history_length() -> Slicing:
    """By the events of all histories, in powers of two."""

    def fine_of(batch: RequestBatch) -> np.ndarray:
        lists = batch.request_lists
        lengths_B = np.zeros(len(batch), dtype=np.int64)
        for keys in lists.layout.histories.values():
            lengths = [lists.num_entries(key) for key in keys]
            lengths_B += next((one.numpy() for one in lengths if one is not None), 0)
        return np.frexp(lengths_B.astype(np.float64))[1].astype(np.int64)

    def slices_of(requests_F: np.ndarray) -> list[tuple[str, np.ndarray]]:
        return [(_range(2**bits >> 1, 2**bits - 1), np.array([bits])) for bits in np.flatnonzero(requests_F).tolist()]

    return Slicing(64, fine_of, slices_of)


def _range(smallest: int, largest: int) -> str:
    return str(largest) if smallest >= largest else f"{smallest} to {largest}"


def _by_unknown_candidates(
    schema: RequestSchema, data: str, history_length: int | Mapping[str, int] | None, batch_size: int
) -> Slicing:
    """By the share of the request's candidates whose row training has not read, or is the unknown id's."""
    feature = next(iter((*schema.of("candidate", "item"), *schema.of("candidate", "id"))), None)
    if feature is None or feature.vocabulary == "managed":
        told = "candidates have none" if feature is None else f"that of {feature.name} is managed"
        raise InputError(f"slice_by: {UNKNOWN_CANDIDATES} needs an item or id of a table, and {told}: leave it out")
    known = _known_rows(feature, schema, data, history_length, batch_size)
    if feature.vocabulary != "refuse":
        known[0] = False
    # None, up to a tenth, ..., more than nine tenths, all.
    names = ["none", *(f"above {low}% to {low + 10}%" for low in range(0, 90, 10)), "above 90%, not all", "all"]

    def fine_of(batch: RequestBatch) -> np.ndarray:
        sizes_B = batch.num_candidates.numpy()
        unknown_C = ~known[_ids_of(batch, feature.name)]
        unknown_B = np.add.reduceat(unknown_C.astype(np.int64), np.cumsum(sizes_B) - sizes_B)
        return np.where(unknown_B == sizes_B, 11, -(-10 * unknown_B // sizes_B))

    def slices_of(requests_F: np.ndarray) -> list[tuple[str, np.ndarray]]:
        return [(names[fine], np.array([fine])) for fine in np.flatnonzero(requests_F)]

    return Slicing(len(names), fine_of, slices_of)


def _known_rows(
    feature: Feature,
    schema: RequestSchema,
    data: str,
    history_length: int | Mapping[str, int] | None,
    batch_size: int,
) -> np.ndarray:
    """Which rows of a feature's table the training split has, as candidates or events that the model reads."""
    of_table = [f.name for f in schema.features if f.table == feature.table and f.kind in KINDS_OF_IDS]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    known = np.zeros(feature.table_size or 0, dtype=bool)
    for batch in RequestDataset(
        data,
        TRAIN,
        batch_size=batch_size,
        rank=rank,
        world_size=ranks,
        history_length=history_length,
        schema=schema,
    ):
        for name in of_table:
            known[_ids_of(batch, name)] = True
    return sum_over_ranks(torch.from_numpy(known).int()).cpu().numpy() > 0


def _ids_of(batch: RequestBatch, name: str) -> np.ndarray:
    """All ids of a feature, in order."""
    for ids in (batch.sequences, batch.request_sparse, batch.candidate_sparse):
        if name in ids.keys():
            return ids[name].values().numpy()
    raise KeyError(name)


def _by_feature(name: str, schema: RequestSchema) -> Slicing:
    of_ids = {f.name: f for f in schema.of("request") if f.is_looked_up and f.kind != "ids"}
    column, columns = 0, {}
    for feature in schema.dense_features["request"]:
        if feature.num_inputs == 1:
            columns[feature.name] = (column, feature)
        column += feature.num_inputs
    if name in of_ids:
        return _by_id(of_ids[name], schema)
    if name in columns:
        return _by_number(*columns[name])
    raise InputError(
        f"slice_by: {name!r} is no feature of requests that the model reads as one id or number: there are "
        f"{[HISTORY_LENGTH, UNKNOWN_CANDIDATES, *of_ids, *columns]}"
    )


def _by_id(feature: Feature, schema: RequestSchema) -> Slicing:
    """The most frequent ids, and the rest."""
    table_size = feature.table_size or 0
    if table_size > MOST_IDS:
        raise InputError(
            f"slice_by: {feature.name} has {table_size} ids, and {MOST_IDS} can be told apart: give a feature of fewer"
        )

    def named(row: int) -> str:
        if row == 0 and feature.vocabulary != "refuse":
            return "unknown"
        if feature.vocabulary == "file":
            return str(schema.vocabularies[feature.table].values[row - 1].as_py())
        return f"row {row}" if feature.vocabulary == "hash" else str(row)

    def slices_of(requests_F: np.ndarray) -> list[tuple[str, np.ndarray]]:
        order = np.argsort(-requests_F, kind="stable")[: np.count_nonzero(requests_F)]
        slices = [(named(row), np.array([row])) for row in order[:NUM_IDS].tolist()]
        rest = order[NUM_IDS:]
        return [*slices, (f"the other {len(rest)}", rest)] if len(rest) else slices

    return Slicing(table_size, lambda batch: _ids_of(batch, feature.name), slices_of)


def _by_number(column: int, feature: Feature) -> Slicing:
    """Quantiles, as near as numbers are told apart by their first 16 bits."""
    is_logarithm = feature.kind != "dense"

    def edge(fine: int) -> str:
        value = score_of(fine)
        return f"{np.exp2(value) - 1 if is_logarithm else value:.4g}"

    def slices_of(requests_F: np.ndarray) -> list[tuple[str, np.ndarray]]:
        part_F = in_equal_parts(requests_F, NUM_QUANTILES)
        there = np.flatnonzero(requests_F)
        parts = [there[part_F[there] == part] for part in range(NUM_QUANTILES)]
        return [(f"{edge(fine[0])} to {edge(fine[-1])}", fine) for fine in parts if len(fine)]

    return Slicing(FINE_SCORES, lambda batch: sortable(batch.request_dense[:, column].numpy()) >> 16, slices_of)
