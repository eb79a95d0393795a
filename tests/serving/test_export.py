import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

from tests.conftest import SCHEMA, make_requests
from tests.launch import ROOT
from tests.serving.test_scorer import assert_same, by_impressions, make_batch, make_model, make_weighted_model
from torchrec_amort import (
    AmortizedScorer,
    Feature,
    HistoryCache,
    InputError,
    RequestBatch,
    RequestSchema,
    export_package,
    load_package,
)
from torchrec_amort.lists import Entries
from torchrec_amort.ops import native
from torchrec_amort.serving import package as package_module
from torchrec_amort.serving.lookup import Lookups
from torchrec_amort.serving.package import MANIFEST_FILE, TABLES_FILE

needs_build = pytest.mark.skipif(
    native.why_no_build(torch.empty(0), torch.float32) is not None, reason="no native build for this processor"
)
SIZES = [[(5, 4)], [(0, 1)], [(1, 1)], [(0, 3), (8, 2), (1, 1), (4, 7)]]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "films"
    export_package(make_model(), folder, SCHEMA, tables="float32")
    return folder


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("microbatch", [None, 3])
def test_a_package_scores_as_the_model(package: Path, sizes: list[tuple[int, int]], microbatch: int | None) -> None:
    scorer = AmortizedScorer(load_package(package), microbatch, HistoryCache(2**20))
    for _ in range(2):
        assert_same(scorer.score(make_batch(sizes)), by_impressions(make_model(), make_batch(sizes)))
    assert scorer.cache is not None
    assert scorer.cache.counters()["hits"] > 0
    assert_same(scorer.score(make_requests(sizes)), by_impressions(make_model(), make_batch(sizes)))


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["traced", "compiled"])
def test_with_tables_of_8_bits_it_scores_as_the_model_with_such_tables(
    is_compiled: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not is_compiled:
        request.getfixturevalue("uncompiled")
    model, folder = make_model(), tmp_path / "small"
    export_package(model, folder, SCHEMA, dtype=torch.bfloat16, tables="int8")
    served = load_package(folder)
    lookups = Lookups.of(model.collection, {module: name for name, module in model.named_modules()})
    for sizes in SIZES:
        batch = make_batch(sizes)
        scores = torch.sigmoid(AmortizedScorer(served).score(batch))
        assert_same(scores, torch.sigmoid(by_impressions(model, batch)), 2e-2)
        exact, rounded = (of.of_candidates(batch)[0]["movie_id"].tensor() for of in (lookups, served.lookups))
        # A row's 255 steps go from its least to its greatest entry.
        assert 0 < float((exact - rounded).abs().max()) <= float((exact.max() - exact.min()) / 255)
    ids = {name: Entries(torch.tensor([3, 4]), torch.tensor([2])) for name in lookups.events["history"]}
    exact, rounded = (of.of_events("history", ids)["history_item"].tensor() for of in (lookups, served.lookups))
    assert_same(rounded, exact, 0.01)
    assert (folder / TABLES_FILE).stat().st_size < 4 * 1000 * 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"interaction": "dcn", "history": "append_cross_causal", "positions": "rotary", "history_vectors": 2},
        {"history_summary": True, "positions": "none"},
        {"history": "mean_pooling"},
        {"history": "none", "interaction": "dcn"},
    ],
)
def test_every_kind_of_model_that_can_be_exported(tmp_path: Path, options: dict[str, Any]) -> None:
    model = make_model(**options)
    export_package(model, tmp_path / "package", SCHEMA, tables="float32")
    scorer = AmortizedScorer(load_package(tmp_path / "package"))
    for sizes in SIZES:
        assert_same(scorer.score(make_batch(sizes)), by_impressions(model, make_batch(sizes)))


def operators_of(package: Path) -> str | None:
    """The library that its manifest names."""
    name: str | None = json.loads((package / MANIFEST_FILE).read_text())["operators"]
    return name


@needs_build
def test_a_package_computes_what_native_code_does(package: Path) -> None:
    assert operators_of(package) == native.load_library()
    scorer, own = AmortizedScorer(load_package(package)), AmortizedScorer(make_model(), backend="native")
    for sizes in SIZES[:3]:
        assert torch.equal(scorer.score(make_batch(sizes)), own.score(make_batch(sizes)))


@needs_build
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("options", "has_operators"),
    [
        ({"history": "append_cross_causal", "history_vectors": 2}, True),
        ({"interaction": "dcn"}, True),
        ({"positions": "rotary"}, True),
        ({"history": "none"}, True),
        ({"interaction": "dcn", "positions": "rotary"}, False),
        ({"history": "mean_pooling", "dense_layers": [7, 8]}, True),
    ],
)
def test_a_package_has_operators_for_what_native_code_can_do(
    tmp_path: Path, options: dict[str, Any], has_operators: bool
) -> None:
    model = make_model(**options)
    export_package(model, tmp_path / "package", SCHEMA, tables="float32")
    assert (operators_of(tmp_path / "package") is not None) == has_operators
    scorer = AmortizedScorer(load_package(tmp_path / "package"))
    for sizes in SIZES:
        assert_same(scorer.score(make_batch(sizes)), by_impressions(model, make_batch(sizes)))


@needs_build
def test_without_its_operators_a_package_is_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for why, message in ((lambda *_: "no build", "no build"), (native.why_no_build, "built for another torch")):
        monkeypatch.setattr(package_module, "why_no_build", why)
        monkeypatch.setattr(native, "load_library", lambda: fail("built for another torch"))
        with pytest.raises(InputError, match=rf"it needs the operators of {operators_of(package)}, .* here: {message}"):
            load_package(package)


