"""What a pilot leaves behind: one self-contained page, JSON beside it, and a summary of one screen.

All three are made of the same record, and the page and the summary of the same rows.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrec_amort.bench.cost import TERMS, CostModel
from torchrec_amort.bench.pilot_analysis import CONTROL, TREATMENT, held_back
from torchrec_amort.config import flat_fields
from torchrec_amort.data.counts import unknown_in_words
from torchrec_amort.files import write_json, write_text
from torchrec_amort.training.metrics import NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARMS = (CONTROL, TREATMENT)
COLORS = {CONTROL: "#8a8f98", TREATMENT: "#1769aa"}


@dataclass(frozen=True)
class Table:
    """A table of the page; those that answer a question are in the summary, too.

    Args:
        title: what it tells.
        note: how it was measured.
        columns: their names.
        rows: a cell for each column.
        question: the question that it answers, if any.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    question: str = ""


def write_report(folder: Path, record: dict[str, Any]) -> None:
    """Write `pilot.json`, `pilot.html` and `pilot.txt`, and print the last.

    Args:
        folder: where to.
        record: what the pilot found.
    """
    text = summary(record)
    write_json(folder / "pilot.json", record)
    write_text(folder / "pilot.txt", text)
    write_text(folder / "pilot.html", page(record))
    print(text)
    print(f"written to {folder}/pilot.html, pilot.json and pilot.txt")


def summary(record: Mapping[str, Any]) -> str:
    """The answers to the three questions, as text that fits one screen."""
    lines = [what_was_replayed(record), *(f"  {name:<10} {what_is(record, name)}" for name in ARMS)]
    for question, rows in _answers(record).items():
        lines += ["", f"{question:<36}{'control':>12}{'treatment':>12}   change [95%]"]
        lines += [f"  {row[0]:<34}{row[1]:>12}{row[2]:>12}   {'  '.join(row[3:])}" for row in rows]
    return "\n".join([*lines, "", f"{agreement(record)} {what_is_unknown(record)}".rstrip()])


def what_was_replayed(record: Mapping[str, Any]) -> str:
    """The requests, in words."""
    return (
        f"{record['data']}, {record['split']}: {record['requests']:,} requests of {record['users']:,} users, "
        f"{record['candidates']:,} candidates"
    )


def what_is_unknown(record: Mapping[str, Any]) -> str:
    """The shares of ids that training did not have, in words; none in records of versions that did not count them."""
    if "unknown_ids" not in record:
        return ""
    return f"Ids of the split that training did not have: {unknown_in_words(record['unknown_ids'])}."


def what_is(record: Mapping[str, Any], arm: str) -> str:
    """An arm, in words."""
    one = record["arms"][arm]
    return f"{one['run_folder']}: history {one['history']}, served by {one['serving']}, {one['dtype']}"


def agreement(record: Mapping[str, Any]) -> str:
    """How far the arms' scores are from each other, in words."""
    return f"The arms' probabilities of one candidate differ by at most {record['largest_difference']:.2g}."


def _answers(record: Mapping[str, Any]) -> dict[str, list[Sequence[str]]]:
    answers: dict[str, list[Sequence[str]]] = {}
    for table in tables(record):
        if table.question:
            answers.setdefault(table.question, []).extend(table.rows)
    return answers


def tables(record: Mapping[str, Any]) -> list[Table]:
    """Everything that was measured, as rows of text."""
    return [
        _quality(record),
        _latency(record),
        _hardware(record),
        _sizing(record),
        _buckets(record, "by_history_length", "events"),
        _buckets(record, "by_candidates", "candidates"),
        _shorter(record),
        _shapes(record),
        _cost_models(record),
    ]


def _quality(record: Mapping[str, Any]) -> Table:
    samples, users = record["config"]["bootstrap_samples"], record["users"]
    return Table(
        "Quality",
        "Difference is treatment less control; in brackets the central 95% of a paired bootstrap over users "
        f"({samples:,} resamples of {users:,} users). NE: log loss as a share of that of the positive rate, less is "
        "better. Calibration: predicted positives for each real one, 1 is best. NDCG is of requests with both labels.",
        ("task and metric", *ARMS, "difference", "verdict"),
        [
            (
                f"{task} {NAMES[metric]}" + (f", {values['requests']:,} requests" if "requests" in values else ""),
                *(f"{values[arm]:.4f}" for arm in ARMS),
                f"{values['difference']:+.4f} [{values['low']:+.4f}, {values['high']:+.4f}]",
                values["verdict"],
            )
            for task, metrics in record["quality"].items()
            for metric, values in metrics.items()
        ],
        "Does accuracy hold?",
    )


