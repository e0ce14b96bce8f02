"""The responses of another prompt beside each pair: `kto` estimates its KL from them (arXiv 2402.01306, 4.1)."""

from typing import Any

from prefscan.common.errors import UserError

MISMATCHED = {"chosen_ids": "other_chosen_ids", "rejected_ids": "other_rejected_ids"}


def with_mismatched(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs with the responses of the next one in the list that has another prompt; after the last comes the first.

    As in the KTO paper (arXiv 2402.01306, section 4.1), which takes them from the micro-batch; taken from the list,
    they do not depend on the micro-batch, which may be a single pair. Raises UserError where all have one prompt.
    """
    other = next((pair for pair in pairs if pair["prompt_ids"] != pairs[-1]["prompt_ids"]), None)
    if other is None:
        raise UserError(
            f"kto estimates its KL from the responses of another prompt, and the {len(pairs)} pairs of a side have one "
            "prompt; add pairs of others"
        )
    following, found = pairs[0], []
    for pair in reversed(pairs):
        other = other if following["prompt_ids"] == pair["prompt_ids"] else following
        found.append(pair | {column: other[key] for key, column in MISMATCHED.items()})
        following = pair
    return found[::-1]


def mismatched(pair: dict[str, Any]) -> dict[str, Any]:
    """The prompt of a pair with the responses of another, as a pair."""
    return {"prompt_ids": pair["prompt_ids"]} | {key: pair[column] for key, column in MISMATCHED.items()}
