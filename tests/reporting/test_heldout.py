"""Held-out pairs beside what length alone gives, clustered by prompt."""

import numpy as np
import pytest
from scipy import stats

from prefscan.common.intervals import share_interval
from prefscan.reporting.heldout import (
    accuracy,
    clustered_estimate,
    clustered_share,
    difference_at_equal_length,
    margins,
)


def test_clusters_of_one_are_students_interval() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 40)
    expected = stats.ttest_1samp(values, 0)
    interval = expected.confidence_interval()
    assert clustered_estimate(values, np.arange(40))[:5] == pytest.approx(
        (values.mean(), stats.sem(values), interval.low, interval.high, expected.pvalue)
    )


def test_repeated_prompts_add_no_certainty() -> None:
    values = np.random.default_rng(1).normal(0, 1, 30)
    once = clustered_estimate(values, np.arange(30))
    assert clustered_estimate(values.repeat(3), np.arange(30).repeat(3))[:5] == pytest.approx(once[:5])


def test_clustered_intervals_hold_with_prompts_of_any_size() -> None:
    """And those over pairs alone do not."""
    rng, clustered, alone = np.random.default_rng(2), 0, 0
    for _ in range(300):
        prompts = np.repeat(np.arange(40), rng.integers(1, 6, 40))
        values = rng.normal(0, 1, 40)[prompts] + rng.normal(0, 0.7, len(prompts))
        found = clustered_estimate(values, prompts)
        clustered += found.significant
        alone += bool(stats.ttest_1samp(values, 0).pvalue <= 0.05)
    assert stats.binom.sf(clustered - 1, 300, 0.065) > 0.001
    assert alone > 0.12 * 300


def test_a_share_of_clusters_of_one_is_wilsons() -> None:
    right = np.arange(50) % 3 == 0
    share, low, high = share_interval(int(right.sum()), 50)
    found = clustered_share(right, np.arange(50))
    assert found.share == share
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.003)  # n − 1 in the clustered variance
    tripled = clustered_share(right.repeat(3), np.arange(50).repeat(3))
    assert tripled == pytest.approx(found)
    assert clustered_share(np.ones(30), np.arange(30)).low == pytest.approx(share_interval(30, 30)[1])
    assert clustered_share(np.ones(9), np.arange(9)) == (1, None, None)


def test_length_alone_explains_an_accuracy() -> None:
    """A model that prefers the shorter response, where the shorter is chosen in 62 of 100 pairs."""
    rejected = np.full(100, 50)
    chosen = np.where(np.arange(100) < 62, 40, 60)
    margin = (rejected - chosen).astype(float)
    found = accuracy(margin, chosen, rejected, np.arange(100))
    assert (found.accuracy.share, found.shorter_is_chosen.share) == (0.62, 0.62)
    assert found.balanced is not None
    assert found.balanced.mean == 0.5


def test_balanced_accuracy_is_the_mean_of_two() -> None:
    rng = np.random.default_rng(3)
    chosen, rejected = rng.integers(20, 60, 200), rng.integers(20, 60, 200)
    margin = rng.normal(0.3, 1, 200)
    found = accuracy(margin, chosen, rejected, np.arange(200)).balanced
    means = [(margin[kind] > 0).mean() for kind in (chosen > rejected, chosen < rejected)]
    assert found is not None
    assert found.mean == pytest.approx(np.mean(means))
    parts = [(margin[kind] > 0) for kind in (chosen > rejected, chosen < rejected)]
    expected = (sum(part.var() / len(part) for part in parts)) ** 0.5 / 2
    assert found.standard_error == pytest.approx(expected, rel=0.02)
    assert accuracy(margin, rejected + 1, rejected, np.arange(200)).balanced is None


def test_a_tie_counts_half() -> None:
    found = accuracy(np.zeros(20), np.full(20, 5), np.full(20, 5), np.arange(20))
    assert (found.accuracy.share, found.shorter_is_chosen.share, found.balanced) == (0.5, 0.5, None)


def test_margins_per_token_and_at_equal_length() -> None:
    """A margin of 0.02 nats for each token more, and of 1 nat at equal length."""
    rng = np.random.default_rng(4)
    chosen, rejected = rng.integers(20, 60, 300), rng.integers(20, 60, 300)
    shift = 0.02 * (chosen - rejected) + 1 + rng.normal(0, 0.1, 300)
    found = margins(shift, np.zeros(300), chosen, rejected, np.arange(300))
    assert found.margin.mean == pytest.approx(shift.mean())
    assert found.per_token.mean == pytest.approx((shift / chosen).mean())
    line = stats.linregress(chosen - rejected, shift)
    assert found.at_equal_length.mean == pytest.approx(line.intercept)
    assert found.at_equal_length.standard_error == pytest.approx(line.intercept_stderr, rel=0.1)
    same = margins(shift, np.zeros(300), rejected, rejected, np.arange(300)).at_equal_length
    assert np.isnan(same.mean)
    assert same.reason is not None


@pytest.mark.parametrize(
    ("lengths", "truncated", "reason"),
    [
        ([0, 0, 0, 0, 0, 0, 0, 9], 0.0, "replies to 1 questions differ in length; it needs 4"),
        ([1, 2, 3, 4, 5, 6, 7, 8], 0.6, "60% of the replies are truncated"),
        ([5] * 8, 0.0, "all differ by the same length"),
    ],
)
def test_equal_length_is_not_told_from_too_little(lengths: list[float], truncated: float, reason: str) -> None:
    found = difference_at_equal_length(np.arange(8.0), lengths, truncated)
    assert np.isnan(found.mean)
    assert found.low is None
    assert found.reason is not None
    assert reason in found.reason


def test_equal_length_is_the_regressions_intercept() -> None:
    scores, lengths = np.array([0.5, 1, 0.2, 2, 0.7, 1.1]), np.array([1.0, 4, 0, 9, -2, 3])
    line = stats.linregress(lengths, scores)
    found = difference_at_equal_length(scores, lengths, 0.5)
    assert (found.mean, found.standard_error) == pytest.approx((line.intercept, line.intercept_stderr))