def _latency(record: Mapping[str, Any]) -> Table:
    return Table(
        "Latency",
        "Milliseconds of one request, one after the other, the arms in random order, from the tensors of its features "
        f"to its scores, on {record['threads']} threads. Ratio is treatment by control, with its interval as above.",
        ("milliseconds", *ARMS, "ratio"),
        [
            (f"{figure}, ms", *(f"{values[arm]:.2f}" for arm in ARMS), _ratio(values))
            for figure, values in record["latency"].items()
        ],
        "How much latency?",
    )


def _ratio(values: Mapping[str, float]) -> str:
    return f"x {values['ratio']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"


def _hardware(record: Mapping[str, Any]) -> Table:
    cost = record["cost"]
    cpu = cost["cpu_seconds"]
    rows = [("CPU seconds for 1,000 requests", *(f"{cpu[arm]:.2f}" for arm in ARMS), _ratio(cpu))]
    if cost["gpu_seconds"] is not None:
        rows.append(("GPU held, s for 1,000 requests", *(f"{cost['gpu_seconds'][arm]:.2f}" for arm in ARMS), ""))
    peaks = [cost["peak_bytes"][arm] for arm in ARMS]
    if None not in peaks:
        rows.append((f"peak memory of {cost['memory_requests']:,} requests, MB", *map(_megabytes, peaks), ""))
    rows.append(("tables and weights, MB", *(_megabytes(record["arms"][arm]["parameter_bytes"]) for arm in ARMS), ""))
    return Table(
        "Hardware",
        "CPU seconds of all threads, in the same calls as the latencies. Peak memory is what an arm took beyond its "
        "model while it read and scored the first requests one after the other.",
        ("what", *ARMS, "ratio"),
        rows,
        "How much hardware?",
    )


def _megabytes(size: float) -> str:
    return f"{size / 2**20:.1f}"


def _sizing(record: Mapping[str, Any]) -> Table:
    sizing = record["sizing"]
    return Table(
        "Sizing",
        f"Cores that a rate of requests takes if each is busy {sizing['utilization']:.0%} of the time and scores one "
        "request at a time, by the fitted cost model. The model is fitted to every other of the shapes below; on the "
        f"others, held back, it is off by {_errors(record)} in the median.",
        ("cores", *ARMS, "for"),
        [
            (
                f"cores, {row['requests_per_second']:,.0f}/s, {row['shape']}",
                *(f"{row['cores'][arm]:.2f}" for arm in ARMS),
                f"n {row['history_length']:.0f}, m {row['candidates']:.0f}: "
                + " and ".join(f"{row['ms'][arm]:.2f}" for arm in ARMS)
                + " ms on one core",
            )
            for row in sizing["rows"]
        ],
        "How much hardware?",
    )


def _errors(record: Mapping[str, Any]) -> str:
    models = record["sizing"]["models"]
    return " and ".join(f"{models[arm]['error_on_held_back']:.0%} ({arm})" for arm in ARMS)


def _buckets(record: Mapping[str, Any], key: str, size: str) -> Table:
    task = next(iter(record["quality"]))
    return Table(
        f"Sensitivity to {'history length' if size == 'events' else 'candidates'}",
        f"The replayed requests by their number of {size}. AUC and NE are of {task}; a dash where labels do not tell.",
        (size, "requests", *_both("p50 ms"), *_both("CPU ms"), *_both("AUC"), *_both("NE")),
        [
            (
                _range(bucket["smallest"], bucket["largest"]),
                f"{bucket['requests']:,}",
                *(f"{bucket['arms'][arm]['p50_ms']:.2f}" for arm in ARMS),
                *(f"{bucket['arms'][arm]['cpu_ms']:.2f}" for arm in ARMS),
                *(_metric(bucket["arms"][arm]["tasks"][task][metric]) for metric in ("auc", "ne") for arm in ARMS),
            )
            for bucket in record[key]
        ],
    )


