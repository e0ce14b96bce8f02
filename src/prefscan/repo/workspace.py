"""The one way to open git and DVC: in the root of both, or refused with a sentence before anything is written."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from dvc.config import ConfigError
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.repo import Repo

from prefscan.common.errors import UserError


def run_git(*arguments: str, **options: str) -> bytes:
    """Standard output of a git command in the working directory; raises UserError with git's words."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, env=os.environ | options)  # noqa: S607
    except FileNotFoundError:
        raise UserError("git is not installed; install it, for prefscan asks it what is committed") from None
    if done.returncode:
        raise UserError(f"git {' '.join(arguments)}: {' '.join(done.stderr.decode(errors='replace').split())}")
    return done.stdout


def check_root() -> None:
    """Raises UserError where the working directory is not the root of a DVC project and of its git repository."""
    check_folder(Path.cwd())


@cache  # what is refused is not kept, and asked again
def check_folder(here: Path) -> None:
    try:
        prefix = run_git("rev-parse", "--show-prefix").decode(errors="surrogateescape").rstrip("\n")
    except UserError as error:
        if "not a git repository" not in str(error):  # such as another user's, where git names `safe.directory`
            raise
        raise UserError(
            f"{here} is in no git repository, as a ZIP or a copied folder is not; clone it, or make it one with "
            "`git init && git add --all && git commit -m Start`"
        ) from None
    projects = [folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()]
    if not projects:
        raise UserError(f"{here} is in no DVC repository; run it in the repository's root")
    if projects[0] != here:
        raise UserError(f"{here} is not the root of a git repository; run it in the repository's root, {projects[0]}")
    if prefix:
        raise UserError(
            f"{here} is a DVC project in the folder {prefix} of a git repository; prefscan needs both to have one "
            "root: give the project a repository of its own"
        )


@contextmanager
def open_dvc(commit: str | None = None, wait: bool = False) -> Iterator[Repo]:
    """DVC's view of the workspace, or of a commit; with `wait`, of a workspace that another command of DVC has locked.

    Raises UserError where `check_root` does, and for a configuration that DVC refuses.
    """
    check_root()
    try:
        repo = Repo(rev=commit, _wait_for_lock=wait)
    except (ConfigError, NotDvcRepoError) as error:
        where = f" of {commit[:7]}" if commit else ""
        raise UserError(f".dvc/config{where}: {' '.join(str(error).split())}; correct it") from None
    with repo:
        yield repo


def words(error: DvcException | OSError) -> str:
    """An error of DVC's in one line."""
    return " ".join(str(error).split())
