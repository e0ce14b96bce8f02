"""A mean with its interval: against scipy where that has one, and by simulation where it has none."""

import numpy as np
import pytest
from scipy import stats

from interval_coverage import TRUTHS, contrast_rate, gain_rate, naive_rate
from prefscan.reporting.estimates import Part, Spread, combined, estimate_mean, finite, from_spread, half_width


def test_without_skewness_it_is_students_interval() -> None:
    half = np.random.default_rng(0).normal(0.3, 1, 40)
    values = np.concatenate([half, 0.6 - half])  # symmetric about 0.3
    found, expected = estimate_mean(values), stats.ttest_1samp(values, 0)
    interval = expected.confidence_interval()
    assert found[:5] == pytest.approx((0.3, stats.sem(values), interval.low, interval.high, expected.pvalue), rel=1e-5)


def test_skewness_moves_the_interval_as_halls_transformation_says() -> None:
    """At both ends g(T) is Student's quantile: the transformation written down forwards, the code inverts it."""
    values = np.random.default_rng(1).lognormal(0, 1, 60)
    found = estimate_mean(values)
    skew, error, n = stats.skew(values), stats.sem(values), 60
    assert found.low is not None
    assert found.high is not None
    for end, quantile in ((found.low, 0.975), (found.high, 0.025)):
        t = (found.mean - end) / error
        g = t + skew * t**2 / (3 * n**0.5) + skew**2 * t**3 / (27 * n) + skew / (6 * n**0.5)
        assert g == pytest.approx(stats.t.ppf(quantile, n - 1), rel=1e-6)
    assert found.high - found.mean > 1.5 * (found.mean - found.low)


@pytest.mark.parametrize("shift", [-0.4, -0.05, 0.1, 0.6])
def test_the_p_value_is_the_level_at_which_the_interval_ends_at_zero(shift: float) -> None:
    values = np.random.default_rng(2).gamma(1, 0.5, 50) - 0.5 + shift
    spread = Spread(Part(float(values.var(ddof=1)) / 50, 49), 1.2, Part(0.003, 3), 0.001)
    found = from_spread(float(values.mean()), spread)
    assert found.p_value is not None
    reach = spread.half_widths(found.p_value)[0 if found.mean > 0 else 1]
    assert reach == pytest.approx(abs(found.mean), rel=1e-4)
    assert found.significant == (found.p_value <= 0.05)


def test_the_parts_add_up() -> None:
    """Without shared noise h² is the sum of both; with all of one part shared, the larger of the two."""
    assert half_width((2.0, 3.0), 4.0, 9.0, 0.0) == pytest.approx((16 + 81) ** 0.5)
    assert half_width((2.0, 3.0), 4.0, 4.0, 4.0) == pytest.approx(6)
    assert combined([Part(1.0, 4), Part(1.0, 4)]) == (2, 8)
    assert combined([Part(0.0, 4), Part(0.0, 3)]) == (0, 7)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.arange(19.0), "19 prompts are too few for an interval; it needs 20"),
        (np.r_[np.ones(9), np.zeros(91)], "9 of 100 prompts differ; an interval needs 10"),
        (np.ones(50), "all 50 prompts have one value, which says nothing of others"),
    ],
)
def test_an_interval_that_would_not_hold_is_not_given(values: np.ndarray, reason: str) -> None:
    found = estimate_mean(values)
    assert found == (values.mean(), None, None, None, None, reason)
    assert not found.significant


def test_missing_values_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        finite([1, np.nan], "[prompts]")
    with pytest.raises(ValueError, match=r"an array \[prompts\], got the shape \[1, 2\]"):
        estimate_mean([[1, 2]])


def at_most(wrong: float, studies: int, bound: float) -> None:
    """Fails where a true rate of `bound` % gives such a count in fewer than 1 of 1,000 simulations."""
    count = round(wrong * studies / 100)
    assert stats.binom.sf(count - 1, studies, bound / 100) > 0.001, f"{count} of {studies} is above {bound} %"


@pytest.mark.parametrize(
    ("kind", "prompts"),
    [("60 % ties, one-sided", 8), ("60 % ties, one-sided", 50), ("90 % ties, one-sided", 50), ("ceiling", 20)],
)
def test_printed_intervals_hold_with_ties_and_at_a_ceiling(kind: str, prompts: int) -> None:
    """Where Student's t misses 9 to 40 %, what is printed misses 7 % of all studies or less."""
    found, t = gain_rate(kind, prompts, 400)
    at_most(found.wrong, 400, 7)
    with pytest.raises(AssertionError):
        at_most(t, 400, 5)


@pytest.mark.parametrize(("prompts", "trainings"), [(80, 3), (256, 4)])
def test_false_alarms_with_few_trainings(prompts: int, trainings: int) -> None:
    at_most(contrast_rate(TRUTHS["trainings vary much"], prompts, trainings, 400).wrong, 400, 5.5)


def test_one_seed_and_the_best_cells_do_raise_them() -> None:
    one_seed, best = naive_rate(256, 6, 300, 0.03)
    for rate in (one_seed, best):
        with pytest.raises(AssertionError):
            at_most(rate, 300, 8)
