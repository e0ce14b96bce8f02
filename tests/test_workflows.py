"""What the workflows hold against a pull request from a fork: pinned actions, few rights, no foreign code."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / ".github/workflows"
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in FOLDER.glob("*.yaml")}
MAY_WRITE = {("review-comment.yaml", "pull-requests")}


def steps(name: str) -> list[Any]:
    return [step for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned_by_hash(name: str) -> None:
    for step in steps(name):
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"])


@pytest.mark.parametrize("name", WORKFLOWS)
def test_rights_are_read_only_but_for_the_one_comment(name: str) -> None:
    workflow = WORKFLOWS[name]
    granted = [workflow["permissions"], *(job.get("permissions", {}) for job in workflow["jobs"].values())]
    assert all(isinstance(rights, dict) for rights in granted)
    for rights in granted:
        for scope, right in rights.items():
            assert right == "read" or (name, scope) in MAY_WRITE
    assert "pull_request_target" not in workflow[True]  # YAML's `on`
    assert not re.search(r"\$\{\{\s*secrets\b", (FOLDER / name).read_text())


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_script_has_an_expression_in_it(name: str) -> None:
    """A branch name within `${{ }}` in a script would run as a command; through the environment it is text."""
    assert not [step["run"] for step in steps(name) if "${{" in step.get("run", "")]


def test_the_workflow_with_a_right_to_write_runs_nothing_of_the_pull_request() -> None:
    used = {step["uses"].split("@")[0] for step in steps("review-comment.yaml") if "uses" in step}
    assert used == {"actions/download-artifact"}
    scripts = " ".join(step.get("run", "") for step in steps("review-comment.yaml"))
    assert not re.search(r"\b(python|make|bash|sh|source|eval)\b", scripts)
    assert WORKFLOWS["review-comment.yaml"][True]["workflow_run"]["workflows"] == [WORKFLOWS["review.yaml"]["name"]]


def test_the_review_has_the_history_in_which_its_merge_base_is() -> None:
    (checkout,) = (step for step in steps("review.yaml") if step.get("uses", "").startswith("actions/checkout@"))
    assert checkout["with"]["fetch-depth"] == 0
