import itertools
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from prefscan.reporting.stats import (
    cluster_bootstrap,
    clustered_mean,
    crossed_mean,
    holm,
    length_controlled_difference,
    paired_difference,
    pairwise_agreement,
    selected_best,
    variance_components,
)


def skewed_scores(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    """Whole judge scores from 1 to 10, more of them high than low."""
    rng = np.random.default_rng(seed)
    return np.clip(np.rint(9.5 - rng.gamma(2, 1.4, size=shape)), 1, 10)


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


def test_clustered_mean_by_hand() -> None:
    """Cluster means 2, 4 and 9: mean 5, variance 13, standard error √(13/3), and Student's quantile 4.3027 at 2."""
    mean, error, low, high = clustered_mean([1, 3, 4, 4, 8, 10], [81, 81, 82, 82, 83, 83])
    assert (mean, error) == pytest.approx((5, (13 / 3) ** 0.5))
    assert (low, high) == pytest.approx((5 - 4.30265273 * error, 5 + 4.30265273 * error))
    assert clustered_mean([10, 4, 1, 8, 3, 4], [83, 82, 81, 83, 81, 82]) == pytest.approx((mean, error, low, high))


def test_clustered_standard_error_is_the_papers_double_sum() -> None:
    """Miller's own form: the naive error plus the covariances within each cluster, times the small-sample factor."""
    scores = skewed_scores(8, 6) + np.arange(8)[:, None]
    values, clusters = scores.ravel(), np.repeat(np.arange(8), 6)
    deviations, n = values - values.mean(), values.size
    squared = (deviations**2).sum() / n**2
    for i, j in itertools.permutations(range(n), 2):
        if clusters[i] == clusters[j]:
            squared += deviations[i] * deviations[j] / n**2
    error = clustered_mean(values, clusters).standard_error
    assert error == pytest.approx((squared * 8 / 7) ** 0.5, rel=1e-12)
    assert error > 1.5 * stats.sem(values)  # what ignoring the questions would have claimed


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([1, 2, 3], [1, 1, 2], "clusters must be of one size, got 1 to 2"),
        ([1, 2], [1, 1], "at least 2 questions, got 1"),
        ([1, math.nan], [1, 2], "1 of 2 values are not finite"),
        ([1, 2], [1, 2, 3], "a cluster for each of 2 values"),
        ([], [], r"an array \[observations\]"),
        ([[1, 2]], [[1, 2]], r"an array \[observations\], got the shape \[1, 2\]"),
    ],
)
def test_clustered_mean_refuses(values: list[float], clusters: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clustered_mean(values, clusters)


def test_paired_difference_is_scipys_paired_t_test() -> None:
    a, b = skewed_scores(2, 80, 2).mean(axis=2)
    result = paired_difference(a, b)
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert result[:5] == pytest.approx(
        ((a - b).mean(), stats.sem(a - b), interval.low, interval.high, expected.pvalue), rel=1e-9
    )
    assert (result.wins, result.ties, result.losses) == ((a > b).sum(), (a == b).sum(), (a < b).sum())
    assert min(result[5:]) > 0
    swapped = paired_difference(b, a)
    assert swapped[:5] == pytest.approx(
        (-result.mean, result.standard_error, -result.high, -result.low, result.p_value)
    )
    assert swapped[5:] == result[5:][::-1]


def test_paired_difference_of_sums_in_another_order_is_a_tie() -> None:
    """0.1 + 0.2 is not 0.3 in floating point: three such questions would be a certain difference of 5e-17."""
    result = paired_difference([0.1 + 0.2, 0.1 + 0.2, 0.1 + 0.2], [0.3, 0.3, 0.3])
    assert result == (0, 0, 0, 0, 1, 0, 3, 0)


def test_paired_difference_without_spread_has_the_sign_tests_p_value() -> None:
    """As where a judge of pairs lets a model lose on every question: three of three are no certainty."""
    assert paired_difference([2, 3, 4], [1, 2, 3]) == (1, 0, 1, 1, 0.25, 3, 0, 0)
    for lost in (np.full(8, 0.5), np.array([0.1 + 0.2, *[0.3] * 7])):  # and where rounding makes a spread of 5e-17
        result = paired_difference(lost - lost[-1], lost)
        assert result.p_value == pytest.approx(stats.binomtest(0, 8).pvalue)
        assert result.losses == 8


@pytest.mark.parametrize(("a", "b"), [([1, 2], [1, 2, 3]), ([1], [2]), ([1, math.inf], [1, 2])])
def test_paired_difference_refuses(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=r"same questions|at least 2 questions|not finite"):
        paired_difference(a, b)


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.04, and never falls: the last is 0.06."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert holm([0.3]) == pytest.approx([0.3])
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, 1.1])
    with pytest.raises(ValueError, match="not finite"):
        holm([0.5, math.nan])


