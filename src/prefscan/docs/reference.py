"""The files that are written from the code: the reference of losses and of parameters, and two files of conf/.

    prefscan docs

A test fails where they are not what this writes.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from prefscan.common.config import Params
from prefscan.common.io import read_text, write_text
from prefscan.training.losses import document, losses_sweep_yaml, papers_yaml

CONF = Path("conf")
KEY = re.compile(r"^(?P<indent>\s*)(?P<name>[\w]+):(?P<value>.*)$")


def comments(path: Path) -> dict[str, str]:
    """The comment beside each key of a file of conf/, by its dotted name within the file."""
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in read_text(path).splitlines():
        match = KEY.match(line)
        if not match:
            continue
        indent = len(match["indent"])
        parents = [(depth, name) for depth, name in parents if depth < indent] + [(indent, match["name"])]
        _, mark, comment = match["value"].partition("  # ")
        if mark:
            found[".".join(name for _, name in parents)] = comment.strip()
    return found


def described() -> dict[str, str]:
    """The comment of each key of params.yaml, from the first file of conf/ that has one."""
    found = comments(CONF / "config.yaml")
    for folder in sorted(
        path for path in CONF.iterdir() if path.is_dir() and path.name not in ("experiment", "losses")
    ):
        for path in sorted(folder.rglob("*.yaml")):
            package = re.match(r"# @package (\S+)", read_text(path))
            prefix = folder.name if package is None else package[1].removeprefix("_global_")
            for key, comment in comments(path).items():
                found.setdefault(f"{prefix}.{key}".lstrip("."), comment)
    return found


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """The dotted names of all values that are no mapping."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, child in value.items()
        for key, leaf in leaves(child, f"{prefix}.{name}".lstrip(".")).items()
    }


def parameters_page() -> str:
    """docs/parameters.md: every key of the committed params.yaml, its value there and its meaning in conf/."""
    values, meaning = yaml.safe_load(read_text(Path("params.yaml"))), described()
    lines = [
        "# Parameters",
        "",
        "Written by `prefscan docs` from params.yaml and the comments in `conf/`. `dvc exp run -S KEY=VALUE` and",
        "`prefscan launch KEY=VALUE` change one; the schema is `src/prefscan/common/config.py`. The hyperparameters of",
        "losses are in [losses.md](losses.md).",
    ]
    sections: dict[str, dict[str, Any]] = {"The recipe, and what holds for every stage": {}}
    for name in Params.model_fields:
        if name in ("losses", "stages"):
            continue
        if isinstance(values[name], dict):
            sections[name] = leaves(values[name], name)
        else:
            next(iter(sections.values()))[name] = values[name]
    for title, own in sections.items():
        lines += ["", f"## {title}", "", "| key | by default | meaning |", "| --- | --- | --- |"]
        lines += [f"| `{key}` | {shown(value)} | {cell(meaning.get(key, ''))} |" for key, value in own.items()]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{cell(text if len(text) <= 60 else f'{text[:57]}…')}`" if text else "empty"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def generated() -> dict[Path, str]:
    """What each file should hold."""
    return {
        Path("docs/losses.md"): document() + "\n",
        Path("conf/losses/papers.yaml"): papers_yaml(),
        Path("conf/sweep/losses.yaml"): losses_sweep_yaml(),
        Path("docs/parameters.md"): parameters_page(),
    }


def main() -> None:
    for path, text in generated().items():
        write_text(path, text)
        print(path)
