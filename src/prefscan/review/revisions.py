"""What git holds of a revision's sweep: parameters, summary, every model's score of each question.

All of it is small and in git, so that a review or a comparison needs neither DVC's cache nor a remote.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from prefscan.common.errors import UserError
from prefscan.common.io import BAD_JSON, read_text
from prefscan.common.libraries import LIBRARIES
from prefscan.common.numbers import read_yaml
from prefscan.common.paths import BASE, JUDGE_METRICS, SUMMARY
from prefscan.repo.git import commit_of, read_at
from prefscan.repo.pipeline import CHOICE
from prefscan.repo.recorded import refuse_stale
from prefscan.reporting.evaluation import PROMPT_REWARDS
from prefscan.reporting.tables import QUESTION_SCORES

PARAMS = Path("params.yaml")
# What is read of each of these files, by its dotted name, and whether it is text or a number. Other keys are the
# business of the version that wrote them.
READ: dict[Path, dict[str, type]] = {
    PARAMS: {f"judge.{name}": str for name in ("kind", "name", "mode", "folder")}
    | {"model.source.kind": str, "seed": float},
    SUMMARY: {"recipe.cell": str} | {f"recipe.{name}": float for name in ("score", "score_low", "score_high")},
    JUDGE_METRICS: {"all.swapped.auc": float},
}
# Points: two revisions' scores of a question that are no further apart are one score. Another processor rounds the
# judge's sums otherwise, by up to 1e-5 (docs/performance.md), and a score by the middle between two, of which
# questions.csv holds three digits, becomes the other.
SAME_SCORE = 0.01
# Parameters that decide how a result is reached or what it costs, and not what it is.
NEUTRAL = {
    *(f"judge.{name}" for name in ("budget", "timeout", "attempts", "concurrency", "prices", "key_variable")),
    *(f"answer.server.{name}" for name in ("timeout", "attempts", "key_variable")),
    "agreement",
    "runtime",
}
# Parameters that make a judge the one that it is, beside the name of one behind an API.
JUDGE = (
    *("kind", "mode", "against", "references", "folder", "dtype"),
    *("base_url", "seed", "temperature", "samples", "max_tokens"),
)


class Revision(NamedTuple):
    """`scores` has a row a question, its number the index, and a column a model beside `category`.

    `rewards` has a row an evaluation prompt and a column a model; it is empty where no reward is known.
    """

    name: str
    params: dict[str, Any]
    summary: dict[str, Any]
    judge: dict[str, Any]
    scores: pd.DataFrame
    pins: dict[str, str]
    rewards: pd.DataFrame

    @property
    def models(self) -> list[str]:
        return [column for column in self.scores.columns if column != "category"]

    @property
    def recipe(self) -> str:
        return str(self.summary["recipe"]["cell"])


def checked(value: Any, wanted: dict[str, type]) -> dict[str, Any]:
    """`value`, a mapping; raises ValueError with the first of the wanted names that is not text, or a finite number."""
    if not isinstance(value, dict):
        raise ValueError(f"expected keys and values, found {value!r:.100}")
    found = dict(leaves(value))
    for name, kind in wanted.items():
        if name not in found:
            raise ValueError(f"{name} is missing")
        if kind is str and not isinstance(found[name], str):
            raise ValueError(f"{name} is {found[name]!r:.100} and no text")
        # An integer may be beyond every float; NaN is not within any bound.
        if kind is float and not (isinstance(found[name], (int, float)) and abs(found[name]) <= sys.float_info.max):
            raise ValueError(f"{name} is {found[name]!r:.100} and no finite number")
    return value


def parse_scores(text: str) -> pd.DataFrame:
    """The scores of reports/questions.csv as `Revision` has them.

    Raises ValueError with the first column that is missing, question that stands twice, or score that is no number.
    """
    table = pd.read_csv(StringIO(text), float_precision="round_trip")
    for column in ("question", "category", "base"):
        if column not in table:
            raise ValueError(f"column {column} is missing")
    scores = table.set_index("question")
    for question in scores.index[scores.index.duplicated()]:
        raise ValueError(f"question {question} stands twice")
    for model in scores.columns.drop("category"):
        numbers = pd.to_numeric(scores[model], errors="coerce")
        for question in scores.index[~np.isfinite(numbers)]:
            raise ValueError(f"question {question}, {model}: {scores.loc[question, model]} is no finite number")
    return scores


def parse_rewards(text: str) -> pd.DataFrame:
    """The rewards of reports/prompts.csv, a row a prompt; raises ValueError for what is missing or no number."""
    table = pd.read_csv(StringIO(text), float_precision="round_trip")
    for column in ("prompt", "base"):
        if column not in table:
            raise ValueError(f"column {column} is missing")
    rewards = table.set_index("prompt")
    if rewards.index.has_duplicates or not np.isfinite(rewards.to_numpy(dtype=float)).all():
        raise ValueError("a prompt stands twice, or a reward is no finite number")
    return rewards


def read_revision(revision: str | None) -> Revision:
    """A revision by what git or DVC's experiments call it; None is the workspace.

    Raises UserError for a name that no commit has, a commit whose results are not those of its parameters, a file that
    is missing, and a value in one that cannot be read.
    """
    name = "workspace" if revision is None else revision
    commit = None if revision is None else commit_of(revision)

    def read(path: Path, parse: Callable[[str], Any]) -> Any:
        try:
            return parse(read_text(path) if commit is None else read_at(path, name, commit))
        except (*BAD_JSON, yaml.YAMLError) as error:
            command = "dvc exp run" if path == PARAMS else "dvc repro"
            raise UserError(
                f"{name}: {path}: {' '.join(str(error).split())}; run `{command}` there, which writes it, and commit it"
            ) from None

    params = read(PARAMS, lambda text: checked(read_yaml(text), READ[PARAMS]))
    summary = read(SUMMARY, lambda text: checked(json.loads(text), READ[SUMMARY]))
    judge = read(JUDGE_METRICS, lambda text: checked(json.loads(text), READ[JUDGE_METRICS]))
    scores = read(QUESTION_SCORES, parse_scores)
    known = params.get("reward") is not None
    rewards = read(PROMPT_REWARDS, parse_rewards) if known else pd.DataFrame()
    versions = read(Path("constraints.txt"), lambda text: dict(pins(text)))
    found = Revision(name, params, summary, judge, scores, versions, rewards)
    if found.recipe not in found.models:
        raise UserError(
            f"{name}: {QUESTION_SCORES}: column {found.recipe} is missing, the recipe of {SUMMARY}; run `dvc repro` "
            "there, which writes both, and commit them"
        )
    if commit is not None:  # of the workspace, `dvc repro --dry` knows more
        refuse_stale(name, commit)
    return found


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


def refuse_scales(revisions: list[Revision]) -> None:
    """Raises UserError where the revisions' scores are on other scales: a pair judge's are shares of wins."""
    if len(modes := {revision.params["judge"]["mode"] for revision in revisions}) > 1:
        names = ", ".join(revision.name for revision in revisions)
        raise UserError(
            f"{names}: judge.mode is {' and '.join(sorted(modes))}, whose scores are on other scales; compare sweeps "
            "of one mode"
        )


def tied(scores: pd.Series, others: pd.Series) -> pd.Series:
    """`scores`, in points, by question, with another revision's where the two are one score: their difference is 0."""
    return scores.where((scores - others).abs() > SAME_SCORE * 1.001, others)


# DVC knows files and parameters: what is installed makes no stage stale.
VERSIONS_NOTE = (
    "Another version of a library makes no stage stale: the numbers are those of the versions that computed them, and "
    "`dvc repro --force` computes them anew."
)


def pins(constraints: str) -> Iterator[tuple[str, str]]:
    for line in constraints.splitlines():
        name, _, version = line.partition("==")
        if name in LIBRARIES:
            yield name, version


def leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every parameter by its dotted name, as DVC shows it; a list is one value."""
    for name, child in value.items():
        if isinstance(child, dict):
            yield from leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def settings(revision: Revision, models: Iterable[str]) -> dict[str, Any]:
    """What decides the models' results: the parameters but for the choice of cells, and the pinned versions.

    Of `losses` it has the sections of their own losses.
    """
    losses = {model.partition("-")[0] for model in models}
    neutral = NEUTRAL | ({"judge.name"} if revision.params["judge"]["kind"] == "local" else set())  # as in judge_of

    def decides(name: str) -> bool:
        if name.startswith("losses."):
            return name.split(".")[1] in losses
        return name.split(".")[0] not in CHOICE and neutral.isdisjoint((name, name.rpartition(".")[0]))

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
