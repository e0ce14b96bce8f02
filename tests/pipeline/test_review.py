"""What a reviewer reads, in a real clone that has neither the cache nor the data of the branch."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from scipy import stats

from git_data import branch, make_repository
from pipeline.workspace import Workspace, of_cells, stages_run
from prefscan.common.errors import UserError
from prefscan.review.pull_request import STALE, difference_section, rows_or
from prefscan.review.revisions import VERSIONS_NOTE, read_revision
from sweep_data import CELLS


@pytest.fixture(scope="module")
def author(sweep: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A branch `tuned`: the recipe at another β, and at a learning rate large enough to change its score; committed.

    What DVC printed is in `ran.txt` beside the workspace.
    """
    work = sweep.copy(tmp_path_factory.mktemp("author") / "work")
    work.git("checkout", "--quiet", "-b", "tuned")
    ran = work.dvc("exp", "run", "-S", "beta=0.7", "-S", "train.learning_rate=0.05", "-S", "sweep.loss=sigmoid")
    (work.folder.parent / "ran.txt").write_text(ran)
    work.commit("Try a larger β")
    return work


@pytest.fixture
def clone(author: Workspace, tmp_path: Path) -> Workspace:
    found = author.clone(tmp_path / "clone")
    found.environment = found.environment | {"PYTHONPATH": "src"}
    return found


def review(clone: Workspace, *arguments: str, fails: bool = False) -> str:
    return clone.run(sys.executable, "-m", "prefscan", "review", "origin/main", *arguments, fails=fails)


def by_question(workspace: Workspace, cell: str) -> list[float]:
    return [score for _, score in sorted(workspace.json(f"metrics/mtbench/{cell}.json")["questions"].items())]


def test_a_new_beta_runs_only_its_cells_and_shows_in_the_diff(
    author: Workspace, sweep: Workspace, tmp_path: Path
) -> None:
    ran = (author.folder.parent / "ran.txt").read_text()
    assert set(stages_run(ran)) == of_cells("sigmoid-0.7-3") | {"check", "report"}
    # The recipe's β replaced 0.1: the sweep around it was empty.
    assert yaml.safe_load((author.folder / "params.yaml").read_text())["grid"]["beta"] == [0.7]
    diff = author.dvc("metrics", "diff", "--all", "main")
    for metric in ("score", "margin"):
        row = next(line.split() for line in diff.splitlines() if f" recipe.{metric} " in line)
        before, after = sweep.json("metrics/summary.json"), author.json("metrics/summary.json")
        assert float(row[2]) == pytest.approx(before["recipe"][metric], abs=1e-4)
        assert float(row[3]) == pytest.approx(after["recipe"][metric], abs=1e-4)
        assert row[2] != row[3]
    # Back on the parameters of before nothing but the report, which had read other cells, may run.
    work = author.copy(tmp_path / "work")
    work.git("checkout", "--quiet", "main")
    assert set(stages_run(work.dvc("repro"))) <= {"check", "report"}
    assert work.git("status", "--short") == ""


def test_a_branch_that_changes_beta_shows_the_recipes_difference(
    author: Workspace, sweep: Workspace, clone: Workspace
) -> None:
    text = review(clone, "--charts", "https://example.org/raw/")
    assert text.startswith("# This sweep against origin/main\n\n")
    assert "no stage is stale" in text
    assert re.search(r"^\| params\.yaml +\| beta +\| 0\.1 +\| 0\.7 +\|$", text, re.MULTILINE)
    old, new = sweep.json("metrics/summary.json")["recipe"], author.json("metrics/summary.json")["recipe"]
    assert (old["cell"], new["cell"]) == ("sigmoid-0.1-3", "sigmoid-0.7-3")
    for cell, name, recipe in (("sigmoid-0.1-3", "origin/main", old), ("sigmoid-0.7-3", "workspace", new)):
        interval = f"[{recipe['score_low']:.2f}, {recipe['score_high']:.2f}]"
        assert f"`{cell}` in {name} scores {recipe['score']:.2f} {interval}" in text
    found = stats.ttest_rel(by_question(author, "sigmoid-0.7-3"), by_question(sweep, "sigmoid-0.1-3"))
    low, high = found.confidence_interval()
    difference = new["score"] - old["score"]
    assert f"the difference is **{difference:+.2f} [{low:+.2f}, {high:+.2f}]**, paired over 8 questions" in text
    assert difference != 0
    assert "Beside the recipe, other settings changed, and the difference is of all: train.learning_rate " in text
    assert "train.learning_rate 0.0005 → 0.05." in text
    assert "Models that both have: 1; with other scores: 0." in text  # the base
    assert "Cells that only origin/main has: sigmoid-0.1-3, kto_pair-0.1-3." in text
    assert "Cells that only workspace has: sigmoid-0.7-3." in text
    assert re.search(r"^\| metrics/summary\.json +\| recipe\.score +\|", text, re.MULTILINE)
    charts = re.findall(r"!\[(\w+)\]\(https://example\.org/raw/(\w+)\.png\)", text)
    assert charts == [(name, name) for name in ("score", "differences", "margin")]
    assert all((clone.folder / f"reports/charts/{name}.png").exists() for name, _ in charts)
    assert not (clone.folder / "metrics/mtbench").exists()  # all of it without data


