"""DVC's command line and configuration. Apart from pipeline.py, which takes half a second to import: workers do not."""

import sys
from pathlib import Path
from typing import Any

from configobj import ConfigObj  # type: ignore[import-untyped]


def dvc_command(*arguments: str) -> list[str]:
    """The command line of this environment's DVC."""
    return [sys.executable, "-m", "dvc", *arguments]


def write_config(path: Path, config: dict[str, dict[str, Any]]) -> None:
    """A file of DVC's configuration, in UTF-8: DVC's own way knows ASCII alone, and folders have other letters."""
    named = {"remote", "machine", "db"}
    sections = {name: values for name, values in config.items() if name not in named}
    for kind in named:
        sections |= {f'{kind} "{name}"': values for name, values in config.get(kind, {}).items()}
    written = ConfigObj(
        {name: {key: plain(value) for key, value in values.items()} for name, values in sections.items()}
    )
    path.write_text("\n".join(written.write()) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """A value without the classes by which DVC remembers that a path was relative."""
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else str(value)
