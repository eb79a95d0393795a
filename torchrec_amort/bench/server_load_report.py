"""What `torchrec-amort load` measured, for people: a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrec_amort.bench.markdown import table
from torchrec_amort.bench.open_loop import ENDINGS, QUANTILES
from torchrec_amort.files import new_file, write_json, write_text

_LATENCIES = (*(f"p{percent}_ms" for percent in QUANTILES), "max_ms", "late_p99_ms")


def write_report(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `load.json`, `load.md` and `load.png`, and print the table.

    Args:
        folder: of the results.
        record: what was measured.
    """
    write_json(folder / "load.json", dict(record))
    text = markdown(record)
    write_text(folder / "load.md", text)
    plot(record, folder / "load.png")
    print(f"{text}\nwritten to {folder}")


def markdown(record: Mapping[str, Any]) -> str:
    """The results as a table, with what the servers said first where they did not answer.

    Args:
        record: what was measured.
    """
    config = record["config"]
    deadline = "no deadline" if config["timeout_ms"] is None else f"a deadline of {config['timeout_ms']} ms"
    lines = [
        "# Load",
        "",
        f"{config['data'] or config['body']} by {config['protocol']} to {', '.join(config['addresses'])}, "
        f"{config['seconds']:g} s of each rate after {config['warmup']:g} s to warm up, {deadline}. Client: "
        f"{record['machine']}, {record['finished']}.",
        "",
    ]
    checked = ["wrong"] if any("wrong" in rate for rate in record["rates"]) else []
    counts = ("sent", *ENDINGS, *checked)
    heads = ["rate", *counts, "goodput/s", *(_head(name) for name in _LATENCIES)]
    lines += table(heads, [_row(rate, counts) for rate in record["rates"]])
    lines += ["", "Latencies are of answers, from when each request was due; late is when it was sent, from then on."]
    for rate in record["rates"]:
        lines += [f"\nAt {rate['rate']:g}/s, {ending}: {detail}" for ending, detail in rate["details"].items()]
    return "\n".join(lines) + "\n"


def _head(latency: str) -> str:
    return latency.removesuffix("_ms").replace("_", " ") + " ms"


def _row(rate: Mapping[str, Any], counts: tuple[str, ...]) -> list[str]:
    latencies = [f"{rate[name]:.1f}" if name in rate else "-" for name in _LATENCIES]
    return [f"{rate['rate']:g}", *(str(rate[name]) for name in counts), f"{rate['goodput']:.1f}", *latencies]


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Quantiles of latency over the rate.

    Args:
        record: what was measured.
        path: of the picture.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - of the extra `report`

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    answered = sorted((rate for rate in record["rates"] if "max_ms" in rate), key=lambda rate: rate["rate"])
    for percent in QUANTILES:
        latencies = [rate[f"p{percent}_ms"] for rate in answered]
        axis.plot([rate["rate"] for rate in answered], latencies, marker="o", label=f"p{percent}")
    if answered:
        axis.set_yscale("log")
    axis.set(xlabel="requests a second", ylabel="latency of answers, ms")
    axis.legend(fontsize="small")
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
