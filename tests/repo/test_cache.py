import errno
import os
from pathlib import Path

import pytest
from dvc.repo import Repo
from dvc_data.hashfile.hash import file_md5

from git_data import git
from prefscan.common.errors import UserError
from prefscan.repo import cache
from prefscan.repo.cache import main, remove_damaged

FOLDER = [("first", "one\n"), ("second", "two\n")]


@pytest.fixture
def repository(in_tmp: Path) -> Path:
    """A DVC repository that tracks a file and a folder, with the cache in a place of its own; returns that cache."""
    git("init", "--quiet")
    with Repo.init(no_scm=True) as repo, repo.config.edit() as config:
        config["cache"] = {"dir": str(in_tmp / "elsewhere"), "type": "hardlink"}
    Path("file").write_text("content\n")
    Path("folder").mkdir()
    for name, text in FOLDER:
        Path("folder", name).write_text(text)
    with Repo() as repo:
        repo.add(["file", "folder"])
        repo.checkout(relink=True)
    return in_tmp / "elsewhere/files/md5"


def stale() -> set[str]:
    """The files with which DVC tracks what it finds changed."""
    with Repo() as repo:
        return set(repo.status())


def objects(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def object_with(cache: Path, text: str) -> Path:
    """The object that has the text in it."""
    (found,) = (path for path in objects(cache) if text in path.read_text())
    return found


def damage(path: Path, how: str) -> None:
    """Change an object in place: it keeps its mode and time, as DVC's trust in it does."""
    before, content = path.stat(), path.read_bytes()
    path.chmod(0o644)
    path.write_bytes({"truncated": content[:-2], "empty": b"", "flipped": content[:-1] + b"\xff"}[how])
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
@pytest.mark.parametrize("text", ["content\n", "two\n", '"relpath"'])
def test_a_damaged_object_is_removed_and_no_other(repository: Path, text: str, how: str) -> None:
    before = objects(repository)
    assert remove_damaged(repository) == (4, [])
    path = object_with(repository, text)
    damage(path, how)
    assert remove_damaged(repository) == (4, [path])
    assert objects(repository) == [other for other in before if other != path]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT])
def test_an_object_that_the_disk_does_not_give_back_is_removed(
    repository: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A bad sector, and what another node's check of the same folder has just removed; no disk here fails on demand."""
    path = object_with(repository, "content")

    def read(name: str) -> str:
        if name != str(path):
            return file_md5(name)
        if number == errno.ENOENT:
            path.unlink()
        raise OSError(number, os.strerror(number), name)

    monkeypatch.setattr(cache, "file_md5", read)
    assert remove_damaged(repository) == (4, [path])
    assert not path.exists()


def test_a_copy_under_way_is_left_alone(repository: Path) -> None:
    partial = object_with(repository, "content").with_name(".AbC123.tmp")
    partial.write_text("half")
    assert remove_damaged(repository) == (4, [])
    assert partial.exists()


def test_a_cache_that_is_not_there_has_no_objects(tmp_path: Path) -> None:
    assert remove_damaged(tmp_path / "none") == (0, [])


def test_a_whole_cache_is_counted(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main()
    assert capsys.readouterr().out == "4 objects, none damaged\n"


def test_a_damaged_link_in_the_workspace_is_noticed_as_well(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DVC knows the workspace's file by inode, time and size, and asks for no hash of it until it is made to."""
    path = object_with(repository, "two")
    assert path.samefile("folder/second")
    damage(path, "flipped")
    assert stale() == set()
    with pytest.raises(UserError) as caught:
        main()
    assert (
        str(caught.value)
        == "1 of 4 objects were damaged and are removed; run `dvc repro` or `dvc pull` to have them again"
    )
    assert capsys.readouterr().out == f"removed {path}: its content has another hash\n"
    assert stale() == {"folder.dvc"}


def test_outside_of_a_repository_it_ends_with_a_sentence(in_tmp: Path) -> None:
    with pytest.raises(UserError, match=r"is in no git repository"):
        main()
