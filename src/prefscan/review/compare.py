"""Compare sweeps that git holds, in one report: prefscan compare zephyr openhermes

Each argument is a branch, tag, commit or DVC experiment. The base and the cells that all of them have are paired
question by question with their like in the first. Revisions that differ in `seed` alone are one sweep trained anew,
and what the seed does is set apart from what the questions do. It writes comparison/ (report.html, report.md, charts),
which git ignores, and prints the sentences.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from prefscan.common.errors import UserError
from prefscan.reporting import charts
from prefscan.reporting.findings import counted
from prefscan.reporting.pages import Figure, Page, Table, write_report
from prefscan.reporting.stats import clustered_mean, crossed_mean, holm, paired_difference, variance_components
from prefscan.reporting.tables import span, spanned, with_interval
from prefscan.review.revisions import (
    SAME_SCORE,
    VERSIONS_NOTE,
    Revision,
    changed,
    judge_of,
    read_revision,
    refuse_scales,
    settings,
    shared_models,
    shared_questions,
    tied,
)
from prefscan.review.rewards import lines_of as reward_lines

COMPARISON = Path("comparison")
FEWEST_SEEDS = 3  # of two, no method tells a lead from their luck (docs/statistics.md)


def what_differs(revisions: list[Revision], models: list[str]) -> pd.DataFrame:
    """A row a parameter or pinned version that is not the same in all, a column a revision."""
    values = [settings(revision, models) for revision in revisions]
    names = dict.fromkeys(name for known in values for name in known)
    rows = [
        {"parameter": name} | {r.name: str(known.get(name, "–")) for r, known in zip(revisions, values, strict=True)}
        for name in names
        if len({str(known.get(name)) for known in values}) > 1
    ]
    return pd.DataFrame(rows, columns=["parameter", *(revision.name for revision in revisions)])


def scores_of(revisions: list[Revision], models: list[str], questions: pd.Index) -> pd.DataFrame:
    """A row a model and revision: its score, its lead on its own base, and its difference from the first revision's.

    All over the shared questions, with 95 % intervals; Holm's correction is over all differences from the first.
    """
    rows = []
    for revision in revisions:
        base = revision.scores.loc[questions, "base"]
        for model in models:
            scores = revision.scores.loc[questions, model]
            mean = clustered_mean(scores, questions)
            row: dict[str, Any] = {"cell": model, "revision": revision.name} | spanned("score", mean)
            if model != "base":
                row |= spanned("lead", paired_difference(scores, base))
            if revision is not revisions[0]:
                first = revisions[0].scores.loc[questions, model]
                apart = paired_difference(tied(scores, first), first)
                row |= spanned("difference", apart)
                row |= {"p": apart.p_value, "wins": apart.wins, "ties": apart.ties, "losses": apart.losses}
            rows.append(row)
    table = pd.DataFrame(rows).sort_values("cell", key=lambda cells: cells.map(models.index), kind="stable")
    tested = table["p"].notna()
    table.loc[tested, "p_holm"] = holm(table.loc[tested, "p"])
    return table.drop(columns="p")


def sets_of_seeds(revisions: list[Revision], models: list[str]) -> list[list[Revision]]:
    """The revisions that differ in `seed` alone, two or more together, each seed once."""
    found: list[list[Revision]] = []
    for revision in revisions:
        for known in found:
            if set(changed(settings(known[0], models), settings(revision, models))) <= {"seed"}:
                if all(revision.params["seed"] != other.params["seed"] for other in known):
                    known.append(revision)
                break
        else:
            found.append([revision])
    return [known for known in found if len(known) > 1]


class Seeds(NamedTuple):
    """Revisions that differ in the seed alone, by name, and a row a cell of what the seed does."""

    names: list[str]
    spread: pd.DataFrame


def spread_of_seeds(known: list[Revision], models: list[str], questions: pd.Index) -> Seeds:
    """A cell's mean lead on the base over seeds, with a 95 % interval and p, and the parts of its spread.

    The interval is for other questions and other trainings alike: what these questions favour by chance is in every
    seed, and what these trainings had by luck in every question. `p_holm` is corrected over the cells. `seed_sd` is the
    spread of the true lead between trainings, `question_sd` between questions, both in points.
    """
    rows = []
    for model in (model for model in models if model != "base"):
        leads = np.stack(
            [(r.scores.loc[questions, model] - r.scores.loc[questions, "base"]).to_numpy() for r in known], axis=1
        )
        found, parts = crossed_mean(leads), variance_components(leads[:, :, None, None])
        assert parts.seed is not None  # of two or more seeds
        rows.append(
            {"cell": model, **spanned("lead", found), "p": found.p_value}
            | {"seed_sd": parts.seed**0.5, "question_sd": parts.question**0.5}
        )
    spread = pd.DataFrame(rows)
    spread["p_holm"] = holm(spread["p"])
    return Seeds([revision.name for revision in known], spread.drop(columns="p"))


def sentences(
    revisions: list[Revision], models: list[str], questions: pd.Index, table: pd.DataFrame, seeds: list[Seeds]
) -> list[str]:
    """What was compared, what differs beyond the choice of questions, and what cannot be concluded."""
    first, names = revisions[0].name, ", ".join(revision.name for revision in revisions)
    lines = [
        f"{len(revisions)} revisions, {names}: {counted(len(models) - 1, 'cell')} and the base are in all of them, "
        f"judged on the same {len(questions)} questions."
    ]
    for revision in revisions:
        missed = [model for model in revision.models if model not in models]
        if missed:
            lines.append(f"Left out, since another revision lacks them: {', '.join(missed)} of {revision.name}.")
        unasked = len(revision.scores) - len(questions)
        if unasked:
            asked = counted(unasked, "question")
            lines.append(f"Left out, since another revision did not ask them: {asked} of {revision.name}.")
    apart = {name for revision in revisions for name in changed(judge_of(revisions[0]), judge_of(revision))}
    if apart:
        ranks = [
            f"{revision.params['judge']['name']} of {revision.name} scores a good answer above another question's with "
            f"probability {revision.judge['all']['swapped']['auc']:.2f}"
            for revision in revisions
        ]
        lines.append(
            f"Their judges are not the same, by {', '.join(sorted(apart))} ({'; '.join(ranks)}; 0.5 is chance): a "
            "difference between revisions is one of judges too. Compare the leads on the base."
        )
    compared = table.dropna(subset="difference")
    significant = compared[compared["p_holm"] <= 0.05]
    named = [f"{row['cell']} in {row['revision']}" for row in significant.to_dict("records")]
    if (compared["ties"] == len(questions)).all():
        lines.append(f"Every model has the same score for every question in all of them, to {SAME_SCORE} points.")
    else:
        lines.append(
            f"Paired by question, the models lie {compared['difference'].min():+.2f} to "
            f"{compared['difference'].max():+.2f} from the same in {first}; with Holm's correction over "
            f"{len(compared)} comparisons {', '.join(named) or 'none'} {'differ' if len(named) > 1 else 'differs'} "
            "significantly."
        )
    for trained, spread in seeds:
        told = ", ".join(spread.loc[spread["p_holm"] <= 0.05, "cell"]) or "no cell"
        lines.append(
            f"Over the {len(trained)} seeds of {', '.join(trained)}, the spread of a cell's lead between trainings is "
            f"{spread['seed_sd'].min():.2f} to {spread['seed_sd'].max():.2f} points (standard deviation); "
            + (
                "for other questions and other trainings alike, and with Holm's correction over "
                f"{counted(len(spread), 'cell')}, the lead of {told} is significant."
                if len(trained) >= FEWEST_SEEDS
                else "two seeds are too few to tell a lead from their luck."
            )
        )
    if not seeds:
        lines.append("No two revisions differ in the seed alone: none of this tells a method from the luck of a seed.")
    return lines


def tables_of(
    differing: pd.DataFrame, table: pd.DataFrame, seeds: list[Seeds], revisions: list[Revision]
) -> list[Table]:
    cell = {"cell": ("cell", "{}")}
    scores = cell | {"revision": ("revision", "{}")} | with_interval("score", "score")
    scores |= with_interval("lead", "minus its base", "{:+.2f}")
    scores |= with_interval("difference", f"minus {revisions[0].name}", "{:+.2f}")
    scores |= {"p_holm": ("p, Holm", "{:.2f}"), "wins": ("won", "{:.0f}"), "ties": ("tied", "{:.0f}")}
    scores |= {"losses": ("lost", "{:.0f}")}
    spread = cell | with_interval("lead", "minus its base, mean over seeds", "{:+.2f}")
    spread |= {"p_holm": ("p, Holm", "{:.2f}")}
    spread |= {"seed_sd": ("SD between trainings", "{:.2f}"), "question_sd": ("SD between questions", "{:.2f}")}
    return [
        Table("Scores", "Intervals and tests are over the shared questions.", table, scores),
        Table(
            "What differs",
            f"Parameters but for the choice of cells, and the versions pinned in constraints.txt. {VERSIONS_NOTE}",
            differing,
            {name: (name, "{}") for name in differing.columns},
        ),
        *(
            Table(
                f"Seeds of {', '.join(names)}",
                "Intervals and p are for other questions and other trainings alike; two seeds are too few for either.",
                rows,
                spread,
            )
            for names, rows in seeds
        ),
    ]


def figures_of(table: pd.DataFrame, first: str) -> dict[str, Figure]:
    compared = table.dropna(subset="difference")
    shifts = [*span("difference"), "p_holm", "wins", "ties", "losses"]
    return {
        "scores": Figure(
            "Score of each model in each revision",
            "Bars are 95 % intervals over the shared questions.",
            charts.scores_by_revision(table, "score"),
            table[["cell", "revision", *span("score")]],
        ),
        "differences": Figure(
            f"Each model minus the same in {first}, paired by question",
            "Bars are 95 % intervals, before the correction; a filled point is significant with Holm's correction.",
            charts.differences(compared, f"score minus that in {first}", "revision"),
            compared[["cell", "revision", *shifts]],
        ),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("revisions", nargs="+", metavar="REVISION", help="a branch, tag, commit or DVC experiment")


def main(revisions: list[str]) -> None:
    names = list(dict.fromkeys(revisions))
    if len(names) < 2:
        raise UserError(f"{names[0]} alone is no comparison; name two or more revisions")
    sweeps = [read_revision(name) for name in names]
    models, questions = shared_models(sweeps), shared_questions(sweeps)
    if len(models) < 2:
        raise UserError(f"{', '.join(names)}: no cell is in all of them; compare sweeps that share losses, β and steps")
    refuse_scales(sweeps)
    try:
        COMPARISON.mkdir(exist_ok=True)
    except FileExistsError:
        raise UserError(f"{COMPARISON} is a file, and the report goes into a folder of that name; move it") from None
    table = scores_of(sweeps, models, questions)
    sets = sets_of_seeds(sweeps, models)
    seeds = [spread_of_seeds(known, models, questions) for known in sets]
    lines = reward_lines(sweeps, list(sweeps[0].rewards.columns), sets) + sentences(
        sweeps, models, questions, table, seeds
    )
    tables = tables_of(what_differs(sweeps, models), table, seeds, sweeps)
    title = " against ".join(reversed(names)) if len(names) == 2 else f"{len(names)} revisions"
    figures = figures_of(table, names[0])
    write_report(COMPARISON, Page(title, lines[:3], figures, tables[:1], lines[3:], tables[1:], names))
    print("\n\n".join(lines))
    print(f"\nReport: {COMPARISON}/report.html")
