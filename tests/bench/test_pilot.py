import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import SCHEMA, make_table
from torchrec_amort.apps import evaluate, pilot, train
from torchrec_amort.bench.pilot_analysis import by_size, cost_model, held_back, quality, sizing
from torchrec_amort.bench.pilot_report import summary, tables
from torchrec_amort.bench.replay import Log, Replayed
from torchrec_amort.errors import InputError

SMALL = ["--candidates=[2,3,4]", "--turns=3", "--warmup=2", "--bootstrap_samples=50", "--rates=[100]"]
CHANCE = "no difference beyond chance"


def train_run(data: Path, run: Path, *more: str) -> Path:
    size = ["--model.embedding_dim=8", "--model.history_length=8", "--loop.epochs=1"]
    train.main(["--data", str(data), "--run_folder", str(run), *size, *more])
    return run


@pytest.fixture(scope="module")
def runs(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for history in ("none", "append_cross", "concatenation"):
        train_run(data_folder, folder / history, f"--model.history={history}")
    return folder


def arguments(out: Path, control: Path, treatment: Path, *more: str) -> list[str]:
    arms = ["--control.run_folder", str(control), "--treatment.run_folder", str(treatment)]
    return [*arms, "--out", str(out), *SMALL, *more]


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "pilot.json").read_text())
    return record


