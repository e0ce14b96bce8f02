"""The training and the held-out side of the pairs: chosen by hash of the prompt, ordered by hash, counted."""

from collections.abc import Mapping
from statistics import fmean, median
from typing import Any, NamedTuple

from prefscan.common.config import Data
from prefscan.common.errors import UserError

Row = dict[str, Any]


class PreparedPairs(NamedTuple):
    """Tokenised pairs of both sides, and the contents of metrics/prepare.json."""

    train: list[Row]
    heldout: list[Row]
    metrics: dict[str, Any]


def is_held_out(prompt_hash: str, share: float) -> bool:
    """By a hexadecimal hash of the prompt alone: no prompt is on both sides, and adding rows moves none."""
    return int(prompt_hash[:8], 16) / 2**32 < share


def fits(row: Row, data: Data) -> bool:
    longest = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    return len(row["prompt_ids"]) <= data.max_prompt_length and len(row["prompt_ids"]) + longest <= data.max_length


def settle_sides(
    train: list[tuple[str, Row]],
    heldout: list[tuple[str, Row]],
    data: Data,
    counts: Mapping[str, int],
    way_out: str = "the limits",
) -> PreparedPairs:
    """Both sides, given with the hash of each row's prompt, in the order of hashes: a file's order changes nothing.

    `counts` has `rows`, and how many were dropped, by reason. Raises UserError when no pair is left on one of the two
    sides; `way_out` says what to raise.
    """
    chosen, held = (
        [row for _, row in sorted(side, key=lambda item: (item[0], item[1]["id"]))] for side in (train, heldout)
    )
    over_cap = max(0, len(held) - data.heldout_max) if data.heldout_max else 0
    held = held[: data.heldout_max]
    dropped = {reason: count for reason, count in counts.items() if reason != "rows"}
    for name, rows, least, keys in (
        ("training", chosen, 1, f"{way_out} or lower data.heldout_share"),
        ("held-out", held, 2, f"{way_out}, data.heldout_share or data.heldout_max"),
    ):
        if len(rows) < least:
            reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items() if count) or "nothing dropped"
            raise UserError(
                f"{len(rows)} {name} pairs are left, {least} needed, of {counts['rows']} rows ({reasons}; "
                f"data.max_length = {data.max_length}, data.max_prompt_length = {data.max_prompt_length} tokens); "
                f"raise {keys}"
            )
    every = chosen + held
    metrics = {
        "rows": counts["rows"],
        "train": len(chosen),
        "heldout": len(held),
        "dropped": dropped | {"over_heldout_max": over_cap},
        "tokens": {
            part: {"mean": round(fmean(lengths), 1), "median": median(lengths), "max": max(lengths)}
            for part in ("prompt", "chosen", "rejected")
            if (lengths := [len(row[f"{part}_ids"]) for row in every])
        },
        "chosen_longer_share": round(fmean(len(row["chosen_ids"]) > len(row["rejected_ids"]) for row in every), 4),
    }
    return PreparedPairs(chosen, held, metrics)