def test_holm_is_the_closed_bonferroni_test() -> None:
    """Marcus, Peritz and Gabriel (1976): a test's adjusted p-value is the largest Bonferroni p of the sets with it."""
    p = np.random.default_rng(0).beta(0.4, 4, size=7)
    expected = np.zeros(7)
    for size in range(1, 8):
        for members in itertools.combinations(range(7), size):
            bonferroni = min(1, size * min(p[list(members)]))
            expected[list(members)] = np.maximum(expected[list(members)], bonferroni)
    assert holm(p) == pytest.approx(expected, rel=1e-12)


def test_selected_best_is_the_nested_loop() -> None:
    scores = skewed_scores(6, 8, 2).mean(axis=2)
    rng = np.random.default_rng(5)
    left_out: list[list[float]] = [[] for _ in range(8)]
    for _ in range(20000):
        draw = rng.integers(8, size=8)
        cell = scores[:, draw].mean(axis=1).round(9).argmax()
        for question in set(range(8)) - set(draw.tolist()):
            left_out[question].append(scores[cell, question])
    expected = np.mean([np.mean(values) for values in left_out])
    best = selected_best(scores, resamples=20000)
    assert best.corrected == pytest.approx(expected, abs=0.03)
    assert best.cell == scores.mean(axis=1).argmax()
    assert best.apparent == pytest.approx(scores.mean(axis=1).max())
    assert best.optimism == pytest.approx(best.apparent - best.corrected)
    assert best.optimism > 0.2
    _, _, low, high = clustered_mean(scores[best.cell], range(8))
    assert (best.low, best.high) == pytest.approx((low - best.optimism, high - best.optimism))


def test_a_single_cell_has_no_optimism() -> None:
    scores = skewed_scores(1, 8)
    best = selected_best(scores)
    mean, _, low, high = clustered_mean(scores[0], range(8))
    assert best == pytest.approx((0, mean, 0, mean, low, high), abs=1e-9)


def test_a_cell_better_on_every_question_has_no_optimism() -> None:
    scores = skewed_scores(5, 8, seed=2)
    scores[3] = scores.max(axis=0) + np.arange(8) / 8 + 0.5
    best = selected_best(scores)
    assert best.cell == 3
    assert best.optimism == pytest.approx(0, abs=1e-9)


def test_equal_cells_go_to_the_first() -> None:
    assert selected_best([[1, 2, 3], [4, 1, 1], [2, 2, 2]]).cell == 0


def test_selected_best_refuses() -> None:
    with pytest.raises(ValueError, match="at least 2 questions, got 1"):
        selected_best([[1.0], [2.0]])
    with pytest.raises(ValueError, match="1 resamples leave some of 8 questions never out"):
        selected_best(skewed_scores(2, 8), resamples=1)
    with pytest.raises(ValueError, match=r"an array \[cells, questions\]"):
        selected_best([1.0, 2.0])


def mean_squares(scores: NDArray[np.float64]) -> tuple[float, float, float, float, float]:
    """The textbook's mean squares of questions, seeds, their interaction, answers and judgements, by loops."""
    questions, seeds, answers, judgements = scores.shape
    grand = scores.mean()
    sums = dict.fromkeys(["q", "s", "qs", "a", "j"], 0.0)
    for q, s, a, j in np.ndindex(*scores.shape):
        mean_q, mean_s, mean_qs = scores[q].mean(), scores[:, s].mean(), scores[q, s].mean()
        sums["q"] += (mean_q - grand) ** 2
        sums["s"] += (mean_s - grand) ** 2
        sums["qs"] += (mean_qs - mean_q - mean_s + grand) ** 2
        sums["a"] += (scores[q, s, a].mean() - mean_qs) ** 2
        sums["j"] += (scores[q, s, a, j] - scores[q, s, a].mean()) ** 2
    return (
        sums["q"] / (questions - 1),
        sums["s"] / (seeds - 1),
        sums["qs"] / ((questions - 1) * (seeds - 1)),
        sums["a"] / (questions * seeds * (answers - 1)),
        sums["j"] / (questions * seeds * answers * (judgements - 1)),
    )


