"""What a pull request shows its reviewer, as Markdown: prefscan review main

It compares the workspace with the revision at which HEAD left its base: which stages dvc.lock misses, parameters,
metrics, the recipe's paired difference, the charts. Of the revision it reads what is in git, so that it works on a
fork, without cache, remote or secret. `--charts URL` is where the charts of this commit can be seen, for a comment that
stands elsewhere.
Exit status 3 if dvc.lock is stale, and its numbers are not those of its parameters, or a result is not in git.
"""

import argparse
import sys

from prefscan.common.errors import UserError
from prefscan.common.paths import REPORTS, SUMMARY
from prefscan.repo.git import commit_of, git
from prefscan.repo.pipeline import dvc, missing_results, stale_stages
from prefscan.repo.recorded import refuse_stale
from prefscan.reporting.findings import counted
from prefscan.reporting.stats import paired_difference
from prefscan.review.revisions import (
    SAME_SCORE,
    VERSIONS_NOTE,
    Revision,
    changed,
    read_revision,
    refuse_scales,
    settings,
    shared_models,
    shared_questions,
    tied,
)
from prefscan.review.rewards import recipe_line

STALE = 3
CHARTS = ("reward", "gain", "score", "differences", "margin")  # those of them that this sweep has


def merge_base(base: str) -> str:
    """What to call the last commit that HEAD shares with `base`: `base` where it is that commit, else its short hash.

    Raises UserError for a base that is no commit, and where they share none.
    """
    tip = commit_of(base)
    try:
        shared = git("merge-base", tip, "HEAD").decode().strip()
    except UserError:
        shallow = git("rev-parse", "--is-shallow-repository").strip() == b"true"
        way_out = "this clone is shallow, so `git fetch --unshallow`" if shallow else "name the base that HEAD left"
        raise UserError(f"{base} and HEAD share no commit; {way_out}") from None
    return base if shared == tip else git("rev-parse", "--short", shared).decode().strip()


def lock_section(stale: list[str], missing: dict[str, list[str]]) -> str:
    if not stale:
        return "`dvc.lock` belongs to the parameters and the code: no stage is stale."
    listed = "\n".join(f"- `{stage}`" for stage in stale)
    text = (
        f"**`dvc.lock` is stale: {counted(len(stale), 'stage')} {'has' if len(stale) == 1 else 'have'} not run with "
        "these parameters and this code, or their "
        "results are missing, so the numbers below are not theirs.** Run `dvc repro` and commit `dvc.lock`, "
        f"`metrics/` and `reports/`.\n\n{listed}"
    )
    if missing:
        listed = "\n".join(f"- `{path}` of `{stage}`" for stage, paths in missing.items() for path in paths)
        text += f"\n\nMissing here, though git is to hold them:\n\n{listed}"
    return text


def base_section(left: str) -> str:
    """Empty where the base's results are those of its parameters."""
    try:
        refuse_stale(left, commit_of(left))
    except UserError as error:
        return f"\n\n**{error}. No difference from {left} below is one of parameters.**"
    return ""


def difference_section(before: Revision, after: Revision) -> str:
    """The recipe's old and new score and their difference, paired by question, with its 95 % interval.

    Raises UserError where the two share fewer than two questions, or their scores are on other scales.
    """
    refuse_scales([before, after])
    sides = [(revision, revision.summary["recipe"]) for revision in (before, after)]
    scored = ", ".join(
        f"`{recipe['cell']}` in {revision.name} scores {recipe['score']:.2f} "
        f"[{recipe['score_low']:.2f}, {recipe['score_high']:.2f}]"
        for revision, recipe in sides
    )
    shared = shared_questions([before, after])
    old = before.scores.loc[shared, before.recipe]
    new = tied(after.scores.loc[shared, after.recipe], old)
    if new.equals(old):
        verdict = f"every one of {len(shared)} questions has the same score, to {SAME_SCORE} points"
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
    both = shared_models([before, after])
    compared = [*both, before.recipe, after.recipe]
    others = changed(settings(before, compared), settings(after, compared))
    if others:
        listed = ", ".join(f"{name} {old} → {new}" for name, (old, new) in others.items())
        lines.append(
            f"The recipe is the same; other settings changed: {listed}."
            if before.recipe == after.recipe
            else f"Beside the recipe, other settings changed, and the difference is of all: {listed}."
        )
    if before.pins != after.pins:
        lines.append(VERSIONS_NOTE)
    first, second = before.scores.loc[shared], after.scores.loc[shared]
    moved = [model for model in both if not tied(second[model], first[model]).equals(first[model])]
    lines.append(
        f"Models that both have: {len(both)}; with other scores: {len(moved)}"
        + (f" ({', '.join(moved)})." if moved else ".")
    )
    for revision in (before, after):
        alone = [model for model in revision.models if model not in both]
        if alone:
            lines.append(f"Cells that only {revision.name} has: {', '.join(alone)}.")
    return "\n\n".join(lines)


def rows_or(table: str, none: str) -> str:
    """A Markdown table of DVC's, or `none` where it has headings alone."""
    return table.strip() if len(table.strip().splitlines()) > 2 else none


def review(base: str, left: str, charts: str, stale: list[str], missing: dict[str, list[str]]) -> str:
    """The whole text; `left` is the merge base with `base`, `missing` what `missing_results` found."""
    try:
        before, after = read_revision(left), read_revision(None)
        recipe = "\n\n".join(filter(None, (recipe_line(before, after), difference_section(before, after))))
    except UserError as error:
        recipe = f"No paired difference: {error}."
    drawn = [name for name in CHARTS if (REPORTS / f"charts/{name}.png").exists()]
    sections = {
        "Stages": lock_section(stale, missing) + base_section(left),
        "Parameters": rows_or(dvc("params", "diff", "--md", left), "No parameter changed."),
        "The recipe": recipe,
        "Metrics": rows_or(dvc("metrics", "diff", "--md", left, "--targets", str(SUMMARY)), "No metric changed."),
        "Charts": "\n\n".join(f"![{name}]({charts}/{name}.png)" for name in drawn),
    }
    against = base if left == base else f"{left}, the merge base with {base}"
    return f"# This sweep against {against}\n\n" + "\n\n".join(f"## {n}\n\n{text}" for n, text in sections.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="the branch, tag or commit to merge into")
    parser.add_argument("--charts", default=str(REPORTS / "charts"), metavar="URL", help="where the charts can be seen")


def main(base: str, charts: str) -> None:
    left = merge_base(base)
    outdated = stale_stages(missing_data_is_stale=False)  # the first to say that dvc.yaml or params.yaml is damaged
    missing = missing_results()
    stale = sorted({*outdated, *missing})
    print(review(base, left, charts.rstrip("/"), stale, missing))
    if stale:
        sys.exit(STALE)
