"""Asking git: what a commit holds, what is not committed, and the files of a snapshot that runs elsewhere."""

import hashlib
import os
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from dvc.exceptions import DvcException
from dvc.scm import map_scm_exception, resolve_rev

from prefscan.common.errors import UserError
from prefscan.repo.pipeline import dependency_hashes, forget
from prefscan.repo.workspace import check_root, open_dvc, run_git

WRITTEN = ("dvc.lock", "metrics/", "reports/")  # by DVC and the stages: no change of the user's


def git(*arguments: str) -> bytes:
    """Standard output of a git command in the repository's root; raises UserError with git's words."""
    check_root()
    return run_git(*arguments)


def names(output: bytes) -> list[str]:
    """Of git's output with -z."""
    return [name for name in output.decode(errors="surrogateescape").split("\0") if name]


def commit_of(revision: str) -> str:
    """The hash of the commit that git or DVC's experiments call `revision`.

    Raises UserError for a name that no commit has, and elsewhere than in the repository's root.
    """
    refused = UserError(f"{revision!r} names no commit; name a branch, tag, commit or DVC experiment")
    if not revision:  # which DVC takes for HEAD
        raise refused
    try:
        with open_dvc() as repo, map_scm_exception():
            found = resolve_rev(repo.scm, revision)
    except DvcException:
        raise refused from None
    try:  # what has a hash may be a tree, and a tag points to its commit
        return git("rev-parse", "--verify", f"{found}^{{commit}}").decode().strip()
    except UserError:
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
    status = git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all")
    return [entry[3:] for entry in names(status) if not entry[3:].startswith(WRITTEN)]


def workspace_files() -> list[str]:
    """The files that git tracks or would, as they are in the workspace; those of submodules too."""
    listed = names(git("ls-files", "-z", "--cached", "--others", "--exclude-standard"))
    return sorted({file for name in listed for file in files_of(name)})


def files_of(name: str) -> Iterator[str]:
    if os.path.isdir(name) and not os.path.islink(name):
        if not name.endswith("/"):  # a submodule; by a slash git names a repository that it does not track
            for folder, inside, found in os.walk(name):
                inside[:] = [other for other in inside if other != ".git"]
                yield from (os.path.join(folder, file) for file in found if file != ".git")
    elif os.path.lexists(name):  # what is deleted and not committed is listed too
        yield name


@dataclass(frozen=True)
class Snapshot:
    """`archive` is a tar of the workspace's files, byte for byte; `digests` has those files' own, by name.

    `dependencies` has DVC's hashes of what stages read and no stage makes, which a clone must have as well.
    """

    archive: bytes
    digests: dict[str, str]
    dependencies: dict[str, str | None]


def snapshot(lost: Collection[str] = ()) -> Snapshot:
    """The workspace's files as they are on disk, without what git ignores: git itself may convert them (line ends,
    filters), and every stage that reads a converted file would run again.

    Its dvc.lock has no entries of the `lost` stages: pipeline.lost_stages says why.
    """
    packed, digests = BytesIO(), {}
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in workspace_files():
            content = without(name, lost) if name == "dvc.lock" and lost else content_of(name)
            digests[name] = digest(name, content)
            info = tar.gettarinfo(name, arcname=name)
            info.uid = info.gid = 0  # of whoever unpacks it
            info.uname = info.gname = ""
            info.type = tarfile.SYMTYPE if info.issym() else tarfile.REGTYPE  # two names of one file are two files
            info.size = 0 if info.issym() else len(content)
            tar.addfile(info, BytesIO(content))
    return Snapshot(packed.getvalue(), digests, dependency_hashes(Path()))


def content_of(name: str) -> bytes:
    """Of a link, where it leads."""
    return os.fsencode(os.readlink(name)) if os.path.islink(name) else Path(name).read_bytes()


def digest(name: str, content: bytes) -> str:
    runs = os.lstat(name).st_mode & 0o100
    return f"{hashlib.sha256(content).hexdigest()} {os.path.islink(name)} {runs}"


def without(name: str, lost: Collection[str]) -> bytes:
    with TemporaryDirectory() as folder:
        lock = Path(folder, "dvc.lock")
        lock.write_bytes(content_of(name))
        forget(lock, lost)
        return lock.read_bytes()


def changed_since(taken: Snapshot) -> list[str]:
    """Files of the workspace that are no longer as in the snapshot, but for what DVC and the stages write."""
    now = {name: digest(name, content_of(name)) for name in workspace_files() if not name.startswith(WRITTEN)}
    before = {name: value for name, value in taken.digests.items() if not name.startswith(WRITTEN)}
    return sorted(name for name in now | before if now.get(name) != before.get(name))
