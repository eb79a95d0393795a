"""What `torchrec-amort benchmark` measured, for people: a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrec_amort.bench.busy import busy_lines
from torchrec_amort.files import new_file


def table(record: Mapping[str, Any]) -> str:
    """Latencies of all cases, and those beside busy processes and under load if there were any, as text."""
    lines = [f"{record['machine']}, torch {record['torch']}, {record['date']}"]
    for case in record["cases"]:
        lines += ["", _heading(case), f"  {'method':<18}{'p50 ms':>10}{'p95':>10}{'p99':>10}{'faster':>9}" + _COLUMNS]
        lines += [_row(name, result, case) for name, result in case["methods"].items()]
    lines += _left_out_lines(record) + _cost_lines(record)
    if "busy" in record:
        lines += busy_lines(record["busy"])
    if "load" in record:
        lines += _load_lines(record["load"])
    return "\n".join(lines)


_COLUMNS = f"{'cores':>7}{'MB':>8}{'GEMM':>7}{'differs':>10}"


def _heading(case: Mapping[str, Any]) -> str:
    requests = "one request" if case["batch"] == 1 else f"{case['batch']} requests"
    roof = f"GEMM {case['gemm_gflops']:.0f} GFLOP/s"
    if "gemm_bf16_gflops" in case:
        roof += f", bf16 {case['gemm_bf16_gflops']:.0f}"
    return f"{requests} of {case['history_length']} events and {case['candidates']} candidates, {_size(case)} ({roof})"


def _size(case: Mapping[str, Any]) -> str:
    if case["embedding_dim"] is None:
        return str(case["model"])
    return f"D {case['embedding_dim']}, {case['layers']} layers"


def _left_out_lines(record: Mapping[str, Any]) -> list[str]:
    # Records of before have none.
    reasons = [item for case in record["cases"] for item in case.get("left_out", {}).items()]
    lines = [f"  {method:<18}{reason}" for method, reason in dict.fromkeys(reasons)]
    return ["", "Left out:", *lines] if lines else []


def _row(name: str, result: Mapping[str, Any], case: Mapping[str, Any]) -> str:
    # The encoder is compared with itself in float32, a whole model with impressions.
    reference = case["methods"].get("encoder" if name.startswith("encoder") else "impressions")
    faster = f"{reference['p50_ms'] / result['p50_ms']:.1f}x" if reference else ""
    memory = "" if result.get("peak_bytes") is None else f"{result['peak_bytes'] / 2**20:.1f}"
    share = f"{result['share_of_gemm']:.0%}" if "share_of_gemm" in result else ""
    differs = f"{result['max_difference']:.0e}" if "max_difference" in result else ""
    times = "".join(f"{result[f'p{percent}_ms']:>10.2f}" for percent in (50, 95, 99))
    return f"  {name:<18}{times}{faster:>9}{result['cores']:>7.1f}{memory:>8}{share:>7}{differs:>10}"


def _cost_lines(record: Mapping[str, Any]) -> list[str]:
    if not record["cost"]:
        return []
    lines = ["", "Cost model, ms = a + b n + c m + d n m + e n n:"]
    for cost in record["cost"]:
        at = cost["at"]
        lines.append(
            f"  {cost['method']:<18}{_size(cost)}: at n {at['history_length']}, m "
            f"{at['candidates']} twice n costs {cost['times_when_n_doubles']:.2f} times as much, twice m "
            f"{cost['times_when_m_doubles']:.2f} times (median error {cost['median_relative_error']:.0%})"
        )
    return lines


def _load_lines(load: Mapping[str, Any]) -> list[str]:
    alone = f"p50 {load['alone']['p50_ms']:.1f} ms, p99 {load['alone']['p99_ms']:.1f} ms"
    clients, capacity = load["settings"]["clients"], load["capacity"]
    lines = ["", f"Load: {clients} clients, capacity {capacity:.0f} requests/s; one by one on one thread {alone}"]
    for rate in load["rates"]:
        lines.append(
            f"  at {rate['share_of_capacity']:.0%} for {rate['seconds']:.0f} s: p50 {rate.get('p50_ms', 0):.1f} ms, "
            f"p99 {rate.get('p99_ms', 0):.1f} ms; {rate['sent']} sent, {rate['answered']} answered, {rate['refused']} "
            f"refused, {rate['failed']} failed, {rate['wrong']} wrong, {rate['lost']} lost; "
            f"{rate['grown_megabytes']:.0f} MB more"
        )
    return lines


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Latency over candidates for each history length of the first model, one request at a time.

    Args:
        record: what was measured.
        path: of the picture.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - of the extra `report`

    first = record["cases"][0]
    cases = [
        case
        for case in record["cases"]
        if case["batch"] == 1 and all(case[key] == first[key] for key in ("embedding_dim", "layers"))
    ]
    lengths = sorted({case["history_length"] for case in cases})
    panels = max(1, len(lengths))
    figure = Figure(figsize=(4.2 * panels, 4), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)
    for axis, length in zip(axes[0], lengths, strict=False):
        of_length = [case for case in cases if case["history_length"] == length]
        for method in [name for name in of_length[0]["methods"] if not name.startswith("encoder")]:
            points = [(c["candidates"], c["methods"][method]["p50_ms"]) for c in of_length if method in c["methods"]]
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=method.replace("_", " "))
        axis.set(xscale="log", yscale="log", title=f"{length} events", xlabel="candidates")
    axes[0][0].set_ylabel("p50 of one request, ms")
    axes[0][-1].legend(fontsize="small")
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
