"""What DVC is asked, in a small repository of real stages; test_clones.py has what a clone is spared."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from git_data import git
from prefscan.pipeline import stale_stages


@pytest.fixture
def finished(in_tmp: Path) -> Path:
    """check → train of two cells → merge of each → report, all of which have run."""

    def stage(reads: list[str], writes: str) -> dict[str, object]:
        return {"cmd": f"cat {' '.join(reads)} > {writes}", "deps": reads, "outs": [writes]}

    cells = {"foreach": ["a", "b"]}
    stages = {
        "check": {"cmd": "echo valid > checked.txt", "deps": ["params.txt"], "outs": ["checked.txt"]},
        "train": cells | {"do": stage(["checked.txt", "${item}.txt"], "adapter-${item}.txt")},
        "merge": cells | {"do": stage(["adapter-${item}.txt"], "merged-${item}.txt")},
        "report": stage(["merged-a.txt", "merged-b.txt"], "report.txt"),
    }
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    for name in ("params", "a", "b"):
        Path(f"{name}.txt").write_text(f"{name}\n")
    git("init", "--quiet", "--initial-branch", "main")
    for command in ("init", "repro"):
        subprocess.run([sys.executable, "-m", "dvc", command, "--quiet"], check=True)
    return in_tmp


@pytest.mark.usefixtures("finished")
def test_what_reads_a_stale_stage_is_stale_too_though_its_files_are_there() -> None:
    """A launch would plan a cell's training alone, and leave the rest to the one `dvc repro` at its end."""
    assert stale_stages(missing_data_is_stale=True) == []
    Path("a.txt").write_text("another\n")
    for missing in (True, False):
        assert stale_stages(missing_data_is_stale=missing) == ["merge@a", "report", "train@a"]


@pytest.mark.usefixtures("finished")
def test_a_stale_check_makes_nothing_else_stale() -> None:
    Path("params.txt").write_text("others\n")
    assert stale_stages(missing_data_is_stale=True) == ["check"]
