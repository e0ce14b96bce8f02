"""Measures of agreement and of comparison between judged answers; standard methods, on scipy.

Models are compared on per-question means, shape `[questions]`, in the judge's points: every question has the same turns
and samples, so the mean over questions is the mean over everything, and the interval between questions is clustered by
question. An axis `[cells]` before it holds the models of a grid. docs/statistics.md says why each method was taken and
how often its intervals contain the truth.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from prefscan.common.intervals import mean_interval
from prefscan.reporting.estimates import LEVEL, Part, Spread, finite
from prefscan.reporting.estimates import TIE as TIE


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


class ClusteredMean(NamedTuple):
    """A mean with its clustered standard error and 95 % interval, all in the unit of the values."""

    mean: float
    standard_error: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """`a` minus `b` over the same questions, in points; wins, ties and losses count questions as `a` sees them."""

    mean: float
    standard_error: float
    low: float
    high: float
    p_value: float
    wins: int
    ties: int
    losses: int


class CrossedMean(NamedTuple):
    """A mean over questions and trainings with the error that both leave in it, in points."""

    mean: float
    standard_error: float
    low: float
    high: float
    p_value: float


class SelectedBest(NamedTuple):
    """The cell that looks best, by its row, what it scored, and that score without the luck of having been chosen."""

    cell: int
    apparent: float
    optimism: float
    corrected: float
    low: float
    high: float


class VarianceComponents(NamedTuple):
    """Variances in points squared; None where the axis has length 1, its part is then in the next axis outwards.

    `seed` moves all questions of a training together, `question_seed` each on its own.
    """

    question: float
    seed: float | None
    question_seed: float | None
    answer: float | None
    judge: float | None


class LengthControlledDifference(NamedTuple):
    """A score difference at equal length, in points, and `slope`, points a unit of length; None if none was fitted."""

    mean: float
    standard_error: float
    low: float
    high: float
    p_value: float
    slope: float | None


def _at_least(minimum: int, questions: int) -> None:
    if questions < minimum:
        raise ValueError(f"needs at least {minimum} questions, got {questions}")


def _p_value(estimate: float, standard_error: float, freedom: float) -> float:
    """Two-sided Student t test of zero.

    Where all differences are the same there is no t. They are 0, or else all on one side of it, which has the sign
    test's p-value, 2·½ⁿ of n questions (Arbuthnot 1710).
    """
    if standard_error <= TIE:
        return 1.0 if abs(estimate) <= TIE else 2 * 0.5 ** (freedom + 1)
    return float(2 * stats.t.sf(abs(estimate) / standard_error, freedom))


def _draw_questions(questions: int, resamples: int) -> NDArray[np.float64]:
    """How often each question is in each bootstrap resample, shape `[resamples, questions]`, seed 0."""
    rng = np.random.default_rng(0)
    return rng.multinomial(questions, np.full(questions, 1 / questions), size=resamples).astype(np.float64)


def clustered_mean(values: ArrayLike, clusters: ArrayLike) -> ClusteredMean:
    """Mean of `values` `[observations]` with the clustered standard error of Miller 2024 (arXiv 2411.00640).

    `clusters` `[observations]` names each observation's question. The error is multiplied by √(C/(C−1)), which makes it
    the standard error of the C cluster means, and the 95 % interval is Student's with C−1 degrees of freedom: Miller's
    normal interval is too narrow for 8 questions.
    Raises ValueError for fewer than two clusters, and for clusters of different sizes: an answer is missing.
    """
    scores, labels = finite(values, "[observations]"), np.asarray(clusters)
    if labels.shape != scores.shape:
        raise ValueError(f"needs a cluster for each of {len(scores)} values, got the shape {list(labels.shape)}")
    _, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    _at_least(2, len(sizes))
    if len(set(sizes)) > 1:
        raise ValueError(f"clusters must be of one size, got {sizes.min()} to {sizes.max()} observations")
    means = np.bincount(index, weights=scores) / sizes
    mean, low, high = mean_interval(means.tolist())
    return ClusteredMean(mean, float(stats.sem(means)), low, high)


def paired_difference(a: ArrayLike, b: ArrayLike) -> PairedDifference:
    """Mean of `a` minus `b`, per-question means `[questions]` of two models, with a paired two-sided t test (95 %).

    The paired analysis of Miller 2024 (arXiv 2411.00640), with Student's t (1908) in place of the normal. Differences
    within 1e-9 are ties and count as 0. Where all differences are equal, the interval is a point and the p-value is the
    sign test's, 1 for ties.
    Raises ValueError for different lengths and for fewer than two questions.
    """
    first, second = finite(a, "[questions]"), finite(b, "[questions]")
    if len(first) != len(second):
        raise ValueError(f"needs the same questions on both sides, got {len(first)} and {len(second)}")
    _at_least(2, len(first))
    differences = first - second
    differences[abs(differences) <= TIE] = 0
    mean, low, high = mean_interval(differences.tolist())
    error = float(stats.sem(differences))
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    p_value = _p_value(mean, error, len(differences) - 1)
    return PairedDifference(mean, error, low, high, p_value, wins, len(differences) - wins - losses, losses)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's (1979) step-down adjusted p-values of `[tests]`, in the order given.

    Rejecting those up to α keeps the probability of any false rejection within α, whatever the dependence of the tests;
    scipy's false_discovery_control bounds another quantity. Raises ValueError outside 0 to 1.
    """
    p = finite(p_values, "[tests]")
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"p-values lie between 0 and 1, got {p.min()} to {p.max()}")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def selected_best(scores: ArrayLike, resamples: int = 2000) -> SelectedBest:
    """The best-looking cell of a grid `[cells, questions]` and its score in points, corrected for the selection.

    The leave-one-out bootstrap (Efron 1983; Efron and Tibshirani 1997): a cell is chosen on each resample of the
    questions and scored on the questions left out, seed 0; each question's scores are averaged, then the questions.
    Optimism is the apparent score minus that. The 95 % interval is the chosen cell's own t interval moved down by the
    optimism. Equal means go to the first cell.
    Raises ValueError for fewer than two questions, and for so few resamples that some question was never left out.
    """
    array = finite(scores, "[cells, questions]")
    questions = array.shape[1]
    _at_least(2, questions)
    counts = _draw_questions(questions, resamples)
    left_out = counts == 0
    if not left_out.any(axis=0).all():
        raise ValueError(f"{resamples} resamples leave some of {questions} questions never out; take more")
    cell = int(array.mean(axis=1).round(9).argmax())
    chosen = (counts @ array.T / questions).round(9).argmax(axis=1)
    # Counting the choices of each cell by question left out replaces an array [resamples, questions] of scores.
    choices = np.eye(len(array))[chosen].T @ left_out
    corrected = float(((choices * array).sum(axis=0) / left_out.sum(axis=0)).mean())
    apparent, low, high = mean_interval(array[cell].tolist())
    optimism = apparent - corrected
    return SelectedBest(cell, apparent, optimism, corrected, low - optimism, high - optimism)