def test_a_stale_lock_fails_with_the_list_of_stale_stages(clone: Workspace) -> None:
    code = clone.folder / "src/prefscan/training/losses.py"
    code.write_text(code.read_text() + "\n# touched\n")
    done = clone.run("sh", "-c", f"{sys.executable} -m prefscan review origin/main > review.md; echo $?")
    assert done.strip().endswith(str(STALE))
    text = (clone.folder / "review.md").read_text()
    listed = re.findall(r"^- `(\S+)`$", text, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == {"check", *of_cells("sigmoid-0.7-3"), "report"}
    assert f"**`dvc.lock` is stale: {len(listed)} stages" in text


def test_other_changes_than_the_recipe_are_named(clone: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    params = clone.folder / "params.yaml"
    params.write_text(params.read_text().replace("\nseed: ", "\nseed: 1"))
    pins = clone.folder / "constraints.txt"
    pins.write_text(re.sub(r"(?m)^trl==.*$", "trl==9.9.9", pins.read_text()))
    monkeypatch.chdir(clone.folder)
    text = difference_section(read_revision("origin/main"), read_revision(None))
    assert re.search(r"the difference is of all: train\.learning_rate .*, seed 0 → 10, trl \S+ → 9\.9\.9\.", text)
    assert VERSIONS_NOTE in text


def test_results_that_git_has_lost_are_stale(clone: Workspace) -> None:
    clone.git("rm", "--quiet", "-r", "reports", "metrics")
    clone.commit("Lose the results")
    done = clone.run("sh", "-c", f"{sys.executable} -m prefscan review origin/main > review.md; echo $?")
    assert done.strip().endswith(str(STALE))
    text = (clone.folder / "review.md").read_text()
    assert "2 stages have not run with these parameters and this code, or their results are missing" in text
    assert re.findall(r"^- `(\S+)`$", text, re.MULTILINE) == ["judge-check", "report"]
    missing = dict(re.findall(r"^- `(\S+)` of `(\S+)`$", text, re.MULTILINE))
    reports = [f"reports/{name}" for name in ("cells.csv", "charts", "questions.csv", "report.md")]
    assert missing == dict.fromkeys([*reports, "metrics/summary.json"], "report") | {
        "metrics/judge.json": "judge-check"
    }
    assert "No paired difference: metrics/summary.json is missing" in text


def test_what_the_base_did_since_is_not_the_branchs(clone: Workspace) -> None:
    clone.git("checkout", "--quiet", "-b", "onwards", "origin/main")
    params = clone.folder / "params.yaml"
    params.write_text(params.read_text().replace("\nthreads: 1\n", "\nthreads: 7\n"))
    summary = clone.folder / "metrics/summary.json"
    summary.write_text(json.dumps(clone.json("metrics/summary.json") | {"pairs": 12345}))
    clone.commit("Go on")
    clone.git("checkout", "--quiet", "tuned")
    left = clone.git("rev-parse", "--short", "origin/main").strip()
    text = clone.run(sys.executable, "-m", "prefscan", "review", "onwards")
    assert text.startswith(f"# This sweep against {left}, the merge base with onwards\n\n")
    assert f"`sigmoid-0.1-3` in {left} scores" in text
    assert "threads" not in text
    assert "12345" not in text


def test_a_base_that_shares_no_commit_ends_with_a_sentence(author: Workspace, clone: Workspace, tmp_path: Path) -> None:
    clone.git("checkout", "--quiet", "--orphan", "unrelated")
    clone.commit("Begin")
    text = clone.run(sys.executable, "-m", "prefscan", "review", "origin/main", fails=True)
    assert text == "prefscan: origin/main and HEAD share no commit; name the base that HEAD left\n"
    author.git(
        "clone", "--quiet", "--depth", "1", "--no-single-branch", f"file://{author.folder}", f"{tmp_path}/shallow"
    )
    text = review(Workspace(tmp_path / "shallow", clone.environment), fails=True)
    words = "this clone is shallow, so `git fetch --unshallow`"
    assert text == f"prefscan: origin/main and HEAD share no commit; {words}\n"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics/summary.json", "[]", r"old: metrics/summary\.json: expected keys and values, found \[\]"),
        ("params.yaml", "", r"old: params\.yaml: expected keys and values, found None"),
    ],
)
def test_a_base_with_a_file_damaged_that_dvc_reads_too_gets_the_rest(
    clone: Workspace, file: str, text: str, message: str
) -> None:
    clone.git("checkout", "--quiet", "-b", "old", "origin/main")
    (clone.folder / file).write_text(text)
    clone.commit("Damage a file")
    clone.git("checkout", "--quiet", "-b", "next")
    for path in ("params.yaml", "dvc.lock", "metrics", "reports"):
        clone.git("checkout", "--quiet", "tuned", "--", path)
    clone.commit("Mend it")
    text = clone.run(sys.executable, "-m", "prefscan", "review", "old")
    assert re.search(rf"^No paired difference: {message}; run `dvc (exp run|repro)` there", text, re.MULTILINE)
    assert "no stage is stale" in text
    assert re.search(r"^\| params\.yaml +\| beta +\|", text, re.MULTILINE)
    assert "recipe.margin" in text
    assert "](reports/charts/score.png)" in text


