"""Logs of any size, to see what building requests of them takes: the same logs for the same seed, day by day.

    python examples/generate_logs.py --out logs --events 1e8 --candidates 1e7 --users 2e6

Items are drawn by Zipf's law, so one of them is hot; user 0 is a bot with a hundredth of all events; and one request of
each day has thousands of candidates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import trange

FIRST_DAY = 1_700_006_400
SECONDS_PER_DAY = 86_400
ITEMS, ACTIONS, CANDIDATES, MANY_CANDIDATES = 500_000, 3, 10, 3_000
BOT_SHARE, CLICK_SHARE, EXPONENT = 0.01, 0.1, 1.2


def generate(out: Path, events: int, candidates: int, users: int, days: int, seed: int) -> None:
    """Write the files of each day: `events-00.parquet` and `shown-00.parquet`, and so on.

    Args:
        out: the folder to make.
        events: of all days.
        candidates: rows of what was shown, ten to a request.
        users: who they are of.
        days: how many.
        seed: of all that is drawn.
    """
    out.mkdir(parents=True)
    for day in trange(days, desc="days"):
        random = np.random.default_rng([seed, day])
        count = events // days
        user = random.integers(users, size=count)
        user[random.random(count) < BOT_SHARE] = 0
        actions = {"item": _items(random, count), "action": random.integers(ACTIONS, size=count).astype(np.int8)}
        _write(out / f"events-{day:02d}.parquet", day, user, random.random(count), actions)
        sizes = np.full(candidates // days // CANDIDATES, CANDIDATES)
        sizes[0] = min(MANY_CANDIDATES, len(sizes))
        user, moment = random.integers(users, size=len(sizes)), random.random(len(sizes))
        shown = {"item": _items(random, sizes.sum()), "is_clicked": random.random(sizes.sum()) < CLICK_SHARE}
        _write(out / f"shown-{day:02d}.parquet", day, np.repeat(user, sizes), np.repeat(moment, sizes), shown)


def _items(random: np.random.Generator, count: int) -> np.ndarray:
    return random.zipf(EXPONENT, count) % ITEMS


def _write(path: Path, day: int, user: np.ndarray, moment: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    """A day's rows in order of time."""
    micros = ((FIRST_DAY + (day + moment) * SECONDS_PER_DAY) * 1_000_000).astype(np.int64)
    order = np.argsort(micros, kind="stable")
    table = pa.table({"user": user, "time": pa.array(micros, pa.timestamp("us")), **columns})
    pq.write_table(table.take(pa.array(order)), path)


def main(args: Sequence[str] | None = None) -> None:
    """Run it.

    Args:
        args: the command line; the process' own if None.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--events", type=float, default=1e7)
    parser.add_argument("--candidates", type=float, default=1e6)
    parser.add_argument("--users", type=float, default=2e5)
    parser.add_argument("--days", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(args)
    generate(Path(given.out), int(given.events), int(given.candidates), int(given.users), given.days, given.seed)


if __name__ == "__main__":
    main()
