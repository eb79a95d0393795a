"""What a server's memory has of a user that it was told to forget."""

import re
import shutil
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import SCHEMA
from tests.launch import start
from tests.serving.server.test_server import unlabelled
from tests.serving.test_scorer import make_model
from torchrec_amort import export_package
from torchrec_amort.serving.server.client import ScoringClient

pytestmark = pytest.mark.slow

# A number that is nowhere else.
USER = 0x5A17C0DE3B9F21
# Memory is overwritten when it is freed, so that what is found is in use. docs/governance.md names them.
OVERWRITING = {
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.perturb=165",
    "PYTHONMALLOC": "malloc",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def test_memory_in_use_has_nothing_of_a_user_who_was_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    export_package(make_model(), tmp_path / "package", SCHEMA)
    shutil.copytree(tmp_path / "package", tmp_path / "treatment")
    for name, value in OVERWRITING.items():
        monkeypatch.setenv(name, value)
    command = ("torchrec-amort", "serve", "--package", str(tmp_path / "package"), "--grpc_port=0", "--http_port=0")
    server = start(*command, f"--cache_bytes={2**26}", f"--history_bytes={2**26}")
    request.addfinalizer(server.kill)
    assert server.stdout is not None
    told = next(found for line in server.stdout if (found := re.search(r"gRPC on (\S+), HTTP on (\S+)", line)))
    one = unlabelled()[0]
    with (
        ScoringClient([told[1]], schema=SCHEMA) as client,
        httpx.Client(base_url=f"http://{told[2]}", timeout=60) as http,
    ):

        def ask(user: int) -> None:
            client.score([one | {"user": user}])
            assert http.post("/v1/score", json={"requests": [one | {"user": user}]}).status_code == 200

        def forget(user: int) -> None:
            assert http.post("/v1/forget", json={"user": user}).json() == {"found": True}

        assert list(found_in(server.pid)) == []
        rollout = {"folder": str(tmp_path / "treatment"), "experiment": "treatment-1", "share": 0, "sample_rate": 1}
        for share in (0, 1):
            assert http.post("/v1/rollout", json=rollout | {"share": share}).status_code == 200
            ask(USER)
        assert http.get("/v1/rollout").json()["counters"]["treatment"] == 2
        for _ in range(10):
            ask(USER)
        assert len(list(found_in(server.pid))) > 2
        forget(USER)
        # Stacks and buffers that are used again have the latest request, whoever's it is.
        for other in range(100):
            ask(other)
            forget(other)
        assert list(found_in(server.pid)) == []
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0


def found_in(pid: int) -> Iterator[str]:
    """Where a process' memory has the user, as a number or as text."""
    with Path(f"/proc/{pid}/mem").open("rb") as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, access, *_ = line.split()
            if not access.startswith("rw"):
                continue
            begin, end = (int(part, 16) for part in place.split("-"))
            memory.seek(begin)
            held = memory.read(end - begin)
            for sought in (struct.pack("<q", USER), str(USER).encode()):
                yield from (f"{line}: {found.start():#x}" for found in re.finditer(re.escape(sought), held))
