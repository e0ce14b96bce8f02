"""What a reviewer reads, in a real clone that has neither the cache nor the data of the branch."""

import re
import sys
from pathlib import Path

import pytest
from scipy import stats

from pipeline.workspace import Workspace
from prefscan.review import STALE
from prefscan.revisions import VERSIONS_NOTE


@pytest.fixture(scope="module")
def author(sweep: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A branch `tuned`: the recipe at another β, and at a learning rate large enough to change its score; committed."""
    work = sweep.copy(tmp_path_factory.mktemp("author") / "work")
    work.git("checkout", "--quiet", "-b", "tuned")
    work.dvc("exp", "run", "-S", "beta=0.7", "-S", "train.learning_rate=0.05", "-S", "sweep=none")
    work.commit("Try a larger β")
    return work


@pytest.fixture
def clone(author: Workspace, tmp_path: Path) -> Workspace:
    found = author.clone(tmp_path / "clone")
    found.environment = found.environment | {"PYTHONPATH": "src"}
    return found


def review(clone: Workspace, *arguments: str, fails: bool = False) -> str:
    return clone.run(sys.executable, "-m", "prefscan.review", "origin/main", *arguments, fails=fails)


def by_question(workspace: Workspace, cell: str) -> list[float]:
    return [score for _, score in sorted(workspace.json(f"metrics/mtbench/{cell}.json")["questions"].items())]


def test_a_branch_that_changes_beta_shows_the_recipes_difference(
    author: Workspace, sweep: Workspace, clone: Workspace
) -> None:
    text = review(clone, "--charts", "https://example.org/raw/")
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
    assert "Not the recipe alone changed, and the difference is of all: train.learning_rate 0.0005 → 0.05." in text
    assert "Models that both have: 1; with other scores: 0." in text  # the base
    assert re.search(r"^\| metrics/summary\.json +\| recipe\.score +\|", text, re.MULTILINE)
    charts = re.findall(r"!\[(\w+)\]\(https://example\.org/raw/(\w+)\.png\)", text)
    assert charts == [(name, name) for name in ("score", "differences", "divergence", "margin")]
    assert all((clone.folder / f"reports/charts/{name}.png").exists() for name, _ in charts)
    assert not (clone.folder / "metrics/mtbench").exists()  # all of it without data


def test_a_stale_lock_fails_with_the_list_of_stale_stages(clone: Workspace) -> None:
    code = clone.folder / "src/prefscan/losses.py"
    code.write_text(code.read_text() + "\n# touched\n")
    text = review(clone, fails=True)
    listed = re.findall(r"^- `(\S+)`$", text, re.MULTILINE)
    of_cells = {f"{stage}@sigmoid-0.7-3" for stage in ("train", "merge", "answer", "mtbench")}
    assert len(listed) == len(set(listed))
    assert set(listed) == {"check", *of_cells, "report"}
    assert f"**`dvc.lock` is stale: {len(listed)} stages" in text
    done = clone.run("sh", "-c", f"{sys.executable} -m prefscan.review origin/main > review.md; echo $?")
    assert done.strip().endswith(str(STALE))
    assert (clone.folder / "review.md").read_text() == text


def test_other_changes_than_the_recipe_are_named(clone: Workspace) -> None:
    params = clone.folder / "params.yaml"
    params.write_text(params.read_text().replace("\nseed: ", "\nseed: 1"))
    pins = clone.folder / "constraints.txt"
    pins.write_text(re.sub(r"(?m)^trl==.*$", "trl==9.9.9", pins.read_text()))
    text = review(clone, fails=True)  # the seed makes the lock stale
    assert re.search(r"the difference is of all: train\.learning_rate .*, seed 0 → 10, trl \S+ → 9\.9\.9\.", text)
    assert VERSIONS_NOTE in text


def test_a_base_without_the_scores_gets_the_rest(clone: Workspace) -> None:
    clone.git("checkout", "--quiet", "-b", "old", "origin/main")
    clone.git("rm", "--quiet", "reports/questions.csv")
    clone.commit("Lose the scores")
    clone.git("checkout", "--quiet", "tuned")
    text = clone.run(sys.executable, "-m", "prefscan.review", "old")
    assert "No paired difference: old has no reports/questions.csv in git" in text
    assert "recipe.margin" in text


def test_an_unknown_base_ends_with_a_sentence(clone: Workspace) -> None:
    text = clone.run(sys.executable, "-m", "prefscan.review", "nowhere", fails=True)
    assert text == "prefscan: dvc params diff --md nowhere: ERROR: unknown Git revision 'nowhere'\n"
