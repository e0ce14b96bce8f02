"""A DVC repository whose branches hold the reports of small sweeps."""

import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from dvc.exceptions import DvcException
from dvc.repo import Repo

GIT = ["git", "-c", "user.name=tests", "-c", "user.email=tests@prefscan.invalid"]
KEPT = ("params.yaml", "metrics/summary.json", "metrics/judge.json", "reports/questions.csv")


def git(*arguments: str) -> str:
    return subprocess.run([*GIT, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def record() -> None:
    """Have dvc.lock say that the results are those of the parameters, as after a run; not of a damaged file."""
    with Repo() as repo, suppress(DvcException):
        repo.commit(force=True)


def make_repository(reported: Path) -> None:
    """In the working directory: the small sweep's reports as one stage's, committed on the branch main."""
    git("init", "--quiet", "--initial-branch", "main")
    Repo.init().close()
    for name in KEPT:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes((reported / name).read_bytes())
    Path("constraints.txt").write_text("# pinned\nnumpy==2.0.0\ntorch==2.13.0\ntrl==1.16.0\n")
    outs = [{name: {"cache": False}} for name in KEPT[1:]]
    Path("dvc.yaml").write_text(
        yaml.safe_dump({"stages": {"report": {"cmd": "true", "params": [{"params.yaml": None}], "outs": outs}}})
    )
    record()
    git("add", "--all")
    git("commit", "--quiet", "--message", "main")


def branch(
    name: str,
    change_params: Callable[[Any], None] = lambda _: None,
    change_scores: Callable[[pd.DataFrame], pd.DataFrame] = lambda scores: scores,
    files: dict[str, str] | None = None,
    ran: bool = True,
) -> None:
    """A branch off main with other parameters, scores or files, by a run or not; leaves main checked out."""
    git("checkout", "--quiet", "-b", name, "main")
    params = yaml.safe_load(Path("params.yaml").read_text())
    change_params(params)
    Path("params.yaml").write_text(yaml.safe_dump(params))
    scores = change_scores(pd.read_csv("reports/questions.csv", index_col="question", float_precision="round_trip"))
    scores.to_csv("reports/questions.csv")
    for path, text in (files or {}).items():
        Path(path).write_text(text)
    if ran:
        record()
    git("commit", "--quiet", "--allow-empty", "--all", "--message", name)
    git("checkout", "--quiet", "main")
