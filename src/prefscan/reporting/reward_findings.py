"""What the known reward says, in sentences: the answer first, then what it cannot say."""

from typing import Any

import pandas as pd

from prefscan.common.config import Params
from prefscan.reporting.contrasts import Contrast
from prefscan.reporting.estimates import Estimate
from prefscan.reporting.evaluation import Comparison, Evaluation, highest


def with_interval(estimate: Estimate, form: str = "+.3f") -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:{form}}"
    return f"{estimate.mean:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def gain_sentence(found: Evaluation, cells: pd.DataFrame, reward_name: str) -> str:
    """How much reward each loss gains over the base."""
    best = [
        highest(group, "gain") for _, group in cells.groupby("loss", sort=False)
    ]  # a row a loss, its cell of highest gain
    listed = ", ".join(
        f"{row['loss']} {row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}] at β {row['beta']:g}"
        for row in best
    )
    significant = cells[(cells["gain_p_holm"] <= 0.05) & (cells["gain"] > 0)]
    worse = cells[(cells["gain_p_holm"] <= 0.05) & (cells["gain"] < 0)]
    losses = [loss for loss in found.losses if loss in set(significant["loss"])]
    verdict = (
        "Every loss gains reward"
        if len(losses) == len(found.losses)
        else f"{', '.join(losses)} gain{'s' * (len(losses) == 1)} reward"
        if losses
        else "No loss gains reward"
    )
    below = f", and {len(worse)} lie significantly below it" if len(worse) else ""
    return (
        f"{verdict}: the base's mean {reward_name} is {found.base_reward:.3f}, and the highest cell of each loss lies "
        f"{listed} above it; {len(significant)} of {len(cells)} cells gain significantly with Holm's correction{below}."
    )


def contrast_sentence(contrasts: list[Contrast], nested: bool) -> str:
    """Which losses differ over the grid, and what difference is excluded where none does."""
    if not contrasts:
        return "One loss alone was trained: there is nothing to compare it with."
    if not nested:
        return (
            "All cells share one training seed, so no statement about losses is made: the variance between trainings "
            "is not known. Set seeding: nested."
        )
    listed = "; ".join(
        f"{c.first} − {c.second} {with_interval(c.difference)}"
        + ("" if c.p_holm is None else f" (p {c.p_holm:.2f} with Holm's correction)")
        for c in contrasts
    )
    different = [c for c in contrasts if c.p_holm is not None and c.p_holm <= 0.05]
    if different:
        verdict = "The losses differ over the grid"
        ending = "."
    else:
        ends = [
            max(abs(c.difference.low), abs(c.difference.high))
            for c in contrasts
            if c.difference.low is not None and c.difference.high is not None
        ]
        verdict = "Over the grid no loss differs significantly from another"
        ending = f"; differences of more than {max(ends):.3f} are excluded at 95 %." if ends else "."
    return f"{verdict}: {listed}{ending}"


def kl_sentence(cells: pd.DataFrame, compared: Comparison) -> str:
    """How far β lets a model move, what the losses do at equal KL, and what is possible there."""
    ends = {
        str(loss): (highest(group, "beta", smallest=True)["kl"], highest(group, "beta")["kl"])
        for loss, group in cells.groupby("loss", sort=False)
    }
    ranges = ", ".join(f"{loss} {first:.2f} to {last:.2f}" for loss, (first, last) in ends.items())
    line = f"From the smallest to the largest β the exact KL to the base goes, in nats a reply, for {ranges}."
    at_equal = [at for at in compared.at_equal_kl if at.difference.low is not None]
    if at_equal:
        different = [at for at in at_equal if at.p_holm is not None and at.p_holm <= 0.05]
        line += (
            f" At equal KL {'some' if different else 'no'} losses differ significantly "
            f"({len(at_equal)} comparisons, largest difference {max(abs(at.difference.mean) for at in at_equal):.3f})."
        )
    known = cells.dropna(subset=["share"])
    if len(known):
        row = highest(known, "share")
        line += f" The highest share of the possible gain at its KL has {row['cell']}, {row['share']:.0%}."
    elif cells["share_at_most"].notna().any():
        line += (
            f" The base's own samples, reweighted, gain more at less KL: no cell has over "
            f"{cells['share_at_most'].max():.0%} of what is possible."
        )
    return line


def check_sentence(check: dict[str, Any]) -> str:
    """Whether the reward is what people say it is, from metrics/reward.json."""

    def spanned(value: dict[str, float]) -> str:
        return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"

    found = check.get("check")
    if check["kind"] == "sentiment" and found:
        parts = [f"{spanned(of['auc'])} on {of['texts']} {name.replace('_', ' ')}" for name, of in found.items()]
        return f"The reward was checked on labels of people that it has not seen: AUC {', '.join(parts)}."
    if check["kind"] == "model" and found:
        return (
            f"The reward orders {found['pairs']} pairs of known order with an accuracy of {spanned(found['accuracy'])}."
        )
    if check["kind"] == "checkable":
        return "The reward is checked by programs: it says what they say."
    return "The reward has no check against people's labels (reward.pairs)."


def caveats(params: Params, found: Evaluation, cells: pd.DataFrame, compared: Comparison) -> list[str]:
    """What the result cannot say."""
    assert params.sample  # of a run with a known reward
    lines = [
        "An interval of a cell is for other prompts, not for other trainings of that cell; one of a contrast between "
        "losses is for both.",
        "β means something else in each loss: equal β is not equal strength. Compare losses at equal KL or over the "
        "grid.",
        f"The task is one: {params.sample.max_new_tokens} tokens that continue a prompt, rewarded by "
        f"{params.reward.name if params.reward else 'no reward'}. It ranks no loss for chat.",
    ]
    if params.sample.eval_split == "development":
        lines.append("These are development prompts, on which settings were chosen: test on sample.eval_split: eval.")
    for group in compared.alike:
        lines.append(f"{', '.join(group)} are one finding: their gains correlate above 0.98 over the prompts.")
    refused = {at.difference.reason for at in compared.at_equal_kl if at.difference.reason}
    lines += [f"At equal KL: {reason}." for reason in sorted(refused)]
    cut = cells["reply_share_truncated"]
    lines.append(f"{cut.min():.0%} to {cut.max():.0%} of the replies were truncated at the limit of tokens.")
    return lines


def headline(found: Evaluation, cells: pd.DataFrame, compared: Comparison, unit: str) -> list[str]:
    """The answer, in three sentences."""
    return [
        gain_sentence(found, cells, unit),
        contrast_sentence(compared.contrasts, found.nested),
        kl_sentence(cells, compared),
    ]