def _mean_squares(scores: NDArray[np.float64]) -> tuple[float, float, float]:
    """Of `[questions, seeds]`, crossed: the mean squares of the questions, of the seeds and of the rest."""
    questions, seeds = scores.shape
    of_questions, of_seeds = scores.mean(axis=1), scores.mean(axis=0)
    rest = scores - of_questions[:, None] - of_seeds + scores.mean()
    return (
        seeds * float(of_questions.var(ddof=1)),
        questions * float(of_seeds.var(ddof=1)),
        float((rest**2).sum()) / ((questions - 1) * (seeds - 1)),
    )


def variance_components(scores: ArrayLike) -> VarianceComponents:
    """Where the variance of `[questions, seeds, answer_samples, judge_samples]` comes from, in points squared.

    Balanced analysis of variance by the method of moments (Searle, Casella and McCulloch 1992): questions crossed with
    training seeds, answers within both, judgements within answers; turns are averaged before. Of one model's scores, or
    of the difference of two models' with the same axes. A negative estimate, which no variance often gives, is set to
    0, so that small parts are overestimated on average.
    Raises ValueError for fewer than two questions.
    """
    array = finite(scores, "[questions, seeds, answer_samples, judge_samples]")
    questions, seeds, answers, judgements = array.shape
    _at_least(2, questions)
    judge = answer = seed = question_seed = None
    # `noise` is the variance that the inner axes leave in the mean over them. It is not clipped on the way out, or the
    # outer parts would be biased as well.
    noise = 0.0
    if judgements > 1:
        judge = float(array.var(axis=3, ddof=1).mean())
        noise = judge / judgements
    of_answers = array.mean(axis=3)
    if answers > 1:
        total = float(of_answers.var(axis=2, ddof=1).mean())
        answer = max(total - noise, 0.0)
        noise = total / answers
    of_trainings = of_answers.mean(axis=2)
    if seeds > 1:
        _, of_seeds, rest = _mean_squares(of_trainings)
        question_seed = max(rest - noise, 0.0)
        seed = max((of_seeds - rest) / questions, 0.0)
        noise = rest / seeds
    question = max(float(of_trainings.mean(axis=1).var(ddof=1)) - noise, 0.0)
    return VarianceComponents(question, seed, question_seed, answer, judge)


