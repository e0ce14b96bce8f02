"""Hash every object of DVC's cache again, and remove those that are not what their name says.

    prefscan check-cache    # exit status 1 where some were removed

DVC trusts a read-only object of its cache, and a file whose inode, time and size it knows: what a failing disk or an
interrupted copy has changed is restored as it is, and every result after it is wrong. An object removed here is missing
instead: `dvc repro` makes it again.
"""

import errno
import re
from pathlib import Path

from dvc_data.hashfile.hash import file_md5
from rich.console import Console
from rich.progress import DownloadColumn, Progress

from prefscan.common.errors import UserError
from prefscan.repo.workspace import open_dvc

OBJECT = re.compile(r"[0-9a-f]{30}(\.dir)?")  # what follows the first two digits; a copy under way has another name


def remove_damaged(cache: Path) -> tuple[int, list[Path]]:
    """Remove the damaged objects of a folder like `.dvc/cache/files/md5`; how many objects there were, and the damaged.

    A folder's list of files, whose name ends in `.dir`, is an object as well.
    """
    objects = [path for path in sorted(cache.glob("[0-9a-f][0-9a-f]/*")) if OBJECT.fullmatch(path.name)]
    damaged = []
    console = Console(stderr=True)
    columns = [*Progress.get_default_columns(), DownloadColumn()]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("hashing", total=sum(path.stat().st_size for path in objects))
        for path in objects:
            progress.advance(task, path.stat().st_size)
            if not is_whole(path):
                path.unlink(missing_ok=True)
                damaged.append(path)
    return len(objects), damaged


def is_whole(path: Path) -> bool:
    """Whether an object can be read and is what its name says."""
    try:
        return bool(file_md5(str(path)) == path.parent.name + path.stem)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOENT):  # a bad sector; another node's check that removed it first
            return False
        raise


def check_cache() -> tuple[int, list[Path]]:
    """Remove the damaged objects of this repository's cache; how many objects there were, and the damaged.

    Raises UserError elsewhere than in the repository's root.
    """
    with open_dvc() as repo:
        count, damaged = remove_damaged(Path(repo.cache.local.path))
        if damaged:  # where the workspace has a link of one, it is as damaged: DVC must hash the workspace again too
            repo.state.hashes.clear()
    for path in damaged:
        print(f"removed {path}: its content has another hash")
    return count, damaged


def main() -> None:
    count, damaged = check_cache()
    if damaged:
        raise UserError(
            f"{len(damaged)} of {count} objects were damaged and are removed; run `dvc repro` or `dvc pull` to have "
            "them again"
        )
    print(f"{count} objects, none damaged")
