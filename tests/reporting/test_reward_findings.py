"""The sentences of a known reward have the numbers of the tables that they speak of."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from prefscan.common.config import Cell, Params, load
from prefscan.reporting.contrasts import Contrast
from prefscan.reporting.estimates import Estimate
from prefscan.reporting.evaluation import Comparison, Evaluation, cell_table, compare_losses, read_evaluation
from prefscan.reporting.reward_findings import (
    caveats,
    check_sentence,
    contrast_sentence,
    gain_sentence,
    headline,
    kl_sentence,
)
from reward_data import write_evaluation
from sweep_data import BETAS, CELLS, LOSSES

GRID = [Cell(loss=loss, beta=beta, steps=8) for loss in LOSSES for beta in BETAS]
Known = tuple[Evaluation, Comparison, pd.DataFrame, Params]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    root = tmp_path_factory.mktemp("evaluated")
    write_evaluation(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        found = read_evaluation(GRID, nested=True)
        compared = compare_losses(found)
        return found, compared, cell_table(found, compared), load(Path("params.yaml"))


def changed(cells: pd.DataFrame, **columns: list[float | None]) -> pd.DataFrame:
    return cells.assign(**{name: pd.Series(values, dtype=float) for name, values in columns.items()})


def test_the_answer_has_three_sentences_each_on_its_own_question(known: Known) -> None:
    found, compared, cells, _ = known
    first, second, third = headline(found, cells, compared, "P(positive)")
    assert "P(positive)" in first
    assert "sigmoid − ipo" in second
    assert "KL" in third


def test_the_gain_is_of_the_highest_cell_of_each_loss(known: Known) -> None:
    found, _, cells, _ = known
    said = gain_sentence(found, cells, "P(positive)")
    assert f"{found.base_reward:.3f}" in said
    for loss in LOSSES:
        best = cells[cells["loss"] == loss].sort_values("gain").iloc[-1]
        numbers = f"{best['gain']:+.3f} [{best['gain_low']:+.3f}, {best['gain_high']:+.3f}] at β {best['beta']:g}"
        assert f"{loss} {numbers}" in said
    assert f"{(cells['gain_p_holm'] <= 0.05).sum()} of 4 cells" in said


@pytest.mark.parametrize(
    ("gains", "p_values", "verdict", "counts"),
    [
        ([0.1] * 4, [0.01] * 4, "Every loss gains", ["4 of 4 cells"]),
        ([0.1] * 4, [0.05, 0.2, 0.2, 0.2], "sigmoid gains", ["1 of 4 cells"]),
        ([0.1] * 4, [0.06] * 4, "No loss gains", ["0 of 4 cells"]),
        ([0.1, 0.1, -0.1, -0.1], [0.01] * 4, "sigmoid gains", ["2 of 4 cells", "2 lie significantly below"]),
        ([-0.1] * 4, [0.01, 0.2, 0.2, 0.2], "No loss gains", ["0 of 4 cells", "1 lie"]),
    ],
)
def test_a_loss_gains_where_one_of_its_cells_does_significantly(
    known: Known, gains: list[float | None], p_values: list[float | None], verdict: str, counts: list[str]
) -> None:
    found, _, cells, _ = known
    said = gain_sentence(found, changed(cells, gain=gains, gain_p_holm=p_values), "reward")
    assert said.startswith(verdict)
    for count in counts:
        assert count in said
    assert ("below it" in said) == (len(counts) > 1)


def contrast(mean: float, half: float, p: float) -> Contrast:
    return Contrast("sigmoid", "ipo", Estimate(mean, half / 2, mean - half, mean + half, p), p, 0.01)


def test_losses_that_differ_are_named_with_their_difference() -> None:
    said = contrast_sentence([contrast(0.0512, 0.03, 0.02), contrast(-0.0049, 0.02, 0.7)], nested=True)
    assert "The losses differ" in said
    assert "+0.051 [+0.021, +0.081] (p 0.02" in said
    assert "-0.005 [-0.025, +0.015] (p 0.70" in said
    assert "excluded" not in said


def test_where_none_differs_the_largest_difference_that_is_left_is_said() -> None:
    said = contrast_sentence([contrast(0.01, 0.03, 0.3), contrast(-0.02, 0.05, 0.4)], nested=True)
    assert "no loss differs" in said
    assert "more than 0.070 are excluded at 95 %" in said  # −0.02 − 0.05


def test_without_seeds_of_their_own_or_a_second_loss_nothing_is_said_of_losses() -> None:
    shared = contrast_sentence([contrast(0.01, 0.03, 0.01)], nested=False)
    assert not re.search(r"\d\.\d", shared)
    assert "seeding: nested" in shared
    assert not re.search(r"\d", contrast_sentence([], nested=True))


def test_kl_is_said_from_the_smallest_beta_to_the_largest(known: Known) -> None:
    _, compared, cells, _ = known
    said = kl_sentence(cells, compared)
    kl = cells.set_index("cell")["kl"]
    for loss in LOSSES:
        assert f"{loss} {kl[f'{loss}-0.1-8']:.2f} to {kl[f'{loss}-0.5-8']:.2f}" in said
    assert "At equal KL" not in said  # two trainings a loss are no curve
    best = cells.dropna(subset=["share"]).sort_values("share").iloc[-1]
    assert f"{best['cell']}, {best['share']:.0%}" in said


def test_where_no_cell_has_a_share_the_most_that_one_may_have_is_said(known: Known) -> None:
    _, compared, cells, _ = known
    none: list[float | None] = [None] * 4
    said = kl_sentence(changed(cells, share=none, share_at_most=[0.2, 0.31, None, 0.1]), compared)
    assert "31%" in said
    assert "%" not in kl_sentence(changed(cells, share=none, share_at_most=none), compared)


def test_differences_at_equal_kl_are_counted(known: Known) -> None:
    _, compared, cells, _ = known
    at = [
        row._replace(difference=Estimate(mean, 0.01, mean - 0.02, mean + 0.02, p), p_holm=p)
        for row, mean, p in zip(compared.at_equal_kl, (0.01, -0.0443, 0.02), (0.5, 0.2, 0.9), strict=True)
    ]
    said = kl_sentence(cells, Comparison(**vars(compared) | {"at_equal_kl": at}))
    assert "no losses differ significantly (3 comparisons, largest difference 0.044)" in said
    at[1] = at[1]._replace(p_holm=0.05)
    assert "some losses differ" in kl_sentence(cells, Comparison(**vars(compared) | {"at_equal_kl": at}))


AUC = {"value": 0.8412, "low": 0.82, "high": 0.8599}


@pytest.mark.parametrize(
    ("check", "numbers"),
    [
        (
            {"kind": "sentiment", "check": {"held_out_snippets": {"texts": 900, "auc": AUC, "accuracy": AUC}}},
            "0.841 [0.820, 0.860] on 900 held out snippets",
        ),
        ({"kind": "model", "check": {"pairs": 55, "accuracy": AUC}}, "55 pairs"),
        ({"kind": "model", "check": None}, "no check"),
        ({"kind": "checkable", "check": None}, "programs"),
    ],
)
def test_how_the_reward_was_checked_is_said(check: dict[str, Any], numbers: str) -> None:
    assert numbers in check_sentence(check)


def test_the_caveats_have_the_settings_and_what_was_truncated(known: Known) -> None:
    found, compared, cells, params = known
    said = " ".join(caveats(params, found, cells, compared))
    cut = cells["reply_share_truncated"]
    assert f"{cut.min():.0%} to {cut.max():.0%} of the replies" in said
    assert params.sample
    assert f"{params.sample.max_new_tokens} tokens" in said
    assert "At equal KL: a curve needs 4 trainings a loss." in said
    assert "development" not in said
    assert "one finding" not in said


def test_development_prompts_and_cells_that_are_one_are_named(known: Known) -> None:
    found, compared, cells, params = known
    assert params.sample
    development = params.model_copy(update={"sample": params.sample.model_copy(update={"eval_split": "development"})})
    alike = Comparison(**vars(compared) | {"alike": [CELLS[:2]]})
    said = caveats(development, found, cells, alike)
    assert any("sample.eval_split: eval" in line for line in said)
    assert any(line.startswith(f"{CELLS[0]}, {CELLS[1]} are one finding") for line in said)


def test_no_number_is_not_a_number(known: Known) -> None:
    found, compared, cells, params = known
    assert np.isnan([at.difference.mean for at in compared.at_equal_kl]).all()
    lines = [*headline(found, cells, compared, "reward"), *caveats(params, found, cells, compared)]
    assert not re.search(r"\bnan\b", " ".join(lines))
