"""Sweeps of several branches in one report: what is in all is paired, and a seed's luck is set apart."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from git_data import branch, make_repository
from prefscan import compare
from prefscan.compare import scores_of, sets_of_seeds, spread_of_seeds
from prefscan.errors import UserError
from prefscan.revisions import Revision, read_revision, shared_models, shared_questions
from sweep_data import CATEGORY_OF, CELLS, Page

MOVED = {f"seed{seed}": np.random.default_rng(seed).normal(0.3 * seed, 0.5, (8, 4)).round(3) for seed in (1, 2)}


@pytest.fixture
def repository(in_tmp: Path, reported: Path) -> None:
    """main; seed1 and seed2, which differ in the seed alone; other, with less in it, by another judge and TRL."""
    make_repository(reported)
    for seed in (1, 2):

        def move(scores: pd.DataFrame, moved: Any = MOVED[f"seed{seed}"]) -> pd.DataFrame:
            scores[CELLS] += moved
            return scores

        branch(f"seed{seed}", lambda params, seed=seed: params.update(seed=100 + seed), move)
    branch(
        "other",
        lambda params: params["judge"].update(name="second"),
        lambda scores: scores.drop(index=81, columns="ipo-0.5-8"),
        {"constraints.txt": "torch==2.13.0\ntrl==1.17.0\n"},
    )


def revisions(*names: str) -> list[Revision]:
    return [read_revision(name) for name in names]


def run(monkeypatch: pytest.MonkeyPatch, *names: str) -> Page:
    monkeypatch.setattr(sys, "argv", ["compare", *names])
    compare.main()
    return Page(Path("comparison/report.html").read_text())


@pytest.mark.usefixtures("repository")
def test_what_all_have_is_paired_question_by_question() -> None:
    known = revisions("main", "seed1", "other")
    models, questions = shared_models(known), shared_questions(known)
    assert models == ["base", *CELLS[:3]]
    assert list(questions) == list(CATEGORY_OF)[1:]
    table = scores_of(known, models, questions).set_index(["cell", "revision"])
    assert list(table.index) == [(model, revision.name) for model in models for revision in known]
    for model in models:
        first, moved = (revision.scores.loc[questions, model] for revision in known[:2])
        row = table.loc[(model, "seed1")]
        assert row["score"] == pytest.approx(moved.mean())
        interval = stats.ttest_rel(moved, first).confidence_interval() if model != "base" else None
        if interval:
            assert (row["difference_low"], row["difference_high"]) == pytest.approx((interval.low, interval.high))
            lead = stats.ttest_rel(moved, known[1].scores.loc[questions, "base"]).confidence_interval()
            assert (row["lead_low"], row["lead_high"]) == pytest.approx((lead.low, lead.high))
        assert row["difference"] == pytest.approx((moved - first).mean())
        assert pd.isna(table.loc[(model, "main"), "difference"])
    # Holm over all eight comparisons: the smallest of their p-values is multiplied by eight.
    ours = [
        stats.ttest_rel(known[1].scores.loc[questions, m], known[0].scores.loc[questions, m]).pvalue for m in models[1:]
    ]
    assert table["p_holm"].min() == pytest.approx(8 * min(ours))


@pytest.mark.usefixtures("repository")
def test_seeds_become_a_spread() -> None:
    known = revisions("main", "other", "seed1", "seed2")
    (found,) = sets_of_seeds(known)
    assert [revision.name for revision in found] == ["main", "seed1", "seed2"]
    assert sets_of_seeds(revisions("main", "other")) == sets_of_seeds(revisions("main", "main")) == []
    spread = spread_of_seeds(found, shared_models(found), shared_questions(found)).set_index("cell")
    assert list(spread.index) == CELLS
    for cell in CELLS:
        leads = [(revision.scores[cell] - revision.scores["base"]).to_numpy() for revision in found]
        means = [lead.mean() for lead in leads]
        low, high = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
        row = spread.loc[cell]
        assert (row["seeds"], row["lead"]) == (3, pytest.approx(np.mean(means)))
        assert (row["lead_low"], row["lead_high"]) == pytest.approx((low, high))
        # The spread of three means, less what eight questions leave in them (two-way analysis of variance).
        array = np.stack(leads, axis=1)
        rest = array - array.mean(1, keepdims=True) - array.mean(0) + array.mean()
        expected = max(np.var(means, ddof=1) - (rest**2).sum() / (7 * 2) / 8, 0) ** 0.5
        assert row["seed_sd"] == pytest.approx(expected)


@pytest.mark.usefixtures("repository")
def test_the_report_says_what_cannot_be_concluded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = run(monkeypatch, "main", "other")
    said = capsys.readouterr().out
    assert page.title == "other against main"
    assert page.leads == said.split("\n\n")[:-1]
    assert "2 revisions, main, other: 3 cells and the base are in all of them, judged on the same 7 questions." in said
    assert "Left out, since another revision lacks them: ipo-0.5-8 of main." in said
    assert "Left out, since another revision did not ask them: 1 question of main." in said
    assert (
        "Their judges are not the same (tiny ranks a reference above another question's with probability 0.53;" in said
    )
    assert "none differs significantly" in said
    assert "No two revisions differ in the seed alone" in said
    scores, differing = page.tables[-2:]
    assert len(scores) == 1 + 2 * 4
    assert differing == [["parameter", "main", "other"], ["judge.name", "tiny", "second"], ["trl", "1.16.0", "1.17.0"]]
    assert {path.name for path in Path("comparison/charts").iterdir()} == {
        f"{name}.{form}" for name in ("scores", "differences") for form in ("svg", "png")
    }


@pytest.mark.usefixtures("repository")
def test_the_report_shows_the_seeds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = run(monkeypatch, "main", "seed1", "seed2")
    assert page.title == "3 revisions"
    assert "Over 3 seeds, the spread of a cell's lead between trainings is" in capsys.readouterr().out
    assert [row[0] for row in page.tables[-1]] == ["cell", *CELLS]
    assert page.tables[-2][1:] == [["seed", *(str(r.params["seed"]) for r in revisions("main", "seed1", "seed2"))]]


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["main", "main"], "main alone is no comparison; name two or more revisions"),
        (["main", "few"], "main, few: they share 1 questions, and a paired difference needs two"),
        (["main", "apart"], "main, apart: no cell is in all of them; compare sweeps that share losses, β and steps"),
    ],
)
def test_what_cannot_be_compared_ends_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, names: list[str], message: str
) -> None:
    branch("few", change_scores=lambda scores: scores.head(1))
    branch("apart", change_scores=lambda scores: scores[["category", "base"]])
    with pytest.raises(UserError, match=f"^{message}$"):
        run(monkeypatch, *names)
    assert not Path("comparison").exists()
