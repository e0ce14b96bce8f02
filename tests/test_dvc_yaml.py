"""dvc.yaml declares what the code does: every stage's code against its real imports.

Its parameters against the real reads: tests/pipeline/test_declared.py, which runs the stages.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from house import PACKAGE, ROOT, closure
from prefscan.__main__ import STAGES as COMMANDS

TEXT = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
STAGES: dict[str, Any] = yaml.safe_load(TEXT)["stages"]


def body(name: str) -> dict[str, Any]:
    return STAGES[name].get("do", STAGES[name])


def module(name: str) -> Path:
    """The module that a stage's command runs. `__main__.py` only finds it: no stage depends on that."""
    found = re.fullmatch(r"(?:OMP_NUM_THREADS=\$\{threads\} )?\$\{prefscan\} ([\w-]+)(?: \S+)?", body(name)["cmd"])
    assert found is not None, name
    return (PACKAGE / COMMANDS[found[1]].module.replace(".", "/")).with_suffix(".py")


def code(name: str) -> list[Path]:
    """The files and folders of the code that a stage declares."""
    return [ROOT / dep for dep in body(name)["deps"] if dep.startswith("src/")]


@pytest.mark.parametrize("name", STAGES)
def test_what_a_stage_runs_is_declared_and_all_that_is_declared_runs(name: str) -> None:
    declared, runs = code(name), closure(module(name))
    assert sorted(file for file in runs if not any(file.is_relative_to(dep) for dep in declared)) == []
    assert [dep for dep in declared if not any(file.is_relative_to(dep) for file in runs)] == []


def test_nothing_is_declared_twice() -> None:
    for name in STAGES:
        declared = code(name)
        assert len(set(declared)) == len(declared), name
        assert not [dep for dep in declared if any(dep.is_relative_to(other) for other in declared if other != dep)]


def test_it_is_short_enough_to_be_read() -> None:
    assert len(TEXT.splitlines()) <= 300


def test_what_computes_has_the_threads_of_the_parameters_in_its_command() -> None:
    """So that a change of them is a change of the stage."""
    free = {"check", "fetch", "prepare", "report"}
    for name in STAGES:
        assert body(name)["cmd"].startswith("OMP_NUM_THREADS=${threads} ") == (name not in free), name
