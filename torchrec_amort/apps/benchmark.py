"""`torchrec-amort benchmark`: the same weights and requests, amortized and impression by impression."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrec_amort.apps.command import parse, run_command
from torchrec_amort.apps.timing import timed
from torchrec_amort.apps.train import TrainConfig, load_run
from torchrec_amort.batch import RequestBatch
from torchrec_amort.data.sample import sample_requests
from torchrec_amort.files import write_json
from torchrec_amort.models.build import build_model
from torchrec_amort.models.dlrm import AmortizedDLRM, AmortizedDLRMTrain
from torchrec_amort.progress import progress
from torchrec_amort.schema import RequestSchema
from torchrec_amort.training.checkpoint import load_weights


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Time one request at a time, amortized and as impressions, by the same weights in one process.

    Args:
        run_folder: folder of a training run.
        data: prepared data folder; the one it was trained on unless given.
        split: where histories and candidates are taken from.
        requests: requests that are timed.
        candidates: candidates of each request.
        history_length: events of each history.
        threads: CPU threads; torch's choice unless given.
        warmup: requests scored before the clock starts.
        seed: of the draw of requests and candidates.
    """

    run_folder: str
    data: str | None = None
    split: str = "test"
    requests: int = 100
    candidates: int = 128
    history_length: int = 100
    threads: int | None = None
    warmup: int = 5
    seed: int = 0


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; it leaves `benchmark.json` in the run's folder.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--run_folder", "runs/first", "--candidates", "512"])
    """
    config = parse(BenchmarkConfig, "benchmark", args)
    run_command(lambda: _benchmark(config))


def _benchmark(config: BenchmarkConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    trained, data, schema = load_run(config.run_folder, config.data)
    model = _trained_model(config.run_folder, trained, schema)
    table = sample_requests(
        data,
        config.split,
        num_requests=config.requests,
        num_candidates=config.candidates,
        history_length=config.history_length,
        seed=config.seed,
    )
    batches = [
        RequestBatch.from_arrow(table.slice(row, 1), schema, config.history_length, source=f"{data}/{config.split}")
        for row in range(table.num_rows)
    ]
    record = {
        "run_folder": config.run_folder,
        "data": data,
        "split": config.split,
        "requests": config.requests,
        "candidates": config.candidates,
        "history_length": config.history_length,
        "threads": torch.get_num_threads(),
        "precision": "float32",
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        **time_both_ways(model, batches, warmup=config.warmup),
    }
    path = Path(config.run_folder) / "benchmark.json"
    write_json(path, record)
    print(
        f"{config.run_folder}: {config.requests} requests of {config.candidates} candidates and "
        f"{config.history_length} events, one at a time, {record['threads']} threads, float32"
    )
    for method, times in record["latency_ms"].items():
        print(f"  {method:<12} p50 {times['p50']:8.2f} ms   p95 {times['p95']:8.2f} ms")
    print(
        f"  amortized is {record['speedup_p50']:.1f} times faster (p50); probabilities differ by at most "
        f"{record['max_score_difference']:.1e}"
    )
    print(f"written to {path}")


def _trained_model(run_folder: str, trained: TrainConfig, schema: RequestSchema) -> AmortizedDLRM:
    model = build_model(schema, trained.model)
    load_weights(run_folder, AmortizedDLRMTrain(model))
    return model.eval()


@torch.inference_mode()
def time_both_ways(model: AmortizedDLRM, batches: Sequence[RequestBatch], *, warmup: int) -> dict[str, Any]:
    """Score each batch amortized and as impressions, in turns, and compare times and scores.

    Args:
        model: in eval mode.
        batches: of one request each.
        warmup: batches scored before the clock starts.

    Returns:
        dict: `latency_ms` of `impressions` and `amortized` (`p50`, `p95`), `speedup_p50` (ratio of the
        medians), `max_score_difference` (of probabilities), and `gemm_gflops`, the rate of a float32
        matrix product of 1024 cubed measured in turns with them.
    """
    matrix = torch.randn(1024, 1024)
    seconds: dict[str, list[float]] = {"impressions": [], "amortized": [], "gemm": []}
    differences: list[float] = []
    warmup = min(warmup, len(batches))
    with progress(total=warmup + len(batches), desc="benchmark", unit="requests") as bar:
        for turn, batch in enumerate([*batches[:warmup], *batches]):
            impressions = batch.to_impressions()
            taken = {}
            amortized_CT, taken["amortized"] = timed(partial(model, batch))
            impressions_CT, taken["impressions"] = timed(partial(model, impressions))
            _, taken["gemm"] = timed(partial(torch.mm, matrix, matrix))
            differences.append(_difference(amortized_CT, impressions_CT))
            if turn >= warmup:
                for method, value in taken.items():
                    seconds[method].append(value)
            bar.update()
    medians = {method: float(np.median(values)) for method, values in seconds.items()}
    return {
        "latency_ms": {
            method: {
                "p50": medians[method] * 1e3,
                "p95": float(np.percentile(seconds[method], 95)) * 1e3,
            }
            for method in ("impressions", "amortized")
        },
        "speedup_p50": medians["impressions"] / medians["amortized"],
        "max_score_difference": float(np.max(differences)),
        "gemm_gflops": 2 * 1024**3 / medians["gemm"] / 1e9,
    }


def _difference(logits_CT: Tensor, others_CT: Tensor) -> float:
    return float((torch.sigmoid(logits_CT) - torch.sigmoid(others_CT)).abs().max())


if __name__ == "__main__":
    main()
