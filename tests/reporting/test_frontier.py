"""What is possible, against a toy language model whose policies are enumerated: 4 tokens of 3, a reward of its own."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from prefscan.reporting.frontier import (
    EFFECTIVE,
    best_of_n,
    best_of_n_kl,
    frontier,
    possible_gain,
    share_of_possible,
    tilted,
)

REPLIES = list(itertools.product(range(3), repeat=4))


class Toy(NamedTuple):
    probability: NDArray[np.float64]  # [prompts, replies]
    reward: NDArray[np.float64]  # [prompts, replies]


def toy(prompts: int) -> Toy:
    """Each prompt has a first-token distribution, transitions, and rewards of token pairs, all its own."""
    rng = np.random.default_rng(0)
    first = rng.dirichlet(np.ones(3), prompts)
    then = rng.dirichlet(np.ones(3), (prompts, 3))
    worth = rng.normal(0, 0.1, (prompts, 3, 3))
    probability = np.ones((prompts, len(REPLIES)))
    reward = np.zeros((prompts, len(REPLIES)))
    for number, reply in enumerate(REPLIES):
        probability[:, number] = first[:, reply[0]]
        for before, token in itertools.pairwise(reply):
            probability[:, number] *= then[:, before, token]
            reward[:, number] += worth[:, before, token]
    return Toy(probability, reward)


def sampled(model: Toy, n: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(1)
    return np.array(
        [rng.choice(reward, size=n, p=p) for p, reward in zip(model.probability, model.reward, strict=True)]
    )


def optimum(model: Toy, temperature: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Reward and KL of π* by its definition, over all replies."""
    policy = model.probability * np.exp(model.reward / temperature)
    policy /= policy.sum(axis=1, keepdims=True)
    kl = (policy * np.log(policy / model.probability)).sum(axis=1)
    return (policy * model.reward).sum(axis=1), kl


def test_the_enumerated_optimum_is_one() -> None:
    """No policy between it and another has more reward minus λ KL: the check of this test's own truth."""
    model, rng = toy(1), np.random.default_rng(2)
    reward, kl = optimum(model, 0.1)
    base = model.probability[0]
    for _ in range(200):
        policy = rng.dirichlet(np.ones(len(REPLIES)))
        objective = policy @ model.reward[0] - 0.1 * (policy * np.log(policy / base)).sum()
        assert objective <= reward[0] - 0.1 * kl[0]


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_best_of_n_is_the_enumerated_one(n: int) -> None:
    """E max = Σ r (F(r)ⁿ − F(r−)ⁿ) by prompt, from 8 samples of each of 3,000."""
    model = toy(3000)
    order = model.reward.argsort(axis=1)
    reward = np.take_along_axis(model.reward, order, axis=1)
    below = np.take_along_axis(model.probability, order, axis=1).cumsum(axis=1)
    truth = (reward * np.diff(below**n, axis=1, prepend=0)).sum(axis=1)
    found = best_of_n(sampled(model, 8))[n - 1] - truth
    assert abs(found.mean()) < 3.5 * found.std() / len(found) ** 0.5


def test_best_of_n_by_hand() -> None:
    """Of 1, 2, 4 the pairs' best are 2, 4, 4."""
    assert best_of_n([[4.0, 1.0, 2.0]])[:, 0] == pytest.approx([7 / 3, 10 / 3, 4])
    assert best_of_n_kl([1, 2, 4]) == pytest.approx([0, 0.1931, 0.6363], abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.2, 0.08])
def test_the_optimum_lies_on_the_enumerated_frontier(temperature: float) -> None:
    """Less than 3 % of the gain below what the enumerated optimum has at its KL, and never above it beyond noise."""
    model = toy(3000)
    base = (model.probability * model.reward).sum(axis=1)
    reward, kl, effective = tilted(sampled(model, 16), temperature)
    curve = np.array([[part.mean() for part in optimum(model, t)] for t in np.geomspace(2, 0.02, 80)])
    most = np.interp(kl.mean(), curve[:, 1], curve[:, 0] - base.mean())
    error = (reward - base).std() / len(reward) ** 0.5
    assert effective.mean() > EFFECTIVE
    assert -0.03 * most - 2 * error < (reward - base).mean() - most < 2 * error


def test_the_jackknife_takes_bias_away() -> None:
    model = toy(3000)
    rewards = sampled(model, 8)
    truth, _ = optimum(model, 0.1)
    weights = np.exp(rewards / 0.1)
    plain = (weights * rewards).sum(axis=1) / weights.sum(axis=1)
    corrected = tilted(rewards, 0.1)[0]
    assert abs((corrected - truth).mean()) < 0.5 * abs((plain - truth).mean())


def test_shares_of_known_policies() -> None:
    """The optimum itself has all of the possible gain at its KL, half its gain has half, and the base has none."""
    model = toy(200)
    known = frontier(sampled(model, 16))
    reward, kl = optimum(model, 0.15)
    base = (model.probability * model.reward).sum(axis=1)
    whole, half = (share_of_possible(known, part * (reward - base), kl) for part in (1.0, 0.5))
    assert whole.low is not None
    assert whole.high is not None
    assert whole.low < 1 < whole.high
    assert whole.share == pytest.approx(1, abs=0.1)
    assert half.share == pytest.approx(0.5, abs=0.05)
    assert share_of_possible(known, 0 * kl, kl).share == 0
    assert share_of_possible(known, 0 * kl, 0 * kl).share is None


def test_best_of_n_lies_on_or_below_the_frontier() -> None:
    known = frontier(sampled(toy(400), 16))
    kl, gain = (np.array([getattr(point, name) for point in known.points]) for name in ("kl", "gain"))
    for point in known.points:
        assert possible_gain(kl, gain, point.kl) >= point.gain - 1e-12
    assert {point.policy for point in known.points} == {"best of n", "optimum"}
    assert all(point.effective >= EFFECTIVE for point in known.points if point.policy == "optimum")


def test_beyond_the_samples_nothing_is_said_but_a_bound() -> None:
    known = frontier(sampled(toy(200), 4))
    best = max(point.gain for point in known.points)
    found = share_of_possible(known, np.full(200, best / 2), np.full(200, 5.0))
    assert (found.share, found.low, found.high) == (None, None, None)
    assert found.at_most == pytest.approx(0.5)
    assert found.reason == "KL 5.00 is beyond 0.64, the last that samples show"
    assert np.isnan(possible_gain(np.array([0.1, 0.2]), np.array([1.0, 1.5]), 0.3))


def test_the_hull_is_concave_and_starts_at_the_base() -> None:
    kl, gain = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 1.1, 3.0, 2.0])
    ats = [0.0, 0.5, 1.0, 2.0, 3.0, 4.0]
    assert [float(possible_gain(kl, gain, at)) for at in ats] == pytest.approx([0, 0.5, 1, 2, 3, 3])


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="20 prompts with 2 samples each, got 8 with 4"):
        frontier(np.zeros((8, 4)))
    with pytest.raises(ValueError, match="nothing can be gained"):
        frontier(np.ones((20, 4)))
    with pytest.raises(ValueError, match="not finite"):
        best_of_n([[1.0, np.nan]])
    with pytest.raises(ValueError, match="λ above 0"):
        tilted([[1.0, 2.0]], 0)
    with pytest.raises(ValueError, match="needs the 30 prompts of the frontier"):
        share_of_possible(frontier(sampled(toy(30), 4)), [0.1], [0.1])