@pytest.fixture(scope="module")
def piloted(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pilot")
    pilot.main(arguments(out, runs / "none", runs / "append_cross"))
    return out


def test_quality_is_what_evaluate_says(runs: Path, piloted: Path) -> None:
    record = record_of(piloted)
    for arm, run in (("control", "none"), ("treatment", "append_cross")):
        evaluate.main(["--run_folder", str(runs / run)])
        evaluated = json.loads((runs / run / "evaluate-test.json").read_text())
        for key in ("requests", "candidates", "users", "unknown_ids"):
            assert record[key] == evaluated[key]
        for task in ("liked", "bought"):
            for metric in ("ne", "auc", "gauc", "calibration"):
                found = record["quality"][task][metric][arm]
                assert found == pytest.approx(evaluated["tasks"][task][metric], abs=2e-6), (arm, task, metric)
            # With whole histories, the passes with shorter ones score the same.
            assert record["shorter_histories"][-1]["history_length"] == 8
            longest = record["shorter_histories"][-1]["arms"][arm][task]
            assert longest["ne"] == pytest.approx(record["quality"][task]["ne"][arm], abs=2e-6)


def test_without_events_only_the_arm_with_history_is_another(piloted: Path) -> None:
    shortest, longest = (record_of(piloted)["shorter_histories"][place] for place in (0, -1))
    assert shortest["history_length"] == 0
    assert shortest["arms"]["control"] == longest["arms"]["control"]
    assert shortest["arms"]["treatment"]["liked"]["ne"] != longest["arms"]["treatment"]["liked"]["ne"]


def test_the_same_arm_twice_does_not_differ_in_quality(runs: Path, tmp_path: Path) -> None:
    pilot.main(arguments(tmp_path, runs / "append_cross", runs / "append_cross", "--history_lengths=[1,2,4,8]"))
    record = record_of(tmp_path)
    assert record["largest_difference"] == 0
    for metrics in record["quality"].values():
        assert {values["verdict"] for values in metrics.values()} == {CHANCE}


@pytest.mark.parametrize(
    ("control", "treatment"),
    [
        ({"run_folder": "append_cross", "serving": "impressions"}, {"run_folder": "append_cross"}),
        ({"run_folder": "append_cross", "serving": "model"}, {"run_folder": "append_cross", "microbatch_size": 2}),
        (
            {"run_folder": "concatenation", "serving": "impressions"},
            {"run_folder": "concatenation", "serving": "model"},
        ),
    ],
)
def test_the_same_weights_served_in_two_ways_do_not_differ(
    control: dict[str, Any], treatment: dict[str, Any], runs: Path, tmp_path: Path
) -> None:
    arms = [{**arm, "run_folder": str(runs / arm["run_folder"])} for arm in (control, treatment)]
    given = ["--control", json.dumps(arms[0]), "--treatment", json.dumps(arms[1])]
    pilot.main([*given, "--out", str(tmp_path), *SMALL, "--requests=40"])
    record = record_of(tmp_path)
    assert record["requests"] == 40
    assert 0 <= record["largest_difference"] < 1e-5
    for metrics in record["quality"].values():
        assert {values["verdict"] for values in metrics.values()} == {CHANCE}


class _Page(HTMLParser):
    """The cells of a page's tables, and its pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.pictures: list[str] = []
        self.links: list[str] = []
        self._is_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._is_cell = tag == "td"
        if tag == "td":
            self.cells.append("")
        if tag == "img":
            self.pictures.append(dict(attrs)["src"] or "")
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._is_cell = self._is_cell and tag != "td"


def test_page_summary_and_record_agree(piloted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(piloted)
    page = _Page()
    page.feed((piloted / "pilot.html").read_text())
    expected = [cell for table in tables(record) for row in table.rows for cell in row]
    assert page.cells[: len(expected)] == expected
    text = (piloted / "pilot.txt").read_text()
    assert text == summary(record)
    for arm in ("control", "treatment"):
        assert f"{record['latency']['p99'][arm]:.2f}" in text
        for metrics in record["quality"].values():
            assert all(f"{values[arm]:.4f}" in text for values in metrics.values())
    assert len(text.splitlines()) <= 50
    assert max(len(line) for line in text.splitlines()[2:]) <= 200


def test_the_page_needs_no_other_file(piloted: Path) -> None:
    page = _Page()
    page.feed((piloted / "pilot.html").read_text())
    assert len(page.pictures) == 5
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)


MEASURE = """<script>
document.title = JSON.stringify({
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  pictures: [...document.images].map(i => i.complete && i.naturalWidth > 0 && i.getBoundingClientRect().height > 100),
  overlaps: [...document.querySelectorAll("section > *")].filter(e => e.previousElementSibling
    && e.previousElementSibling.getBoundingClientRect().bottom > e.getBoundingClientRect().top + 1).length,
})</script></body>"""


@pytest.mark.parametrize("width", [1100, 500])
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_the_page_looks_right_in_a_browser(piloted: Path, tmp_path: Path, width: int) -> None:
    copy, shot = tmp_path / "pilot.html", tmp_path / "pilot.png"
    copy.write_text((piloted / "pilot.html").read_text().replace("</body>", MEASURE))
    browser = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path}/b",
    ]
    browser.append(f"--window-size={width},5500")
    dom = subprocess.run(
        [*browser, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r"<title>(.*?)</title>", dom.stdout)
    assert found is not None
    layout = json.loads(found.group(1))
    assert layout == {"wide": 0, "pictures": [True] * 5, "overlaps": 0}
    subprocess.run([*browser, f"--screenshot={shot}", copy.as_uri()], capture_output=True, timeout=120, check=True)
    pixels = pyplot_image(shot)
    assert pixels.shape[1] == width
    for color in ((0x8A, 0x8F, 0x98), (0x17, 0x69, 0xAA)):
        # Both arms' bars are there to see.
        assert (np.abs(pixels - color).max(-1) <= 3).sum() > 1000
    assert 0.02 < (pixels.min(-1) < 128).mean() < 0.5


def pyplot_image(path: Path) -> np.ndarray:
    """Red, green and blue of each pixel, 0 to 255."""
    from matplotlib import pyplot

    return np.round(255 * pyplot.imread(path)[..., :3]).astype(int)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--treatment.run_folder={runs}/nothing"], "nothing/config.yaml: no such file"),
        (["--treatment.run_folder={runs}/concatenation"], "cannot be amortized: use serving: model, or impressions"),
        (["--history_lengths=[1,9]"], "history_lengths has 9, but 3 requests of at least that many events are needed"),
        (["--candidates=[2]"], "4 history_lengths and 1 candidates are 4 shapes: the cost model needs 10 or more"),
        (["--utilization=0"], "utilization is 0.0: give a share above 0"),
        (["--requests=0"], "requests is 0: give 1 or more"),
        (["--split=future"], "no such split"),
        (["--control.serving=model", "--control.dtype=bfloat16"], "dtype and microbatch_size are the scorer's"),
    ],
)
def test_what_cannot_be_piloted_is_refused_in_one_line(
    runs: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(runs=runs) for word in more]
    with pytest.raises(SystemExit) as stop:
        pilot.main(arguments(tmp_path / "out", runs / "none", runs / "append_cross", *given))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_labels_between_0_and_1_are_refused_by_name() -> None:
    table = make_table(5)
    labels = table["bought"].to_pylist()
    labels[3][-1] = 0.25
    column = table.schema.get_field_index("bought")
    table = table.set_column(column, table.field("bought"), pa.array(labels, table.field("bought").type))
    with pytest.raises(InputError, match=r"request_id 3: bought is 0.25, neither 0 nor 1, as are 1 of \d+ labels"):
        Log.of(table, SCHEMA)


def make_log(num_requests: int, seed: int) -> tuple[Log, np.ndarray]:
    """A log of one task, and logits that tell its labels a little."""
    random = np.random.default_rng(seed)
    num_candidates = random.integers(1, 9, size=num_requests)
    labels = random.integers(2, size=(num_candidates.sum(), 1)).astype(np.float32)
    users = np.unique(random.integers(40, size=num_requests), return_inverse=True)[1]
    log = Log(labels, users, num_candidates, random.integers(0, 101, size=(num_requests, 1)))
    return log, labels + random.normal(size=labels.shape)


def test_a_worse_arm_and_a_better_one_are_told_from_chance() -> None:
    log, logits = make_log(800, 0)
    noise = np.random.default_rng(1).normal(size=logits.shape)
    for control, treatment, verdict in ((logits, noise, "worse"), (noise, logits, "better")):
        (found,) = quality(log, {"control": control, "treatment": treatment}, ["task"], samples=100, seed=0).values()
        assert {found[metric]["verdict"] for metric in ("ne", "auc", "gauc", "request_auc", "ndcg")} == {verdict}
        positives = np.bincount(log.requests, log.labels[:, 0])
        assert found["ndcg"]["requests"] == ((positives > 0) & (positives < log.num_candidates)).sum() > 0
        for values in found.values():
            assert values["difference"] == pytest.approx(values["treatment"] - values["control"])
    shifted = {"control": logits, "treatment": logits + 1}
    (found,) = quality(log, shifted, ["task"], samples=100, seed=0).values()
    assert (found["auc"]["verdict"], found["calibration"]["verdict"]) == (CHANCE, "differs")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 100))
def test_every_request_is_in_one_bucket(sizes: list[int], seed: int) -> None:
    log, logits = make_log(len(sizes), seed)
    arms = dict.fromkeys(
        ("control", "treatment"), Replayed(logits, np.arange(1.0, len(sizes) + 1), np.ones(len(sizes)))
    )
    buckets = by_size(log, np.array(sizes), arms, ["task"])
    assert sum(bucket["requests"] for bucket in buckets) == len(sizes)
    assert sum(bucket["candidates"] for bucket in buckets) == len(log.labels)
    assert [bucket["smallest"] for bucket in buckets] == sorted({bucket["smallest"] for bucket in buckets})
    assert all(a["largest"] < b["smallest"] for a, b in itertools.pairwise(buckets))


def test_the_cost_model_foretells_the_points_that_it_was_not_fitted_to() -> None:
    def cost(n: int, m: int) -> float:
        return 0.5 + 0.01 * n + 0.02 * m + 0.001 * n * m

    def point(n: int, m: int, milliseconds: float) -> dict[str, Any]:
        return {"history_length": n, "candidates": m, "one_thread_ms": {"control": milliseconds}}

    shapes = list(itertools.product((12, 25, 50, 100), (8, 32, 128, 512)))
    points = [point(n, m, cost(n, m)) for n, m in shapes]
    model, error = cost_model(points, "control")
    assert error < 1e-6
    assert model(70, 300) == pytest.approx(cost(70, 300))
    # What is held back has no say in the model, and is what its error is of.
    slower = [
        point(n, m, cost(n, m) * (2 if back else 1)) for (n, m), back in zip(shapes, held_back(shapes), strict=True)
    ]
    other, error = cost_model(slower, "control")
    assert other.coefficients == pytest.approx(model.coefficients, abs=1e-9)
    assert error == pytest.approx(0.5)
    log, _ = make_log(50, 0)
    rows = sizing(log, {"control": model}, [100, 1000], utilization=0.5, longest=60)
    expected = np.mean([cost(min(n, 60), m) for n, m in zip(log.num_events, log.num_candidates, strict=True)])
    assert rows[0]["ms"]["control"] == pytest.approx(expected)
    assert [row["cores"]["control"] for row in rows[:2]] == pytest.approx([0.2 * expected, 2 * expected])