def test_an_unknown_base_ends_with_a_sentence(clone: Workspace) -> None:
    text = clone.run(sys.executable, "-m", "prefscan", "review", "nowhere", fails=True)
    assert text == "prefscan: 'nowhere' names no commit; name a branch, tag, commit or DVC experiment\n"


def test_the_same_recipe_by_a_renamed_judge_on_another_processor_is_the_same(in_tmp: Path, reported: Path) -> None:
    make_repository(reported)

    def rounded(scores: pd.DataFrame) -> pd.DataFrame:
        scores[["base", *CELLS]] -= 1e-5
        return scores

    branch("same", lambda params: params["judge"].update(name="other"), rounded)
    branch("threads", lambda params: params.update(threads=7))
    branch("moved", change_scores=lambda scores: scores.assign(base=scores["base"] + 1))
    main = read_revision("main")
    text = difference_section(main, read_revision("same"))
    assert "every one of 8 questions has the same score, to 0.01 points." in text
    assert "Models that both have: 5; with other scores: 0." in text
    assert "settings changed" not in text
    assert (
        f"The recipe is the same; other settings changed: threads {main.params['threads']} → 7."
        in difference_section(main, read_revision("threads"))
    )
    assert "with other scores: 1 (base)." in difference_section(main, read_revision("moved"))


def test_the_verdict_is_of_the_questions_that_both_asked(in_tmp: Path, reported: Path) -> None:
    make_repository(reported)
    main = read_revision("main")

    def moved(by: list[float]) -> Callable[[pd.DataFrame], pd.DataFrame]:
        return lambda scores: scores.assign(**{main.recipe: scores[main.recipe] + by})

    branch("better", change_scores=moved([1, 1, 1, 1, 1, 1, 0, -0.5]))
    branch("noisy", change_scores=moved([1, -1] * 4))
    branch("fewer", change_scores=lambda scores: moved([0.5] * 7)(scores.drop(index=81)))
    better = difference_section(main, read_revision("better"))
    assert "**+0.69 [" in better
    assert "(6 won, 1 tied, 1 lost; p = 0.01" in better
    assert "more than the choice of questions explains" in better
    assert "no evidence that one is better" in difference_section(main, read_revision("noisy"))
    assert "the difference is **+0.50 [+0.50, +0.50]**, paired over 7 questions" in difference_section(
        main, read_revision("fewer")
    )


def test_scores_on_other_scales_have_no_difference(in_tmp: Path, reported: Path) -> None:
    make_repository(reported)
    branch("pairs", lambda params: params["judge"].update(mode="pair"))
    with pytest.raises(UserError, match=r"^main, pairs: judge\.mode is pair and single, whose scores"):
        difference_section(read_revision("main"), read_revision("pairs"))


def test_a_table_of_headings_alone_says_that_nothing_changed() -> None:
    head = "| Path | Param |\n|---|---|\n"
    assert rows_or(f"{head}\n", "No parameter changed.") == "No parameter changed."
    assert rows_or(f"{head}| a | b |\n\n", "No parameter changed.") == f"{head}| a | b |"
