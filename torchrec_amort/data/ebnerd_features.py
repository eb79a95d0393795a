"""Features of EB-NeRD's requests, candidates and events: what was known before the second of each."""

from __future__ import annotations

import numpy as np

from torchrec_amort.data.ebnerd_counters import HALF_LIVES_HOURS, VECTOR_SIZE, DecayedCounts, Embedding, Readers
from torchrec_amort.data.ebnerd_files import Articles, Split
from torchrec_amort.data.splits import ranges

DEVICES = (1, 2, 3)

OF_REQUEST = (
    "hour_sin", "hour_cos", *(f"device_{device}" for device in DEVICES),
    "num_candidates", "history_length", "clicks_of_week",
)  # fmt: skip
# Clicks with a half-life of 6 hours.
POPULARITY = "popularity"
COMPARED = (
    "clicks_1h", POPULARITY, "clicks_24h",
    *(f"{what}_{hours}h" for what in ("inviews", "click_rate") for hours in HALF_LIVES_HOURS),
    "article_age", "readers", "id_gap", "article_length",
)  # fmt: skip
OF_CANDIDATE = (
    *COMPARED, "is_new", "id_rank", "length_missing", "premium", *(f"{name}_less_mean" for name in COMPARED)
)  # fmt: skip
# What is told of an article, of an event's as of a candidate's.
ATTRIBUTES = ("premium", "article_length", "readers")


