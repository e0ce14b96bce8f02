"""How often the statistics are right, in synthetic studies whose truth is known; docs/statistics.md has the figures."""

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from prefscan.reporting.stats import clustered_mean, holm, paired_difference, selected_best

# Points. A question's ease is 9 minus a gamma variable, so that scores pile up below 10 with a tail of hard questions;
# second turns score lower. The standard deviation of a question's mean is 2.0, and 1.7 that of a paired difference.
EASE, SHAPE, SCALE = 9.0, 2.0, 1.2
TURNS = np.array([0.0, -0.6])
CELL_BY_QUESTION, ANSWER, JUDGE = 0.9, 1.2, 0.5
SPREAD = 0.4  # standard deviation between the cells' effects, where there is a true difference


class Study(NamedTuple):
    scores: NDArray[np.float64]  # [cells, questions]
    truth: NDArray[np.float64]  # [cells]


@cache
def truth_by_effect() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The expected score for each cell effect, after rounding to whole points and clipping to 1–10.

    A score is 1 plus the number of half points 1.5, 2.5, … 9.5 that lie below it, and given the question all else is
    normal: exact but for the 20,000 quantiles that stand for the questions.
    """
    ease = EASE - stats.gamma.ppf((np.arange(20000) + 0.5) / 20000, SHAPE, scale=SCALE)
    noise = np.hypot(np.hypot(CELL_BY_QUESTION, ANSWER), JUDGE)
    effects = np.linspace(-3, 3, 61)
    above = [
        stats.norm.cdf((ease + t + e - h - 0.5) / noise).mean() for e in effects for t in TURNS for h in range(1, 10)
    ]
    return effects, 1 + np.reshape(above, (61, 2, 9)).sum(axis=2).mean(axis=1)


def simulate(cells: int, questions: int, spread: float, seed: int) -> Study:
    """One study: questions and cells are drawn anew, and every cell answers the same questions."""
    rng = np.random.default_rng([cells, questions, round(spread * 10), seed])
    ease = EASE - rng.gamma(SHAPE, SCALE, size=(questions, 1))
    effect = rng.normal(0, 1, size=cells) * spread
    latent = ease + TURNS + effect[:, None, None] + rng.normal(0, CELL_BY_QUESTION, size=(cells, questions, 1))
    latent = latent + rng.normal(0, ANSWER, size=latent.shape) + rng.normal(0, JUDGE, size=latent.shape)
    return Study(np.clip(np.rint(latent), 1, 10).mean(axis=2), np.interp(effect, *truth_by_effect()))


def outcomes(study: Study) -> dict[str, bool]:
    """What each method got right in one study; `holm` is whether it found a difference of any cell from the first."""
    scores, truth = study
    mean = clustered_mean(scores[0], range(scores.shape[1]))
    differences = [paired_difference(cell, scores[0]) for cell in scores[1:]]
    best = selected_best(scores)
    return {
        "score": mean.low <= truth[0] <= mean.high,
        "difference": differences[0].low <= truth[1] - truth[0] <= differences[0].high,
        "selected": best.low <= truth[best.cell] <= best.high,
        "uncorrected": best.low + best.optimism <= truth[best.cell] <= best.high + best.optimism,
        "uncorrected_tests": min(difference.p_value for difference in differences) <= 0.05,
        "holm": holm([difference.p_value for difference in differences]).min() <= 0.05,
    }


def count(cells: int, questions: int, spread: float, studies: int) -> dict[str, int]:
    results = [outcomes(simulate(cells, questions, spread, seed)) for seed in range(studies)]
    return {method: sum(result[method] for result in results) for method in results[0]}


def assert_share_within(times: int, studies: int, low: float, high: float) -> None:
    """Fails where a true share within `low` to `high` would give such a count in fewer than 1 of 1,000 simulations."""
    assert stats.binom.cdf(times, studies, low) > 0.001, f"{times} of {studies} is below {low}"
    assert stats.binom.sf(times - 1, studies, high) > 0.001, f"{times} of {studies} is above {high}"


def assert_as_documented(counts: dict[str, int], spread: float, studies: int) -> None:
    for method in ("score", "difference"):
        assert_share_within(counts[method], studies, 0.93, 0.97)
    assert_share_within(counts["selected"], studies, *SELECTED)
    if not spread:
        assert_share_within(counts["holm"], studies, 0, 0.05)


# What the corrected interval of the best cell reaches; docs/statistics.md says where it leaves 93 to 97 %.
SELECTED = (0.92, 0.99)
GRIDS = [(cells, questions, spread) for cells in (6, 54) for questions in (8, 80) for spread in (0.0, SPREAD)]


def test_the_truth_is_what_many_studies_average() -> None:
    study = simulate(4, 100_000, SPREAD, seed=0)
    errors = study.scores.std(axis=1) / 100_000**0.5
    assert (abs(study.scores.mean(axis=1) - study.truth) < 4 * errors).all()
    assert np.ptp(study.truth) > 10 * errors.max()


def test_the_synthetic_scores_are_skewed_and_bounded() -> None:
    scores = simulate(2, 100_000, 0.0, seed=1).scores
    assert (scores.min(), scores.max()) == (1, 10)
    assert stats.skew(scores[0]) < -0.4
    assert scores[0].std() == pytest.approx(2.0, abs=0.05)
    assert (scores[0] - scores[1]).std() == pytest.approx(1.75, abs=0.05)


@pytest.mark.parametrize(("questions", "spread"), [(8, 0.0), (80, SPREAD)])
def test_intervals_cover_in_few_studies(questions: int, spread: float) -> None:
    assert_as_documented(count(6, questions, spread, studies=150), spread, studies=150)


@pytest.mark.slow
def test_the_simulation_sees_what_is_not_corrected() -> None:
    """With 54 cells of equal truth, the interval of the best-looking and unadjusted tests fail the same bounds."""
    counts = count(54, 8, 0.0, studies=200)
    with pytest.raises(AssertionError, match=r"below 0\.92"):
        assert_share_within(counts["uncorrected"], 200, *SELECTED)
    with pytest.raises(AssertionError, match=r"above 0\.05"):
        assert_share_within(counts["uncorrected_tests"], 200, 0, 0.05)


def test_the_correction_errs_low_and_less() -> None:
    """A resample holds 63 % of the questions: the cell chosen on them is a little worse than the one chosen on all."""
    errors = []
    for seed in range(500):
        scores, truth = simulate(54, 8, SPREAD, seed)
        best = selected_best(scores)
        errors.append([best.apparent - truth[best.cell], best.corrected - truth[best.cell]])
    apparent, corrected = np.mean(errors, axis=0)
    assert 0.6 < apparent < 0.85
    assert -0.25 < corrected < 0
    assert np.square(errors).mean(axis=0)[1] < np.square(errors).mean(axis=0)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("cells", "questions", "spread"), GRIDS)
def test_intervals_cover_in_1000_studies(cells: int, questions: int, spread: float) -> None:
    """Prints its row of docs/statistics.md, with `-s`."""
    counts = count(cells, questions, spread, studies=1000)
    shares = [f"{times / 10:.1f}" for times in counts.values()]
    print(f"\n| {cells} | {questions} | {spread} | {' | '.join(shares)} |")
    assert_as_documented(counts, spread, studies=1000)