def _range(smallest: int, largest: int) -> str:
    return str(smallest) if smallest == largest else f"{smallest} to {largest}"


def _both(what: str) -> tuple[str, ...]:
    return tuple(f"{what}, {arm}" for arm in ARMS)


def _metric(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _shorter(record: Mapping[str, Any]) -> Table:
    metrics = ("auc", "gauc", "ne")
    return Table(
        "Quality with shorter histories",
        "All requests, their histories cut to the latest events: what a shorter one would cost, without training anew.",
        ("task", "events", *(column for metric in metrics for column in _both(NAMES[metric]))),
        [
            (
                task,
                str(point["history_length"]),
                *(_metric(point["arms"][arm][task][metric]) for metric in metrics for arm in ARMS),
            )
            for task in record["quality"]
            for point in record["shorter_histories"]
        ],
    )


def _shapes(record: Mapping[str, Any]) -> Table:
    points = record["shapes"]
    backs = held_back([(point["history_length"], point["candidates"]) for point in points])
    return Table(
        "Requests of given shapes",
        f"Median milliseconds of {record['config']['turns']} requests with as many candidates, and events of each "
        f"history, on {record['threads']} threads and on one.",
        ("events", "candidates", *_both("ms"), *_both("one thread, ms"), "cost model"),
        [
            (
                str(point["history_length"]),
                str(point["candidates"]),
                *(f"{point[key][arm]:.2f}" for key in ("ms", "one_thread_ms") for arm in ARMS),
                "held back" if back else "fitted",
            )
            for point, back in zip(points, backs, strict=True)
        ],
    )


def _cost_models(record: Mapping[str, Any]) -> Table:
    models = record["sizing"]["models"]
    return Table(
        "Cost model",
        "Milliseconds on one thread as a + b n + c m + d n m + e n n, for n events of each history (their mean) and m "
        "candidates; none is negative.",
        ("arm", "a", "b", "c", "d", "e", "error, fitted", "error, held back"),
        [
            (
                arm,
                *(f"{models[arm]['coefficients'][name]:.3g}" for name in TERMS),
                f"{models[arm]['error_on_fitted']:.1%}",
                f"{models[arm]['error_on_held_back']:.1%}",
            )
            for arm in ARMS
        ],
    )


def page(record: Mapping[str, Any]) -> str:
    """The report as one HTML page that needs no other file."""
    import jinja2  # noqa: PLC0415 - of the extra `report`

    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("torchrec_amort.bench").joinpath("pilot.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        replayed=what_was_replayed(record),
        arms={arm: what_is(record, arm) for arm in ARMS},
        colors=COLORS,
        agreement=agreement(record),
        unknown=what_is_unknown(record),
        tables=tables(record),
        pictures=_pictures(record),
        finished=record["finished"],
        machine=record["machine"],
        versions={name: version for name, version in record["versions"].items() if version},
        git_commit=record["git_commit"],
        config={name: str(value) for name, value in flat_fields(record["config"]).items()},
    )


def _pictures(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """For the table that each stands beside, what it shows and the picture as a data URI."""
    drawn: dict[str, tuple[str, Callable[[Mapping[str, Any]], Figure]]] = {
        "Quality": ("Differences of quality with their intervals", _draw_quality),
        "Latency": ("Latency of both arms", _draw_latency),
        "Hardware": ("CPU time and memory of both arms", _draw_hardware),
        "Quality with shorter histories": ("AUC over the length of histories", _draw_shorter),
        "Requests of given shapes": ("Measured times and the cost model, on one thread", _draw_shapes),
    }
    return {title: {"shows": shows, "uri": _uri(draw(record))} for title, (shows, draw) in drawn.items()}


def _uri(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def _figure(panels: int, *, sharey: bool = False) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure  # noqa: PLC0415 - of the extra `report`

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharey="row" if sharey else "none")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def _draw_quality(record: Mapping[str, Any]) -> Figure:
    figure, axes = _figure(len(record["quality"]))
    for axis, (task, metrics) in zip(axes, record["quality"].items(), strict=True):
        names = list(metrics)[::-1]
        for place, name in enumerate(names):
            values = metrics[name]
            axis.plot([values["low"], values["high"]], [place, place], color=COLORS[TREATMENT], linewidth=3)
            axis.plot(values["difference"], place, "o", color=COLORS[TREATMENT])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), [NAMES[name] for name in names])
        axis.set(title=task, xlabel="treatment less control", ylim=(-0.6, len(names) - 0.4))
    return figure


