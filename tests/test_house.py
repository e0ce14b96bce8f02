"""The rules of the house: who imports whom. The folders are prefscan's own."""

import ast
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest

from house import MODULES, PACKAGE, files_of, imported, loaded_by_name
from prefscan.common.config import LocalJudge, OpenAIJudge, Train

SHARED = {"common", "models", "logprobs", "endpoints"}
DOMAINS = SHARED | {"data", "generation", "judging", "merging", "reporting", "rewards", "training"}
ABOVE = {"", "docs", "launch", "repo", "review", "stages"}
# A module that breaks a rule, and the folder that it may not import: to be emptied.
EXCEPTIONS = {
    ("judging/check.py", "reporting"),  # its statistics
    ("repo/pipeline.py", "training"),  # composing refuses a loss that is not defined
}
LIBRARIES = {"dvc", "dvc_data", "git", "scmrepo", "hydra", "omegaconf", "pygit2", "dulwich"}


def folder(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else ""


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def allowed(path: Path) -> set[str]:
    """The folders that a module may import, beside the package itself."""
    own = folder(path)
    match own:
        case "common":
            return {own}
        case "stages":
            return DOMAINS
        case "docs":
            return DOMAINS | {own}
        case "launch" | "review":
            return DOMAINS | {own, "repo"}
        case "repo":
            return {own, "common"}
        case "":
            return {"common"}  # __main__ imports the command's module by its name
        case "rewards":
            return SHARED | {own, "data"}  # whose rows and sources they read
        case _:
            return SHARED | {own}


def test_every_folder_has_its_rule() -> None:
    assert {folder(path) for path in MODULES} <= DOMAINS | ABOVE


def test_modules_import_what_their_folder_may() -> None:
    broken = {
        (name(path), other)
        for path in MODULES
        for other in {folder(file) for file in files_of(imported(path))} - allowed(path) - {""}
    }
    assert broken == EXCEPTIONS


def test_no_stage_imports_another() -> None:
    stages = [path for path in MODULES if folder(path) == "stages"]
    assert [name(path) for path in stages if any(found.startswith("prefscan.stages") for found in imported(path))] == []


@pytest.mark.parametrize("path", [path for path in MODULES if folder(path) != "repo"], ids=name)
def test_repo_alone_talks_to_git_and_dvc(path: Path) -> None:
    assert {found.split(".")[0] for found in imported(path)} & LIBRARIES == set()
    lists = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.List, ast.Tuple))]
    commands = [[ast.unparse(word) for word in node.elts] for node in lists]
    assert [line for line in commands if line[:1] == ["'git'"] or ("'-m'", "'dvc'") in pairwise(line)] == []


def test_packages_run_no_code_when_they_are_imported() -> None:
    """So dvc.yaml need not list their `__init__.py`; prefscan's own is in every stage's list."""
    assert [name(path) for path in MODULES if path.name == "__init__.py" and path.read_text()] == ["__init__.py"]


def test_the_modules_that_a_parameter_names_are_known() -> None:
    """As the closure of a stage has them, against the schema."""
    kinds = [kind.model_fields["kind"].annotation for kind in (LocalJudge, OpenAIJudge)]
    expected = {f"judging/{literal}.py" for kind in kinds for literal in get_args(kind)}
    assert {name(path) for path in loaded_by_name(PACKAGE / "judging/judge.py")} == expected
    layouts = get_args(Train.model_fields["layout"].annotation)
    assert {name(path) for path in loaded_by_name(PACKAGE / "logprobs/layouts.py")} == {
        f"logprobs/{layout}.py" for layout in layouts
    }
