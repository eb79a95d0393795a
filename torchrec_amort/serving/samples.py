"""Samples: requests in a package, and the scores that it has to have for them wherever it is loaded.

Shape suffixes: C candidates, all requests together; T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from torchrec_amort.errors import InputError
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.scorer import AmortizedScorer
from torchrec_amort.serving.served import Served

SAMPLES_FILE = "samples.parquet"
_LOGITS = "logits"


def write_samples(
    folder: Path, schema: RequestSchema, requests: Sequence[Mapping[str, Any]], logits_CT: Tensor
) -> None:
    """Write requests and their scores into a package.

    Args:
        folder: of the package.
        schema: of the requests.
        requests: as mappings, all with the same columns.
        logits_CT: what the package scores them.
    """
    columns = pa.schema([field for field in schema.arrow_schema() if field.name in requests[0]])
    table = pa.Table.from_pylist(list(requests), columns)
    bounds = np.cumsum([len(request[schema.candidate_column]) for request in requests])[:-1]
    logits = [part.tolist() for part in np.split(logits_CT.numpy(), bounds)]
    pq.write_table(table.append_column(_LOGITS, pa.array(logits)), folder / SAMPLES_FILE)


def refuse_other_scores(served: Served, folder: Path, most: float, told: Path) -> None:
    """Refuse a package that scores its samples in another way than when it was made.

    Args:
        served: the package, loaded.
        folder: of the package's files.
        most: difference of a probability that is none.
        told: what the package is called.

    Raises:
        InputError: names the first sample that differs, and by how much.
    """
    table = pq.read_table(folder / SAMPLES_FILE)
    expected = table[_LOGITS].to_pylist()
    logits_CT = AmortizedScorer(served).score(table.drop_columns([_LOGITS]).to_pylist())
    parts = logits_CT.split([len(of_request) for of_request in expected])
    for row, (part_mT, of_request) in enumerate(zip(parts, expected, strict=True)):
        difference = (torch.sigmoid(part_mT) - torch.sigmoid(torch.tensor(of_request))).abs().max()
        if not difference <= most:
            raise InputError(
                f"{told}: sample {row}: a probability differs by {float(difference):.1e} from when the package was "
                f"made, more than {most:.0e}: do not serve it; export it again on this machine"
            )
