"""Held-out pairs and lengths: accuracy beside what length alone gives, and margins at equal length.

Arrays are `[pairs]`, with a prompt's name for each pair: pairs of one prompt resemble each other, so intervals are
clustered by prompt. Margins are in nats, lengths in tokens.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtr, stdtrit

from prefscan.reporting.estimates import LEVEL, TIE, Estimate, finite, refused
from prefscan.reporting.stats import length_controlled_difference

FEWEST_LENGTHS = 4  # questions whose replies differ in length: of fewer, the slope is one or two questions'
FEWEST_CLUSTERS = 10


class Share(NamedTuple):
    """A share with its 95 % interval; None where too few prompts are behind it."""

    share: float
    low: float | None
    high: float | None


class Accuracy(NamedTuple):
    """Held-out accuracy beside what "the shorter response is the chosen one" gets on the same pairs.

    `balanced` is the mean of the accuracies on pairs whose chosen response is the longer, and the shorter: a rule that
    looks at length alone has one half there. None where either kind has no pair.
    """

    accuracy: Share
    shorter_is_chosen: Share
    balanced: Estimate | None


def clustered_totals(
    values: NDArray[np.float64], prompts: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum of `[pairs]` and number of pairs of each prompt, `[prompts]`."""
    names = np.asarray(prompts)
    if names.shape != values.shape:
        raise ValueError(f"needs a prompt for each of {len(values)} pairs, got the shape {list(names.shape)}")
    _, index = np.unique(names, return_inverse=True)
    totals = np.bincount(index, weights=values).astype(np.float64)
    return totals, np.bincount(index).astype(np.float64)


def clustered_estimate(values: ArrayLike, prompts: ArrayLike) -> Estimate:
    """The mean of `[pairs]` with the cluster-robust error of Liang and Zeger (1986), clusters of any size.

    The mean over pairs is a ratio of totals over C prompts: its error is that of the totals of residuals, times
    √(C/(C−1)), with Student's t of C−1 degrees of freedom. No interval for fewer than 10 prompts.
    """
    array = finite(values, "[pairs]")
    totals, sizes = clustered_totals(array, prompts)
    mean, clusters = float(array.mean()), len(sizes)
    if clusters < FEWEST_CLUSTERS:
        return refused(mean, f"pairs of {clusters} prompts are too few for an interval; it needs {FEWEST_CLUSTERS}")
    residuals = totals - mean * sizes
    error = float((residuals @ residuals * clusters / (clusters - 1)) ** 0.5) / len(array)
    if error <= TIE:
        return refused(mean, f"all {len(array)} pairs have one value, which says nothing of others")
    half = float(stdtrit(clusters - 1, 1 - LEVEL / 2)) * error
    return Estimate(mean, error, mean - half, mean + half, float(2 * stdtr(clusters - 1, -abs(mean) / error)))


def clustered_share(right: ArrayLike, prompts: ArrayLike) -> Share:
    """A share of `[pairs]`, ties as ½: Wilson's (1927) interval with the effective number of independent pairs.

    The clustered variance over the binomial one is the design effect (Kish 1965); the pairs count for that many fewer,
    never for more. No interval for fewer than 10 prompts.
    """
    array = finite(right, "[pairs]")
    estimate = clustered_estimate(array, prompts)
    share = float(array.mean())
    clusters = len(clustered_totals(array, prompts)[1])
    if clusters < FEWEST_CLUSTERS:
        return Share(share, None, None)
    binomial = share * (1 - share) / len(array)
    effect = max((estimate.standard_error or 0.0) ** 2 / binomial, 1.0) if binomial else len(array) / clusters
    count, z = len(array) / effect, float(ndtri(1 - LEVEL / 2))
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return Share(share, centre - half, centre + half)


def accuracy(margins: ArrayLike, chosen_tokens: ArrayLike, rejected_tokens: ArrayLike, prompts: ArrayLike) -> Accuracy:
    """Accuracy of held-out margins `[pairs]` beside the rule "the shorter response is the chosen one"; ties count ½."""
    margin = finite(margins, "[pairs]")
    longer = finite(chosen_tokens, "[pairs]") - finite(rejected_tokens, "[pairs]")
    right = np.where(abs(margin) <= TIE, 0.5, margin > 0)
    by_length = np.where(longer == 0, 0.5, longer < 0)
    balanced = _balanced(right, longer, prompts) if (longer > 0).any() and (longer < 0).any() else None
    return Accuracy(clustered_share(right, prompts), clustered_share(by_length, prompts), balanced)


