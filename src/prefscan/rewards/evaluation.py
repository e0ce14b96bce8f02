"""What a model's replies earn against the base's: reward, win rate, exact KL, length and repetition.

The unit of every interval is the prompt: a prompt's replies are averaged first. A cell's first replies to a prompt have
the random numbers of the base's first ones, so that the two are paired.
"""

from collections.abc import Sequence
from itertools import islice
from statistics import fmean
from typing import Any

from prefscan.common.errors import UserError
from prefscan.common.intervals import mean_interval
from prefscan.rewards.reward import Prompt, Reward

Row = dict[
    str, Any
]  # `id`, `prompt` and `replies`, each with `score`, `utility`, `length`, `truncated`, `repetition`, `kl`


def rewarded(
    reward: Reward, prompts: Sequence[str], replies: Sequence[Sequence[str]], chat: bool
) -> list[list[tuple[float, float]]]:
    """Utility and score of each prompt's replies; with `chat`, the prompt was a user's turn."""
    asked: list[Prompt] = [[{"role": "user", "content": prompt}] if chat else prompt for prompt in prompts]
    repeated = [prompt for prompt, own in zip(asked, replies, strict=True) for _ in own]
    utilities = iter(reward.utilities(repeated, [reply for own in replies for reply in own]))
    return [[(utility, reward.score(utility)) for utility in islice(utilities, len(own))] for own in replies]


def interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of values a prompt with its 95 % t interval, under `name`, `name_low` and `name_high`."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), mean_interval(values), strict=True))


def mean_score(row: Row) -> float:
    return fmean(reply["score"] for reply in row["replies"])


def won(row: Row, base: Row) -> float:
    """The share of a prompt's replies that the reward prefers to the base's of the same random numbers, ties half."""
    pairs = zip(row["replies"], base["replies"], strict=False)
    return fmean(
        0.5 if ours["utility"] == theirs["utility"] else float(ours["utility"] > theirs["utility"])
        for ours, theirs in pairs
    )


def aligned(rows: Sequence[Row], base: Sequence[Row]) -> list[Row]:
    """The base's rows of the same prompts in the same order; raises UserError where they are of other prompts."""
    by_prompt = {row["id"]: row for row in base}
    if missing := [row["id"] for row in rows if row["id"] not in by_prompt]:
        raise UserError(f"the base has no replies to {len(missing)} prompts, the first {missing[0]}; run `dvc repro`")
    return [by_prompt[row["id"]] for row in rows]


def reply_metrics(rows: Sequence[Row]) -> dict[str, Any]:
    """Of one model: mean reward with its interval, length in tokens, share of truncated replies, repetition."""
    replies = [reply for row in rows for reply in row["replies"]]
    return {
        "prompts": len(rows),
        "replies": len(replies),
        **interval("reward", [mean_score(row) for row in rows]),
        "mean_tokens": fmean(reply["length"] for reply in replies),
        "share_truncated": fmean(reply["truncated"] for reply in replies),
        "repetition": fmean(reply["repetition"] for reply in replies),
    }


def cell_metrics(rows: Sequence[Row], base_rows: Sequence[Row]) -> dict[str, Any]:
    """metrics/evaluate/CELL.json: the above, the gain over the base, the win rate and the exact KL, in nats a reply.

    The gain is against the mean of all replies that the base gave to a prompt: more than a cell gives.
    """
    base = aligned(rows, base_rows)
    kls = [fmean(known) for row in rows if (known := [r["kl"] for r in row["replies"] if r["kl"] is not None])]
    return {
        **reply_metrics(rows),
        **interval("gain", [mean_score(ours) - mean_score(theirs) for ours, theirs in zip(rows, base, strict=True)]),
        **interval("win_rate", [won(ours, theirs) for ours, theirs in zip(rows, base, strict=True)]),
        "kl_prompts": len(kls),
        **interval("kl", kls),
    }
