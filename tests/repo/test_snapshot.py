"""A clone has the workspace's bytes, whatever git would make of them, and DVC finds in it what it finds here."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.config import Config

from git_data import git
from prefscan.common.errors import UserError
from prefscan.launch.clone import Chain, Place, new_clone, run_chain
from prefscan.repo.git import Snapshot, changed_since, snapshot, uncommitted
from prefscan.repo.pipeline import dvc_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One stage that reads a file and a folder of code, committed; the working directory is its root."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    command = f"cat code.txt > out.txt && echo ran >> {tmp_path}/ran"
    stage = {"cmd": command, "deps": ["code.txt", "src"], "outs": ["out.txt"]}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"train": stage}}))
    Path("code.txt").write_bytes(b"first\nsecond\n")
    Path("src").mkdir()
    Path("src/code.py").write_text("pass\n")
    Path(".gitignore").write_text("/.prefscan/\n/runs/\n/out.txt\n*.partial\n")
    git("init", "--quiet", "--initial-branch", "main")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], check=True)
    git("add", "--all")
    git("commit", "--quiet", "--message", "Start")
    return tmp_path


def place_at(root: Path) -> Place:
    settings = dvc_settings()
    return Place(root / "clones", settings.cache, root / "state", None, None, settings.local)


def in_clone(root: Path, taken: Snapshot, name: str) -> bytes:
    with new_clone("a", taken, place_at(root)) as clone:
        return (clone / name).read_bytes()


@pytest.mark.parametrize(
    "convert",
    [
        ("core.autocrlf", "true", None),
        ("core.autocrlf", "input", None),
        ("core.eol", "crlf", "*.txt text\n"),
        ("filter.shout.smudge", "tr a-z A-Z", "*.txt filter=shout\n"),
        ("user.name", "tests", "code.txt export-ignore\n"),
        ("user.name", "tests", "*.txt ident export-subst\n"),
    ],
)
def test_a_clone_has_the_bytes_of_the_workspace(repository: Path, convert: tuple[str, str, str | None]) -> None:
    key, value, attributes = convert
    git("config", key, value)
    if attributes:
        Path(".gitattributes").write_text(attributes)
    contents = {
        "code.txt": b"lines\nof Unix $Id$\n",
        "windows.txt": b"lines\r\nof Windows\r\n",
        "mixed.txt": b"\r\nx\n",
    }
    for name, content in contents.items():
        Path(name).write_bytes(content)
    with new_clone("a", snapshot(), place_at(repository)) as clone:
        assert {name: (clone / name).read_bytes() for name in contents} == contents


def test_nothing_runs_twice_where_git_converts_line_ends(repository: Path) -> None:
    git("config", "core.autocrlf", "true")
    outcome = run_chain(Chain("a", ("train",)), snapshot(), place_at(repository), 1, 0, lambda _: None)
    assert outcome.error == ""
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], capture_output=True, text=True)
    assert "Stage 'train' is cached" in done.stdout
    assert (repository / "ran").read_text() == "ran\n"


def test_links_rights_and_names_reach_a_clone_and_deleted_and_ignored_files_do_not(repository: Path) -> None:
    Path("tool.sh").write_text("#!/bin/sh\n")
    Path("tool.sh").chmod(0o755)
    Path("daten für é.txt").write_text("new\n")
    Path("link").symlink_to("code.txt")
    Path("gone.txt").write_text("x")
    git("add", "gone.txt")
    Path("gone.txt").unlink()
    Path("half.partial").write_text("x")
    with new_clone("a", snapshot(), place_at(repository)) as clone:
        assert (clone / "tool.sh").stat().st_mode & 0o111
        assert (clone / "daten für é.txt").read_text() == "new\n"
        assert (clone / "link").readlink() == Path("code.txt")
        assert not {"gone.txt", "half.partial"} & {path.name for path in clone.iterdir()}


def test_untracked_code_is_seen_where_git_hides_it(repository: Path) -> None:
    git("config", "status.showUntrackedFiles", "no")
    Path("src/new").mkdir()
    Path("src/new/loss.py").write_text("pass\n")
    assert uncommitted() == ["src/new/loss.py"]
    taken = snapshot()
    assert in_clone(repository, taken, "src/new/loss.py") == b"pass\n"
    Path("src/new/loss.py").write_text("raise\n")
    assert changed_since(taken) == ["src/new/loss.py"]
    Path("src/new/loss.py").unlink()
    assert changed_since(taken) == ["src/new/loss.py"]


def test_what_git_ignores_within_a_dependency_is_refused_before_anything_runs(repository: Path) -> None:
    """DVC hashes it in the workspace, and no clone has it: each stage would run in its clone, and again here."""
    Path("src/left.partial").write_text("half")
    outcome = run_chain(Chain("a", ("train",)), snapshot(), place_at(repository), 1, 0, lambda _: None)
    assert outcome.error.startswith("src: not in a clone as in the workspace")
    assert not (repository / "ran").exists()
    Path(".dvcignore").write_text("*.partial\n")
    assert in_clone(repository, snapshot(), "src/code.py") == b"pass\n"


def test_a_clone_has_the_local_configuration_in_utf_8(repository: Path) -> None:
    folder = repository / "größe"
    Path(".dvc/config.local").write_text(
        f"[core]\n    checksum_jobs = 3\n[cache]\n    shared = group\n    type = copy\n    dir = ../../cache\n"
        f'[remote "größe"]\n    url = {folder}\n[remote "near"]\n    url = "../../near, \'b\' # c"\n',
        encoding="utf-8",
    )
    with new_clone("a", snapshot(), place_at(repository)) as clone:
        found = Config(str(clone / ".dvc"))
        assert "größe".encode() in (clone / ".dvc/config.local").read_bytes()
        site = clone / ".dvc/tmp/site"
    assert found["cache"]["shared"] == "group"
    assert found["cache"]["type"] == ["copy"]
    assert found["cache"]["dir"] == str(dvc_settings().cache)
    assert found["core"] | {"checksum_jobs": 3, "no_scm": True, "site_cache_dir": str(site)} == found["core"]
    assert found["remote"]["größe"]["url"] == str(folder)
    assert found["remote"]["near"]["url"] == str(repository / "near, 'b' # c")


def test_this_repository_has_the_same_bytes_in_every_clone(tmp_path: Path) -> None:
    git("clone", "--quiet", "--config", "core.autocrlf=true", str(ROOT), str(tmp_path / "clone"))
    for name in ("params.yaml", "src/prefscan/__init__.py", "dvc.lock"):
        committed = subprocess.run(["git", "-C", ROOT, "show", f"HEAD:{name}"], capture_output=True, check=True).stdout
        assert (tmp_path / "clone" / name).read_bytes() == committed


def test_a_folder_without_git_is_refused(in_tmp: Path) -> None:
    with pytest.raises(UserError, match="is in no git repository"):
        uncommitted()


def test_a_file_that_dvc_add_tracks_is_in_the_clone(repository: Path) -> None:
    """Git has its .dvc file alone, and `dvc repro` makes stages' outputs, not these."""
    Path("mine.jsonl").write_text("mine\n")
    subprocess.run([sys.executable, "-m", "dvc", "add", "--quiet", "mine.jsonl"], check=True)
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace("- code.txt", "- mine.jsonl"))
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace("cat code.txt", "cat mine.jsonl"))
    outcome = run_chain(Chain("a", ("train",)), snapshot(), place_at(repository), 1, 0, lambda _: None)
    assert outcome.error == ""
    assert (repository / "ran").read_text() == "ran\n"