def _balanced(right: NDArray[np.float64], longer: NDArray[np.float64], prompts: ArrayLike) -> Estimate:
    """The mean of two accuracies, linearised: each pair's part of it is the weight of its kind times its residual."""
    kinds = [longer > 0, longer < 0]
    means = [float(right[kind].mean()) for kind in kinds]
    weight = np.select(kinds, [0.5 / kind.mean() for kind in kinds], 0.0)
    spread = clustered_estimate(weight * (right - np.select(kinds, means, 0.0)), prompts)
    mean = sum(means) / 2
    if spread.standard_error is None or spread.high is None:
        return refused(mean, spread.reason or "")
    return Estimate(mean, spread.standard_error, mean - spread.high, mean + spread.high, None)


class Margins(NamedTuple):
    """The held-out margin in nats: whole, for each token of both responses, and at equal length of the two."""

    margin: Estimate
    per_token: Estimate
    at_equal_length: Estimate


def margins(
    chosen_shift: ArrayLike,
    rejected_shift: ArrayLike,
    chosen_tokens: ArrayLike,
    rejected_tokens: ArrayLike,
    prompts: ArrayLike,
) -> Margins:
    """Margins of `[pairs]` from the log-ratios of both responses to the base, in nats, summed over tokens.

    Per token, each response's log-ratio is divided by its own length. At equal length is the intercept of a least
    squares line of the margin on the difference of lengths, clustered by prompt.
    These intervals are over pairs of one training; the variance between trainings is not in them.
    """
    chosen, rejected = finite(chosen_shift, "[pairs]"), finite(rejected_shift, "[pairs]")
    sizes = finite(chosen_tokens, "[pairs]"), finite(rejected_tokens, "[pairs]")
    whole, longer = chosen - rejected, sizes[0] - sizes[1]
    per_token = clustered_estimate(chosen / sizes[0] - rejected / sizes[1], prompts)
    return Margins(clustered_estimate(whole, prompts), per_token, _intercept(whole, longer, prompts))


def _intercept(values: NDArray[np.float64], at: NDArray[np.float64], prompts: ArrayLike) -> Estimate:
    """Least squares of `[pairs]`, read at 0, with the cluster-robust error (HC0 with √(C/(C−1)), as above)."""
    design = np.column_stack([np.ones_like(at), at])
    if int((at != 0).sum()) < FEWEST_LENGTHS or not np.ptp(at):
        return refused(float("nan"), f"fewer than {FEWEST_LENGTHS} pairs differ in length, or all by the same")
    weights = np.linalg.pinv(design)[0]
    coefficients = np.linalg.pinv(design) @ values
    totals, _ = clustered_totals(weights * (values - design @ coefficients), prompts)
    mean, clusters = float(coefficients[0]), len(totals)
    if clusters < FEWEST_CLUSTERS:
        return refused(mean, f"pairs of {clusters} prompts are too few for an interval; it needs {FEWEST_CLUSTERS}")
    error = float((totals @ totals * clusters / (clusters - 1)) ** 0.5)
    half = float(stdtrit(clusters - 2, 1 - LEVEL / 2)) * error
    p_value = float(2 * stdtr(clusters - 2, -abs(mean) / error)) if error > TIE else None
    return Estimate(mean, error, mean - half, mean + half, p_value)


def difference_at_equal_length(score_difference: ArrayLike, length_difference: ArrayLike, truncated: float) -> Estimate:
    """The score difference `[questions]` at equal length; no figure where the data do not say it.

    `truncated` is the share of replies that ended at the token limit: where it is more than one half, the lengths are
    the limit's. Fewer than four questions whose replies differ in length give no slope.
    """
    lengths = finite(length_difference, "[questions]")
    differ = int((lengths != 0).sum())
    if truncated > 0.5:
        return refused(float("nan"), f"{truncated:.0%} of the replies are truncated: their length is the limit's")
    if differ < FEWEST_LENGTHS:
        return refused(float("nan"), f"replies to {differ} questions differ in length; it needs {FEWEST_LENGTHS}")
    if not np.ptp(lengths):
        return refused(float("nan"), "the replies all differ by the same length")
    found = length_controlled_difference(score_difference, lengths)
    return Estimate(found.mean, found.standard_error, found.low, found.high, found.p_value)
