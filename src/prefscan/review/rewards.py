"""Known rewards of sweeps that git holds: the recipe's before and after, and loss against loss over seeds."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from prefscan.reporting.contrasts import crossed_estimate, loss_contrasts
from prefscan.reporting.estimates import Estimate, estimate_mean
from prefscan.reporting.reward_findings import with_interval
from prefscan.review.revisions import Revision


def shared_prompts(revisions: Sequence[Revision]) -> pd.Index:
    """The evaluation prompts that all of them have; empty where one has no known reward."""
    shared = revisions[0].rewards.index
    for revision in revisions[1:]:
        shared = shared.intersection(revision.rewards.index)
    return shared


def recipe_line(before: Revision, after: Revision) -> str | None:
    """The recipe's mean reward in both and their difference, paired by prompt; None without a reward in both."""
    prompts = shared_prompts([before, after])
    if len(prompts) < 2 or before.recipe not in before.rewards or after.recipe not in after.rewards:
        return None
    old, new = before.rewards.loc[prompts, before.recipe], after.rewards.loc[prompts, after.recipe]
    if new.equals(old):
        return f"The recipe's mean reward is {old.mean():.3f} in both, the same on each of {len(prompts)} prompts."
    found = estimate_mean((new - old).to_numpy())
    return (
        f"`{before.recipe}` in {before.name} has a mean reward of {old.mean():.3f}, `{after.recipe}` in {after.name} "
        f"{new.mean():.3f}: the difference is **{with_interval(found)}**, paired over {len(prompts)} prompts. It is of "
        "these two trainings; others of the same settings would differ."
    )


def by_loss(
    revisions: Sequence[Revision], cells: Sequence[str], prompts: pd.Index
) -> tuple[list[str], list[np.ndarray]]:
    """Losses, and of each the rewards `[trainings, prompts]` of its cells in all revisions, in one order of points."""
    losses = list(dict.fromkeys(cell.split("-")[0] for cell in cells))
    points = [[cell.split("-", 1)[1] for cell in cells if cell.startswith(f"{loss}-")] for loss in losses]
    common = [point for point in points[0] if all(point in other for other in points)]
    return losses, [
        np.array([r.rewards.loc[prompts, f"{loss}-{point}"] for r in revisions for point in common]) for loss in losses
    ]


def lines_of(revisions: Sequence[Revision], models: Sequence[str], seeds: Sequence[Sequence[Revision]]) -> list[str]:
    """What the known reward says: losses over the seeds, or the last sweep's cells against the first's."""
    prompts = shared_prompts(revisions)
    cells = [model for model in models if model != "base" and all(model in r.rewards for r in revisions)]
    if len(prompts) < 2 or not cells:
        return []
    found = []
    for known in seeds:
        losses, rewards = by_loss(known, cells, prompts)
        if len(losses) < 2 or not len(rewards[0]):
            continue
        contrasts = loss_contrasts(np.array(rewards), losses, nested=True)
        listed = "; ".join(
            f"{c.first} − {c.second} {with_interval(c.difference)}"
            + ("" if c.p_holm is None else f", p {c.p_holm:.2f}")
            for c in contrasts
        )
        names = ", ".join(revision.name for revision in known)
        found.append(
            f"Over {len(rewards[0])} trainings of each loss in {names}, the mean rewards differ by {listed} (95 % "
            f"intervals for other trainings and prompts, p with Holm's correction, {len(prompts)} prompts)."
        )
    if not found:
        first, last = revisions[0], revisions[-1]
        apart = np.array([(last.rewards[cell] - first.rewards[cell]).loc[prompts] for cell in cells])
        estimate: Estimate = crossed_estimate(apart)[0] if len(cells) > 1 else estimate_mean(apart[0])
        found.append(
            f"The {len(cells)} shared cells have a mean reward in {last.name} that lies {with_interval(estimate)} from "
            f"that in {first.name}, paired by cell and by prompt ({len(prompts)} prompts)."
        )
    return found
