from pathlib import Path

import pytest

from tests.conftest import MAX_HISTORY, SCHEMA, make_requests
from torchrec_amort import AmortizedDLRM, ModelConfig, RequestBatch, build_model
from torchrec_amort.bench.methods import Methods
from torchrec_amort.errors import InputError
from torchrec_amort.serving.export import export_package


def test_a_model_that_is_on_no_cpu_is_not_exported_and_not_timed_as_a_package(tmp_path: Path) -> None:
    config = ModelConfig(embedding_dim=8, history_length=MAX_HISTORY)
    # The meta device stands for a GPU: it takes no tensor of the CPU either.
    model = build_model(SCHEMA, config, seed=0).eval().to("meta")
    assert isinstance(model, AmortizedDLRM)
    with pytest.raises(
        InputError, match=r"the model is on meta, and packages are compiled for CPUs: export model\.cpu"
    ):
        export_package(model, tmp_path / "package", SCHEMA)
    assert not any(tmp_path.iterdir())
    batch = RequestBatch.from_requests(make_requests([(3, 2)]), SCHEMA)
    calls, left_out = Methods(model, SCHEMA, 8).calls(batch, ["model", "exported"])
    assert list(calls) == ["model"]
    assert left_out == {"exported": "the model is on meta, and packages are compiled for CPUs: export model.cpu()"}
