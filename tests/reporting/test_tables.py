"""The report's tables say what the stages' files hold; test_report.py has those that every sweep has."""

import numpy as np
import pytest

from prefscan.judging.check import discrimination
from prefscan.judging.pairs import MODE
from prefscan.reporting.tables import judge_check, spread


def judgements(scores: np.ndarray) -> list[dict[str, float | int]]:
    """Of `[questions, turns, samples]`."""
    return [
        {"question_id": 81 + q, "turn": 1 + t, "sample": s, "score": float(score)}
        for (q, t, s), score in np.ndenumerate(scores)
    ]


def test_the_spread_between_judgements_is_apart_from_that_between_questions() -> None:
    """The one-way analysis of variance over each question's mean of both turns, by hand."""
    draw = np.random.default_rng(0)
    scores = {key: draw.normal(5, 2, (12, 1, 1)) + draw.normal(0, 0.5, (12, 2, 3)) for key in ("base", "ipo-0.1-8")}
    (table,) = spread(("base", "ipo-0.1-8"), {key: judgements(value) for key, value in scores.items()})
    assert list(table.data["cell"]) == ["base", "ipo-0.1-8"]
    for row, value in zip(table.data.to_dict("records"), scores.values(), strict=True):
        means = value.mean(axis=1)  # of both turns; [questions, samples]
        within = means.var(axis=1, ddof=1).mean()
        assert row["judge"] == pytest.approx(within**0.5)
        assert row["question"] == pytest.approx((means.mean(axis=1).var(ddof=1) - within / 3) ** 0.5)


def test_a_judge_that_was_asked_once_has_no_such_table() -> None:
    assert spread(("base",), {"base": judgements(np.ones((4, 2, 1)))}) == []


def test_the_model_that_pairs_are_judged_against_has_no_spread() -> None:
    pairs = judgements(np.random.default_rng(0).choice([0.0, 0.5, 1.0], (12, 2, 3)))
    (table,) = spread(("base", "ipo-0.1-8"), {"base": [], "ipo-0.1-8": pairs})
    assert list(table.data["cell"]) == ["ipo-0.1-8"]


def test_the_check_of_a_judge_of_pairs_has_no_margin() -> None:
    """It is drawn all the same: in every cell of the table there is a value or a dash."""
    # Of three questions: a win over the swapped answer, a tie with the truncated one.
    scores = {"swapped/A": 1.0, "swapped/B": 0.0, "truncated/A": 0.5, "truncated/B": 0.5}
    table = judge_check({"questions": 3, "true_auc": 0.8, "all": discrimination([scores] * 3, MODE)})
    assert list(table.data.columns) == list(table.columns)
    assert list(table.data["auc"]) == [1.0, 0.5]
    assert table.data["margin"].isna().all()
