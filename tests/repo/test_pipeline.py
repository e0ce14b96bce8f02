"""What DVC is asked, in a small repository of real stages; test_clones.py has what a clone is spared."""

import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import yaml

from git_data import git
from prefscan.common.errors import UserError
from prefscan.repo.pipeline import forget, lost_stages, push_current, stale_stages, take_over


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
def test_a_pipeline_that_dvc_cannot_read_is_no_finished_one() -> None:
    Path("dvc.yaml").write_text("stages: [")
    with pytest.raises(UserError, match=r"^dvc .*repro .*'\./dvc\.yaml' is invalid"):
        stale_stages(missing_data_is_stale=True)


@pytest.mark.usefixtures("finished")
def test_a_lock_without_stages_has_none_to_forget() -> None:
    lock = Path("dvc.lock")
    lock.write_text("schema: '2.0'\n")
    assert lost_stages(["check"], remote=False) == {"check"}
    forget(lock, ["check"])
    assert yaml.safe_load(lock.read_text()) == {"schema": "2.0"}


@pytest.mark.usefixtures("finished")
def test_a_command_of_dvc_that_fails_is_an_error() -> None:
    Path("remote").write_text("no folder\n")
    subprocess.run([sys.executable, "-m", "dvc", "remote", "add", "--default", "shared", "remote"], check=True)
    with pytest.raises(UserError, match="dvc push"):
        push_current([])


@pytest.mark.usefixtures("finished")
def test_a_stale_check_makes_nothing_else_stale() -> None:
    Path("params.txt").write_text("others\n")
    assert stale_stages(missing_data_is_stale=True) == ["check"]


@pytest.mark.parametrize("lock_of", ["here", "another processor"])
def test_what_is_made_elsewhere_is_taken_over_and_the_rest_is_not_run(
    finished: Path, tmp_path_factory: pytest.TempPathFactory, lock_of: str
) -> None:
    for name in ("a", "b"):
        Path(f"{name}.txt").write_text("another\n")
    clone = tmp_path_factory.mktemp("clones") / "clone"
    shutil.copytree(finished, clone)
    (clone / ".dvc/config.local").write_text(f"[cache]\n    dir = {finished / '.dvc/cache'}\n")
    with chdir(clone):
        subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet", "merge@a"], check=True)
    made = yaml.safe_load((clone / "dvc.lock").read_text())["stages"]
    lock = yaml.safe_load(Path("dvc.lock").read_text())
    before = dict(lock["stages"])
    if lock_of == "another processor":  # the right dependencies, and outputs that are in no cache
        out = made["train@a"]["outs"][0] | {"md5": "0" * 32}
        lock["stages"]["train@a"] = made["train@a"] | {"outs": [out]}
        Path("dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    assert take_over(stale_stages(missing_data_is_stale=True), pull=False) == ["train@a", "merge@a"]
    assert Path("merged-a.txt").read_text() == "valid\nanother\n"
    assert Path("merged-b.txt").read_text() == "valid\nb\n"
    after = yaml.safe_load(Path("dvc.lock").read_text())["stages"]
    assert after == before | {name: made[name] for name in ("train@a", "merge@a")}
    assert stale_stages(missing_data_is_stale=True) == ["merge@b", "report", "train@b"]
