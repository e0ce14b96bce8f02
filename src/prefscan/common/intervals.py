"""Intervals of a mean and of a share; standard methods, on scipy.

They are apart from stats.py so that a new figure of the comparison leaves trained adapters and answers as they are.
The quantiles come from scipy.special: importing scipy.stats for them would take half a second in most stages.
"""

from collections.abc import Sequence
from statistics import fmean, stdev

from scipy.special import ndtri, stdtrit


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and two-sided Student t interval of independent values, in their own unit.

    Raises ValueError for fewer than two values, which say nothing about their spread.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, got {len(values)}")
    mean = fmean(values)
    half = float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def share_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float, float]:
    """Share and Wilson score interval (Wilson 1927); ties may count as half a success."""
    share = successes / trials
    z = float(ndtri((1 + confidence) / 2))
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    return share, centre - half, centre + half
