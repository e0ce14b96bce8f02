"""What git holds of a revision is read as it was committed, and what is missing is named."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from git_data import branch, git, make_repository
from prefscan.common.errors import UserError
from prefscan.common.libraries import LIBRARIES
from prefscan.launch.runner import SAME
from prefscan.repo.git import commit_of
from prefscan.review.revisions import changed, judge_of, leaves, read_revision, settings
from sweep_data import CATEGORY_OF, CELLS, in_git

ROOT = Path(__file__).parents[2]
OPENAI = yaml.safe_load((ROOT / "conf/judge/gpt4.yaml").read_text())


@pytest.fixture
def repository(in_tmp: Path, reported: Path) -> Path:
    make_repository(reported)
    return in_tmp


def test_a_branch_and_the_workspace_are_read_apart(repository: Path, reported: Path) -> None:
    branch("other", lambda params: params.update(seed=7), lambda scores: scores.assign(base=scores["base"] + 1))
    main, other = read_revision("main"), read_revision("other")
    mean = json.loads((reported / "metrics/mtbench/base.json").read_text())["questions"]
    assert main.scores["base"].to_dict() == {int(n): in_git(score) for n, score in mean.items()}
    assert (other.scores["base"] - main.scores["base"]).to_list() == pytest.approx([1.0] * len(CATEGORY_OF))
    assert (main.name, main.recipe, main.pins) == ("main", "sigmoid-0.5-8", {"torch": "2.13.0", "trl": "1.16.0"})
    assert list(main.scores.columns) == ["category", "base", *CELLS]
    assert changed(settings(main, CELLS), settings(other, CELLS)) == {"seed": (main.params["seed"], 7)}
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace(f"seed: {main.params['seed']}", "seed: 11"))
    assert read_revision(None).params["seed"] == 11
    assert read_revision("main").params == main.params


@pytest.mark.usefixtures("repository")
def test_what_is_missing_is_named() -> None:
    for name in ("nowhere", "", git("rev-parse", "main:metrics"), "main:params.yaml"):
        with pytest.raises(UserError, match=f"^'{name}' names no commit; name a branch, tag, commit or DVC experiment"):
            read_revision(name)
    git("checkout", "--quiet", "-b", "old")
    git("rm", "--quiet", "reports/questions.csv")
    git("commit", "--quiet", "--message", "old")
    with pytest.raises(UserError, match=r"^old has no reports/questions\.csv in git; run `dvc repro` there"):
        read_revision("old")
    with pytest.raises(UserError, match=r"^reports/questions\.csv is missing; run `dvc repro`"):
        read_revision(None)


@pytest.mark.usefixtures("repository")
def test_a_tag_is_its_commit() -> None:
    git("tag", "--annotate", "--message", "first", "first", "main")
    assert git("rev-parse", "first") != commit_of("first") == commit_of("HEAD") == git("rev-parse", "main")


@pytest.mark.usefixtures("repository")
def test_elsewhere_than_in_the_root_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("metrics")
    with pytest.raises(UserError, match=r"metrics is not the root of a git repository; run it in the"):
        read_revision("main")


def test_a_repository_without_a_commit_has_no_revision(in_tmp: Path) -> None:
    git("init", "--quiet", "--initial-branch", "main")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], check=True)
    for name in ("main", "HEAD"):
        with pytest.raises(UserError, match=f"^'{name}' names no commit"):
            read_revision(name)


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("params.yaml", ".*", "{\x00: [", "unacceptable character"),
        ("params.yaml", ".*", "[1]", r"expected keys and values, found \[1\]"),
        ("params.yaml", ".*", "", "expected keys and values, found None"),
        ("params.yaml", "judge:", "judges:", r"judge\.kind is missing"),
        ("metrics/summary.json", ".*", "{", "Expecting property name"),
        ("metrics/summary.json", ".*", "[]", r"expected keys and values, found \[\]"),
        ("metrics/summary.json", '"recipe"', '"recipes"', r"recipe\.cell is missing"),
        ("metrics/summary.json", '"cell": "', '"cell": 1, "was": "', r"recipe\.cell is 1 and no text"),
        ("metrics/summary.json", r'"score": [\d.]+', '"score": null', r"recipe\.score is None and no finite number"),
        ("metrics/summary.json", r'"score_low": [\d.]+', '"score_low": NaN', r"recipe\.score_low is nan and no finite"),
        (
            "metrics/summary.json",
            r'"score_high": [\d.]+',
            f'"score_high": 1{"0" * 309}',
            r"recipe\.score_high is 10+ and no finite",
        ),
        ("metrics/judge.json", ".*", "{}", r"all\.swapped\.auc is missing"),
        ("reports/questions.csv", ".*", "", "No columns to parse"),
        ("reports/questions.csv", ",base", ",basis", "column base is missing"),
        ("reports/questions.csv", r"(83,\w+,)[\d.]+", r"\1", "question 83, base: nan is no finite number"),
        ("reports/questions.csv", r"(83,\w+,)[\d.]+", r"\1good", "question 83, base: good is no finite number"),
        ("reports/questions.csv", r"(83,\w+,)[\d.]+", r"\1inf", "question 83, base: inf is no finite number"),
        ("reports/questions.csv", "\n83,", "\n81,", "question 81 stands twice"),
        ("reports/questions.csv", "sigmoid-0.5-8", "other", r"column sigmoid-0\.5-8 is missing, the recipe of metrics"),
    ],
)
def test_what_cannot_be_read_in_a_committed_file_is_named(file: str, old: str, new: str, message: str) -> None:
    text = Path(file).read_text()
    damaged = re.sub(old, new, text, count=1, flags=re.DOTALL)
    assert damaged != text
    branch("broken", files={file: damaged})
    command = "exp run" if file == "params.yaml" else "repro"
    with pytest.raises(UserError, match=f"^broken: {re.escape(file)}: {message}.*; run `dvc {command}` there"):
        read_revision("broken")
    Path(file).write_text(damaged)
    with pytest.raises(UserError, match=f"^workspace: {re.escape(file)}: {message}"):
        read_revision(None)


def test_leaves_have_dotted_names_and_lists_are_values() -> None:
    assert dict(leaves({"a": {"b": 1, "c": [1, 2]}, "d": None})) == {"a.b": 1, "a.c": [1, 2], "d": None}
    assert changed({"a.b": 1, "c": 2}, {"a.b": 3, "d": 4}) == {"a.b": (1, 3), "c": (2, None), "d": (None, 4)}


@pytest.mark.usefixtures("repository")
def test_the_settings_are_what_decides_a_cells_result() -> None:
    found = settings(read_revision("main"), CELLS)
    assert (found["judge.folder"], found["trl"]) == ("models/base", "1.16.0")
    assert not [name for name in found if name.startswith(("grid", "sweep")) or name in ("loss", "beta", "steps")]


@pytest.mark.usefixtures("repository")
def test_how_a_result_is_reached_is_no_setting_of_it() -> None:
    def change(params: Any) -> None:
        params["judge"] = OPENAI | {"budget": 50.0, "concurrency": 2}
        params["launch"] |= {"cells": 7}
        params["runtime"] |= {"report_to": "wandb", "gradient_checkpointing": True}
        params["agreement"] = {"judgements": "people.jsonl", "answers": "answers.jsonl"}

    branch("first", lambda params: params.update(judge=OPENAI))
    branch("second", change)
    branch("renamed", lambda params: params["judge"].update(name="other"))
    for seconds in (1, 2):
        branch(
            f"wait-{seconds}", lambda params, s=seconds: params["answer"].update(server={"timeout": s, "attempts": s})
        )
    assert changed(settings(read_revision("wait-1"), CELLS), settings(read_revision("wait-2"), CELLS)) == {}
    first, second = read_revision("first"), read_revision("second")
    assert changed(settings(first, CELLS), settings(second, CELLS)) == {}
    assert changed(settings(read_revision("main"), CELLS), settings(read_revision("renamed"), CELLS)) == {}
    assert settings(first, CELLS)["judge.name"] == "gpt-4"
    assert changed(settings(read_revision("main"), CELLS), settings(first, CELLS))["judge.kind"] == ("local", "openai")


@pytest.mark.usefixtures("repository")
def test_a_hyperparameter_is_a_setting_of_its_own_losss_cells_alone() -> None:
    branch("gamma", lambda params: params["losses"]["simpo"].update(gamma=1.0))
    main, gamma = read_revision("main"), read_revision("gamma")
    assert changed(settings(main, CELLS), settings(gamma, CELLS)) == {}
    simpo = [*CELLS, "simpo-0.1-8"]
    assert changed(settings(main, simpo), settings(gamma, simpo)) == {"losses.simpo.gamma": (0.5, 1.0)}


@pytest.mark.usefixtures("repository")
def test_a_local_judge_is_its_weights_and_one_behind_an_api_its_name() -> None:
    main = judge_of(read_revision("main"))
    branch("renamed", lambda params: params["judge"].update(name="other"))
    branch("larger", lambda params: params["model"]["source"].update(file="larger.gguf"))

    def separate(params: Any) -> None:
        params["judge"].update(folder="judges/large")

    branch("elsewhere", separate)
    assert judge_of(read_revision("renamed")) == main
    assert list(changed(main, judge_of(read_revision("larger")))) == ["model.source.file"]
    assert "judge.folder" in changed(main, judge_of(read_revision("elsewhere")))
    branch("gpt4", lambda params: params.update(judge=OPENAI))
    branch("gpt5", lambda params: params.update(judge=OPENAI | {"name": "gpt-5", "folder": "judges/large"}))
    gpt4, gpt5 = judge_of(read_revision("gpt4")), judge_of(read_revision("gpt5"))
    assert changed(gpt4, gpt5) == {"judge.name": ("gpt-4", "gpt-5")}
    branch("greedy", lambda params: params.update(judge=OPENAI | {"temperature": 0.25}))
    assert list(changed(gpt4, judge_of(read_revision("greedy")))) == ["judge.temperature"]
    branch("both", lambda params: (separate(params), params["model"]["source"].update(file="larger.gguf")))
    assert judge_of(read_revision("both")) == judge_of(read_revision("elsewhere"))
    for name in ("base_url", "samples", "max_tokens"):
        branch(f"other-{name}", lambda params, name=name: params.update(judge=OPENAI | {name: "other"}))
        assert list(changed(gpt4, judge_of(read_revision(f"other-{name}")))) == [f"judge.{name}"]


def test_what_decides_a_result_and_what_works_together_is_the_same_on_every_node() -> None:
    assert {*LIBRARIES, "dvc", "ray"} == set(SAME)
