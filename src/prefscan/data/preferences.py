"""Preference pairs of the base's own replies, ordered by the known reward.

As in section 6.1 of the DPO paper (Rafailov et al. 2023, arXiv 2305.18290): replies are sampled from the model that
will be tuned, and the reward says which is preferred. `best_worst` takes the best reply of a prompt against its worst,
the second against the last but one, and so on. `bradley_terry` takes replies two by two as they were drawn and draws
which is preferred, with probability σ(r − r′) (Bradley and Terry 1952), as the paper does.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from prefscan.common.config import Data, SampledPairs
from prefscan.common.errors import UserError
from prefscan.data.split import PreparedPairs, fits, is_held_out, settle_sides

Reply = dict[str, Any]


def candidates(replies: list[Reply], source: SampledPairs, prompt_id: str) -> Iterator[tuple[Reply, Reply]]:
    """The preferred and the other reply of each pair that a prompt can give, in the order in which they are taken."""
    if source.pairing == "best_worst":
        order = sorted(range(len(replies)), key=lambda i: (-replies[i]["utility"], i))
        for place in range(len(order) // 2):
            yield replies[order[place]], replies[order[-1 - place]]
        return
    for number in range(len(replies) // 2):
        first, second = replies[2 * number], replies[2 * number + 1]
        digest = hashlib.sha256(f"{prompt_id}/{number}".encode()).digest()
        drawn = int.from_bytes(digest[:8], "big") / 2**64
        yield (first, second) if drawn < preference(first, second) else (second, first)


def preference(first: Reply, second: Reply) -> float:
    """Bradley and Terry's probability that the first is preferred."""
    gap = first["utility"] - second["utility"]
    return 1 / (1 + math.exp(-gap)) if gap >= 0 else 1 - 1 / (1 + math.exp(gap))


def pairs_of_prompt(row: dict[str, Any], source: SampledPairs, counts: Counter[str]) -> list[dict[str, Any]]:
    """The tokenised pairs of a prompt, at most `pairs_per_prompt`; `counts` says what gave none, and why."""
    found: list[dict[str, Any]] = []
    for chosen, rejected in candidates(row["replies"], source, row["id"]):
        if chosen["tokens"] == rejected["tokens"]:
            counts["identical"] += 1
        elif abs(chosen["utility"] - rejected["utility"]) < source.min_gap:
            counts["below_min_gap"] += 1
        elif len(found) == source.pairs_per_prompt:
            counts["over_pairs_per_prompt"] += 1
        else:
            identity = f"{row['id']}/{chosen['tokens']}/{rejected['tokens']}"
            found.append(
                {
                    "id": hashlib.sha256(identity.encode()).hexdigest()[:16],
                    "prompt": row["prompt"],
                    "chosen": chosen["text"],
                    "rejected": rejected["text"],
                    "prompt_ids": row["prompt_ids"],
                    "chosen_ids": chosen["tokens"],
                    "rejected_ids": rejected["tokens"],
                    "gap": chosen["utility"] - rejected["utility"],
                }
            )
    counts["prompts_without_pair"] += not found
    return found


def sampled_pairs(rows: list[dict[str, Any]], data: Data) -> PreparedPairs:
    """Training rows, held-out rows and the counts of metrics/prepare.json, of the replies that the sample stage wrote.

    Raises UserError for a prompt with fewer than two replies, and when no pair is left on one of the two sides.
    """
    source = data.source
    assert isinstance(source, SampledPairs)  # the caller's choice
    reasons = ("identical", "below_min_gap", "over_pairs_per_prompt", "prompts_without_pair", "too_long")
    counts: Counter[str] = Counter({"rows": sum(len(row["replies"]) for row in rows)} | dict.fromkeys(reasons, 0))
    sides: dict[bool, list[tuple[str, dict[str, Any]]]] = {False: [], True: []}
    for row in rows:
        if len(row["replies"]) < 2:
            raise UserError(
                f"{data.folder}: prompt {row['id']} has {len(row['replies'])} reply, and a pair takes two; raise "
                "sample.train_replies"
            )
        prompt_hash = hashlib.sha256(row["id"].encode()).hexdigest()
        for pair in pairs_of_prompt(row, source, counts):
            if fits(pair, data):
                sides[is_held_out(prompt_hash, data.heldout_share)].append((prompt_hash, pair))
            else:
                counts["too_long"] += 1
    way_out = "sample.train_prompts or sample.train_replies, or lower data.source.min_gap; raise the limits"
    found = settle_sides(sides[False], sides[True], data, counts, way_out)
    gaps = [pair["gap"] for pair in [*found.train, *found.heldout]]
    found.metrics["gap"] = round(fmean(gaps), 4)
    return found
