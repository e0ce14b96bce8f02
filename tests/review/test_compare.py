"""Sweeps of several branches in one report: what is in all is paired, and a seed's luck is set apart."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from git_data import branch, make_repository
from prefscan.common.errors import UserError
from prefscan.reporting.stats import crossed_mean, holm
from prefscan.review import compare
from prefscan.review.compare import scores_of, sets_of_seeds, spread_of_seeds
from prefscan.review.revisions import Revision, read_revision, shared_models, shared_questions
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
        lambda params: params["judge"].update(name="second", references="stock"),
        lambda scores: scores.drop(index=81, columns="ipo-0.5-8"),
        {"constraints.txt": "torch==2.13.0\ntrl==1.17.0\n"},
    )


def revisions(*names: str) -> list[Revision]:
    return [read_revision(name) for name in names]


def run(*names: str) -> Page:
    compare.main([*names])
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
        mean_interval = stats.t.interval(0.95, len(moved) - 1, loc=moved.mean(), scale=stats.sem(moved))
        assert (row["score_low"], row["score_high"]) == pytest.approx(mean_interval)
        interval = stats.ttest_rel(moved, first).confidence_interval() if model != "base" else None
        if interval:
            assert (row["difference_low"], row["difference_high"]) == pytest.approx((interval.low, interval.high))
            lead = stats.ttest_rel(moved, known[1].scores.loc[questions, "base"]).confidence_interval()
            assert (row["lead_low"], row["lead_high"]) == pytest.approx((lead.low, lead.high))
        assert row["difference"] == pytest.approx((moved - first).mean())
        counts = (moved > first).sum(), (moved == first).sum(), (moved < first).sum()
        assert (row["wins"], row["ties"], row["losses"]) == counts
        assert pd.isna(table.loc[(model, "main"), "difference"])
    # Holm over all eight comparisons: the smallest of their p-values is multiplied by eight.
    ours = [
        stats.ttest_rel(known[1].scores.loc[questions, m], known[0].scores.loc[questions, m]).pvalue for m in models[1:]
    ]
    assert table["p_holm"].min() == pytest.approx(8 * min(ours))


@pytest.mark.usefixtures("repository")
def test_seeds_become_a_spread() -> None:
    known = revisions("main", "other", "seed1", "seed2")
    (found,) = sets_of_seeds(known, CELLS)
    assert [revision.name for revision in found] == ["main", "seed1", "seed2"]
    assert sets_of_seeds(revisions("main", "other"), CELLS) == sets_of_seeds(revisions("main", "main"), CELLS) == []
    seeds = spread_of_seeds(found, shared_models(found), shared_questions(found))
    assert seeds.names == ["main", "seed1", "seed2"]
    spread = seeds.spread.set_index("cell")
    assert list(spread.index) == CELLS
    for cell in CELLS:
        leads = [(revision.scores[cell] - revision.scores["base"]).to_numpy() for revision in found]
        means = [lead.mean() for lead in leads]
        row = spread.loc[cell]
        array = np.stack(leads, axis=1)
        expected = crossed_mean(array)
        assert (row["lead"], row["lead_low"], row["lead_high"]) == (expected.mean, expected.low, expected.high)
        assert row["lead"] == pytest.approx(np.mean(means))
        # The spread of three means, less what eight questions leave in them (two-way analysis of variance), and of
        # eight means, less what three seeds leave in them.
        rest = array - array.mean(1, keepdims=True) - array.mean(0) + array.mean()
        square = (rest**2).sum() / (7 * 2)
        assert row["seed_sd"] == pytest.approx(max(np.var(means, ddof=1) - square / 8, 0) ** 0.5)
        assert row["question_sd"] == pytest.approx(max(np.var(array.mean(1), ddof=1) - square / 3, 0) ** 0.5)


@pytest.mark.usefixtures("repository")
def test_the_report_says_what_cannot_be_concluded(capsys: pytest.CaptureFixture[str]) -> None:
    page = run("main", "other")
    said = capsys.readouterr().out
    assert page.title == "other against main"
    assert page.leads + page.caveats == said.split("\n\n")[:-1]
    assert "2 revisions, main, other: 3 cells and the base are in all of them, judged on the same 7 questions." in said
    assert "Left out, since another revision lacks them: ipo-0.5-8 of main." in said
    assert "Left out, since another revision did not ask them: 1 question of main." in said
    assert (
        "Their judges are not the same, by judge.references (tiny of main scores a good answer above another "
        "question's with probability 0.53; second of other scores" in said
    )
    assert "Every model has the same score for every question in all of them" in said
    assert "No two revisions differ in the seed alone" in said
    scores, differing = page.tables[-2:]
    assert len(scores) == 1 + 2 * 4
    assert differing[0] == ["parameter", "main", "other"]
    assert differing[1:] == [
        ["judge.references", "corrected", "stock"],
        ["trl", "1.16.0", "1.17.0"],
    ]
    assert {path.name for path in Path("comparison/charts").iterdir()} == {
        f"{name}.{form}" for name in ("scores", "differences") for form in ("svg", "png")
    }


@pytest.mark.usefixtures("repository")
def test_the_report_shows_the_scores_and_the_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    page = run("main", "seed1", "seed2")
    assert page.title == "3 revisions"
    said = capsys.readouterr().out
    known = revisions("main", "seed1", "seed2")
    models, questions = known[0].models, shared_questions(known)
    shifts = {f"{m} in {r.name}": r.scores[m] - known[0].scores[m] for m in models for r in known[1:]}
    means = [shift.mean() for shift in shifts.values()]
    p_values = holm([stats.ttest_1samp(shift, 0).pvalue if shift.any() else 1.0 for shift in shifts.values()])
    (apart,) = (name for name, p in zip(shifts, p_values, strict=True) if p <= 0.05)
    assert (
        f"Paired by question, the models lie {min(means):+.2f} to {max(means):+.2f} from the same in main; with Holm's "
        f"correction over 10 comparisons {apart} differs significantly." in said
    )
    seed_sd = spread_of_seeds(known, models, questions).spread["seed_sd"]
    assert (
        "Over the 3 seeds of main, seed1, seed2, the spread of a cell's lead between trainings is "
        f"{min(seed_sd):.2f} to {max(seed_sd):.2f} points (standard deviation)" in said
    )
    assert "Their judges are not the same" not in said
    bars, differences, scores = page.charts[0], page.charts[1], page.tables[-3]
    columns = {name: [name, f"{name}_low", f"{name}_high"] for name in ("score", "lead", "difference")}
    counted = ["wins", "ties", "losses"]
    assert bars[0] == ["cell", "revision", *columns["score"]]
    assert differences[0] == ["cell", "revision", *columns["difference"], "p_holm", *counted]
    interval = ["95 % low", "95 % high"]
    leads = ["minus its base", *interval, "minus main", *interval]
    assert scores[0] == ["cell", "revision", "score", *interval, *leads, "p, Holm", "won", "tied", "lost"]
    table = scores_of(known, models, questions).set_index(["cell", "revision"])
    place = (models[2], "seed1")
    base, moved = table.loc[("base", "main")], table.loc[place]
    assert scores[1] == ["base", "main", *(f"{value:.2f}" for value in base[columns["score"]]), *["–"] * 10]
    assert scores[1 + 2 * len(known) + 1] == [
        *place,
        *(f"{value:.2f}" for value in moved[columns["score"]]),
        *(f"{value:+.2f}" for value in moved[columns["lead"] + columns["difference"]]),
        f"{moved['p_holm']:.2f}",
        *(f"{value:.0f}" for value in moved[counted]),
    ]
    assert [row[0] for row in page.tables[-1]] == ["cell", *CELLS]
    assert page.tables[-2][1:] == [["seed", *(str(r.params["seed"]) for r in known)]]


@pytest.mark.usefixtures("repository")
def test_what_the_questions_favour_is_no_lead_however_many_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    """The first cell gains on all questions alike; the second as much on average, by what one question favours."""
    everywhere, by_chance = CELLS[:2]
    for seed in range(3):

        def lead(scores: pd.DataFrame, seed: int = seed) -> pd.DataFrame:
            scores[CELLS] = np.stack([scores["base"]] * len(CELLS), axis=1)
            scores[everywhere] += 0.9 + seed / 10 + np.arange(8) / 100
            scores[by_chance] += np.array([8.0, -1, 0, 1, 0, -1, 1, 0]) + seed / 10
            return scores

        branch(f"lead{seed}", lambda params, seed=seed: params.update(seed=200 + seed), lead)
    known = revisions("lead0", "lead1", "lead2")
    spread = spread_of_seeds(known, known[0].models, shared_questions(known)).spread.set_index("cell")
    assert spread.loc[everywhere, "lead_low"] > 0 > spread.loc[by_chance, "lead_low"]
    assert spread.loc[by_chance, "lead"] > 0.9
    leads = {cell: [(sweep.scores[cell] - sweep.scores["base"]).to_numpy() for sweep in known] for cell in CELLS}
    p_values = [crossed_mean(np.stack(leads[cell], axis=1)).p_value for cell in spread.index]
    assert spread["p_holm"].tolist() == holm(p_values).tolist()
    run("lead0", "lead1", "lead2")
    said = capsys.readouterr().out
    assert f"with Holm's correction over 4 cells, the lead of {everywhere} is significant." in said
    run("lead0", "lead1")
    assert "two seeds are too few to tell a lead from their luck." in capsys.readouterr().out


@pytest.mark.usefixtures("repository")
def test_two_sets_of_seeds_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("larger", 0), ("larger1", 101)):
        branch(name, lambda params, seed=seed: params.update(seed=seed, model=params["model"] | {"name": "larger"}))
    page = run("main", "seed1", "larger", "larger1")
    said = capsys.readouterr().out
    for names in ("main, seed1", "larger, larger1"):
        assert f"Over the 2 seeds of {names}, the spread" in said
    assert [row[0] for row in page.tables[-1]] == [row[0] for row in page.tables[-2]] == ["cell", *CELLS]
    page_text = Path("comparison/report.html").read_text()
    assert "Seeds of main, seed1" in page_text
    assert "Seeds of larger, larger1" in page_text


@pytest.mark.usefixtures("repository")
def test_another_processors_rounding_is_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    """All scores a little lower, by as much as would be significant; and the base's in another revision by a point."""
    rounding = -1e-5 - 1e-6 * np.arange(8) / 8

    def move(scores: pd.DataFrame) -> pd.DataFrame:
        scores[["base", *CELLS]] += rounding[:, None]
        return scores

    def raise_base(scores: pd.DataFrame) -> pd.DataFrame:
        return move(scores).assign(base=scores["base"] + 1 + np.arange(8) / 100)

    branch("elsewhere", change_scores=move)
    branch("raised", change_scores=raise_base)
    assert stats.ttest_1samp(rounding, 0).pvalue < 1e-9
    run("main", "elsewhere")
    said = capsys.readouterr().out
    assert "Every model has the same score for every question in all of them, to 0.01 points." in said
    assert "significantly" not in said
    known = revisions("main", "raised")
    table = scores_of(known, known[0].models, shared_questions(known)).dropna(subset="difference").set_index("cell")
    assert table["ties"].to_dict() == {"base": 0} | dict.fromkeys(CELLS, 8)
    assert (table.loc[CELLS, ["difference", "difference_low", "difference_high"]] == 0).all(axis=None)
    run("main", "raised")
    said = capsys.readouterr().out
    assert "with Holm's correction over 5 comparisons base in raised differs significantly." in said
    branch("noisy", change_scores=lambda scores: scores.assign(base=scores["base"] + [1, -1] * 4))
    run("main", "noisy")
    said = capsys.readouterr().out
    assert "the models lie +0.00 to +0.00 from the same in main; with Holm's" in said
    assert "none differs significantly." in said


