import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import SCHEMA
from tests.serving.test_scorer import make_model
from torchrec_amort import InputError, export_package, load_package
from torchrec_amort.serving.package import MANIFEST_FILE, write_manifest
from torchrec_amort.serving.samples import SAMPLES_FILE


def test_a_package_that_scores_otherwise_than_when_it_was_made_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    export_package(make_model(), folder, SCHEMA)
    load_package(folder)
    table = pq.read_table(folder / SAMPLES_FILE)
    logits = table["logits"].to_pylist()
    logits[7][2][1] += 0.01
    pq.write_table(table.set_column(table.num_columns - 1, "logits", pa.array(logits)), folder / SAMPLES_FILE)
    with pytest.raises(InputError, match="samples.parquet"):
        load_package(folder)
    # As if it had been made so.
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    write_manifest(folder, manifest)
    with pytest.raises(
        InputError, match=r"sample 7: a probability differs by [0-9.]+e-03 from when the package was made"
    ):
        load_package(folder)
