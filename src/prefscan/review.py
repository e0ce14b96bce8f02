"""What a pull request shows its reviewer, as Markdown: python -m prefscan.review main

It compares the workspace with a revision: which stages dvc.lock misses, parameters, metrics, the recipe's paired
difference, the charts. Of the revision it reads what is in git, so that it works on a fork, without cache, remote or
secret. `--charts URL` is where the charts of this commit can be seen, for a comment that stands elsewhere.
Exit status 3 if dvc.lock is stale: its numbers are then not those of its parameters.
"""

import argparse
import sys

from prefscan.errors import UserError, run_stage
from prefscan.paths import REPORTS, SUMMARY
from prefscan.pipeline import dvc, stale_stages
from prefscan.revisions import (
    VERSIONS_NOTE,
    Revision,
    changed,
    read_revision,
    settings,
    shared_models,
    shared_questions,
)
from prefscan.stats import paired_difference

STALE = 3
CHARTS = ("score", "differences", "divergence", "margin")


def lock_section(stale: list[str]) -> str:
    if not stale:
        return "`dvc.lock` belongs to the parameters and the code: no stage is stale."
    listed = "\n".join(f"- `{stage}`" for stage in stale)
    return (
        f"**`dvc.lock` is stale: {len(stale)} stages have not run with these parameters and this code, so the numbers "
        f"below are not theirs.** Run `dvc repro` and commit `dvc.lock`, `metrics/` and `reports/`.\n\n{listed}"
    )


def difference_section(before: Revision, after: Revision) -> str:
    """The recipe's old and new score and their difference, paired by question, with its 95 % interval.

    Raises UserError where the two share fewer than two questions.
    """
    sides = [(revision, revision.summary["recipe"]) for revision in (before, after)]
    scored = ", ".join(
        f"`{recipe['cell']}` in {revision.name} scores {recipe['score']:.2f} "
        f"[{recipe['score_low']:.2f}, {recipe['score_high']:.2f}]"
        for revision, recipe in sides
    )
    shared = shared_questions([before, after])
    new, old = after.scores.loc[shared, after.recipe], before.scores.loc[shared, before.recipe]
    if new.equals(old):
        verdict = f"every one of {len(shared)} questions has the same score"
    else:
        found = paired_difference(new.to_numpy(), old.to_numpy())
        verdict = (
            f"the difference is **{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]**, paired over {len(shared)} "
            f"questions ({found.wins} won, {found.ties} tied, {found.losses} lost; p = {found.p_value:.2f}, 95 % "
            "interval, one seed): "
            + (
                "more than the choice of questions explains"
                if found.p_value <= 0.05
                else "no evidence that one is better"
            )
        )
    lines = [f"{scored}; {verdict}."]
    others = changed(settings(before), settings(after))
    if others:
        listed = ", ".join(f"{name} {old} → {new}" for name, (old, new) in others.items())
        lines.append(f"Not the recipe alone changed, and the difference is of all: {listed}.")
    if before.pins != after.pins:
        lines.append(VERSIONS_NOTE)
    both = shared_models([before, after])
    moved = [model for model in both if not before.scores.loc[shared, model].equals(after.scores.loc[shared, model])]
    lines.append(
        f"Models that both have: {len(both)}; with other scores: {len(moved)}"
        + (f" ({', '.join(moved)})." if moved else ".")
    )
    return "\n\n".join(lines)


def rows_or(table: str, none: str) -> str:
    """A Markdown table of DVC's, or `none` where it has headings alone."""
    return table.strip() if len(table.strip().splitlines()) > 2 else none


def review(base: str, charts: str, stale: list[str]) -> str:
    parameters = dvc("params", "diff", "--md", base)  # the first to say that there is no such base
    try:
        recipe = difference_section(read_revision(base), read_revision(None))
    except UserError as error:
        recipe = f"No paired difference: {error}."
    sections = {
        "Stages": lock_section(stale),
        "Parameters": rows_or(parameters, "No parameter changed."),
        "The recipe": recipe,
        "Metrics": rows_or(dvc("metrics", "diff", "--md", base, "--targets", str(SUMMARY)), "No metric changed."),
        "Charts": "\n\n".join(f"![{name}]({charts}/{name}.png)" for name in CHARTS),
    }
    return f"# This sweep against {base}\n\n" + "\n\n".join(f"## {name}\n\n{text}" for name, text in sections.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="prefscan.review", description="What a pull request shows its reviewer.")
    parser.add_argument("base", help="the branch, tag or commit to compare with")
    parser.add_argument("--charts", default=str(REPORTS / "charts"), metavar="URL", help="where the charts can be seen")
    arguments = parser.parse_args()
    stale = stale_stages(missing_data_is_stale=False)
    print(review(arguments.base, arguments.charts.rstrip("/"), stale))
    if stale:
        sys.exit(STALE)


if __name__ == "__main__":
    run_stage(main)
