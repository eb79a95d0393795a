"""Latency, memory and cores of every way to score a request, with the same weights."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchrec_amort.bench.benchmark_report import plot, table
from torchrec_amort.bench.benchmark_source import BenchmarkConfig, Source, sources
from torchrec_amort.bench.busy import measure_busy
from torchrec_amort.bench.cost import encoder_flops, fit
from torchrec_amort.bench.load import measure_load
from torchrec_amort.bench.methods import SLOW, Methods, amortized_arch
from torchrec_amort.bench.timing import Times, machine, peak_memory
from torchrec_amort.files import write_json
from torchrec_amort.models.dlrm import AmortizedDLRM
from torchrec_amort.models.ranker import Ranker
from torchrec_amort.progress import progress
from torchrec_amort.serving.scorer import AmortizedScorer
from torchrec_amort.stores import local_path

# Rows of the matrix whose product tells the machine's rate: a GPU is not filled by fewer.
GEMM = 8192 if torch.cuda.is_available() else 1024


def run_benchmark(config: BenchmarkConfig) -> None:
    """Measure, and leave `benchmark.json` and `benchmark.png` in the folder of the results.

    Args:
        config: what to measure.

    Raises:
        InputError: there is no such run or data.
    """
    out = local_path(config.out or config.run_folder or "runs/benchmark")
    cases = [case for source in sources(config) for case in _measure(source, config)]
    record: dict[str, Any] = {
        "run_folder": config.run_folder,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "microbatch_size": config.microbatch_size,
        "cases": cases,
        "cost": _cost(cases),
    }
    if config.load.seconds > 0:
        record["load"] = _load(config)
    if config.busy > 0:
        record["busy"] = _busy(config)
    write_json(out / "benchmark.json", record)
    plot(record, out / "benchmark.png")
    print(table(record))
    print(f"written to {out}/benchmark.json and {out}/benchmark.png")


@torch.inference_mode()
def _measure(source: Source, config: BenchmarkConfig) -> list[dict[str, Any]]:
    methods = Methods(source.model, source.schema, config.microbatch_size)
    shapes = list(itertools.product(config.batches, config.history_lengths, config.candidates))
    turns = config.warmup + config.turns
    cases = []
    with progress(total=len(shapes) * turns, desc="benchmark", unit="turns") as bar:
        for count, events, candidates in shapes:
            batches = [source.batch(count, events, candidates, config.seed + i) for i in range(min(5, config.turns))]
            too_slow = count * events * candidates > config.most_pairs
            wanted = [method for method in config.methods if not (too_slow and method in SLOW)]
            calls, reasons = zip(*(methods.calls(batch, wanted) for batch in batches), strict=True)
            left_out = reasons[0]
            shape = {"batch": count, "history_length": events, "candidates": candidates}
            times = _take(calls, config, bar)
            cases.append(_case(source, shape, times, calls[0], config) | {"left_out": left_out})
    return cases


def _take(calls: Sequence[Mapping[str, Callable[[], Any]]], config: BenchmarkConfig, bar: Any) -> Times:
    """Time all methods in turns, the slow ones in the first turns only, beside a plain matrix product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.randn(GEMM, GEMM, device=device)
    gemm = {"gemm": partial(torch.mm, matrix, matrix)}
    # Seconds where a processor has no instructions for it, so only beside what is compared with it.
    if any("bf16" in method for method in config.methods):
        half = matrix.bfloat16()
        gemm["gemm_bf16"] = partial(torch.mm, half, half)
    times = Times(config.warmup)
    for turn in range(config.warmup + config.turns):
        ready = calls[turn % len(calls)]
        # One of the turns that are not counted is enough to warm a slow method up.
        has_slow = config.warmup - 1 <= turn < config.warmup + config.slow_turns
        times.take({name: call for name, call in ready.items() if has_slow or name not in SLOW} | gemm)
        bar.update()
    return times


