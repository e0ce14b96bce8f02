"""Chains in clones of small DVC repositories: what reaches a clone, what comes back, and what is waited for."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.serialize import parse_yaml

from prefscan.common.errors import UserError
from prefscan.launch.clone import (
    Chain,
    Outcome,
    Place,
    Progress,
    new_clone,
    progress_after,
    remove_left_clones,
    run_chain,
    run_supervised,
)
from prefscan.repo.git import changed_since, snapshot, uncommitted
from prefscan.repo.pipeline import dvc_settings, lost_stages, push_current

AUTHOR = ["-c", "user.name=tests", "-c", "user.email=tests@prefscan.invalid"]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *AUTHOR, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def make_repository(command: str) -> None:
    """In the working directory: a committed DVC repository with one stage, `train@a`, that makes `out.txt`."""
    stage = {"foreach": {"a": 1}, "do": {"cmd": command, "deps": ["code.txt"], "outs": ["out.txt"]}}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"train": stage}}))
    Path("code.txt").write_text("first\n")
    Path(".dvc").mkdir()
    Path(".dvc/config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    Path(".gitignore").write_text("/out.txt\n/.prefscan/\n/runs/\n/.dvc/*\n!/.dvc/config\n")
    git("init", "--quiet", "--initial-branch", "main")
    git("add", "--all")
    git("commit", "--quiet", "--message", "Start")


def dvc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    monkeypatch.setenv("FREE", str(tmp_path / "free"))
    return tmp_path


def run(
    repository: Path,
    attempts: int = 1,
    patience: float = 0,
    targets: tuple[str, ...] = ("train@a",),
    **changes: Any,
) -> tuple[Outcome, list[Progress]]:
    cache, _, remote = dvc_settings()
    usual = {"clones": repository / "clones", "cache": cache, "state": repository / "state", "remote": remote}
    place = Place(**usual | {"marker": None} | changes)
    seen: list[Progress] = []
    chain = Chain("a", targets)
    return run_chain(chain, snapshot(), place, attempts, patience, seen.append), seen


def test_progress_is_read_from_what_dvc_and_transformers_print() -> None:
    lines = [
        "Running stage 'train@ipo-0.5-24':\n",
        "> PYTHONPATH=src prefscan train ipo-0.5-24\n",
        "  0%|          | 0/24 [00:00<?, ?it/s]\n",
        "{'loss': '0.6931', 'grad_norm': '1.2', 'learning_rate': '0.0005', 'epoch': '0.04'}\n",
        "  4%|▍         | 1/24 [00:04<01:40,  4.36s/it]\n",
        "Stage 'merge@ipo-0.5-24' is cached - skipping run, checking out outputs\n",
        "  0%|          | 0/272 [00:00<?, ?it/s]\n",
    ]
    progress, seen = Progress(), []
    for line in lines:
        progress = progress_after(line, progress)
        seen.append((progress.stage, progress.step, progress.loss))
    assert seen == [
        ("train", "", ""),
        ("train", "", ""),
        ("train", "0 of 24", ""),
        ("train", "0 of 24", "0.6931"),
        ("train", "1 of 24", "0.6931"),
        ("merge", "", ""),
        ("merge", "", ""),
    ]


def test_a_snapshot_has_what_is_changed_and_new_and_leaves_git_as_it_is(repository: Path) -> None:
    make_repository("true")
    assert uncommitted() == []
    Path("code.txt").write_text("second\n")
    Path("new file.txt").write_text("new\n")
    Path("dvc.lock").write_text("schema: '2.0'\nstages: {a: {cmd: b}, c: {cmd: on}}\n")
    Path("metrics").mkdir()
    Path("metrics/summary.json").write_text("{}\n")
    Path("reports").mkdir()
    Path("reports/report.md").write_text("# Report\n")
    Path("out.txt").write_text("ignored\n")
    before = git("status", "--porcelain")
    assert sorted(uncommitted()) == ["code.txt", "new file.txt"]  # what DVC writes is no change of the user's
    taken = snapshot({"a", "of no entry"})
    with tarfile.open(fileobj=io.BytesIO(taken.archive)) as tar:
        names = {member.name for member in tar if member.isfile()}
        code = tar.extractfile("code.txt")
        assert code is not None
        assert code.read() == b"second\n"
        lock = tar.extractfile("dvc.lock")
        assert lock is not None
        kept = parse_yaml(lock.read().decode(), "dvc.lock")  # text in DVC's YAML
        assert kept == {"schema": "2.0", "stages": {"c": {"cmd": "on"}}}
    assert names >= {"new file.txt", "dvc.lock", "dvc.yaml", ".dvc/config"}
    assert "out.txt" not in names
    assert git("log", "--all", "--format=%s") == "Start"
    assert git("status", "--porcelain") == before
    assert changed_since(taken) == []
    Path("dvc.lock").write_text("stages: {a: b}\n")
    Path("code.txt").write_text("third\n")
    assert changed_since(taken) == ["code.txt"]


def test_outputs_of_dvc_lock_are_lost_where_neither_the_cache_nor_the_remote_has_them(repository: Path) -> None:
    make_repository("echo result > out.txt")
    dvc("remote", "add", "--default", "--local", "shared", str(repository / "remote"))
    assert lost_stages(["train@a"], remote=False) == {"train@a"}  # it has not run
    dvc("repro")
    assert lost_stages(["train@a"], remote=False) == lost_stages([], remote=True) == set()
    lock = Path("dvc.lock").read_text()
    Path("dvc.lock").write_text(lock + lock.partition("stages:\n")[2].replace("train@a", "train@of-another-grid"))
    assert lost_stages(["train@a"], remote=False) == {"train@of-another-grid"}
    Path("dvc.lock").write_text(lock)
    assert lost_stages(["train@a"], remote=True) == {"train@a"}  # a clone elsewhere sees no cache of the workspace
    push_current(["train@a"])
    assert not (repository / "remote").exists()
    push_current([])
    shutil.rmtree(".dvc/cache")
    assert lost_stages(["train@a"], remote=True) == set()
    assert lost_stages(["train@a"], remote=False) == {"train@a"}

    shutil.rmtree(repository / "remote")
    (repository / "remote").write_text("no folder\n")
    with pytest.raises(UserError, match=r"the DVC remote cannot be asked: .*remote"):
        lost_stages(["train@a"], remote=True)

    pipeline = yaml.safe_load(Path("dvc.yaml").read_text())
    pipeline["stages"]["train"]["do"]["outs"] = [{"out.txt": {"cache": False}}]  # what git keeps is in no cache
    Path("dvc.yaml").write_text(yaml.safe_dump(pipeline))
    dvc("repro")
    assert lost_stages(["train@a"], remote=False) == set()
    Path("out.txt").write_text("of another commit\n")
    assert lost_stages(["train@a"], remote=False) == {"train@a"}


@pytest.mark.parametrize("old", [False, True])
def test_a_clone_is_unpacked_by_every_python_3_11(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    """Before 3.11.4, as Debian 12 has it, tarfile knows no filters: extractall takes no such argument."""
    if old:
        monkeypatch.delattr(tarfile, "tar_filter", raising=False)
        unpack = tarfile.TarFile.extractall
        monkeypatch.setattr(tarfile.TarFile, "extractall", lambda self, path: unpack(self, path))
    make_repository("true")
    Path("elsewhere").symlink_to(tmp_path)
    place = Place(tmp_path / "clones", tmp_path / "cache", tmp_path / "state", remote=None, marker=None)
    with new_clone("cell", snapshot(), place) as clone:
        assert (clone / "code.txt").read_text() == Path("code.txt").read_text()
        assert (clone / "elsewhere").readlink() == tmp_path
        assert (clone / "runs").resolve() == tmp_path / "state/runs"
    assert not clone.exists()


def test_what_is_no_repository_is_a_sentence(in_tmp: Path) -> None:
    with pytest.raises(UserError, match="is in no git repository"):
        uncommitted()


def test_a_chain_runs_in_a_clone_and_the_workspace_restores_it(repository: Path) -> None:
    make_repository("cat code.txt > out.txt && echo ran >> $RAN")
    Path("code.txt").write_text("changed and not committed\n")
    outcome, seen = run(repository)
    assert (outcome.name, outcome.error) == ("a", "")
    assert seen == [Progress(), Progress("train")]
    assert not Path("out.txt").exists()
    assert not list((repository / "clones").iterdir())
    dvc("repro")
    assert Path("out.txt").read_text() == "changed and not committed\n"
    assert (repository / "ran").read_text() == "ran\n"  # once, in the clone
    assert "Running stage 'train@a'" in (repository / "state/.prefscan/launch/a.log").read_text()


def test_a_chain_that_fails_shows_its_last_lines_and_is_not_tried_again(repository: Path) -> None:
    make_repository("echo 'prefscan: beta: 0 is refused'; echo ran >> $RAN; exit 1")
    outcome, _ = run(repository, attempts=3)
    assert "prefscan: beta: 0 is refused" in outcome.error
    assert "failed to reproduce 'train@a'" in outcome.error
    assert (repository / "ran").read_text() == "ran\n"
    assert not list((repository / "clones").iterdir())


@pytest.mark.parametrize(("attempts", "ends_well"), [(2, True), (1, False)])
def test_a_stage_that_was_killed_is_tried_again(repository: Path, attempts: int, ends_well: bool) -> None:
    make_repository("echo ran >> $RAN; test $(wc -l < $RAN) -ge 2 || kill -9 $$; echo x > out.txt")
    outcome, _ = run(repository, attempts=attempts)
    assert (outcome.error == "") == ends_well
    assert (repository / "ran").read_text() == "ran\n" * attempts


def test_a_stage_that_is_killed_every_time_ends(repository: Path) -> None:
    make_repository("echo ran >> $RAN; kill -9 $$")
    outcome, _ = run(repository, attempts=3)
    assert "exited with -9" in outcome.error
    assert (repository / "ran").read_text() == "ran\n" * 3


@pytest.mark.parametrize(
    "fault", ["{ echo 'prefscan: a: terminated at update 3 of 9; run it again'; exit 1; }", "kill -9 $PPID"]
)
def test_a_training_that_sigterm_ended_and_a_dvc_that_was_killed_are_tried_again(repository: Path, fault: str) -> None:
    make_repository(f"echo ran >> $RAN; test $(wc -l < $RAN) -ge 2 || {fault}; echo x > out.txt")
    outcome, _ = run(repository, attempts=2)
    assert outcome.error == ""
    assert (repository / "ran").read_text() == "ran\n" * 2


def test_the_judges_cost_is_that_of_the_chains_models(repository: Path) -> None:
    make_repository("true")

    def judged(key: str, usd: float) -> dict[str, Any]:
        path = f"metrics/mtbench/{key}.json"
        return {"cmd": f"mkdir -p metrics/mtbench && echo '{{\"usd\": {usd}}}' > {path}", "outs": [path]}

    stages = {"mtbench-base": judged("base", 0.25), "mtbench": {"foreach": ["a"], "do": judged("${item}", 0.5)}}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    outcome, _ = run(repository, targets=("mtbench-base", "mtbench@a"))
    assert (outcome.error, outcome.usd) == ("", 0.75)


@pytest.mark.parametrize("again", ["another node", "the workspace"])
def test_what_a_node_has_pushed_runs_nowhere_again(repository: Path, again: str) -> None:
    make_repository("echo ran >> $RAN; echo result > out.txt")
    dvc("remote", "add", "--default", "--local", "shared", str(repository / "remote"))
    assert run(repository, cache=repository / "one")[0].error == ""
    if again == "another node":
        assert run(repository, cache=repository / "two")[0].error == ""
    else:
        dvc("repro", "--pull")
        assert Path("out.txt").read_text() == "result\n"
    assert (repository / "ran").read_text() == "ran\n"


def test_unfinished_work_and_logs_are_outside_the_clone(repository: Path) -> None:
    make_repository("echo half > .prefscan/half; echo log > runs/log; exit 1")
    run(repository)
    assert (repository / "state/.prefscan/half").read_text() == "half\n"
    assert (repository / "state/runs/log").read_text() == "log\n"


@pytest.mark.parametrize(("patience", "ends_well"), [(60, True), (0, False)])
@pytest.mark.parametrize("gone", ["not mounted", "broken"])
def test_a_remote_that_is_gone_is_waited_for(repository: Path, gone: str, patience: float, ends_well: bool) -> None:
    """Not mounted, its folder is empty, and DVC would push to the wrong disk; broken, a push fails."""
    make_repository("echo result > out.txt")
    remote = repository / "remote"
    marker = remote / "marker" if gone == "not mounted" else None
    remote.mkdir() if marker else remote.write_text("not a folder\n")
    dvc("remote", "add", "--default", "--local", "shared", str(remote))

    def come_back() -> None:
        time.sleep(4)
        marker.touch() if marker else remote.unlink()

    thread = threading.Thread(target=come_back, daemon=True)
    if ends_well:
        thread.start()
    outcome, seen = run(repository, patience=patience, cache=repository / "cache", marker=marker)
    assert (outcome.error == "") == ends_well
    if not ends_well:
        assert "launch again" in outcome.error
        return
    thread.join()
    assert Progress("push") in seen
    dvc("repro", "--pull")
    assert Path("out.txt").read_text() == "result\n"
    lines = (repository / "state/.prefscan/launch/a.log").read_text()
    assert lines.count("Running stage 'train@a'") == 1


@pytest.mark.parametrize("when", ["before the stage", "during the stage"])
def test_nothing_is_read_from_or_written_to_the_folder_of_a_remote_that_is_gone(
    repository: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A stage may take hours: its remote is looked for again before the push."""
    make_repository("echo ran >> $RAN; rm -f $MARKER; echo result > out.txt")
    marker = repository / "remote/marker"
    marker.parent.mkdir()
    if when == "during the stage":
        marker.touch()
    monkeypatch.setenv("MARKER", str(marker))
    dvc("remote", "add", "--default", "--local", "shared", str(marker.parent))
    outcome, _ = run(repository, cache=repository / "cache", marker=marker)
    assert f"the DVC remote {marker.parent} is gone; mount it" in outcome.error
    assert (repository / "ran").exists() == (when == "during the stage")
    assert list(marker.parent.iterdir()) == []