def fail(message: str) -> None:
    raise RuntimeError(message)


@pytest.mark.usefixtures("uncompiled")
def test_without_a_build_packages_need_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load_library", lambda: None)
    export_package(make_model(), tmp_path / "package", SCHEMA, tables="float32")
    assert operators_of(tmp_path / "package") is None
    scorer = AmortizedScorer(load_package(tmp_path / "package"))
    assert_same(scorer.score(make_batch([(5, 4)])), by_impressions(make_model(), make_batch([(5, 4)])))


def test_what_cannot_be_exported_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be exported: its bags are weighted"):
        export_package(make_weighted_model(), tmp_path / "package", SCHEMA)
    for options in ({"history": "target_attention"}, {"history": "append_candidate_self"}, {"recent_events": 3}):
        with pytest.raises(InputError, match="cannot be exported"):
            export_package(make_model(**options), tmp_path / "package", SCHEMA)
    assert not list(tmp_path.iterdir())


def damaged(package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "copy"))


def test_a_damaged_package_is_one_clear_error(package: Path, tmp_path: Path) -> None:
    copy = damaged(package, tmp_path)
    content = bytearray((copy / TABLES_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / TABLES_FILE).write_bytes(content)
    with pytest.raises(InputError, match=r"tables\.pt: checksum is [0-9a-f]{12}"):
        load_package(copy)
    (copy / TABLES_FILE).unlink()
    with pytest.raises(InputError, match=r"tables\.pt: no such file"):
        load_package(copy)
    with pytest.raises(InputError, match="is no package"):
        load_package(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"package_version": 99}, "package_version is 99"),
        ({"cpu": "Z80"}, "compiled for Z80"),
        ({"sha256": None}, "not the manifest of a package"),
    ],
)
def test_a_package_of_another_kind_is_one_clear_error(
    package: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    copy = damaged(package, tmp_path)
    manifest = json.loads((copy / MANIFEST_FILE).read_text()) | change
    (copy / MANIFEST_FILE).write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))
    with pytest.raises(InputError, match=message):
        load_package(copy)


def test_a_package_for_other_features_is_refused(package: Path) -> None:
    served = load_package(package)
    features = tuple(f for f in SCHEMA.features if f.name != "movie_id")
    other = RequestSchema("other", (*features, Feature("movie_id", "candidate", "id", 7, "candidate_item")))
    with pytest.raises(InputError, match="movie_id has 7 rows, but the model's table for it has 40"):
        AmortizedScorer(served, schema=other)
    scorer, batch = AmortizedScorer(served), make_batch([(3, 2)])
    batch.candidate_dense = torch.rand(2, 3)
    with pytest.raises(InputError, match="candidate_dense 3, but the model reads 1 and 1"):
        scorer.score(batch)
    without = SCHEMA.without(["genres"])
    with pytest.raises(InputError, match=r"candidate_sparse has \['movie_id'\], but the model reads 'genres'"):
        scorer.score(RequestBatch.from_requests(make_requests([(3, 2)]), without))
    with pytest.raises(ValueError, match="give none"):
        AmortizedScorer(served, dtype=torch.bfloat16)
    assert_same(scorer.score(make_batch([(3, 2)])), by_impressions(make_model(), make_batch([(3, 2)])))


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="no cmake or no C++ compiler")
@pytest.mark.skipif(
    torch.version.cuda is not None and not (Path(CUDA_HOME or "none") / "include" / "cuda_runtime.h").exists(),
    reason="torch's CUDA build, and no CUDA toolkit to link with",
)
def test_a_package_serves_from_cpp(package: Path, tmp_path: Path) -> None:
    build, prefix = tmp_path / "build", torch.utils.cmake_prefix_path
    source = ROOT / "examples" / "cpp"
    commands: list[list[str | Path]] = [
        ["cmake", "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Release"],
        ["cmake", "--build", build],
    ]
    for command in commands:
        subprocess.run(command, check=True, capture_output=True)
    model, batch, served = make_model(), make_batch([(6, 9)]), load_package(package)
    bags, items = served.lookups.of_candidates(batch)
    events = {key: batch.request_lists.entries(key) for key in served.lookups.events["history"]}
    embeddings = {
        "events_0": served.lookups.of_events("history", events),
        "request_bags": served.lookups.of_requests(batch),
        "candidate_bags": bags,
        "items": items["history"],
    }
    inputs = {name: [rows.tensor().detach() for rows in of_name.values()] for name, of_name in embeddings.items()}
    inputs |= {"request_dense": [batch.request_dense], "candidate_dense": [batch.candidate_dense]}
    torch.save(inputs, tmp_path / "inputs.pt")
    runner: list[str | Path] = [build / "score_package", package, tmp_path / "inputs.pt", tmp_path / "logits"]
    if (operators := operators_of(package)) is not None:
        without = subprocess.run(runner, check=False, capture_output=True, text=True)
        assert without.returncode == 1
        assert "torchrec_amort::encode_history" in without.stderr
        runner.append(Path(native.__file__).with_name(operators))
    result = subprocess.run(runner, check=True, capture_output=True, text=True)
    assert "9 candidates scored" in result.stdout
    logits = torch.from_numpy(np.fromfile(tmp_path / "logits", dtype=np.float32)).view(9, 2)
    assert_same(logits, by_impressions(model, batch))
    failed = subprocess.run([*runner[:2], tmp_path / "none", *runner[3:]], check=False, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "cannot be read" in failed.stderr
