"""Whose results a commit holds: dvc.lock says so, and the files beside it are held against it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from git_data import git
from prefscan.common.errors import UserError
from prefscan.repo.recorded import differences, refuse_stale
from prefscan.review.revisions import commit_of

PARAMS = {"seed": 0, "train": {"rate": 0.5, "steps": [1, 2]}, "launch": {"cells": 2}}


def dvc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], check=True, capture_output=True)


def commit(message: str) -> None:
    git("add", "--all")
    git("commit", "--quiet", "--allow-empty", "--message", message)


def write_params(**changes: object) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(PARAMS | changes))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """check → train of two cells → report, whose summary and charts git holds; committed as main after `dvc repro`."""
    root = tmp_path_factory.mktemp("recorded") / "work"
    root.mkdir()
    cells = {
        "foreach": ["a", "b"],
        "do": {"cmd": "mkdir -p out && cat code/run.txt > out/${item}.txt && echo ${item} >> out/${item}.txt"}
        | {"deps": ["checked.txt", "code"], "params": ["seed", "train"], "outs": ["out/${item}.txt"]},
    }
    stages = {
        "check": {"cmd": "echo valid > checked.txt", "params": ["seed", "launch"], "outs": ["checked.txt"]},
        "train": cells,
        "report": {
            "cmd": "cat out/*.txt > summary.json; mkdir -p charts; cp summary.json charts/é.svg",
            "deps": ["out"],
            "outs": [{"summary.json": {"cache": False}}, {"charts": {"cache": False}}],
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
        Path("code").mkdir()
        Path("code/run.txt").write_text("first\n")
        Path(".gitignore").write_text("/out\n/checked.txt\n")
        write_params()
        git("init", "--quiet", "--initial-branch", "main")
        dvc("init", "--quiet")
        dvc("repro")
        commit("Start")
    return root


@pytest.fixture
def repository(ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    subprocess.run(["cp", "-r", ran, tmp_path / "work"], check=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def found() -> dict[str, list[str]]:
    commit("Change")
    return differences(commit_of("HEAD"))


@pytest.mark.usefixtures("repository")
def test_a_commit_of_a_run_is_as_recorded_and_one_of_other_seeds_is_not() -> None:
    assert differences(commit_of("main")) == {}
    refuse_stale("main", commit_of("main"))
    git("switch", "--quiet", "-c", "seed1")
    write_params(seed=1, train=PARAMS["train"] | {"rate": 0.25})
    assert found() == {
        "seed is 1 in params.yaml and was 0": ["train@a", "train@b"],
        "train.rate is 0.25 in params.yaml and was 0.5": ["train@a", "train@b"],
    }
    with pytest.raises(UserError) as caught:
        refuse_stale("seed1", commit_of("seed1"))
    assert str(caught.value) == (
        "seed1: its results are not those of its parameters and code, by its dvc.lock: seed is 1 in params.yaml and "
        "was 0 (train@a, train@b); train.rate is 0.25 in params.yaml and was 0.5 (train@a, train@b); run `dvc repro` "
        "there and commit dvc.lock, metrics/ and reports/"
    )
    dvc("repro")
    assert found() == {}


@pytest.mark.usefixtures("repository")
def test_parameters_that_change_no_result_are_no_difference() -> None:
    write_params(launch={"cells": 9}, unknown=1)
    assert found() == {}


@pytest.mark.usefixtures("repository")
def test_a_result_in_git_that_was_edited_is_found() -> None:
    Path("summary.json").write_text("better\n")
    Path("charts/é.svg").write_text("better\n")
    assert found() == {
        "summary.json is another than it wrote": ["report"],
        "charts is another than it wrote": ["report"],
    }


@pytest.mark.usefixtures("repository")
def test_code_and_commands_that_have_not_run_are_found() -> None:
    Path("code/run.txt").write_text("second\n")
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace("cat out/*.txt", "sort out/*.txt"))
    assert found() == {
        "code is another than it read": ["train@a", "train@b"],
        "its command is another in dvc.yaml": ["report"],
    }


@pytest.mark.usefixtures("repository")
def test_stages_that_ran_without_those_after_them_are_found() -> None:
    """Of parameters and code they are, and the summary is not of them; the files between are in DVC's cache alone."""
    Path("code/run.txt").write_text("second\n")
    dvc("repro", "train@a", "train@b")
    assert found() == {"out is another than it read": ["report"]}


@pytest.mark.usefixtures("repository")
def test_a_new_cell_that_has_not_run_is_found() -> None:
    pipeline = yaml.safe_load(Path("dvc.yaml").read_text())
    pipeline["stages"]["train"]["foreach"].append("c")
    Path("dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    assert found()["it has not run"] == ["train@c"]


@pytest.mark.usefixtures("repository")
def test_an_experiment_that_ran_the_check_alone_is_found() -> None:
    dvc("exp", "run", "check", "-S", "seed=3", "--name", "half")
    assert "seed is 3 in params.yaml and was 0" in differences(commit_of("half"))


@pytest.mark.usefixtures("repository")
def test_a_commit_without_a_lock_or_with_a_damaged_pipeline_ends_with_a_sentence() -> None:
    git("rm", "--quiet", "dvc.lock")
    commit("Lose the lock")
    with pytest.raises(UserError, match=r"^old: has no dvc\.lock, .*; run `dvc repro` there and commit"):
        refuse_stale("old", commit_of("HEAD"))
    git("revert", "--no-edit", "HEAD")
    Path("dvc.yaml").write_text(json.dumps({"stages": {"train": 1}}))
    commit("Damage the pipeline")
    with pytest.raises(UserError, match=r"^old: its pipeline cannot be read \("):
        refuse_stale("old", commit_of("HEAD"))
