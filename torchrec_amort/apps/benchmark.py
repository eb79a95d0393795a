"""`torchrec-amort benchmark`: latency, memory and cores of every way to score a request, with the same weights."""

from __future__ import annotations

from collections.abc import Sequence

from torchrec_amort.apps.command import parse, run_command
from torchrec_amort.bench.benchmark import run_benchmark
from torchrec_amort.bench.benchmark_source import BenchmarkConfig
from torchrec_amort.bench.timing import threads


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; it leaves `benchmark.json` and `benchmark.png` in the folder of the results.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--run_folder", "runs/first", "--history_lengths=[100]", "--candidates=[512]"])
    """
    config = parse(BenchmarkConfig, "benchmark", args)
    with threads(config.threads):
        run_command(lambda: run_benchmark(config), "report")


if __name__ == "__main__":
    main()