@pytest.mark.usefixtures("repository")
def test_a_file_in_the_reports_way_is_left_alone() -> None:
    Path("comparison").write_text("notes")
    with pytest.raises(UserError, match=r"^comparison is a file, and the report goes into a folder of that name; move"):
        run("main", "seed1")
    assert Path("comparison").read_text() == "notes"


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["main", "pairs"], "main, pairs: judge.mode is pair and single, whose scores are on other scales; .*"),
        (["", "main"], "'' names no commit; name a branch, tag, commit or DVC experiment"),
        (["main", "main"], "main alone is no comparison; name two or more revisions"),
        (["main", "few"], "main, few: they share 1 questions, and a paired difference needs two"),
        (["main", "apart"], "main, apart: no cell is in all of them; compare sweeps that share losses, β and steps"),
    ],
)
def test_what_cannot_be_compared_ends_with_a_sentence(names: list[str], message: str) -> None:
    branch("pairs", lambda params: params["judge"].update(mode="pair"))
    branch("few", change_scores=lambda scores: scores.head(1))
    summary, recipe = Path("metrics/summary.json"), "sigmoid-0.5-8"
    branch(
        "apart",
        change_scores=lambda scores: scores[["category", "base", recipe]].rename(columns={recipe: "ipo-0.7-8"}),
        files={str(summary): summary.read_text().replace(recipe, "ipo-0.7-8")},
    )
    with pytest.raises(UserError, match=f"^{message}$"):
        run(*names)
    assert not Path("comparison").exists()