def synthetic(*shape: int) -> NDArray[np.float64]:
    """Scores with the variances 4 of questions, 1 of seeds, 0.64 of their interaction, 2.25 answers and 0.36 judge."""
    questions, seeds, answers, _ = shape
    rng = np.random.default_rng(1)
    return (
        6
        + rng.normal(0, 2, (questions, 1, 1, 1))
        + rng.normal(0, 1, (1, seeds, 1, 1))
        + rng.normal(0, 0.8, (questions, seeds, 1, 1))
        + rng.normal(0, 1.5, (questions, seeds, answers, 1))
        + rng.normal(0, 0.6, shape)
    )


def test_variance_components_are_the_textbooks() -> None:
    scores = synthetic(9, 4, 3, 2)
    q, s, qs, a, j = mean_squares(scores)
    expected = ((q - qs) / 24, (s - qs) / 54, (qs - a) / 6, (a - j) / 2, j)
    assert variance_components(scores) == pytest.approx(expected, rel=1e-9)
    assert min(expected) > 0


def test_variance_components_find_the_truth() -> None:
    assert variance_components(synthetic(300, 200, 2, 2)) == pytest.approx((4, 1, 0.64, 2.25, 0.36), rel=0.3)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1500, 1, 1, 1), (4 + 0.64 + 2.25 + 0.36, None, None, None, None)),
        ((1500, 1, 1, 2), (4 + 0.64 + 2.25, None, None, None, 0.36)),
        ((1500, 1, 3, 1), (4 + 0.64, None, None, 2.25 + 0.36, None)),
        ((1500, 30, 1, 2), (4, 1, 0.64 + 2.25, None, 0.36)),
        ((1500, 30, 1, 1), (4, 1, 0.64 + 2.25 + 0.36, None, None)),
    ],
)
def test_a_part_without_repeats_is_in_the_next_one_outwards(
    shape: tuple[int, ...], expected: tuple[float | None, ...]
) -> None:
    """One seed's own effect is a constant of all scores, and in no part."""
    found = variance_components(synthetic(*shape))
    assert [part is None for part in found] == [part is None for part in expected]
    for part, truth in zip(found, expected, strict=True):
        if part is not None:
            # The standard error of a variance of 30 seeds is a quarter of it; the others have 1,500 values.
            assert part == pytest.approx(truth, rel=0.5 if truth == 1 else 0.12)


def test_negative_variance_components_are_zero() -> None:
    """Both questions have mean 5, yet the judge varies: question would be estimated as 0 − 8/2."""
    found = variance_components(np.array([[3.0, 7], [7, 3]])[:, None, None, :])
    assert found == (0, None, None, None, 8)
    with pytest.raises(ValueError, match="at least 2 questions"):
        variance_components(np.ones((1, 2, 2, 2)))
    with pytest.raises(ValueError, match=r"an array \[questions, seeds, answer_samples, judge_samples\]"):
        variance_components(np.ones((2, 2)))


def test_length_controlled_difference_is_the_normal_equations() -> None:
    rng = np.random.default_rng(4)
    lengths = rng.normal(60, 40, size=80)
    scores = 0.3 + 0.01 * lengths + rng.normal(0, 1, size=80)
    design = np.column_stack([np.ones(80), lengths])
    coefficients = np.linalg.inv(design.T @ design) @ design.T @ scores
    residuals = scores - design @ coefficients
    error = (np.linalg.inv(design.T @ design)[0, 0] * (residuals @ residuals) / 78) ** 0.5
    low, high = stats.t.interval(0.95, 78, loc=coefficients[0], scale=error)
    p_value = 2 * stats.t.sf(abs(coefficients[0]) / error, 78)
    found = length_controlled_difference(scores, lengths)
    assert found == pytest.approx((coefficients[0], error, low, high, p_value, coefficients[1]), rel=1e-9)
    assert found.mean < scores.mean() - 0.3  # the longer answers' part is gone