def test_what_has_ended_well_before_a_failure_is_handed_over(repository: Path) -> None:
    make_repository("echo result > out.txt")
    pipeline = yaml.safe_load(Path("dvc.yaml").read_text())
    pipeline["stages"]["mtbench"] = {"foreach": {"a": 1}, "do": {"cmd": "exit 1", "deps": ["out.txt"]}}
    Path("dvc.yaml").write_text(yaml.safe_dump(pipeline))
    dvc("remote", "add", "--default", "--local", "shared", str(repository / "remote"))
    outcome, _ = run(repository, targets=("train@a", "mtbench@a"), cache=repository / "cache")
    assert "failed to reproduce 'mtbench@a'" in outcome.error
    dvc("repro", "--pull", "train@a")
    assert Path("out.txt").read_text() == "result\n"
    assert (repository / "state/.prefscan/launch/a.log").read_text().count("Running stage 'train@a'") == 1


def test_a_node_that_is_lost_takes_no_finished_stage_with_it(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_repository("echo ran >> $RAN; echo result > out.txt")
    remote, left = repository / "remote", repository / "left"
    monkeypatch.setenv("REMOTE", str(remote))
    monkeypatch.setenv("LEFT", str(left))
    pipeline = yaml.safe_load(Path("dvc.yaml").read_text())
    # What the others see of a node that is gone while it runs the second stage.
    judge = {
        "cmd": "[ -e $LEFT ] || cp -r $REMOTE $LEFT; echo 5 > score.txt",
        "deps": ["out.txt"],
        "outs": ["score.txt"],
    }
    pipeline["stages"]["mtbench"] = {"foreach": {"a": 1}, "do": judge}
    Path("dvc.yaml").write_text(yaml.safe_dump(pipeline))
    dvc("remote", "add", "--default", "--local", "shared", str(remote))
    targets = ("train@a", "mtbench@a")
    assert run(repository, targets=targets, cache=repository / "one")[0].error == ""
    shutil.rmtree(remote)
    left.rename(remote)
    left.mkdir()
    assert run(repository, targets=targets, cache=repository / "another")[0].error == ""
    assert (repository / "ran").read_text() == "ran\n"
    dvc("repro", "--pull")
    assert Path("score.txt").read_text() == "5\n"
    assert (repository / "ran").read_text() == "ran\n"


def test_a_clone_that_a_process_works_in_is_left_alone(repository: Path) -> None:
    make_repository("true")
    place = Place(repository / "clones", repository / "cache", repository / "state", None, None)
    taken = snapshot()
    with new_clone("a", taken, place) as used:
        (repository / "clones/b.left").mkdir()
        worker = subprocess.Popen(["sleep", "60"], cwd=used)
        remove_left_clones(place.clones)
        assert list(place.clones.iterdir()) == [used]
        worker.kill()
        worker.wait()
        remove_left_clones(place.clones)
        assert list(place.clones.iterdir()) == []


def test_a_log_that_cannot_be_written_ends_the_command(in_tmp: Path) -> None:
    talks = [sys.executable, "-c", "while True: print('line ' * 1000)"]
    with pytest.raises(OSError, match="No space left"):
        run_supervised(talks, in_tmp, dict(os.environ), Path("/dev/full"), lambda _: None)


def test_what_another_process_has_locked_is_waited_for(repository: Path) -> None:
    make_repository(
        "test -e $FREE || { echo 'prefscan: another process is training a here' ; exit 1; }; echo x > out.txt"
    )
    threading.Timer(6, (repository / "free").touch).start()
    outcome, seen = run(repository)
    assert outcome.error == ""
    assert Progress("waits for another process") in seen


@pytest.mark.parametrize("small_disk", ["full disk"], indirect=True)
def test_no_room_for_a_clone_fails_the_chain_alone(repository: Path, small_disk: Path) -> None:
    make_repository("true")
    Path("large.txt").write_text("x" * 200_000)
    outcome, _ = run(repository, clones=small_disk / "clones")
    assert outcome.error.endswith("make room or access and launch again")
    assert not list((small_disk / "clones").iterdir())
