"""What a backtest leaves behind: JSON, tables in Markdown, and a picture of quality by day."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrec_amort.bench.markdown import interval, table
from torchrec_amort.files import new_file, write_json, write_text
from torchrec_amort.training.metrics import NAMES, Metric

METRICS: tuple[Metric, ...] = ("ne", "auc", "request_auc")


def write_report(folder: Path, record: dict[str, Any]) -> None:
    """Write `backtest.json`, `backtest.md` and `backtest.png`, and print the tables.

    Args:
        folder: where to.
        record: what `backtest` found.
    """
    write_json(folder / "backtest.json", record)
    text = markdown(record)
    write_text(folder / "backtest.md", text)
    _draw(folder / "backtest.png", record)
    print(text)
    print(f"written to {folder}/backtest.json, backtest.md and backtest.png")


def markdown(record: Mapping[str, Any]) -> str:
    """Quality of each arm by day and in the mean, the differences to the reference, drift, and what training took.

    Args:
        record: what `backtest` found.
    """
    arms, reference = list(record["arms"]), record["reference"]
    lines = [
        f"{record['data']}, {len(record['days'])} days. Difference: of the mean over days to {reference}, and the "
        "central 95% of a paired bootstrap over users. Drift: the log loss of stale less that of warm, nats.",
    ]
    for task in record["differences"]:
        of_arms = [record["arms"][arm]["tasks"][task] for arm in arms]
        metrics = [name for name in METRICS if all(name in values for values in of_arms)]
        has_drift = "drift" in record
        heads = [f"{NAMES[name]}, {arm}" for name in metrics for arm in arms] + ["drift"] * has_drift
        rows: list[tuple[str, ...]] = []
        for place, day in enumerate(record["days"]):
            cells = [f"{day['arms'][arm]['tasks'][task][name]:.4f}" for name in metrics for arm in arms]
            drift = [f"{record['drift'][task][place]:+.4f}"] if has_drift else []
            rows.append((day["until"], *cells, *drift))
        means = [f"{values[name]:.4f}" for name in metrics for values in of_arms]
        drift = [f"{sum(record['drift'][task]) / len(record['days']):+.4f}"] if has_drift else []
        versus = [interval(record["differences"][task].get(arm, {}).get(name)) for name in metrics for arm in arms]
        rows += [("mean", *means, *drift), ("difference", *versus, *["-"] * has_drift)]
        lines += ["", f"**{task}**", "", *table(["day until", *heads], rows)]
    trained = {arm: record["arms"][arm]["trained"] for arm in arms}
    costs = [(arm, f"{cost['candidates']:,}", f"{cost['seconds']:,.0f}") for arm, cost in trained.items()]
    lines += ["", "**training**", "", *table(["arm", "candidates", "seconds"], costs)]
    return "\n".join(lines) + "\n"


def _draw(path: Path, record: Mapping[str, Any]) -> None:
    """NE and AUC of each arm by day, a row of panels for each task."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - of the extra `report`

    tasks, drawn = list(record["differences"]), ("ne", "auc")
    figure = Figure(figsize=(9, 3.2 * len(tasks) + 0.6), layout="constrained")
    axes = figure.subplots(len(tasks), len(drawn), squeeze=False)
    days = record["days"]
    for row, task in zip(axes, tasks, strict=True):
        for panel, metric in zip(row, drawn, strict=True):
            for arm in record["arms"]:
                values = [day["arms"][arm]["tasks"][task][metric] for day in days]
                panel.plot(range(1, 1 + len(days)), values, marker="o", label=arm)
            panel.set_xlabel("day")
            panel.set_ylabel(f"{NAMES[metric]} of {task}")
            panel.grid(alpha=0.3)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8)
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
