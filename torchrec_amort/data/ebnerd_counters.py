"""Clicks, inviews and readers of each article so far, and users embedded by what they read.

Shapes: E events; A articles; U users; Q questions, each an article and a second. The answer for a second is told from
events of earlier seconds alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

HALF_LIVES_HOURS = (1, 6, 24)
VECTOR_SIZE = 32
# Readers that an article of the table and of the reader embedding has at least.
LEAST_READERS = 5
# A vector of a few readers says little: it is n / (n + 3) long.
READERS_OF_HALF_LENGTH = 3

_SECONDS_PER_HOUR = 3600
# With these, the cosines of users are numpy's of a whole SVD to 1e-5 on the demo set.
_SVD_SIZE, _SVD_ITERATIONS, _SVD_SEED = 96, 30, 0
# Vectors that cancel leave a rest of rounding, which has no direction.
_SHORTEST = 1e-6


@dataclass(frozen=True)
class Embedding:
    """Users by what they read: the 2nd to 33rd singular vectors of who read what.

    Args:
        article: int64, the articles that it is made from, in order.
        basis: float64 [articles, 32], the right singular vectors.
        user_vectors: float64 [U, 32], each of length one, or zero.
    """

    article: np.ndarray
    basis: np.ndarray
    user_vectors: np.ndarray


def embed_readers(user: np.ndarray, article: np.ndarray, num_users: int, like: Embedding | None = None) -> Embedding:
    """Embed users by what they read.

    Args:
        user: int64 [E], who read, from 0.
        article: int64 [E], what.
        num_users: U.
        like: another embedding, whose axes this one is turned onto by the articles that both have.

    Returns:
        Embedding: of articles with 5 readers or more, weighted by log(U / readers); the vectors of users have the mean
        of all taken off.

    Example::

        train = embed_readers(user, article, num_users)
        test = embed_readers(test_user, test_article, num_test_users, like=train)
    """
    user, article = np.unique(np.stack([user, article]), axis=1)
    num_readers = np.bincount(article)
    known = np.flatnonzero(num_readers >= LEAST_READERS)
    is_known = num_readers[article] >= LEAST_READERS
    user, column = user[is_known], np.searchsorted(known, article[is_known])
    weight = np.log(num_users / num_readers[known])[column]
    length = np.sqrt(np.bincount(user, weight**2, minlength=num_users))[user]
    weight = np.divide(weight, length, out=np.zeros_like(weight), where=length > 0)
    with torch.sparse.check_sparse_tensor_invariants(True):
        rows = torch.sparse_coo_tensor(
            torch.from_numpy(np.stack([user, column])), torch.from_numpy(weight), (num_users, len(known))
        ).coalesce()
    basis = _singular_vectors(rows)
    if like is not None:
        _, ours, theirs = np.intersect1d(known, like.article, assume_unique=True, return_indices=True)
        left, _, right = np.linalg.svd(basis[ours].T @ like.basis[theirs])
        basis = basis @ (left @ right)
    vectors = (rows @ torch.from_numpy(basis)).numpy()
    return Embedding(known, basis, unit(vectors - vectors.mean(axis=0)))


def _singular_vectors(rows: torch.Tensor) -> np.ndarray:
    """The right singular vectors but for the first, float64 [columns, 32]; zero where there are not so many."""
    basis = np.zeros((rows.shape[1], VECTOR_SIZE))
    if size := min(_SVD_SIZE, *rows.shape):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SVD_SEED)
            _, _, vectors = torch.svd_lowrank(rows, size, niter=_SVD_ITERATIONS)
        kept = vectors[:, 1 : 1 + VECTOR_SIZE].numpy()
        basis[:, : kept.shape[1]] = kept
    return basis


def unit(vectors: np.ndarray) -> np.ndarray:
    """The vectors at length one; zero where there is none to speak of."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > _SHORTEST)


