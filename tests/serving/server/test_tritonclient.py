import json
import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SCHEMA
from tests.serving.server.test_server import scores_of, serving, unlabelled, version
from tests.serving.server.test_tensors import as_tensors
from torchrec_amort.serving.versions import Versions

SCRIPT = Path(__file__).parent / "ask_by_tritonclient.py"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with tritonclient, which does not go with TorchX in one."""
    folder = tmp_path_factory.mktemp("tritonclient")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "tritonclient[grpc,http]"], check=True, timeout=600)
    return python


@pytest.mark.slow
def test_tritonclients_read_what_the_model_scores(python: Path, tmp_path: Path) -> None:
    requests = unlabelled()
    tensors = as_tensors(requests, SCHEMA, is_raw=False, columns=list(requests[0]))
    columns = {t.name: (t.datatype, list(t.shape), t.values.tolist()) for t in tensors}
    (tmp_path / "columns.json").write_text(json.dumps(columns))
    with serving(Versions(version("monday"))) as client:
        addresses = [f"127.0.0.1:{port}" for port in (client.server.grpc_port, client.server.http_port)]
        command = [str(python), str(SCRIPT), *addresses, str(tmp_path / "columns.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for protocol in ("grpc", "http"):
        np.testing.assert_allclose(found[protocol], scores_of(requests), atol=1e-5)
        assert found[f"{protocol} counts"] == [len(request["candidate_item"]) for request in requests]
        assert "column" in found[f"{protocol} error"]
