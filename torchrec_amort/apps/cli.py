"""The console command: `torchrec-amort COMMAND ...`."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "build": "write raw logs as request-level Parquet: histories, labels and counts of what was known before",
    "prepare": "write a public data set as request-level Parquet",
    "migrate": "turn a log of impressions into request-level Parquet, and back",
    "train": "train a model with or without history, on any number of ranks",
    "evaluate": "AUC, GAUC and NE of a trained model on a split",
    "compare": "train and test several history encoders on one data set: quality, latency, speed",
    "backtest": "train day after day on logged requests: from the day before, anew, or never again",
    "throughput": "time reading and training, request by request and impression by impression",
    "export": "write a trained model as a package of compiled phases, quantized tables and a manifest",
    "apply": "make a package of an earlier one and what export --since wrote",
    "serve": "answer requests for scores over gRPC and HTTP, by the Open Inference Protocol",
    "benchmark": "time the same weights amortized and impression by impression",
    "load": "send requests to servers at given rates: latency, goodput, and what became of each",
    "pilot": "replay logged requests through two arms: latency, quality and cost side by side",
}


def main() -> None:
    """Hand the arguments to the module of the command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in COMMANDS:
        asked_for_help = arguments[:1] in (["-h"], ["--help"])
        lines = ["usage: torchrec-amort COMMAND [--help] ...", ""]
        lines += [f"  {name:<11} {summary}" for name, summary in COMMANDS.items()]
        if arguments and not asked_for_help:
            lines.append(f"\nerror: no command {arguments[0]!r}")
        print("\n".join(lines), file=sys.stdout if asked_for_help else sys.stderr)
        sys.exit(0 if asked_for_help else 2)
    importlib.import_module(f"torchrec_amort.apps.{arguments[0]}").main(arguments[1:])
