"""dvc.yaml declares what the code does: every stage's modules against its real imports.

Its parameters against the real reads: tests/pipeline/test_declared.py, which runs the stages.
"""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def stage_module(name: str) -> str:
    return {"answer-base": "answer", "judge-check": "judge_check", "mtbench-base": "mtbench"}.get(name, name)


def body(name: str) -> dict[str, Any]:
    return STAGES[name].get("do", STAGES[name])


def unit(path: Path) -> str:
    """A file at the top of the package stands for itself, one in a subpackage for its folder, which loads by name."""
    parts = path.relative_to(SOURCE).parts
    return "/".join(("src", *parts[:2]))


def imports(path: Path) -> set[Path]:
    """The prefscan files that a file imports, at the top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] == "prefscan":
                base = SOURCE / name.replace(".", "/")
                found |= {p for p in (base.with_suffix(".py"), base / "__init__.py") if p.exists()}
    return found


def closure(path: Path) -> set[str]:
    """The units of all files that running a module imports, itself included."""
    todo, seen = {path, SOURCE / "prefscan/__init__.py"}, set()
    while todo:
        file = todo.pop()
        seen.add(file)
        package = file.parent
        # A subpackage loads its modules by name, so all of them belong to the closure.
        more = set(package.glob("*.py")) if package != SOURCE / "prefscan" else set()
        todo |= (imports(file) | more) - seen
    return {unit(file) for file in seen}


@pytest.mark.parametrize("name", STAGES)
def test_declared_modules_are_the_imported_ones(name: str) -> None:
    declared = {dep for dep in body(name)["deps"] if dep.startswith("src/")}
    templates = {"src/prefscan/templates"} if name == "report" else set()
    assert declared == closure(SOURCE / f"prefscan/{stage_module(name)}.py") | templates


def test_what_computes_has_the_threads_of_the_parameters_in_its_command() -> None:
    """So that a change of them is a change of the stage."""
    free = {"check", "fetch", "prepare", "report"}
    for name in STAGES:
        assert body(name)["cmd"].startswith("OMP_NUM_THREADS=${threads} ") == (name not in free), name
