"""Contrasts of losses: by their definition, and by how often they hold in simulated studies of known truth."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, stats

from interval_coverage import PILOT, Truth, best_rate, group_rate, kl_rate, kl_study, study
from prefscan.reporting.contrasts import (
    FORMS,
    SHARED_SEED,
    crossed_estimate,
    equal_kl_contrasts,
    form_errors,
    gains,
    group_contrast,
    loss_contrasts,
    near_duplicates,
    own_best_contrasts,
)
from prefscan.reporting.stats import crossed_mean, holm

LOSSES = ["sigmoid", "ipo", "kto_pair"]


def rewards(losses: int = 3, trainings: int = 6, prompts: int = 60, seed: int = 0) -> NDArray[np.float64]:
    return study(Truth(), losses, trainings, prompts, np.random.default_rng(seed))


def at_most(wrong: float, studies: int, bound: float) -> None:
    """Fails where a true rate of `bound` % gives such a count in fewer than 1 of 1,000 simulations."""
    count = round(wrong * studies / 100)
    assert stats.binom.sf(count - 1, studies, bound / 100) > 0.001, f"{count} of {studies} is above {bound} %"


def test_a_contrast_is_the_paired_mean_over_trainings_and_prompts() -> None:
    array = rewards()
    found = loss_contrasts(array, LOSSES, nested=True)
    assert [(c.first, c.second) for c in found] == list(itertools.combinations(LOSSES, 2))
    for contrast, (a, b) in zip(found, itertools.combinations(range(3), 2), strict=True):
        difference = array[a] - array[b]
        expected = crossed_mean(difference.T)
        assert contrast.difference.mean == pytest.approx(difference.mean())
        assert contrast.difference.standard_error == pytest.approx(expected.standard_error)
    p_values = [c.difference.p_value for c in found]
    assert [c.p_holm for c in found] == pytest.approx(holm(p_values))


def test_what_prompts_and_seeds_share_cancels() -> None:
    array = rewards()
    moved = array + np.random.default_rng(1).normal(0, 5, (6, 1)) + np.random.default_rng(2).normal(0, 5, 60)
    before, after = (loss_contrasts(a, LOSSES, nested=True)[0].difference for a in (array, moved))
    assert after[:5] == pytest.approx(before[:5], rel=1e-6)


def test_one_shared_seed_has_no_interval() -> None:
    for contrast in loss_contrasts(rewards(), LOSSES, nested=False):
        assert contrast.difference[1:] == (None, None, None, None, SHARED_SEED)
        assert (contrast.p_holm, contrast.training_sd) == (None, None)
    gain, kl = kl_study("KL(α − βKL)", 6, 60, 0.01, np.random.default_rng(0))
    assert {c.difference.reason for c in equal_kl_contrasts(gain, kl, LOSSES, nested=False)} == {SHARED_SEED}
    assert {c.difference.reason for c in own_best_contrasts(rewards(), LOSSES, nested=False)} == {SHARED_SEED}


def test_one_training_has_no_interval() -> None:
    found = loss_contrasts(rewards(trainings=1), LOSSES, nested=True)[0]
    assert found.training_sd is None
    assert found.difference.reason == "one training a loss says nothing of the variance between trainings"


def test_repeated_seeds_set_the_points_own_effect_apart() -> None:
    """Losses that depend on β differently: between points that is no luck of a training."""
    points = np.repeat([0, 1, 2], 3)
    difference = rewards(1, 9, 200)[0] - rewards(1, 9, 200, seed=1)[0] + np.array([-0.1, 0, 0.1])[points][:, None]
    (with_points, sd), (without, larger) = crossed_estimate(difference, points), crossed_estimate(difference)
    assert sd is not None
    assert larger is not None
    assert sd < 0.04 < 0.07 < larger
    assert with_points.mean == without.mean
    assert with_points.standard_error is not None
    assert without.standard_error is not None
    assert with_points.standard_error < 0.5 * without.standard_error


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="a name for each of 3 losses, got 2"):
        loss_contrasts(rewards(), LOSSES[:2], nested=True)
    with pytest.raises(ValueError, match="a point for each of 6 trainings"):
        loss_contrasts(rewards(), LOSSES, nested=True, points=[1, 2])
    with pytest.raises(ValueError, match="a KL above 0"):
        equal_kl_contrasts(rewards(), np.zeros((3, 6)), LOSSES, nested=True)
    with pytest.raises(ValueError, match="two groups"):
        group_contrast(rewards(), [True, True, True])


def test_equal_kl_finds_curves_and_their_difference() -> None:
    """Losses on exact curves k(α − βk) of their own: the difference at each KL is known."""
    rng = np.random.default_rng(0)
    _, kl = kl_study("KL(α − βKL)", 6, 60, 0.0, rng)
    alpha = np.array([0.04, 0.05, 0.03])[:, None]
    curve = kl * (alpha - 0.003 * kl)
    noise = rng.normal(0, 0.01, (3, 1, 60))
    found = equal_kl_contrasts(curve[..., None] + noise - noise.mean(axis=2, keepdims=True), kl, LOSSES, nested=True)
    assert len(found) == 9
    for contrast in found:
        assert contrast.kl is not None
        difference = {("sigmoid", "ipo"): -0.01, ("sigmoid", "kto_pair"): 0.01, ("ipo", "kto_pair"): 0.02}
        truth = difference[contrast.first, contrast.second] * contrast.kl
        assert contrast.difference.mean == pytest.approx(truth, abs=1e-6)


def test_the_curve_is_least_squares() -> None:
    gain, kl = kl_study("d(α − βd)", 9, 60, 0.01, np.random.default_rng(3))
    form = "d(α − βd), d = √KL"
    found = equal_kl_contrasts(gain, kl, LOSSES, nested=True, at=[2.0], form=form)[0]
    values = []
    for y, x in zip(gain.mean(axis=2), kl, strict=True):
        (a, b), _ = optimize.curve_fit(lambda k, a, b: np.sqrt(k) * (a - b * np.sqrt(k)), x, y)
        values.append(2**0.5 * (a - b * 2**0.5))
    assert found.difference.mean == pytest.approx(values[0] - values[1], abs=1e-6)


def test_where_losses_do_not_overlap_nothing_is_said() -> None:
    gain = rewards(2)
    kl = np.stack([np.linspace(0.5, 1, 6), np.linspace(2, 3, 6)])
    found = equal_kl_contrasts(gain, kl, LOSSES[:2], nested=True)
    assert len(found) == 1
    assert found[0].kl is None
    assert found[0].difference.reason == "KL reaches 0.5 to 1 and 2 to 3: no KL is common to both"
    beyond = equal_kl_contrasts(gain, kl - [[0.0], [1.5]], LOSSES[:2], nested=True, at=[0.7, 1.4])
    assert [c.difference.low is None for c in beyond] == [False, True]
    assert beyond[1].difference.reason == "both losses reach KL 0.5 to 1 only"
    few = equal_kl_contrasts(gain[:, :3], kl[:, :3] - [[0.0], [1.5]], LOSSES[:2], nested=True)
    assert few[0].difference.reason == "a curve needs 4 trainings a loss"


def test_the_leave_one_out_error_is_that_of_leaving_one_out() -> None:
    gain, kl = np.array(PILOT["gain"]), np.array(PILOT["kl"])
    for name, error in form_errors([gain], [kl]).items():
        left_out = []
        for i in range(len(kl)):
            keep = np.arange(len(kl)) != i
            coefficients, *_ = np.linalg.lstsq(FORMS[name](kl[keep]), gain[keep], rcond=None)
            left_out.append(gain[i] - (FORMS[name](kl[i : i + 1]) @ coefficients)[0])
        assert error == pytest.approx(np.mean(np.square(left_out)) ** 0.5)


def test_the_pilots_cells_prefer_a_curve_in_kl() -> None:
    errors = form_errors([PILOT["gain"]], [PILOT["kl"]])
    assert min(errors, key=errors.__getitem__) == "KL(α − βKL)"


def test_own_best_chooses_on_one_half_and_tests_on_the_other() -> None:
    """A point that is best by luck on one half alone gains nothing from it: its luck is on that half."""
    array = np.zeros((2, 3, 40))
    order = np.random.default_rng(0).permutation(40)
    array[0, 1, order[:20]], array[0, 2, order[20:]] = 1, 1
    array += np.random.default_rng(4).normal(0, 0.01, array.shape)
    found = own_best_contrasts(array, LOSSES[:2], nested=True)[0]
    assert [first for first, _ in found.points] == [1, 2]
    assert found.difference.mean == pytest.approx(0, abs=0.01)


def test_own_best_splits_seeds_where_they_repeat() -> None:
    """Luck of one training of a point is in the half that chooses, not in the one that tests."""
    array = np.random.default_rng(5).normal(0, 0.01, (2, 4, 40))
    array[0, 1] += 1  # point "a" is lucky in its second seed
    array[0, 0] -= 0.1  # and a little worse than "b" in its first
    found = own_best_contrasts(array, LOSSES[:2], nested=True, points=["a", "a", "b", "b"])[0]
    assert [first for first, _ in found.points] == ["b", "a", "b", "a"]
    assert found.difference.mean == pytest.approx(-0.05, abs=0.02)  # chosen by its luck, "a" is tested without it


def test_groups_of_losses_are_weighed_by_loss() -> None:
    array = rewards(5)
    fixed = group_contrast(array, [True, True, False, False, False], random=False)
    assert fixed.mean == pytest.approx(array[:2].mean() - array[2:].mean())
    kinds = group_contrast(array, [True, True, False, False, False])
    assert kinds.mean == pytest.approx(fixed.mean)
    one = group_contrast(array, [True, False, False, False, False])
    assert one.reason == "a group of one loss says nothing of other losses of its kind"


def test_kinds_of_losses_are_welchs_test_where_losses_vary_most() -> None:
    effects = np.random.default_rng(6).normal(0, 1, (7, 1, 1))
    array = rewards(7) + effects
    first = np.arange(7) < 3
    expected = stats.ttest_ind(array[first].mean(axis=(1, 2)), array[~first].mean(axis=(1, 2)), equal_var=False)
    interval = expected.confidence_interval()
    found = group_contrast(array, first.tolist())
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=0.02)


def test_gains_are_paired_and_corrected() -> None:
    array = rewards(4, 1, 80)[:, 0]
    found = gains(array[1:] + np.array([[0.1], [0], [0]]), array[0], list("abc"))
    assert [g.cell for g in found] == list("abc")
    assert found[0].gain.mean == pytest.approx((array[1] - array[0]).mean() + 0.1)
    p_values = [g.gain.p_value for g in found]
    assert [g.p_holm for g in found] == pytest.approx(holm(p_values))
    few = gains([[1.0] * 8], [0.0] * 8, ["a"])[0]
    assert (few.gain.p_value, few.p_holm) == (None, None)
    with pytest.raises(ValueError, match="needs 2 cells over 80 prompts"):
        gains(array[1:], array[0], ["a", "b"])


def test_near_duplicates_are_named_as_one() -> None:
    """Cells of one loss at two β with margins that correlate 0.99 are one; scale and shift do not tell them apart."""
    rng = np.random.default_rng(7)
    values = rng.normal(0, 1, (3, 200)).repeat(2, axis=0) + rng.normal(0, 0.1, (6, 200))
    values[1] = 3 * values[1] + 2
    assert near_duplicates(values, list("abcdef")) == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert near_duplicates(values + rng.normal(0, 0.3, values.shape), list("abcdef")) == [[c] for c in "abcdef"]
    assert near_duplicates(values[:1], ["a"]) == [["a"]]
    assert near_duplicates([[1.0, 1], [1, 1], [2, 2], [0, 1]], list("abcd")) == [["a", "b"], ["c"], ["d"]]


def test_every_two_cells_of_a_group_correlate() -> None:
    """A chain, each link at 0.985, has ends that do not: complete linkage cuts it."""
    rng = np.random.default_rng(8)
    steps = np.linalg.qr(rng.normal(size=(400, 5)))[0].T
    angles = np.arccos(0.985) * np.arange(5)
    chain = np.cos(angles)[:, None] * steps[0] + np.sin(angles)[:, None] * steps[1]
    for group in near_duplicates(chain, list("abcde")):
        members = chain[["abcde".index(name) for name in group]]
        assert np.corrcoef(members).min() > 0.98 or len(group) == 1


def test_false_alarms_at_equal_kl() -> None:
    one, any_of_nine = kl_rate("d(α − βd)", 6, 64, 0.01, 60)
    at_most(one.wrong, 180, 10)  # three pairs a study share a loss
    at_most(any_of_nine, 60, 8)


def test_false_alarms_at_the_own_best() -> None:
    for points, repeats in ((6, 1), (3, 2)):
        at_most(best_rate(points, repeats, 0.0, 0.03, 80).wrong, 80, 7)


def test_false_alarms_of_groups() -> None:
    at_most(group_rate((3, 3), 0.02, True, 80).wrong, 80, 7)
    at_most(group_rate((3, 3), 0.02, False, 80).wrong, 80, 7)


def test_fixed_losses_say_too_much_of_their_kinds() -> None:
    rng, first = np.random.default_rng(9), [True] * 3 + [False] * 3
    studies = [study(Truth(), 6, 6, 60, rng) + rng.normal(0, 0.05, (6, 1, 1)) for _ in range(60)]
    fixed, kinds = (sum(group_contrast(s, first, random=r).significant for s in studies) for r in (False, True))
    assert fixed > 20 > 10 > kinds
