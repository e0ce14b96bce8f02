"""A DVC experiment beside the branch it came from."""

import sys
from pathlib import Path

import pytest

from pipeline.workspace import Workspace


@pytest.mark.slow
def test_an_experiment_with_another_seed_is_compared_with_its_branch(sweep: Workspace, tmp_path: Path) -> None:
    work = sweep.copy(tmp_path / "work")
    work.dvc("exp", "run", "-S", "seed=1", "-S", "sweep=none", "--name", "seed1")
    work.git("reset", "--hard", "--quiet", "HEAD")  # the workspace has main's files again, the experiment its own
    work.environment = work.environment | {"PYTHONPATH": "src"}
    text = work.run(sys.executable, "-m", "prefscan", "compare", "main", "seed1")
    assert "2 revisions, main, seed1: 1 cell and the base are in all of them, judged on the same 8 questions." in text
    assert "Left out, since another revision lacks them: kto_pair-0.1-3 of main." in text
    assert "Over the 2 seeds of main, seed1, the spread of a cell's lead between trainings is" in text
    report = (work.folder / "comparison/report.md").read_text()
    assert "| seed | 0 | 1 |" in report
    assert work.git("status", "--short") == ""  # a comparison is nobody's output