def _draw_latency(record: Mapping[str, Any]) -> Figure:
    figure, (axis,) = _figure(1)
    _bars(axis, {figure: [values[arm] for arm in ARMS] for figure, values in record["latency"].items()}, ".2f")
    axis.set_ylabel("milliseconds of a request")
    return figure


def _draw_hardware(record: Mapping[str, Any]) -> Figure:
    cost = record["cost"]
    peaks = [cost["peak_bytes"][arm] for arm in ARMS]
    figure, axes = _figure(1 if None in peaks else 2)
    _bars(axes[0], {"": [cost["cpu_seconds"][arm] for arm in ARMS]}, ".2f")
    axes[0].set_ylabel("CPU seconds for 1,000 requests")
    if len(axes) == 2:
        _bars(axes[1], {"": [peak / 2**20 for peak in peaks]}, ".1f")
        axes[1].set_ylabel(f"peak MB of {cost['memory_requests']:,} requests")
    return figure


def _bars(axis: Axes, groups: Mapping[str, Sequence[float]], digits: str) -> None:
    """Bars side by side for the arms, their values above them."""
    for side, arm in enumerate(ARMS):
        places = [group + (side - 0.5) * 0.4 for group in range(len(groups))]
        drawn = axis.bar(places, [values[side] for values in groups.values()], 0.38, color=COLORS[arm], label=arm)
        axis.bar_label(drawn, fmt=f"{{:{digits}}}", fontsize=8, padding=2)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.margins(y=0.15)
    axis.legend(frameon=False, fontsize=8)


def _draw_shorter(record: Mapping[str, Any]) -> Figure:
    tasks = list(record["quality"])
    figure, axes = _figure(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        for arm in ARMS:
            points = [(p["history_length"], p["arms"][arm][task]["auc"]) for p in record["shorter_histories"]]
            known = [point for point in points if point[1] is not None]
            axis.plot([n for n, _ in known], [value for _, value in known], "o-", color=COLORS[arm], label=arm)
        axis.set(title=task, xlabel="latest events kept", ylabel="AUC")
        axis.legend(frameon=False, fontsize=8)
    return figure


def _draw_shapes(record: Mapping[str, Any]) -> Figure:
    points = record["shapes"]
    lengths = sorted({point["history_length"] for point in points})
    backs = held_back([(point["history_length"], point["candidates"]) for point in points])
    figure, axes = _figure(len(lengths), sharey=True)
    for axis, length in zip(axes, lengths, strict=True):
        of_length = [(p, back) for p, back in zip(points, backs, strict=True) if p["history_length"] == length]
        candidates = [p["candidates"] for p, _ in of_length]
        for arm in ARMS:
            saved = record["sizing"]["models"][arm]
            model = CostModel(tuple(saved["coefficients"][term] for term in TERMS), saved["error_on_fitted"])
            fitted = [model(length, m) for m in candidates]
            axis.plot(candidates, fitted, "-", color=COLORS[arm], linewidth=1, label=f"{arm}, fitted")
            for p, back in of_length:
                face = "white" if back else COLORS[arm]
                axis.plot(p["candidates"], p["one_thread_ms"][arm], "o", color=COLORS[arm], markerfacecolor=face)
        axis.set(xscale="log", yscale="log", title=f"{length} events", xlabel="candidates")
        axis.set_xticks(candidates, [str(m) for m in candidates])
        axis.xaxis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    axes[0].set_ylabel("ms on one thread")
    axes[0].plot([], [], "o", color="black", markerfacecolor="white", label="held back")
    axes[0].legend(frameon=False, fontsize=7)
    return figure
