"""What reviews and comparisons say of a known reward: numbers by numpy and scipy, not sentences."""

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from prefscan.reporting.contrasts import loss_contrasts
from prefscan.reporting.estimates import estimate_mean
from prefscan.review.revisions import Revision
from prefscan.review.rewards import by_loss, lines_of, recipe_line, shared_prompts

PROMPTS = [f"p{i}" for i in range(60)]
CELLS = ["sigmoid-0.1-8", "sigmoid-0.5-8", "sigmoid-1-8", "ipo-0.1-8", "ipo-0.5-8", "ipo-1-8"]


def revision(
    name: str, seed: int, lift: float = 0.0, recipe: str = "sigmoid-0.1-8", prompts: Any = PROMPTS
) -> Revision:
    rng = np.random.default_rng(seed)
    level = np.random.default_rng(99).uniform(0.3, 0.7, len(prompts))
    rewards = pd.DataFrame({"base": level}, index=pd.Index(prompts, name="prompt"))
    for cell in CELLS:
        own = 0.1 if cell.startswith("ipo") else 0.0
        rewards[cell] = level + own + lift + rng.normal(0, 0.05, len(prompts)) + rng.normal(0, 0.01)
    return Revision(name, {"seed": seed}, {"recipe": {"cell": recipe}}, {}, pd.DataFrame(), {}, rewards)


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"[-+]\d\.\d{3}", text)]


def test_the_recipes_difference_is_paired_by_prompt() -> None:
    before, after = revision("main", 0), revision("mine", 1, lift=0.05, recipe="ipo-0.5-8")
    line = recipe_line(before, after)
    assert line is not None
    apart = (after.rewards["ipo-0.5-8"] - before.rewards["sigmoid-0.1-8"]).to_numpy()
    found = estimate_mean(apart)
    assert found.low is not None
    assert found.high is not None
    assert numbers(line) == pytest.approx([found.mean, found.low, found.high], abs=5e-4)


def test_the_same_rewards_have_no_difference() -> None:
    line = recipe_line(revision("main", 0), revision("mine", 0))
    assert line is not None
    assert numbers(line) == []
    assert "60 prompts" in line


def test_prompts_that_one_lacks_are_left_out_and_a_sweep_without_reward_says_nothing() -> None:
    one, other = revision("main", 0), revision("mine", 1, prompts=PROMPTS[20:])
    assert list(shared_prompts([one, other])) == PROMPTS[20:]
    without = revision("old", 2)._replace(rewards=pd.DataFrame())
    assert recipe_line(one, without) is None
    assert lines_of([one, without], ["base", *CELLS], []) == []


def test_seeds_lead_with_the_contrast_of_the_losses() -> None:
    sweeps = [revision(name, seed) for seed, name in enumerate(("main", "seed1", "seed2"))]
    (line,) = lines_of(sweeps, ["base", *CELLS], [sweeps])
    losses, rewards = by_loss(sweeps, CELLS, sweeps[0].rewards.index)
    assert (losses, rewards[0].shape) == (["sigmoid", "ipo"], (9, 60))
    (contrast,) = loss_contrasts(np.array(rewards), losses, nested=True)
    difference = contrast.difference
    assert difference.high is not None
    assert difference.high < 0  # ipo is better by 0.1
    assert numbers(line) == pytest.approx([difference.mean, difference.low, difference.high], abs=5e-4)


def test_two_sweeps_that_differ_otherwise_are_compared_cell_by_cell() -> None:
    first, second = revision("main", 0), revision("other", 1, lift=0.08)
    (line,) = lines_of([first, second], ["base", *CELLS], [])
    mean, low, high = numbers(line)
    assert low < 0.08 < high
    apart = np.mean([(second.rewards[cell] - first.rewards[cell]).mean() for cell in CELLS])
    assert mean == pytest.approx(apart, abs=5e-4)
