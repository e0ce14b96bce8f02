"""AUC and accuracy with intervals, against brute force, other packages and simulation."""

import random

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from prefscan.common.intervals import share_interval
from prefscan.rewards.checks import accuracy_interval, auc_interval


def test_auc_with_ties_is_scikit_learn_s() -> None:
    rng = random.Random(1)
    values = [rng.randrange(6) for _ in range(80)]
    labels = [rng.random() < 0.4 for _ in values]
    area, low, high = auc_interval(values, labels, range(80))
    assert area == pytest.approx(roc_auc_score(labels, values), abs=1e-12)
    assert 0 < low < area < high < 1


def test_one_text_a_cluster_gives_delong_s_variance() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 1, 30), rng.normal(0, 1, 40)
    wins = (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])
    variance = wins.mean(1).var(ddof=1) / 30 + wins.mean(0).var(ddof=1) / 40
    area, low, high = auc_interval([*x, *y], [True] * 30 + [False] * 40, range(70))
    width = np.log(high / (1 - high)) - np.log(low / (1 - low))
    assert width == pytest.approx(2 * 1.959964 * variance**0.5 / (area * (1 - area)), rel=1e-6)


def test_repeating_each_text_in_its_cluster_narrows_nothing() -> None:
    rng = np.random.default_rng(0)
    labels = [i % 2 == 0 for i in range(60)]
    values = [rng.normal(label, 1) for label in labels]
    once = auc_interval(values, labels, range(60))
    thrice = auc_interval(values * 3, labels * 3, [*range(60)] * 3)
    assert thrice == pytest.approx(once, abs=1e-9)
    right = [float(value > 0.5) == label for value, label in zip(values, labels, strict=True)]
    assert accuracy_interval(right * 3, [*range(60)] * 3) == pytest.approx(
        accuracy_interval(right, range(60)), abs=0.01
    )


def test_intervals_of_clustered_texts_cover_what_they_should() -> None:
    """300 studies of 40 reviews of 6 texts: 95 % intervals cover in 90 to 99 % of them; unclustered ones do not."""
    rng = np.random.default_rng(0)
    labels = np.repeat([True, False], 20 * 6)
    clusters = np.repeat(np.arange(40), 6)
    mean = 1.2
    truth, right = 0.8019, 0.7257  # P(x > y) = Φ(1.2 / √2 ), P(x > 0.6) = Φ(0.6), both with unit variance
    covered = np.zeros(4)
    for _ in range(300):
        values = mean * labels + np.repeat(rng.normal(0, 0.8, 40), 6) + rng.normal(0, 0.6, 240)
        hits = (values > mean / 2) == labels
        for i, (groups, auc) in enumerate(
            [(clusters, True), (clusters, False), (range(240), True), (range(240), False)]
        ):
            interval = (
                auc_interval(list(values), list(labels), groups) if auc else accuracy_interval(list(hits), groups)
            )
            covered[i] += interval[1] <= (truth if auc else right) <= interval[2]
    assert (covered[:2] / 300 > 0.90).all()
    assert (covered[:2] / 300 < 0.99).all()
    assert (covered[2:] / 300 < 0.85).all()


def test_perfect_order_still_has_an_interval_and_one_cluster_has_none() -> None:
    area, low, high = auc_interval([3, 2, 1, 0], [True, True, False, False], range(4))
    assert (area, low, high) == (1.0, *share_interval(2, 2)[1:])
    with pytest.raises(ValueError, match="two clusters of each class"):
        auc_interval([1, 2, 3], [True, True, False], "aab")


def test_single_texts_have_wilson_s_interval() -> None:
    assert accuracy_interval([1.0] * 7 + [0.0] * 3, range(10)) == share_interval(7, 10)
    assert accuracy_interval([1.0] * 4, "abcd") == share_interval(4, 4)
