"""Measures of agreement and of comparison between judged answers; standard methods, on scipy."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray


def auc(good: ArrayLike, bad: ArrayLike) -> float:
    """The probability that a value of `good` lies above one of `bad`, ties half; shapes `[N]` and `[M]`.

    Mann and Whitney's U over N·M (1947), which is the area under the ROC curve (Hanley and McNeil 1982).
    """
    return float(np.sign(np.subtract.outer(good, bad)).mean() / 2 + 0.5)


def cluster_bootstrap(
    clusters: int, statistic: Callable[[NDArray[np.intp]], float], confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of a statistic of whole clusters drawn with replacement, seed 0.

    `statistic` takes the indices of the drawn clusters, shape `[clusters]`. NaN for a draw, such as a correlation of
    equal values, leaves that draw out; if none is left, both ends are NaN.
    Raises ValueError for fewer than two clusters.
    """
    if clusters < 2:
        raise ValueError(f"a bootstrap needs at least two clusters, got {clusters}")
    draws = np.random.default_rng(0).integers(clusters, size=(resamples, clusters))
    values = np.array([statistic(draw) for draw in draws])
    values = values[~np.isnan(values)]
    if not values.size:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def pairwise_agreement(first: ArrayLike, second: ArrayLike) -> tuple[int, int, int, int]:
    """Two judges' scores of the same answers to one question, shape `[models]` each, compared as votes on each pair.

    As in the MT-Bench paper (Zheng et al. 2023, arXiv 2306.05685, section 4.1): the higher score is a vote and equal
    scores are a tie. Returns how many votes agree and of how many: first with ties as a vote of their own (setup S1),
    then over the pairs in which neither judge has a tie (setup S2).
    """
    a, b = np.asarray(first), np.asarray(second)
    i, j = np.triu_indices(len(a), 1)
    vote, other = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
    decided = (vote != 0) & (other != 0)
    return int((vote == other).sum()), len(vote), int((vote == other)[decided].sum()), int(decided.sum())
