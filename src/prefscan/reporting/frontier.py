"""What any model could gain over the base at a given KL, from rewards of the base's own samples.

Two families of policies are known from samples alone: best-of-n, and the optimum under a KL constraint. The upper
concave hull of their points is the frontier, on which a tuned model has a share. Rewards are `[prompts, n]`, n samples
of the base for each prompt; KL is in nats a reply. Intervals are 95 % percentile bootstraps over prompts, seed 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, logsumexp

from prefscan.reporting.estimates import FEWEST_PROMPTS, finite

Array = NDArray[np.float64]
# Fewest effective samples a prompt, as a mean over prompts. The optimum's points then lie less than 3 % below the true
# frontier (`benchmarks/interval_coverage.py possible`); reward and KL for a given λ are lower by more, both of them.
EFFECTIVE = 5.0
RESAMPLES = 1000


class Point(NamedTuple):
    """A policy made of the base's samples: gain over the base and KL from it, with intervals.

    `parameter` is n of best-of-n or λ of the optimum, `effective` the effective samples a prompt; `kl` of best-of-n is
    its upper bound and has no error.
    """

    policy: str
    parameter: float
    gain: float
    gain_low: float
    gain_high: float
    kl: float
    kl_low: float
    kl_high: float
    effective: float


class Frontier(NamedTuple):
    """The points, and what they have on each prompt: `gains` and `kls` are `[points, prompts]`."""

    points: list[Point]
    gains: Array
    kls: Array


class Share(NamedTuple):
    """A model's gain as a share of the possible gain at its KL, with its interval.

    Where the frontier is not known, `share` and its interval are None, `reason` says why, and `at_most` is the share of
    the frontier's last point: more KL never makes less possible.
    """

    share: float | None
    low: float | None
    high: float | None
    at_most: float | None
    reason: str | None = None


def best_of_n_kl(n: ArrayLike) -> Array:
    """log n − (n−1)/n nats: an upper bound of best-of-n's KL from the base (Beirami et al. 2024, arXiv 2401.01879)."""
    size = np.asarray(n, dtype=np.float64)
    return np.log(size) - (size - 1) / size


def best_of_n(rewards: ArrayLike) -> Array:
    """Expected reward of the best of 1, 2, … N samples, shape `[N, prompts]`, without bias from N samples.

    The mean over all subsets of n samples: Σ_i C(i−1, n−1) / C(N, n) r_(i), with r_(i) the i-th smallest reward (a
    U-statistic, Hoeffding 1948; as pass@k of Chen et al. 2021, arXiv 2107.03374).
    """
    ordered = np.sort(finite(rewards, "[prompts, n]"), axis=1)
    drawn = ordered.shape[1]
    rank, n = np.arange(1, drawn + 1), np.arange(1, drawn + 1)[:, None]
    weights = np.where(rank >= n, np.exp(_log_choose(rank - 1, n - 1) - _log_choose(drawn, n)), 0.0)
    return weights @ ordered.T


def _log_choose(of: ArrayLike, chosen: ArrayLike) -> Array:
    """log C(of, chosen); of any value where `chosen` exceeds `of`."""
    total, taken = np.asarray(of, dtype=np.float64), np.asarray(chosen, dtype=np.float64)
    return gammaln(total + 1) - gammaln(taken + 1) - gammaln(np.maximum(total - taken, 0) + 1)


def tilted(rewards: ArrayLike, temperature: float) -> tuple[Array, Array, Array]:
    """Reward, KL and effective sample size `[prompts]` of π* ∝ π_base · exp(r / λ), λ = `temperature`.

    π* has the highest reward of all policies with its mean KL (Korbak et al. 2022, arXiv 2205.11275). With weights
    w ∝ exp(r / λ) over the n samples of a prompt, its reward is Σ w r and its KL is that over λ, minus the log of the
    mean of exp(r / λ). Both are too low, by a bias whose part in 1/n the jackknife takes away (Quenouille 1956).
    The effective size is 1 / Σ w² (Kong 1992).
    """
    array = finite(rewards, "[prompts, n]")
    count = array.shape[1]
    if count < 2 or not temperature > 0:
        raise ValueError(f"needs two samples a prompt and λ above 0, got {count} and {temperature}")
    reward, kl, weights = _tilted(array, array / temperature, temperature)
    without = np.where(np.eye(count, dtype=bool), -np.inf, (array / temperature)[:, None, :])
    left_reward, left_kl, _ = _tilted(array[:, None, :], without, temperature)
    return (
        count * reward - (count - 1) * left_reward.mean(axis=1),
        count * kl - (count - 1) * left_kl.mean(axis=1),
        1 / (weights**2).sum(axis=1),
    )


def _tilted(rewards: Array, logits: Array, temperature: float) -> tuple[Array, Array, Array]:
    """Reward, KL and weights over the last axis, without a correction; samples with the logit −inf are not there."""
    normaliser = logsumexp(logits, axis=-1, keepdims=True)
    weights = np.exp(logits - normaliser)
    reward = (weights * rewards).sum(axis=-1)
    there = np.isfinite(logits).sum(axis=-1)
    return reward, reward / temperature - (normaliser[..., 0] - np.log(there)), weights


