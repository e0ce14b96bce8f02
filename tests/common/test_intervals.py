import math
import random

import pytest
from scipy import stats

from prefscan.common.intervals import mean_interval, share_interval


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize("values", [[1.0, 2.0], [6.5, 7.25, 7.25, 8.0, 3.0], [-0.001, 0.002, 0.0]])
def test_mean_interval_is_students(values: list[float], confidence: float) -> None:
    mean, low, high = mean_interval(values, confidence)
    expected = stats.t.interval(confidence, len(values) - 1, loc=stats.tmean(values), scale=stats.sem(values))
    assert (mean, low, high) == pytest.approx((stats.tmean(values), *expected), rel=1e-12)


def test_mean_interval_of_equal_values_is_a_point() -> None:
    assert mean_interval([4.0, 4.0, 4.0]) == (4.0, 4.0, 4.0)


@pytest.mark.parametrize("values", [[], [7.0]])
def test_mean_interval_needs_two_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match=f"at least two values, got {len(values)}"):
        mean_interval(values)


def test_mean_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = random.Random(0)
    trials = 4000
    covered = 0
    for _ in range(trials):
        _, low, high = mean_interval([rng.gauss(3.0, 2.0) for _ in range(6)])
        covered += low <= 3.0 <= high
    assert covered / trials == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / trials))


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize(("successes", "trials"), [(0, 12), (1, 1), (7, 12), (12, 12), (640, 1000)])
def test_share_interval_is_wilsons(successes: int, trials: int, confidence: float) -> None:
    share, low, high = share_interval(successes, trials, confidence)
    expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert (share, low, high) == pytest.approx((successes / trials, expected.low, expected.high), abs=1e-12)


def test_share_interval_counts_a_tie_as_half() -> None:
    share, low, high = share_interval(6.5, 12)
    _, low_of_6, high_of_6 = share_interval(6, 12)
    _, low_of_7, high_of_7 = share_interval(7, 12)
    assert share == 6.5 / 12
    assert low_of_6 < low < low_of_7
    assert high_of_6 < high < high_of_7
