"""DVC's command line and configuration. Apart from pipeline.py, which takes half a second to import: workers do not."""

import sys
from pathlib import Path
from typing import Any

from dvc.config import Config


def dvc_command(*arguments: str) -> list[str]:
    """The command line of this environment's DVC."""
    return [sys.executable, "-m", "dvc", *arguments]


def configure_clone(folder: Path, cache: Path, remote: dict[str, Any] | None) -> None:
    """Let the files of a snapshot be a DVC repository without git, by the node's cache and the default remote."""
    with Config(str(folder / ".dvc")).edit("local") as config:
        config["core"]["no_scm"] = True
        config["core"]["site_cache_dir"] = str(folder / ".dvc/tmp/site")  # gone with the clone
        config["cache"]["dir"] = str(cache)
        if remote:
            remote = dict(remote)
            config["core"]["remote"] = default = remote.pop("name")
            config["remote"][default] = remote
