"""Where people keep repositories: each works, or every command refuses it with one sentence and writes nothing."""

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from git_data import git
from launch import make_sleeping
from prefscan.common.errors import UserError
from prefscan.launch import forecast, partial_report, runner, schedule
from prefscan.repo import cache
from prefscan.review import compare, pull_request

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, Callable[[], object]] = {
    "launch": lambda: schedule.main([], None, dirty=True),
    "plan": lambda: forecast.main([], None),
    "partial-report": lambda: partial_report.main(pull=False),
    "review": lambda: pull_request.main("main", "charts"),
    "compare": lambda: compare.main(["main", "other"]),
    "check-cache": cache.main,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sleeping(tmp_path_factory.mktemp("places") / "work", 1, 0)


@pytest.fixture
def work(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    shutil.copytree(project, folder)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return folder


def in_subdirectory(work: Path) -> Path:
    return work / "conf"


def without_git(work: Path) -> Path:
    shutil.rmtree(work / ".git")
    return work


def below_the_git_root(work: Path) -> Path:
    shutil.move(work / ".git", work.parent)
    return work


def of_another_user(work: Path) -> Path:
    if os.getuid():
        pytest.skip("giving a folder to another user needs root")
    for path in (work, work / ".git"):
        os.chown(path, 12345, 12345)
    return work


def without_dvc(work: Path) -> Path:
    shutil.rmtree(work / ".dvc")
    return work


def with_a_damaged_configuration(work: Path) -> Path:
    (work / ".dvc/config.local").write_text("[cache]\n    type = magic\n")
    return work


PLACES: list[tuple[Callable[[Path], Path], str]] = [
    (in_subdirectory, r"conf is not the root of a git repository; run it in the repository's root, \S+/work$"),
    (
        without_git,
        r"work is in no git repository, as a ZIP or a copied folder is not; clone it, or make it one with `git",
    ),
    (below_the_git_root, r"work is a DVC project in the folder work/ of a git repository; .* a repository of its own$"),
    (of_another_user, r"dubious ownership in repository at '\S+/work' .* git config --global --add safe\.directory"),
    (without_dvc, r"work is in no DVC repository; run it in the repository's root$"),
]


@pytest.mark.parametrize(("change", "message"), PLACES, ids=[place.__name__ for place, _ in PLACES])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_does_not_work_is_refused_by_every_command_at_once(
    work: Path, monkeypatch: pytest.MonkeyPatch, command: str, change: Callable[[Path], Path], message: str
) -> None:
    monkeypatch.chdir(change(work))
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    with pytest.raises(UserError, match=message) as caught:
        COMMANDS[command]()
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before


@pytest.mark.parametrize("command", ["review", "compare", "check-cache"])
def test_a_configuration_that_dvc_refuses_is_a_sentence(
    work: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(with_a_damaged_configuration(work))
    with pytest.raises(UserError, match=r"^\.dvc/config: .*magic.*; correct it$"):
        COMMANDS[command]()


def test_a_worktree_of_git_is_a_root(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    git("worktree", "add", "--quiet", "../tree")
    monkeypatch.chdir(work.parent / "tree")
    cache.main()


def test_a_temporary_folder_with_too_long_a_name_is_not_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for folder, chosen in (("/t" * 19, None), ("/t" * 21, "/tmp/ray"), ("/é" * 14, "/tmp/ray")):
        monkeypatch.setenv("TMPDIR", folder)
        assert runner.temp_folder() == chosen
    monkeypatch.setattr(runner.os, "access", lambda *_: False)
    with pytest.raises(
        UserError, match=r"^TMPDIR: /é\S+ is too long .*; set RAY_TMPDIR to a folder of at most 39 bytes"
    ):
        runner.temp_folder()


def test_a_launch_works_where_letters_lengths_and_rights_are_unusual(work: Path) -> None:
    """A folder with non-ASCII letters and blanks, a TMPDIR beyond the length of sockets, a HOME that cannot be written,
    line ends that git converts, links from the cache. And a chain that fails is said once, without Ray's trace.
    """
    place = work.parent / "größe é ü/work"
    place.parent.mkdir()
    work.rename(place)
    temporary = place.parents[1] / ("t" * 50)
    temporary.mkdir()
    pipeline = yaml.safe_load((place / "dvc.yaml").read_text())
    fault = place.parents[1] / "fault"
    ran = place.parents[1] / "ran"
    prepare = pipeline["stages"]["prepare"]
    prepare["cmd"] = f"echo prepare >> {ran}; test ! -e {fault} && {prepare['cmd']}"
    (place / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    for key, value in (("core.autocrlf", "true"), ("status.showUntrackedFiles", "no")):
        subprocess.run(["git", "-C", place, "config", key, value], check=True)
    (place / ".dvc/config.local").write_text("[cache]\n    type = symlink\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HOME": "/sys", "TMPDIR": str(temporary)}
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_TMPDIR"):
        environment.pop(name, None)

    def launch() -> tuple[int, str]:
        command = [sys.executable, "-m", "prefscan", "launch", "--dirty"]
        done = subprocess.run(
            command,
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert not re.search(r"Traceback|Token authentication|ray\.exceptions|\(raylet", done.stdout), done.stdout
        return done.returncode, done.stdout

    fault.touch()
    code, output = launch()
    assert code == schedule.FAILED, output
    assert re.findall(r"^(\S.*) failed on", output, re.MULTILINE) == ["prepare"]
    skipped = output.split("\nNot run, since what they need failed: ")[1].strip().split(", ")
    assert skipped == ["reference-heldout", "reference-train", "judge-check", "sigmoid-0.1-24"]

    fault.unlink()
    code, output = launch()
    assert code == 0, output
    assert ran.read_text() == "prepare\nprepare\n"  # once of each launch
    assert output.count("Running stage") == 1, output  # the report: all else came from the clones
    assert "Running stage 'report'" in output
    assert (place / "data/prepared.txt").is_symlink()
    assert not stat.S_ISLNK((place / "params.yaml").lstat().st_mode)