def test_length_controlled_difference_by_hand() -> None:
    """A line through all points has no error: 2 points at equal length, half a point for ten tokens."""
    found = length_controlled_difference([2.5, 3, 4], [10, 20, 40])
    assert found == pytest.approx((2, 0, 2, 2, 0, 0.05), abs=1e-6)


def test_lengths_that_do_not_vary() -> None:
    scores = [1.0, -0.5, 0.75, 0.25]
    plain = paired_difference(scores, [0, 0, 0, 0])
    assert length_controlled_difference(scores, [0, 0, 0, 0]) == (*plain[:5], None)
    with pytest.raises(ValueError, match=r"every length difference is 12\.0"):
        length_controlled_difference(scores, [12, 12, 12, 12])
    with pytest.raises(ValueError, match="at least 3 questions"):
        length_controlled_difference([1, 2], [3, 4])
    with pytest.raises(ValueError, match="same questions on both sides, got 4 and 3"):
        length_controlled_difference(scores, [1, 2, 3])


def test_the_mean_over_questions_and_seeds_equals_its_definition() -> None:
    """Mean squares cell by cell, and the larger of the two sums of squared half widths by hand."""
    scores = np.array([[1.0, 2.5, 0.5], [3.0, 3.5, 2.0], [-1.0, 1.0, 0.0], [2.0, 2.0, 1.5]])
    questions, seeds = scores.shape
    grand = scores.mean()
    by_question = seeds * sum((scores[i].mean() - grand) ** 2 for i in range(4)) / 3
    by_seed = questions * sum((scores[:, j].mean() - grand) ** 2 for j in range(3)) / 2
    rest = (
        sum(
            (scores[i, j] - scores[i].mean() - scores[:, j].mean() + grand) ** 2
            for i in range(questions)
            for j in range(seeds)
        )
        / 6
    )
    error = ((by_question + by_seed - rest) / 12) ** 0.5
    t3, t2 = stats.t.ppf(0.975, 3), stats.t.ppf(0.975, 2)
    squares = (
        t3**2 * by_question + t2**2 * max(by_seed - rest, 0),
        t3**2 * max(by_question - rest, 0) + t2**2 * by_seed,
    )
    half = (max(squares) / 12) ** 0.5
    found = crossed_mean(scores)
    assert (found.mean, found.standard_error) == pytest.approx((grand, error))
    assert (found.low, found.high) == pytest.approx((grand - half, grand + half))
    assert (found.p_value <= 0.05) == (not found.low <= 0 <= found.high)


@pytest.mark.parametrize("flip", [False, True], ids=["questions alone", "seeds alone"])
def test_where_one_axis_alone_varies_the_interval_is_that_of_its_means(flip: bool) -> None:
    means = [0.5, 1.5, 1.0, 3.0]
    scores = np.repeat(np.array(means)[:, None], 3, axis=1)
    found = crossed_mean(scores.T if flip else scores)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 3, loc=1.5, scale=stats.sem(means)))
    assert found.p_value == pytest.approx(stats.ttest_1samp(means, 0).pvalue)


@pytest.mark.parametrize("scale", [1.0, 0.1], ids=["an axis", "both axes"])
def test_rest_that_exceeds_an_axis_never_makes_the_mean_surer_than_the_other_axis_alone(scale: float) -> None:
    """Equal means of the seeds under noise within: MS of the seeds less that of the rest is negative."""
    noise = np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])
    means = scale * np.array([0.0, 1.0, 2.0, 5.0])
    found = crossed_mean(means[:, None] + noise)
    expected = stats.t.interval(0.95, 3, loc=2 * scale, scale=stats.sem(means))
    assert (found.low, found.high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.ones((1, 3)), "needs at least 2 questions, got 1"),
        (np.ones((3, 1)), "needs at least two seeds, got 1"),
        (np.ones(3), r"needs an array \[questions, seeds\], got the shape \[3\]"),
        (np.array([[1.0, np.nan], [1.0, 1.0]]), "1 of 4 values are not finite"),
    ],
)
def test_a_mean_over_questions_and_seeds_needs_two_of_each(scores: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crossed_mean(scores)
