"""The mean of per-prompt values with its 95 % interval, where prompts and trainings both leave an error in it.

Unit and shape of every function: `[prompts]` values in the unit of the reward. An interval that does not hold is not
given: `Estimate.reason` says why. docs/statistics.md has the measured coverage.
"""

from collections.abc import Sequence
from math import exp, log
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import stdtrit

LEVEL = 0.05  # of every interval and test
FEWEST_PROMPTS = 20  # of 8, Student's t misses up to 43 % where many are ties (docs/statistics.md)
FEWEST_DIFFERENT = 10  # prompts whose value is not 0: of fewer, neither spread nor skewness is known
TIE = 1e-9  # values closer than this are one value that was summed in another order


class Estimate(NamedTuple):
    """A mean, its standard error, 95 % interval and two-sided p-value of 0; None, with a reason, if not known."""

    mean: float
    standard_error: float | None
    low: float | None
    high: float | None
    p_value: float | None
    reason: str | None = None

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0, before any correction."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def refused(mean: float, reason: str) -> Estimate:
    """An estimate without interval."""
    return Estimate(mean, None, None, None, None, reason)


class Part(NamedTuple):
    """The variance of a mean that one source leaves in it, and the degrees of freedom of its estimate."""

    variance: float
    freedom: float


def combined(parts: Sequence[Part]) -> Part:
    """The sum of independent parts, with Satterthwaite's (1946) degrees of freedom."""
    total = sum(part.variance for part in parts)
    squares = sum(part.variance**2 / part.freedom for part in parts)
    return Part(total, total**2 / squares if squares else sum(part.freedom for part in parts))


class Spread(NamedTuple):
    """What makes a mean uncertain: prompts, with the skewness of their values, and trainings, where they vary.

    `shared` is the variance that both parts hold: the noise of the replies.
    """

    prompts: Part
    skewness: float = 0.0
    trainings: Part | None = None
    shared: float = 0.0

    @property
    def standard_error(self) -> float:
        p, t = self.prompts.variance, self.trainings.variance if self.trainings else 0.0
        return float(max(p, t, p + t - self.shared) ** 0.5)

    def half_widths(self, level: float) -> tuple[float, float]:
        """How far the interval with the error `level` reaches below and above the mean; see `half_width`."""
        return self._reach(level, below=True), self._reach(level, below=False)

    def _reach(self, level: float, *, below: bool) -> float:
        t = float(stdtrit(self.prompts.freedom, 1 - level / 2))
        sign = 1 if below else -1
        unskewed = sign * _unskewed(sign * t, self.skewness, self.prompts.freedom + 1)
        trainings = self.trainings or Part(0.0, 1.0)
        quantiles = max(unskewed, 0.0), float(stdtrit(trainings.freedom, 1 - level / 2))
        return float(half_width(quantiles, self.prompts.variance, trainings.variance, self.shared))

    def p_value(self, mean: float) -> float:
        """The smallest level, from 1e-12 on, at which the interval around `mean` excludes 0."""

        def excess(log_level: float) -> float:
            return abs(mean) - self._reach(exp(log_level), below=mean > 0)

        smallest = log(1e-12)
        if excess(0) <= 0:
            return 1.0
        return 1e-12 if excess(smallest) >= 0 else exp(brentq(excess, smallest, 0, xtol=1e-7))


def half_width(
    quantiles: tuple[float, float], prompts: ArrayLike, trainings: ArrayLike, shared: ArrayLike
) -> NDArray[np.float64]:
    """Half the width of an interval, from the variances that prompts and trainings leave in a mean.

    Each part has a quantile of its own, and the squares add up (Cochran 1964; MOVER, Zou and Donner 2008):
    h² = q_P² v_P + q_T² max(v_T − shared, 0), or q_P² max(v_P − shared, 0) + q_T² v_T where that is more. With
    Satterthwaite's degrees of freedom instead, two to four trainings give too many false alarms.
    """
    p, t, both = (np.asarray(part, dtype=np.float64) for part in (prompts, trainings, shared))
    of_prompts, of_trainings = (quantile**2 for quantile in quantiles)
    with_prompts = of_prompts * p + of_trainings * np.maximum(t - both, 0)
    return np.sqrt(np.maximum(with_prompts, of_prompts * np.maximum(p - both, 0) + of_trainings * t))


def _unskewed(quantile: float, skewness: float, count: float) -> float:
    """The value of (estimate − truth) / error at which Hall's (1992) transformation has this quantile.

    The transformation is monotone: g(T) = T + cT² + c²T³/3 + γ/(6√n), with c = γ/(3√n) and γ the skewness of n values
    (Hall 1992, On the removal of skewness by transformation, equation 2.4). Without skewness it changes nothing.
    """
    c = skewness / (3 * count**0.5)
    if abs(c) < 1e-9:
        return quantile
    return float(np.cbrt(1 + 3 * c * (quantile - c / 2)) - 1) / c


def skewness_of(values: NDArray[np.float64]) -> float:
    """The moment estimate of the skewness of `[prompts]`; 0 where all are equal."""
    centred, deviation = values - values.mean(), float(values.std())
    return float((centred**3).mean()) / deviation**3 if deviation > TIE else 0.0


def estimate_mean(values: ArrayLike, trainings: Part | None = None, shared: float = 0.0) -> Estimate:
    """The mean of `[prompts]` for other prompts of the same kind, and for other trainings where `trainings` is given.

    `trainings` is the variance that trainings leave in the mean, `shared` the part of it that is the replies' noise.
    No interval for fewer than 20 prompts, than 10 prompts whose value is not 0, or where all are equal.
    Raises ValueError for values that are not finite or have another shape.
    """
    array = finite(values, "[prompts]")
    count, mean = len(array), float(array.mean())
    different = int((abs(array) > TIE).sum())
    if count < FEWEST_PROMPTS:
        return refused(mean, f"{count} prompts are too few for an interval; it needs {FEWEST_PROMPTS}")
    if different < FEWEST_DIFFERENT:
        return refused(mean, f"{different} of {count} prompts differ; an interval needs {FEWEST_DIFFERENT}")
    if np.ptp(array) <= TIE:
        return refused(mean, f"all {count} prompts have one value, which says nothing of others")
    prompts = Part(float(array.var(ddof=1)) / count, count - 1)
    return from_spread(mean, Spread(prompts, skewness_of(array), trainings, shared))


def from_spread(mean: float, spread: Spread) -> Estimate:
    """The estimate of a mean whose spread is known."""
    below, above = spread.half_widths(LEVEL)
    return Estimate(mean, spread.standard_error, mean - below, mean + above, spread.p_value(mean))


def finite(values: ArrayLike, shape: str) -> NDArray[np.float64]:
    """`values` as an array with the axes named in `shape`; a missing value is an error, never a smaller average."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != shape.count(",") + 1 or not array.size:
        raise ValueError(f"needs an array {shape}, got the shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {array.size} values are not finite")
    return array