def _case(
    source: Source,
    shape: dict[str, int],
    times: Times,
    calls: Mapping[str, Callable[[], Any]],
    config: BenchmarkConfig,
) -> dict[str, Any]:
    rates = {name: 2 * GEMM**3 / times.median(name) / 1e9 for name in times.methods() if name.startswith("gemm")}
    reference = calls.get("impressions", calls.get("model"))
    expected = None if reference is None else torch.sigmoid(reference())
    methods = {}
    for name, call in calls.items():
        result: dict[str, Any] = {
            **{f"p{percent}_ms": 1e3 * times.percentile(name, percent) for percent in (50, 95, 99)},
            "turns": times.turns(name),
            "cores": times.cores(name),
        }
        if name not in ("encoder_causal", "encoder_extended"):
            result["candidates_per_second"] = shape["batch"] * shape["candidates"] / times.median(name)
        if config.memory:
            result["peak_bytes"] = peak_memory(call)
        if not name.startswith("encoder") and name != "concatenation" and expected is not None:
            result["max_difference"] = _difference(expected, call())
        if (flops := _flops(source.model, name, shape)) is not None:
            rate = flops * shape["batch"] / times.median(name) / 1e9
            result |= {"gflops": rate, "share_of_gemm": rate / rates["gemm_bf16" if "bf16" in name else "gemm"]}
        methods[name] = result
    model, arch = source.model, amortized_arch(source.model)
    return {
        **shape,
        "model": type(getattr(model, "model", model)).__name__,
        "embedding_dim": model.sparse_arch.D if isinstance(model, AmortizedDLRM) else None,
        "layers": 0 if arch is None else len(arch.layers),
        **{f"{name}_gflops": rate for name, rate in rates.items()},
        "methods": methods,
    }


def _difference(expected_CT: Tensor, logits_CT: Tensor) -> float:
    return float((torch.sigmoid(logits_CT) - expected_CT).abs().max())


def _flops(model: Ranker, method: str, shape: Mapping[str, int]) -> int | None:
    arch = amortized_arch(model)
    if arch is None or not method.startswith("encoder") or method == "encoder_extended":
        return None
    width = arch.layers[0].feedforward[0].out_features
    assert isinstance(width, int)
    is_causal = method == "encoder_causal"
    return encoder_flops(
        shape["history_length"],
        0 if is_causal else shape["candidates"],
        dim=arch.embedding_dim,
        width=width,
        layers=len(arch.layers),
        cached=method == "encoder_cached",
        causal=is_causal,
    )


def _cost(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cost model of each method that was measured on enough lengths of one model, one request at a time."""
    points: dict[tuple[str, str, int | None, int], list[tuple[int, int, float]]] = {}
    for case in cases:
        for method, result in case["methods"].items():
            if case["batch"] == 1 and not method.startswith("encoder"):
                key = (method, case["model"], case["embedding_dim"], case["layers"])
                points.setdefault(key, []).append((case["history_length"], case["candidates"], result["p50_ms"]))
    models = []
    for (method, model_name, dim, layers), measured in points.items():
        if len(measured) >= 6 and min(len({p[side] for p in measured}) for side in (0, 1)) > 1:
            n, m, _ = measured[len(measured) // 2]
            model = fit(measured)
            models.append(
                {
                    "method": method,
                    "model": model_name,
                    "embedding_dim": dim,
                    "layers": layers,
                    "coefficients": model.by_term,
                    "median_relative_error": model.error,
                    "at": {"history_length": n, "candidates": m, "ms": model(n, m)},
                    "times_when_n_doubles": model(2 * n, m) / model(n, m),
                    "times_when_m_doubles": model(n, 2 * m) / model(n, m),
                }
            )
    return models


def _load(config: BenchmarkConfig) -> dict[str, Any]:
    source = _first_source(config)
    batches = source.usual(config.load.requests)
    return {"settings": asdict(config.load), **measure_load(source.model, batches, config.load, config.seed)}


def _busy(config: BenchmarkConfig) -> dict[str, Any]:
    source = _first_source(config)
    scorer = AmortizedScorer(source.model)
    cases = []
    for events, candidates in itertools.product(config.history_lengths, config.candidates):
        batch = source.batch(1, events, candidates, config.seed)
        # Percentiles of a busy machine need more turns than a median does.
        measured = measure_busy(scorer, batch, config.busy, 5 * config.turns)
        cases.append({"history_length": events, "candidates": candidates, **measured})
    return {"processes": config.busy, "cases": cases}


def _first_source(config: BenchmarkConfig) -> Source:
    return sources(replace(config, embedding_dims=[], layers=[]))[0]
