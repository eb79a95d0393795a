"""What a comparison leaves behind: JSON, a table in Markdown, and a picture of quality against latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrec_amort.bench.markdown import interval, table
from torchrec_amort.data.counts import unknown_in_words
from torchrec_amort.files import new_file, write_json, write_text
from torchrec_amort.training.metrics import NAMES, SHOWN

# Metrics whose differences have room in the same rows.
MOST_IN_ROW = 4


def write_report(folder: Path, record: dict[str, Any]) -> None:
    """Write `compare.json`, `compare.md` and `compare.png`, and print the table.

    Args:
        folder: where to.
        record: what `compare` found.
    """
    write_json(folder / "compare.json", record)
    text = markdown(record)
    write_text(folder / "compare.md", text)
    _draw(folder / "compare.png", record)
    print(text)
    print(f"written to {folder}/compare.json, compare.md and compare.png")


def markdown(record: dict[str, Any]) -> str:
    """A table of quality for each task, beside the difference to the reference, and one of speed."""
    speed, scoring = record["speed"], record["speed"]["scoring"]
    seeds = len(record["seeds"])
    lines = [
        f"{record['data']}, test split; mean and standard deviation over {seeds} seeds. In brackets: difference to "
        f"{record['reference']}, and the central 95% of a paired bootstrap over users. Training: candidates per "
        f"second, the median over steps, request by request, and the same updates with all requests padded to the "
        f"longest, and impression by impression. Scoring: median ms of one request with {scoring['candidates']} "
        f"candidates and {scoring['history_length']} events, and impression by impression. {speed['threads']} threads, "
        f"torch {speed['torch']}.",
    ]
    if "unknown_ids" in record:  # Earlier versions did not count them.
        lines.append(f"Unknown ids of the test split: {unknown_in_words(record['unknown_ids'])}.")
    for task, differences in _by_task(record).items():
        runs = [run[task] for arm in record["arms"].values() for run in arm["test"]]
        # Earlier versions told fewer metrics, and some requests have not all.
        metrics = [metric for metric in SHOWN if all(metric in run for run in runs)]
        names = [NAMES[metric] for metric in metrics]
        quality = {
            name: [_spread([run[task][metric] for run in arm["test"]]) for metric in metrics]
            for name, arm in record["arms"].items()
        }
        versus = {name: [interval(differences.get(name, {}).get(metric)) for metric in metrics] for name in quality}
        changes = [f"{name} difference" for name in names]
        lines += ["", f"**{task}**", ""]
        if len(metrics) <= MOST_IN_ROW:
            lines += table(["encoder", *names, *changes], [(name, *quality[name], *versus[name]) for name in quality])
        else:
            lines += table(["encoder", *names], [(name, *cells) for name, cells in quality.items()])
            lines += ["", *table(["encoder", *changes], [(name, *cells) for name, cells in versus.items()])]
        if controls := record.get("differences_from_controls", {}).get(task):
            rows = [(name, *(interval(of_arm.get(metric)) for metric in metrics)) for name, of_arm in controls.items()]
            lines += ["", *table(["less its control", *names], rows)]
    ways = ("training, cand/s", "padded", "as impressions", "scoring, ms", "as impressions")
    rows = []
    for name, arm in record["arms"].items():
        training = [_number(speed["training"][name].get(way), ",.0f") for way in ("requests", "padded", "impressions")]
        milliseconds = scoring["median_ms"][name]
        latencies = [_number(milliseconds.get(way), ".2f") for way in ("requests_ms", "impressions_ms")]
        rows.append((name, *training, *latencies, "yes" if arm["is_amortizable"] else "no"))
    lines += ["", "**speed**", "", *table(["encoder", *ways, "amortizable"], rows)]
    return "\n".join(lines) + "\n"


def _by_task(record: dict[str, Any]) -> dict[str, Any]:
    differences: dict[str, Any] = record["differences"]
    return differences


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{deviation}"


def _number(value: float | None, digits: str) -> str:
    return "-" if value is None else f"{value:{digits}}"


def _draw(path: Path, record: dict[str, Any]) -> None:
    """AUC against the time to score a request, one panel for each task."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - of the extra `report`

    tasks = list(_by_task(record))
    figure = Figure(figsize=(4.5 * len(tasks) + 2.5, 4.5), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)
    scoring = record["speed"]["scoring"]
    for panel, task in zip(axes[0], tasks, strict=True):
        for name, arm in record["arms"].items():
            values = [run[task]["auc"] for run in arm["test"]]
            milliseconds = scoring["median_ms"][name]["requests_ms"]
            marker = "o" if arm["is_amortizable"] else "x"
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            panel.errorbar(milliseconds, np.mean(values), yerr=spread, fmt=marker, capsize=3, label=name)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("{x:g}")
        panel.tick_params(axis="x", which="both", labelsize=7)
        panel.set_xlabel(f"ms to score {scoring['candidates']} candidates, {scoring['history_length']} events")
        panel.set_ylabel(f"AUC of {task}, test split")
        panel.grid(alpha=0.3)
    handles, names = axes[0][0].get_legend_handles_labels()
    title = "o: history once per request\nx: once per candidate"
    figure.legend(handles, names, loc="outside right upper", fontsize=8, title=title, title_fontsize=8)
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
