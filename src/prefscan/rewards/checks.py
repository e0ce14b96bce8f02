"""How well a reward agrees with known labels: AUC and accuracy with intervals, texts of one review counted as one.

Texts cut from one review are not independent, so both intervals take the variance between reviews (clusters). With one
text a cluster, they are DeLong's and Wilson's.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit, ndtri
from scipy.stats import rankdata

from prefscan.common.intervals import share_interval

Interval = tuple[float, float, float]  # value, low, high


def _sums(values: npt.NDArray[Any], clusters: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    return np.bincount(clusters, weights=values, minlength=count)


def auc_interval(
    values: Sequence[float], labels: Sequence[bool], clusters: Sequence[Any], confidence: float = 0.95
) -> Interval:
    """Area under the ROC curve, and its interval on the logit scale, for clustered texts.

    Obuchowski, "Nonparametric analysis of clustered ROC curve data" (Biometrics 1997), which is DeLong, DeLong and
    Clarke-Pearson (1988) with one text a cluster. Where no pair is misordered the variance is 0, and Wilson's interval
    of as many successes as the smaller class has clusters stands in. Raises ValueError for fewer than two clusters of
    a class.
    """
    x, positive = np.asarray(values, float), np.asarray(labels, bool)
    names, cluster = np.unique(np.asarray(list(clusters)), return_inverse=True)
    clusters_of = [np.unique(cluster[side]).size for side in (positive, ~positive)]
    if min(clusters_of) < 2:
        raise ValueError(f"an AUC needs two clusters of each class, got {clusters_of}")
    m, n = int(positive.sum()), int((~positive).sum())
    ranks = rankdata(x)
    # Share of the other class that a text is ordered rightly against, ties half.
    right = np.where(positive, 0.0, 1.0)
    right[positive] = (ranks[positive] - rankdata(x[positive])) / n
    right[~positive] = 1 - (ranks[~positive] - rankdata(x[~positive])) / m
    area = float(right[positive].mean())
    deviation = [_sums(np.where(side, right - area, 0.0), cluster, len(names)) for side in (positive, ~positive)]
    variance = 0.0
    for (size, count), part in zip(((m, clusters_of[0]), (n, clusters_of[1])), deviation, strict=True):
        variance += count / (count - 1) * float((part**2).sum()) / size**2
    between = len(names) / (len(names) - 1) * float((deviation[0] * deviation[1]).sum()) / (m * n)
    variance += 2 * between  # clusters with texts of both classes; 0 where each has one
    if variance <= 0 or area in (0.0, 1.0):
        return share_interval(area * min(clusters_of), min(clusters_of), confidence)
    half = float(ndtri((1 + confidence) / 2)) * variance**0.5 / (area * (1 - area))
    return area, float(expit(logit(area) - half)), float(expit(logit(area) + half))


def accuracy_interval(right: Sequence[float], clusters: Sequence[Any], confidence: float = 0.95) -> Interval:
    """Share of right texts and Wilson's interval at the effective sample size of clustered texts.

    The effective size is the number of texts over Kish's design effect, never more than the number of texts.
    """
    values = np.asarray(right, float)
    names, cluster = np.unique(np.asarray(list(clusters)), return_inverse=True)
    share, size = float(values.mean()), float(len(values))
    if len(names) < len(values) and len(names) > 1 and 0 < share < 1:
        spread = float((_sums(values - share, cluster, len(names)) ** 2).sum())
        variance = len(names) / (len(names) - 1) * spread / size**2
        size = min(size, share * (1 - share) / variance) if variance > 0 else size
    trials = max(1, int(size))
    _, low, high = share_interval(share * trials, trials, confidence)
    return share, low, high


def rounded(interval: Interval) -> dict[str, float]:
    """An interval as metrics have it, to 4 decimals."""
    return dict(zip(("value", "low", "high"), (round(number, 4) for number in interval), strict=True))
