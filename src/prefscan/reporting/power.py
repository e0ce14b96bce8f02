"""What difference a design of a sweep detects, from variances that are given or measured, and what more of it buys.

All standard deviations are in the unit of the reward.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.optimize import brentq

from prefscan.reporting.estimates import LEVEL, finite, half_width

POWER = 0.8


class Design(NamedTuple):
    """A sweep: losses on a grid of β and steps, `seeds` trainings a grid point, `replies` to each of `prompts`."""

    losses: int
    betas: int
    steps: int
    seeds: int
    prompts: int
    replies: int

    @property
    def trainings(self) -> int:
        """Trainings of each loss."""
        return self.betas * self.steps * self.seeds

    @property
    def training_freedom(self) -> int:
        """Degrees of freedom of the variance between trainings: within grid points where seeds repeat them."""
        return self.betas * self.steps * (self.seeds - 1) if self.seeds > 1 else self.trainings - 1


class Variances(NamedTuple):
    """Standard deviations of a loss's reward, each a part that does not cancel between two losses.

    `training`: between trainings of a grid point, all prompts alike, and between grid points, as far as two losses
    depend on β differently. `prompt`: of a loss on a prompt, over all its trainings. `training_prompt`: of a training
    on a prompt. `reply`: of a reply, given training and prompt.
    """

    training: float
    prompt: float
    training_prompt: float
    reply: float


class Detectable(NamedTuple):
    """The smallest difference between two losses found with 80 % power, and the same with one more of something.

    A quarter more prompts stands for "one more": a single prompt changes no digit.
    """

    difference: float
    one_more_seed: float
    one_more_beta: float
    quarter_more_prompts: float
    one_more_reply: float


def measured_variances(rewards: ArrayLike) -> Variances:
    """The standard deviations, from `[losses, trainings, prompts, replies]` of a sweep or a pilot.

    Balanced analysis of variance by moments (Searle, Casella and McCulloch 1992) of each loss's deviation from the mean
    of the losses, over (1 − 1/losses). Negative variances are 0. With one reply its noise is in `training_prompt`.
    Raises ValueError for fewer than two losses, trainings or prompts.
    """
    array = finite(rewards, "[losses, trainings, prompts, replies]")
    losses, trainings, prompts, replies = array.shape
    if min(losses, trainings, prompts) < 2:
        raise ValueError(f"needs two losses, trainings and prompts, got {losses}, {trainings} and {prompts}")
    reply = float(array.var(axis=3, ddof=1).mean()) if replies > 1 else 0.0
    means = array.mean(axis=3)
    apart = (means - means.mean(axis=0)) / (1 - 1 / losses) ** 0.5
    of_training, of_prompt = apart.mean(axis=2), apart.mean(axis=1)
    rest = apart - of_training[:, :, None] - of_prompt[:, None, :] + apart.mean(axis=(1, 2))[:, None, None]
    noise = float((rest**2).sum()) / (losses * (trainings - 1) * (prompts - 1))
    training = float(of_training.var(axis=1, ddof=1).mean()) - noise / prompts
    prompt = float(of_prompt.var(axis=1, ddof=1).mean()) - noise / trainings
    parts = (training, prompt, noise - reply / replies, reply)
    return Variances(*(max(part, 0.0) ** 0.5 for part in parts))


def detectable_difference(design: Design, sd: Variances) -> float:
    """The true difference of two losses' means over the grid that `loss_contrasts` finds with 80 % power.

    Holm's first step over all pairs of losses; the interval is `estimates.half_width`'s. Its width does not depend on
    the mean, so power is the normal's, averaged over 4,000 draws of the mean squares with seed 0: to about 1 %.
    Raises ValueError for fewer than two losses, trainings or prompts, which give no interval.
    """
    if min(design.losses, design.trainings, design.prompts) < 2 or design.replies < 1:
        raise ValueError(f"needs two losses, trainings and prompts, and a reply: got {design}")
    noise = 2 * (sd.training_prompt**2 + sd.reply**2 / design.replies) / (design.trainings * design.prompts)
    parts = np.array([2 * sd.prompt**2 / design.prompts, 2 * sd.training**2 / design.trainings, 0.0]) + noise
    error = float((parts[0] + parts[1] - noise) ** 0.5)
    if not error:
        return 0.0
    freedom = np.array([design.prompts - 1, design.training_freedom, (design.prompts - 1) * design.training_freedom])
    rng = np.random.default_rng(0)
    squares = rng.chisquare(freedom, size=(4000, 3)) / freedom * parts
    level = LEVEL / (design.losses * (design.losses - 1) // 2)
    quantiles = (float(stats.t.ppf(1 - level / 2, freedom[0])), float(stats.t.ppf(1 - level / 2, freedom[1])))
    widths = half_width(quantiles, *squares.T)

    def excess_power(difference: float) -> float:
        found = stats.norm.cdf((difference - widths) / error) + stats.norm.cdf((-difference - widths) / error)
        return float(found.mean()) - POWER

    return float(brentq(excess_power, 0, float(widths.max()) + 3 * error, xtol=1e-9))


def noncentrality(freedom: float, power: float, alpha: float) -> float:
    """The true difference, in standard errors, that a two-sided t test finds with this power (Cohen 1988)."""
    critical = float(stats.t.ppf(1 - alpha / 2, freedom))

    def excess_power(shift: float) -> float:
        # The wrong-side tail by symmetry: scipy's nct.cdf is NaN there for a large noncentrality.
        return float(stats.nct.sf(critical, freedom, shift) + stats.nct.sf(critical, freedom, -shift)) - power

    # Numerator and denominator of t each stay on the good side with probability √power: both do with at least `power`.
    enough = critical * (stats.chi2.ppf(power**0.5, freedom) / freedom) ** 0.5 + stats.norm.ppf(power**0.5)
    return float(brentq(excess_power, 0, float(enough), xtol=1e-10))


def detectable(design: Design, sd: Variances) -> Detectable:
    """`detectable_difference` of a design, and of the same with one more seed, β, reply, or a quarter more prompts."""
    more: list[Callable[[Design], Design]] = [
        lambda d: d,
        lambda d: d._replace(seeds=d.seeds + 1),
        lambda d: d._replace(betas=d.betas + 1),
        lambda d: d._replace(prompts=d.prompts + d.prompts // 4),
        lambda d: d._replace(replies=d.replies + 1),
    ]
    return Detectable(*(detectable_difference(change(design), sd) for change in more))


class JudgeResolution(NamedTuple):
    """What a judge's scores detect, beside the most that they can differ: right answers against wrong ones, in points.

    `detects` is None, with a reason, where the judge cannot tell right from wrong.
    """

    detects: float | None
    judge_range: float
    reason: str | None = None


def judge_resolution(
    sd_of_differences: float, questions: int, comparisons: int, judge_range: float, auc_low: float
) -> JudgeResolution:
    """The difference found with 80 % power after Holm's correction over `comparisons` cells, beside the judge's range.

    `judge_range` is the judge's mean margin of a right answer over a wrong one, `auc_low` the lower end of the interval
    of how often it ranks them rightly. A difference above the range says nothing of quality, and where `auc_low` is
    at most one half, no difference does.
    """
    if auc_low <= 0.5:
        return JudgeResolution(None, judge_range, "the judge cannot be shown to tell right from wrong answers")
    if questions < 2 or comparisons < 1:
        raise ValueError(f"needs two questions and a comparison, got {questions} and {comparisons}")
    factor = noncentrality(questions - 1, POWER, LEVEL / comparisons)
    detects = factor * sd_of_differences / questions**0.5
    if detects > judge_range:
        return JudgeResolution(
            detects, judge_range, "the judge's whole range, right against wrong, is smaller than what is detected"
        )
    return JudgeResolution(detects, judge_range)
