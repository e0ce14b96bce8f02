import numpy as np
import pytest
from scipy import stats

from prefscan.stats import auc, cluster_bootstrap, pairwise_agreement


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [
        ([3, 4], [1, 2], 1),
        ([1, 2], [3, 4], 0),
        ([5, 5], [5, 5], 0.5),
        ([1, 3, 5], [2, 3], 3.5 / 6),  # 5 beats both, 3 beats 2 and ties with 3, 1 loses to both
    ],
)
def test_auc_counts_the_pairs_by_hand(good: list[float], bad: list[float], expected: float) -> None:
    assert auc(good, bad) == pytest.approx(expected, abs=1e-12)
    u = stats.mannwhitneyu(good, bad).statistic
    assert auc(good, bad) == pytest.approx(u / (len(good) * len(bad)), abs=1e-12)


def test_a_bootstrap_over_clusters_is_scipys_of_their_means() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=40)
    low, high = cluster_bootstrap(40, lambda draw: float(values[draw].mean()), resamples=9999)
    expected = stats.bootstrap((values,), np.mean, method="percentile", rng=2).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.06)
    assert (low, high) == cluster_bootstrap(40, lambda draw: float(values[draw].mean()), resamples=9999)


def test_a_bootstrap_draws_whole_clusters() -> None:
    """Four clusters of equal values: each doubled, as a second observation of the same, changes nothing."""
    values = np.array([1.0, 2.0, 4.0, 8.0])
    once = cluster_bootstrap(4, lambda draw: float(values[draw].mean()))
    assert cluster_bootstrap(4, lambda draw: float(np.repeat(values[draw], 2).mean())) == once
    assert once[0] < values.mean() < once[1]


def test_a_bootstrap_leaves_out_undefined_draws() -> None:
    assert cluster_bootstrap(2, lambda draw: float("nan") if draw[0] == draw[1] else 1.0) == (1, 1)
    assert np.isnan(cluster_bootstrap(2, lambda _: float("nan"))).all()
    with pytest.raises(ValueError, match="at least two clusters, got 1"):
        cluster_bootstrap(1, lambda _: 0.0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [4, 6, 9], (3, 3, 3, 3)),
        ([1, 2, 3], [9, 6, 4], (0, 3, 0, 3)),
        ([1, 1, 3], [5, 5, 2], (1, 3, 0, 2)),  # a tie of both agrees in S1 and is not in S2
        ([1, 1, 3], [4, 5, 6], (2, 3, 2, 2)),  # a tie of one disagrees in S1 and is not in S2
    ],
)
def test_pairwise_agreement_is_the_papers(
    first: list[float], second: list[float], expected: tuple[int, int, int, int]
) -> None:
    assert pairwise_agreement(first, second) == expected