class ArticleLog:
    """Events of articles, to tell how many an article had before a second.

    Args:
        article: int64 [E].
        time: int64 [E], seconds since 1970.
        num_articles: A.

    Example::

        log = ArticleLog(article, time, num_articles)
        first, stop = log.before(candidate, request_time)  # places in article[log.order], the latest last
    """

    def __init__(self, article: np.ndarray, time: np.ndarray, num_articles: int) -> None:
        self._span = int(time.max(initial=0)) + 2
        key = self._key(article, time)
        self.order = np.argsort(key, kind="stable")
        self._key_of_event = key[self.order]
        self.bounds = np.searchsorted(self._key_of_event, np.arange(num_articles + 1) * self._span)

    def before(self, article: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the events of each article start, and where those before each second stop."""
        return self.bounds[article], np.searchsorted(self._key_of_event, self._key(article, time))

    def accumulate(self, ufunc: np.ufunc, values: np.ndarray) -> np.ndarray:
        """Running totals of values that are in this order, anew for each article."""
        totals = np.empty_like(values)
        for first, stop in zip(self.bounds[:-1], self.bounds[1:], strict=True):
            if first < stop:
                totals[first:stop] = ufunc.accumulate(values[first:stop], axis=0)
        return totals

    def _key(self, article: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Numbers in order of article and second; all seconds after the last event are one."""
        return article * self._span + np.minimum(time, self._span - 1)


class DecayedCounts:
    """Events of articles so far, each halved every 1, 6 or 24 hours.

    Args:
        article: int64 [E].
        time: int64 [E], seconds.
        num_articles: A.
        start: the first second that is asked for. Events before it are kept as one number of each article.

    Example::

        clicks_1h, clicks_6h, clicks_24h = DecayedCounts(article, time, num_articles, start).at(candidate, request_time)
    """

    def __init__(self, article: np.ndarray, time: np.ndarray, num_articles: int, start: int) -> None:
        self._start = start
        is_early = time < start
        article_early, age_early = article[is_early], start - time[is_early]
        self._early = [
            np.bincount(article_early, np.exp2(-age_early / half_life), minlength=num_articles)
            for half_life in _half_lives()
        ]
        time = time[~is_early]
        self._log = ArticleLog(article[~is_early], time, num_articles)
        since = time[self._log.order] - start
        # In logarithms, as weights of a month in half-lives of an hour leave the range of floats.
        self._later = [self._log.accumulate(np.logaddexp2, since / half_life) for half_life in _half_lives()]

    def at(self, article: np.ndarray, time: np.ndarray) -> np.ndarray:
        """The counts of each article before each second: float64 [3, Q]."""
        first, stop = self._log.before(article, time)
        counts = np.empty((len(HALF_LIVES_HOURS), len(article)))
        has_later = stop > first
        for row, half_life, early, later in zip(counts, _half_lives(), self._early, self._later, strict=True):
            halvings = (time - self._start) / half_life
            row[:] = early[article] * np.exp2(-halvings)
            row[has_later] += np.exp2(later[stop[has_later] - 1] - halvings[has_later])
        return counts


def _half_lives() -> tuple[int, ...]:
    return tuple(hours * _SECONDS_PER_HOUR for hours in HALF_LIVES_HOURS)


class Readers:
    """Who has read each article so far; a user counts once, from the first time.

    Args:
        user: int64 [E], users from 0; their events in order of time.
        article: int64 [E].
        time: int64 [E], seconds.
        num_articles: A.
        start: the first second whose answer is of its own; that of an earlier one is that of `start`.
        user_vectors: float64 [U, 32].

    Example::

        num_readers, vectors = Readers(user, article, time, num_articles, start, user_vectors).at(candidate, time)
    """

    def __init__(
        self,
        user: np.ndarray,
        article: np.ndarray,
        time: np.ndarray,
        num_articles: int,
        start: int,
        user_vectors: np.ndarray,
    ) -> None:
        _, first = np.unique(user * num_articles + article, return_index=True)
        user, article, time = user[first], article[first], time[first]
        is_early = time < start
        user_early, article_early = user[is_early], article[is_early]
        self._num_early = np.bincount(article_early, minlength=num_articles)
        self._sum_early = np.stack(
            [np.bincount(article_early, axis[user_early], minlength=num_articles) for axis in user_vectors.T], axis=1
        ).astype(np.float32)
        self._log = ArticleLog(article[~is_early], time[~is_early], num_articles)
        vectors_later = user_vectors[user[~is_early][self._log.order]]
        self._sum_later = self._log.accumulate(np.add, vectors_later).astype(np.float32)

    def at(self, article: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Readers of each article before each second, int64 [Q], and its vector, float32 [Q, 32].

        The vector is the direction of the sum of its readers', n / (n + 3) long for n readers.
        """
        first, stop = self._log.before(article, time)
        sums = self._sum_early[article]
        has_later = stop > first
        sums[has_later] += self._sum_later[stop[has_later] - 1]
        num_readers = self._num_early[article] + stop - first
        trust = num_readers / (num_readers + READERS_OF_HALF_LENGTH)
        return num_readers, unit(sums) * trust[:, None].astype(np.float32)