def frontier(rewards: ArrayLike, temperatures: Sequence[float] | None = None) -> Frontier:
    """Best-of-n for every n up to the samples drawn, and the optimum for each λ with enough effective samples.

    By default 30 λ from 3 to 1/100 of the rewards' standard deviation within prompts.
    Raises ValueError for fewer than 20 prompts, or for rewards that do not vary within a prompt.
    """
    array = finite(rewards, "[prompts, n]")
    prompts, drawn = array.shape
    if prompts < FEWEST_PROMPTS or drawn < 2:
        raise ValueError(f"needs {FEWEST_PROMPTS} prompts with 2 samples each, got {prompts} with {drawn}")
    spread = float(array.var(axis=1, ddof=1).mean() ** 0.5)
    if not spread:
        raise ValueError("every prompt's samples have one reward: nothing can be gained")
    base = array.mean(axis=1)
    best = best_of_n(array)
    names: list[tuple[str, float, float]] = [("best of n", float(n), drawn / n) for n in range(1, drawn + 1)]
    gains, kls = list(best - base), [np.full(prompts, kl) for kl in best_of_n_kl(np.arange(1, drawn + 1))]
    for temperature in spread * np.geomspace(3, 0.01, 30) if temperatures is None else temperatures:
        reward, kl, effective = tilted(array, float(temperature))
        if effective.mean() >= EFFECTIVE:
            names.append(("optimum", float(temperature), float(effective.mean())))
            gains.append(reward - base)
            kls.append(kl)
    all_gains, all_kls = np.array(gains), np.array(kls)
    counts = resamples(prompts)
    gain_ends, kl_ends = (np.quantile(counts @ rows.T, [0.025, 0.975], axis=0) for rows in (all_gains, all_kls))
    ranges = np.vstack([all_gains.mean(axis=1), gain_ends, all_kls.mean(axis=1), kl_ends]).T.tolist()
    points = [
        Point(policy, parameter, gain, gain_low, gain_high, kl, kl_low, kl_high, effective)
        for (policy, parameter, effective), (gain, gain_low, gain_high, kl, kl_low, kl_high) in zip(
            names, ranges, strict=True
        )
    ]
    return Frontier(points, all_gains, all_kls)


def resamples(prompts: int) -> Array:
    """The weight of each prompt in each bootstrap resample, `[resamples, prompts]`, seed 0."""
    rng = np.random.default_rng(0)
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES) / prompts


def possible_gain(kl: ArrayLike, gain: ArrayLike, at: ArrayLike) -> Array:
    """The upper concave hull of points `[..., points]` and the base (KL 0, gain 0) at one KL `[...]`; NaN beyond all.

    The highest chord between a point at or below that KL and one at or above it, or a gain of less KL where that is
    more: the true frontier is concave in the mean KL and never falls.
    """
    x, y = np.asarray(kl, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    x, y = (np.concatenate([np.zeros((*values.shape[:-1], 1)), values], axis=-1) for values in (x, y))
    target = np.asarray(at, dtype=np.float64)[..., None]
    below = np.where(x <= target, y, -np.inf)
    start, run = x[..., :, None], x[..., None, :] - x[..., :, None]
    across = (start <= target[..., None]) & (x[..., None, :] >= target[..., None]) & (run > 0)
    part = (target[..., None] - start) / np.where(across, run, 1.0)
    chords = np.where(across, y[..., :, None] + part * (y[..., None, :] - y[..., :, None]), -np.inf)
    most = np.maximum(below.max(axis=-1), chords.max(axis=(-2, -1)))
    return np.where(target[..., 0] <= x.max(axis=-1), most, np.nan)


def share_of_possible(known: Frontier, gain: ArrayLike, kl: ArrayLike) -> Share:
    """A model's share of the gain that is possible at its KL; `gain` over the base and `kl` are `[prompts]`.

    The prompts are the frontier's, in its order: both are resampled together. The interval is for other prompts, not
    for other trainings. None beyond the frontier's last KL, and where more than 1 in 20 resamples are beyond it.
    """
    gains, kls = finite(gain, "[prompts]"), finite(kl, "[prompts]")
    prompts = known.gains.shape[1]
    if gains.shape != (prompts,) or kls.shape != (prompts,):
        raise ValueError(f"needs the {prompts} prompts of the frontier, got {gains.shape} gains and {kls.shape} KL")
    frontier_gain, frontier_kl = known.gains.mean(axis=1), known.kls.mean(axis=1)
    last = float(frontier_kl.max())
    mean_gain, mean_kl = float(gains.mean()), float(kls.mean())
    at_most = mean_gain / float(frontier_gain.max()) if mean_gain > 0 else None
    if mean_kl <= 0:
        return Share(None, None, None, None, "at KL 0 nothing can be gained")
    if mean_kl > last:
        return Share(None, None, None, at_most, f"KL {mean_kl:.2f} is beyond {last:.2f}, the last that samples show")
    counts = resamples(prompts)
    shares = counts @ gains / possible_gain(counts @ known.kls.T, counts @ known.gains.T, counts @ kls)
    inside = shares[np.isfinite(shares)]
    if len(inside) < 0.95 * len(shares):
        return Share(None, None, None, at_most, f"KL {mean_kl:.2f} is at the end of what samples show, {last:.2f}")
    low, high = np.quantile(inside, [0.025, 0.975])
    share = mean_gain / float(possible_gain(frontier_kl, frontier_gain, mean_kl))
    return Share(share, float(low), float(high), None)