def crossed_mean(scores: ArrayLike) -> CrossedMean:
    """Mean of `[questions, seeds]`, in points, for other questions and other trainings alike: 95 % interval, p of 0.

    Of one model's scores, or of the difference of two models'. In a random-effects analysis of variance of Q questions
    crossed with S seeds the mean squares MS of the questions, the seeds and the rest give the mean a variance of
    (MS_question + MS_seed − MS_rest) / QS (Searle, Casella and McCulloch 1992). `Spread` makes the interval.
    Raises ValueError for fewer than two questions or seeds.
    """
    array = finite(scores, "[questions, seeds]")
    questions, seeds = array.shape
    _at_least(2, questions)
    if seeds < 2:
        raise ValueError(f"needs at least two seeds, got {seeds}")
    of_questions, of_seeds, rest = (square / array.size for square in _mean_squares(array))
    spread = Spread(Part(of_questions, questions - 1), trainings=Part(of_seeds, seeds - 1), shared=rest)
    mean, error, half = float(array.mean()), spread.standard_error, spread.half_widths(LEVEL)[0]
    p_value = spread.p_value(mean) if error > TIE else _p_value(mean, error, questions - 1)
    return CrossedMean(mean, error, mean - half, mean + half, p_value)


def length_controlled_difference(
    score_difference: ArrayLike, length_difference: ArrayLike
) -> LengthControlledDifference:
    """The score difference `[questions]`, in points, at zero length difference `[questions]`, by least squares.

    The idea of length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475), which regresses preferences
    logistically; scores have a linear effect here. The 95 % interval and the two-sided p-value are the intercept's, by
    Student's t with questions−2 degrees of freedom. Without any length difference it is the plain paired difference.
    Raises ValueError for different lengths of the arrays, for fewer than three questions, and where all questions have
    one length difference other than zero, from which nothing can be said about equal length.
    """
    scores, lengths = finite(score_difference, "[questions]"), finite(length_difference, "[questions]")
    if len(scores) != len(lengths):
        raise ValueError(f"needs the same questions on both sides, got {len(scores)} and {len(lengths)}")
    _at_least(3, len(scores))
    if not np.ptp(lengths):
        if lengths[0]:
            raise ValueError(f"every length difference is {lengths[0]}: nothing is known at equal length")
        plain = paired_difference(scores, np.zeros_like(scores))
        return LengthControlledDifference(*plain[:5], slope=None)
    fit = stats.linregress(lengths, scores)
    mean, error, freedom = float(fit.intercept), float(fit.intercept_stderr), len(scores) - 2
    half = float(stats.t.ppf(0.975, freedom)) * error
    return LengthControlledDifference(
        mean, error, mean - half, mean + half, _p_value(mean, error, freedom), float(fit.slope)
    )