class KnownBefore:
    """Features of requests, candidates and events of one split, of what was known before each request.

    Args:
        split: its requests and events.
        articles: what is known of all articles.
        embedding: of the split's users with a history.

    Example::

        known = KnownBefore(train, articles, embedding)
        dense, vectors = known.of_candidates(0, 4096)
    """

    def __init__(self, split: Split, articles: Articles, embedding: Embedding) -> None:
        self.split, self._articles = split, articles
        events, num_articles, start = split.events, len(articles.ids), split.start
        without_history = np.zeros((len(split.user_ids) - split.num_readers, VECTOR_SIZE))
        self._readers = Readers(
            events.user,
            events.article,
            events.time,
            num_articles,
            start,
            np.concatenate([embedding.user_vectors, without_history]),
        )
        time_shown = np.repeat(split.time, np.diff(split.bounds))
        self._clicks = DecayedCounts(events.article, events.time, num_articles, start)
        self._inviews = DecayedCounts(split.candidate, time_shown, num_articles, start)
        self._first_seen = np.full(num_articles, np.iinfo(np.int64).max)
        np.minimum.at(self._first_seen, events.article, events.time)
        np.minimum.at(self._first_seen, split.candidate, time_shown)
        # Articles are in order of their ids.
        newest = np.maximum.reduceat(split.candidate, split.bounds[:-1])
        num_earlier = np.searchsorted(split.time, split.time)
        newest_earlier = np.append(-1, np.maximum.accumulate(newest))[num_earlier]
        self._newest_id = articles.ids[np.maximum(newest, newest_earlier)]
        self._num_of_history = np.append(0, np.cumsum(events.time < start))
        self._clicked = self._before(events.user, events.time, split.user)
        user_shown = np.repeat(split.user, np.diff(split.bounds))
        order = np.lexsort((split.candidate, time_shown, user_shown))
        self._views = split.candidate[order], time_shown[order]
        self._viewed = self._before(user_shown[order], time_shown[order], split.user)

    def _before(self, users: np.ndarray, times: np.ndarray, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of a user for each request start, and where those before the request stop.

        Args:
            users: of rows, in order.
            times: of them, in order for each user.
            user: of each request.
        """
        span = max(times.max(initial=0), self.split.time[-1]) + 1
        rows = users * span + times
        return np.searchsorted(rows, user * span), np.searchsorted(rows, user * span + self.split.time)

    def of_requests(self, begin: int, end: int) -> dict[str, np.ndarray]:
        """The dense features of requests, float64, as they are before they are standardized."""
        split, (first, stop) = self.split, self._clicked
        angle = 2 * np.pi * (split.time[begin:end] % 86_400) / 86_400
        num_candidates = np.diff(split.bounds[begin : end + 1])
        num_before_week = self._num_of_history[stop[begin:end]] - self._num_of_history[first[begin:end]]
        history_length = stop[begin:end] - first[begin:end]
        devices = [(split.device[begin:end] == device).astype(float) for device in DEVICES]
        values = (
            np.sin(angle), np.cos(angle), *devices, np.log(num_candidates),
            np.log1p(history_length), np.log1p(history_length - num_before_week),
        )  # fmt: skip
        return dict(zip(OF_REQUEST, values, strict=True))

    def of_candidates(self, begin: int, end: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The dense features of candidates, float64, and their vectors, float32 [C, 32]."""
        split = self.split
        bounds = split.bounds[begin : end + 1] - split.bounds[begin]
        num_candidates = np.diff(bounds)
        article = split.candidate[split.bounds[begin] : split.bounds[end]]
        time = np.repeat(split.time[begin:end], num_candidates)
        clicks, inviews = self._clicks.at(article, time), self._inviews.at(article, time)
        num_readers, vectors = self._readers.at(article, time)
        is_new = self._first_seen[article] >= time
        compared = (
            *np.log1p(clicks), *np.log1p(inviews), *np.log((clicks + 0.5) / (inviews + 5)),
            np.log1p(np.where(is_new, 0, time - self._first_seen[article])),
            np.log1p(num_readers),
            np.log1p(np.repeat(self._newest_id[begin:end], num_candidates) - self._articles.ids[article]),
            np.log1p(self._articles.length[article]),
        )  # fmt: skip
        values = (
            *compared,
            is_new.astype(float),
            _rank(article, bounds, len(self._articles.ids)),
            np.isnan(self._articles.length[article]).astype(float),
            self._articles.premium[article],
            *(_less_mean(column, bounds) for column in compared),
        )
        return dict(zip(OF_CANDIDATE, values, strict=True)), vectors

    def of_events(self, places: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The attributes of events' articles, float64, and their vectors, float32 [N, 32].

        Readers are those before the event itself; for an event before the split, those before the split.
        """
        events = self.split.events
        article = events.article[places]
        num_readers, vectors = self._readers.at(article, events.time[places])
        values = (self._articles.premium[article], np.log1p(self._articles.length[article]), np.log1p(num_readers))
        return dict(zip(ATTRIBUTES, values, strict=True)), vectors

    def histories(self, begin: int, end: int, history_length: int) -> tuple[np.ndarray, np.ndarray]:
        """The length of each request's history, and the places of its events, the latest ones, oldest first."""
        return _latest(self._clicked, begin, end, history_length)

    def views(self, begin: int, end: int, history_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How many articles were in the user's view before each request; these articles, and the seconds of it.

        The latest ones are kept, oldest first; those of one second in order of their ids.
        """
        num_views, places = _latest(self._viewed, begin, end, history_length)
        article, time = self._views
        return num_views, article[places], time[places]


def _latest(
    rows: tuple[np.ndarray, np.ndarray], begin: int, end: int, history_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """How many rows of each request are kept, and their places, of those from where to where it has them."""
    first, stop = (places[begin:end] for places in rows)
    first = np.maximum(first, stop - history_length)
    return stop - first, ranges(first, stop)[1]


def _rank(article: np.ndarray, bounds: np.ndarray, num_articles: int) -> np.ndarray:
    """The share of the other candidates of the request that have a smaller id."""
    num_candidates = np.diff(bounds)
    key = np.repeat(np.arange(len(num_candidates)), num_candidates) * num_articles + article
    num_smaller = np.searchsorted(np.sort(key), key) - np.repeat(bounds[:-1], num_candidates)
    return num_smaller / np.repeat(np.maximum(num_candidates - 1, 1), num_candidates)


def _less_mean(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Values of candidates less the mean over their request; those that are missing do not count."""
    is_known = ~np.isnan(values)
    sums, counts = (
        np.add.reduceat(column, bounds[:-1]) for column in (np.where(is_known, values, 0), is_known.astype(float))
    )
    return values - np.repeat(sums / np.maximum(counts, 1), np.diff(bounds))
