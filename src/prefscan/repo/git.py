"""Asking git: what a commit holds, what is not committed, and the workspace as a snapshot that runs elsewhere."""

import os
import subprocess
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.scm import map_scm_exception, resolve_rev

from prefscan.common.errors import UserError
from prefscan.repo.pipeline import forget

WRITTEN = ("dvc.lock", "metrics/", "reports/")  # by DVC and the stages: no change of the user's


def git(*arguments: str, index: str | None = None) -> bytes:
    """Standard output; raises UserError with git's words."""
    environment = os.environ | ({"GIT_INDEX_FILE": index} if index else {})
    done = subprocess.run(["git", *arguments], capture_output=True, env=environment)  # noqa: S607
    if done.returncode:
        raise UserError(f"git {' '.join(arguments)}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def commit_of(revision: str) -> str:
    """The hash of the commit that git or DVC's experiments call `revision`.

    Raises UserError for a name that no commit has, and elsewhere than in the repository's root.
    """
    if not Path(".git").exists():  # all paths are relative to it
        raise UserError(f"{Path.cwd()} is not the root of a git repository; run it in the repository's root")
    refused = UserError(f"{revision!r} names no commit; name a branch, tag, commit or DVC experiment")
    if not revision:  # which DVC takes for HEAD
        raise refused
    try:
        with Repo() as repo, map_scm_exception():
            found = resolve_rev(repo.scm, revision)
        # What has a hash may be a tree, and a tag points to its commit.
        return git("rev-parse", "--verify", f"{found}^{{commit}}").decode().strip()
    except (DvcException, UserError):
        raise refused from None


def read_at(path: Path, revision: str, commit: str) -> str:
    """A file of a commit, which errors call `revision`; raises UserError where it has none, ValueError beside UTF-8."""
    try:
        return git("cat-file", "blob", f"{commit}:{path}").decode()
    except UserError:
        raise UserError(
            f"{revision} has no {path} in git; run `dvc repro` there with this version and commit the reports"
        ) from None


def uncommitted() -> list[str]:
    """Files that differ from the last commit or that git does not know, but for what DVC and the stages write."""
    status = git("status", "--porcelain", "-z", "--no-renames").decode(errors="surrogateescape")
    return [entry[3:] for entry in status.split("\0") if entry and not entry[3:].startswith(WRITTEN)]


def workspace_tree() -> str:
    """The hash of a git tree of the workspace's files as they are, without what git ignores."""
    with TemporaryDirectory() as folder:
        index = f"{folder}/index"
        git("read-tree", "HEAD", index=index)
        git("add", "--all", index=index)
        return git("write-tree", index=index).decode().strip()


def snapshot(tree: str, lost: Collection[str]) -> bytes:
    """A tree's files as a tar archive, and in the repository as a commit that is on no branch.

    Its dvc.lock has no entries of the `lost` stages: pipeline.lost_stages says why.
    """
    if lost and git("ls-tree", tree, "dvc.lock"):
        with TemporaryDirectory() as folder:
            index, lock = f"{folder}/index", Path(folder, "dvc.lock")
            git("read-tree", tree, index=index)
            lock.write_bytes(git("show", f"{tree}:dvc.lock"))
            forget(lock, lost)
            blob = git("hash-object", "-w", str(lock)).decode().strip()
            git("update-index", "--cacheinfo", f"100644,{blob},dvc.lock", index=index)
            tree = git("write-tree", index=index).decode().strip()
    author = ("-c", "user.name=prefscan", "-c", "user.email=prefscan@localhost")
    commit = git(*author, "commit-tree", tree, "-p", "HEAD", "-m", "Workspace at prefscan.launch").decode().strip()
    return git("archive", "--format=tar", commit)


def changed_since(tree: str) -> list[str]:
    """Files of the workspace that are no longer as in the tree, but for what DVC and the stages write."""
    names = git("diff-tree", "-r", "-z", "--name-only", tree, workspace_tree()).decode(errors="surrogateescape")
    return [name for name in names.split("\0") if name and not name.startswith(WRITTEN)]
