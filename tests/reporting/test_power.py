"""What a design detects: against simulation of the design, and the components that are measured."""

import numpy as np
import pytest
from scipy import stats

from interval_coverage import simulated_power
from prefscan.reporting.power import (
    Design,
    Variances,
    detectable,
    detectable_difference,
    judge_resolution,
    measured_variances,
)

SD = Variances(training=0.01, prompt=0.04, training_prompt=0.03, reply=0.17)


@pytest.mark.parametrize("design", [Design(3, 4, 1, 1, 128, 2), Design(2, 3, 1, 2, 64, 1), Design(6, 9, 1, 1, 40, 2)])
def test_the_detectable_difference_is_found_in_80_percent_of_studies(design: Design) -> None:
    found = simulated_power(design, SD, np.random.default_rng(0), 300)
    assert stats.binomtest(round(3 * found), 300, 0.8).pvalue > 0.001


def test_more_of_anything_detects_less() -> None:
    found = detectable(Design(3, 6, 1, 1, 128, 2), SD)
    assert all(found.difference > less > 0.5 * found.difference for less in found[1:])


def test_many_prompts_and_trainings_reach_the_normal_approximation() -> None:
    """(z(0.975) + z(0.8)) standard errors, of two losses."""
    design = Design(2, 200, 5, 1, 4000, 2)
    error = (2 * (0.04**2 / 4000 + 0.01**2 / 1000 + (0.03**2 + 0.17**2 / 2) / 4e6)) ** 0.5
    assert detectable_difference(design, SD) == pytest.approx(2.802 * error, rel=0.02)


def test_what_does_not_vary_is_detected_and_what_cannot_be_tested_refused() -> None:
    assert detectable_difference(Design(2, 3, 1, 1, 20, 1), Variances(0, 0, 0, 0)) == 0
    for design in (Design(1, 3, 1, 1, 20, 1), Design(2, 1, 1, 1, 20, 1), Design(2, 3, 1, 1, 20, 0)):
        with pytest.raises(ValueError, match="needs two losses, trainings and prompts, and a reply"):
            detectable_difference(design, SD)


def test_repeated_seeds_leave_the_degrees_of_freedom_within_points() -> None:
    assert Design(2, 3, 2, 1, 20, 1).training_freedom == 5
    assert Design(2, 3, 2, 3, 20, 1).training_freedom == 12


def test_the_variances_are_found_again() -> None:
    rng = np.random.default_rng(0)
    shape = (6, 40, 200, 2)
    rewards = rng.normal(0.5, 0.1, (1, 1, 200, 1)) + rng.normal(0, 0.2, (1, 40, 1, 1))  # shared by the losses
    for axes, sd in (((6, 40, 1, 1), 0.03), ((6, 1, 200, 1), 0.04), ((6, 40, 200, 1), 0.05), (shape, 0.17)):
        rewards = rewards + rng.normal(0, sd, axes)
    assert measured_variances(rewards) == pytest.approx((0.03, 0.04, 0.05, 0.17), rel=0.1)
    with pytest.raises(ValueError, match="two losses, trainings and prompts, got 1, 40 and 200"):
        measured_variances(rewards[:1])


def test_the_judge_detects_less_after_correction_and_nothing_where_it_fails() -> None:
    one, six = (judge_resolution(0.5, 80, count, judge_range=1.0, auc_low=0.7).detects for count in (1, 6))
    assert one is not None
    assert six is not None
    assert one == pytest.approx(0.5 / 80**0.5 * 2.84, abs=0.003)
    assert six > 1.2 * one
    failed = judge_resolution(0.08, 8, 6, judge_range=0.035, auc_low=0.45)
    assert failed == (None, 0.035, "the judge cannot be shown to tell right from wrong answers")
    coarse = judge_resolution(0.08, 8, 6, judge_range=0.035, auc_low=0.55)
    assert coarse.detects is not None
    assert coarse.detects > 0.08
    assert coarse.reason is not None
    assert "judge's whole range" in coarse.reason
