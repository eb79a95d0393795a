"""`torchrec-amort migrate`: a log of impressions as request-level Parquet, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jsonargparse import ArgumentParser

from torchrec_amort.apps.command import run_command
from torchrec_amort.config import parser_of
from torchrec_amort.data.impressions import REPORT_FILE, to_impressions, to_requests
from torchrec_amort.errors import InputError
from torchrec_amort.schema import RequestSchema, load_vocabularies
from torchrec_amort.stores import Location, location


@dataclass(kw_only=True)
class ToRequestsConfig:
    """Write a log of impressions, one row per candidate, as request-level Parquet.

    Args:
        log: its Parquet file, folder or pattern; `--log.train`, `--log.validation` and `--log.test` if it is split,
            else it is split in order of time, 80, 10 and 10% of the rows.
        schema: JSON file of the features, with the vocabularies that it needs beside it; see docs/data.md.
        out: the data folder to make.
        request_key: columns that together tell a request, if the log has no request_id: [user, time] for example.
        drop: columns of the log to leave out.
        rounded: columns of floats that may be rounded to float32, and of times that may be cut to whole seconds.
        overwrite: replace a folder that is there.
        refuse_same_second: refuse a request with an event of its own second, instead of counting it with a warning.
    """

    log: str | dict[str, str]
    schema: str
    out: str
    request_key: list[str] | None = None
    drop: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    overwrite: bool = False
    refuse_same_second: bool = False


@dataclass(kw_only=True)
class ToImpressionsConfig:
    """Write request-level Parquet as a log of impressions, one row per candidate.

    Args:
        data: prepared data folder, on this machine or a store.
        out: the folder to make.
        overwrite: replace a folder that is there.
    """

    data: str
    out: str
    overwrite: bool = False


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["impressions", "--data", "data/movielens-1m", "--out", "data/movielens-1m-impressions"])
    """
    parser = ArgumentParser(prog="torchrec-amort migrate", description=(__doc__ or "").partition(": ")[2])
    directions = parser.add_subcommands(dest="to")
    for name, config_class in CONFIGS.items():
        summary = (config_class.__doc__ or "").splitlines()[0]
        directions.add_subcommand(name, parser_of(config_class, f"migrate {name}"), help=summary)
    given = parser.parse_args(args)
    values = {name: value for name, value in vars(given[given.to]).items() if name != "config"}
    config = CONFIGS[given.to](**values)
    run_command(lambda: _migrate(config))


CONFIGS: dict[str, type[ToRequestsConfig | ToImpressionsConfig]] = {
    "requests": ToRequestsConfig,
    "impressions": ToImpressionsConfig,
}


def _migrate(config: ToRequestsConfig | ToImpressionsConfig) -> None:
    if isinstance(config, ToImpressionsConfig):
        report = to_impressions(config.data, config.out, overwrite=config.overwrite)
    else:
        report = to_requests(
            config.log,
            _schema(location(config.schema)),
            config.out,
            request_key=config.request_key,
            drop=config.drop,
            rounded=config.rounded,
            overwrite=config.overwrite,
            refuse_same_second=config.refuse_same_second,
        )
    print(summary(report))
    print(f"written to {config.out}, with {REPORT_FILE}")


def _schema(path: Location) -> RequestSchema:
    if not path.is_file():
        raise InputError(f"{path}: no such file: give the JSON file of the features, a prepared folder's schema.json")
    return RequestSchema.from_json(path.read_text(encoding="utf-8"), str(path), load_vocabularies(path.parent))


def summary(report: Mapping[str, Any]) -> str:
    """Counts, and what impressions repeat that requests have once, as text.

    Args:
        report: of `to_requests` or `to_impressions`.

    Example::

        print(summary(to_impressions("data/movielens-1m", "data/movielens-1m-impressions")))
    """
    per_request = report["candidates_per_request"]
    lines = [
        f"{report['requests']:,} requests of {report['users']:,} users, {report['impressions']:,} impressions in "
        f"{report['seconds']:.0f} s",
        f"candidates of a request: mean {per_request['mean']:.1f}, median {per_request['median']:g}, "
        f"most {per_request['max']:,}",
        "",
        f"{'split':<12}{'requests':>12}{'impressions':>14}{'users':>10}",
    ]
    for split, count in report["splits"].items():
        lines.append(f"{split:<12}{count['requests']:>12,}{count['candidates']:>14,}{count['users']:>10,}")
    lines += ["", _HEADS, _FORMS]
    repeated = {name: sizes for name, sizes in report["columns"].items() if sizes["deduplicated"]}
    lines += [_row(name, sizes) for name, sizes in repeated.items()]
    others = [sizes for name, sizes in report["columns"].items() if name not in repeated]
    lines.append(_row("of candidates", {key: _sum(others, key) for key in ("values", "arrow_bytes", "file_bytes")}))
    values = _sum(list(report["columns"].values()), "values")
    lines.append(_row("all, files whole", {**report, "values": values}))
    if report["dropped_file_bytes"]:
        lines.append(f"columns that were dropped: {report['dropped_file_bytes'] / 1e6:,.2f} MB of the log's files")
    saved = {key: report[key]["impressions"] - report[key]["requests"] for key in ("arrow_bytes", "file_bytes")}
    lines += [
        "",
        f"saved: {saved['arrow_bytes'] / 1e6:,.2f} MB in memory, {saved['file_bytes'] / 1e6:,.2f} MB in files",
    ]
    return "\n".join(lines)


_HEADS = f"{'':<22}{'values':>25}{'MB in memory':>20}{'MB in files':>20}"
_FORMS = f"{'column':<22}{'repeated':>13}{'once':>12}" + f"{'repeated':>11}{'once':>9}" * 2


def _row(name: str, sizes: Mapping[str, Any]) -> str:
    values = sizes["values"]
    row = f"{name:<22}{values['impressions']:>13,}{values['requests']:>12,}"
    for key in ("arrow_bytes", "file_bytes"):
        row += f"{sizes[key]['impressions'] / 1e6:>11,.2f}{sizes[key]['requests'] / 1e6:>9,.2f}"
    return row


def _sum(columns: Sequence[Mapping[str, Any]], key: str) -> dict[str, int]:
    return {form: sum(sizes[key][form] for sizes in columns) for form in ("impressions", "requests")}


if __name__ == "__main__":
    main()
