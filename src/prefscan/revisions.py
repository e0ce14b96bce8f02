"""What git holds of a revision's sweep: parameters, summary, every model's score of each question.

All of it is small and in git, so that a review or a comparison needs neither DVC's cache nor a remote.
"""

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import dvc.api
import pandas as pd
import yaml
from dvc.exceptions import DvcException, PathMissingError
from dvc.scm import SCMError

from prefscan.errors import UserError
from prefscan.files import BAD_JSON, read_text
from prefscan.paths import BASE, JUDGE_METRICS, SUMMARY
from prefscan.tables import QUESTION_SCORES

CHOICE = ("loss", "beta", "steps", "grid", "sweep", "launch")  # parameters that choose and place cells and change none
# Parameters that decide how a result is reached or what it costs, and not what it is.
NEUTRAL = {
    *(f"judge.{name}" for name in ("budget", "timeout", "attempts", "concurrency", "prices", "key_variable")),
    *(f"answer.server.{name}" for name in ("timeout", "attempts", "key_variable")),
    "train.report_to",
}
# Parameters that make a judge the one that it is, beside the name of one behind an API.
JUDGE = ("kind", "mode", "against", "references", "folder", "dtype", "base_url", "seed", "samples", "max_tokens")
PINS = ("trl", "transformers", "peft", "torch")  # whose versions may change a result


class Revision(NamedTuple):
    """`scores` has a row a question, its number the index, and a column a model beside `category`."""

    name: str
    params: dict[str, Any]
    summary: dict[str, Any]
    judge: dict[str, Any]
    scores: pd.DataFrame
    pins: dict[str, str]

    @property
    def models(self) -> list[str]:
        return [column for column in self.scores.columns if column != "category"]

    @property
    def recipe(self) -> str:
        return str(self.summary["recipe"]["cell"])


def read_at(path: Path, revision: str | None) -> str:
    """A file of a revision, or of the workspace; raises UserError where there is no such revision or file."""
    if revision is None:
        return read_text(path)
    try:
        return str(dvc.api.read(str(path), rev=revision, encoding="utf-8"))
    except (PathMissingError, FileNotFoundError):
        raise UserError(
            f"{revision} has no {path} in git; run `dvc repro` there with this version and commit the reports"
        ) from None
    except (DvcException, SCMError) as error:
        raise UserError(f"{revision}: {' '.join(str(error).split())}; name a branch, tag or commit") from None


def read_revision(revision: str | None) -> Revision:
    """A revision by what `git rev-parse` or DVC's experiments call it; None is the workspace."""
    try:
        scores = pd.read_csv(StringIO(read_at(QUESTION_SCORES, revision)), float_precision="round_trip")
        return Revision(
            revision or "workspace",
            yaml.safe_load(read_at(Path("params.yaml"), revision)),
            json.loads(read_at(SUMMARY, revision)),
            json.loads(read_at(JUDGE_METRICS, revision)),
            scores.set_index("question"),
            dict(pins(read_at(Path("constraints.txt"), revision))),
        )
    except (*BAD_JSON, yaml.YAMLError, KeyError) as error:
        raise UserError(f"{revision or 'workspace'}: a committed file cannot be read: {error}") from None


def shared_models(revisions: list[Revision]) -> list[str]:
    """The base and the cells that every revision has, in the order of the first."""
    return [model for model in revisions[0].models if all(model in revision.models for revision in revisions)]


def shared_questions(revisions: list[Revision]) -> pd.Index:
    """The numbers of the questions that every revision asked; raises UserError for fewer than two."""
    shared = revisions[0].scores.index
    for revision in revisions[1:]:
        shared = shared.intersection(revision.scores.index)
    if len(shared) < 2:
        names = ", ".join(revision.name for revision in revisions)
        raise UserError(f"{names}: they share {len(shared)} questions, and a paired difference needs two")
    return shared


# DVC knows files and parameters: what is installed makes no stage stale.
VERSIONS_NOTE = (
    "Another version of a library makes no stage stale: the numbers are those of the versions that computed them, and "
    "`dvc repro --force` computes them anew."
)


def pins(constraints: str) -> Iterator[tuple[str, str]]:
    for line in constraints.splitlines():
        name, _, version = line.partition("==")
        if name in PINS:
            yield name, version


def leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every parameter by its dotted name, as DVC shows it; a list is one value."""
    for name, child in value.items():
        if isinstance(child, dict):
            yield from leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def settings(revision: Revision) -> dict[str, Any]:
    """What decides a cell's result: the parameters but for the choice of cells, and the pinned versions."""

    def decides(name: str) -> bool:
        return name.split(".")[0] not in CHOICE and NEUTRAL.isdisjoint((name, name.rpartition(".")[0]))

    return {name: value for name, value in leaves(revision.params) if decides(name)} | revision.pins


def judge_of(revision: Revision) -> dict[str, Any]:
    """What makes the judge of a revision the one that it is.

    A local judge is its weights, whatever it is called; of the base's own folder, those are the model's.
    """
    judge = revision.params["judge"]
    known = {f"judge.{name}": judge.get(name) for name in JUDGE}
    if judge["kind"] == "openai":
        return known | {"judge.name": judge["name"], "judge.folder": None}  # a stage's dependency, which it reads not
    if judge["folder"] == str(BASE):
        known |= dict(leaves(revision.params["model"]["source"], "model.source."))
    return known


def changed(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, in the order of the first; None where one has no such setting."""
    names = dict.fromkeys([*first, *second])
    return {n: (first.get(n), second.get(n)) for n in names if first.get(n) != second.get(n)}
