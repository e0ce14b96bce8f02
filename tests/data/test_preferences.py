"""Pairs of sampled replies: which replies meet, which is preferred, what is counted."""

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from prefscan.common.config import Data
from prefscan.common.errors import UserError
from prefscan.data.preferences import candidates, pairs_of_prompt, preference, sampled_pairs


def data(**source: Any) -> Data:
    given = {"kind": "sampled", "pairing": "best_worst", "min_gap": 0.5, "pairs_per_prompt": 2} | source
    limits = {"max_prompt_length": 10, "max_length": 20, "heldout_share": 0.4, "heldout_max": None}
    return Data.model_validate({"name": "sampled", "folder": "data/samples/train.jsonl", "source": given, **limits})


def reply(utility: float, *tokens: int) -> dict[str, Any]:
    return {"text": f"reply of {utility}", "tokens": list(tokens) or [int(100 * utility) % 1000], "utility": utility}


def row(*utilities: float, identity: str = "p") -> dict[str, Any]:
    return {"id": identity, "prompt": "Go", "prompt_ids": [1, 2], "replies": [reply(u) for u in utilities]}


def test_the_best_meets_the_worst_and_the_second_the_last_but_one() -> None:
    replies = row(0.1, 2.0, -1.0, 1.0, 0.4)["replies"]
    met = [(a["utility"], b["utility"]) for a, b in candidates(replies, data().source, "p")]  # type: ignore[arg-type]
    assert met == [(2.0, -1.0), (1.0, 0.1)]


def test_equal_rewards_pair_in_the_order_drawn() -> None:
    replies = [reply(1.0, 7), reply(1.0, 8)]
    ((first, second),) = candidates(replies, data().source, "p")  # type: ignore[arg-type]
    assert (first["tokens"], second["tokens"]) == ([7], [8])


def test_bradley_terry_prefers_with_the_logistic_of_the_gap() -> None:
    source = data(pairing="bradley_terry", min_gap=0.0, pairs_per_prompt=1).source
    wins = 0
    for number in range(4000):
        ((chosen, _),) = candidates([reply(1.0, 1), reply(0.0, 2)], source, f"prompt {number}")  # type: ignore[arg-type]
        wins += chosen["tokens"] == [1]
    expected = 1 / (1 + math.exp(-1))
    assert wins / 4000 == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))


@pytest.mark.parametrize("gap", [-800.0, -2.0, 0.0, 3.0, 800.0])
def test_the_probability_of_a_preference_is_finite_at_any_gap(gap: float) -> None:
    one, other = preference(reply(gap), reply(0.0)), preference(reply(0.0), reply(gap))
    assert one + other == pytest.approx(1)
    assert 0 <= one <= 1


def test_what_gives_no_pair_is_counted() -> None:
    counts: Counter[str] = Counter()
    found = pairs_of_prompt(row(3.0, 2.0, 1.0, 0.0, -1.0, -2.0), data(pairs_per_prompt=1).source, counts)  # type: ignore[arg-type]
    assert [(p["chosen"], p["rejected"]) for p in found] == [("reply of 3.0", "reply of -2.0")]
    assert counts == {"over_pairs_per_prompt": 2, "prompts_without_pair": 0}
    assert pairs_of_prompt(row(0.2, 0.0), data().source, counts) == []  # type: ignore[arg-type]
    same = {"id": "q", "prompt": "Go", "prompt_ids": [1], "replies": [reply(2.0, 5), reply(0.0, 5)]}
    assert pairs_of_prompt(same, data().source, counts) == []  # type: ignore[arg-type]
    assert (counts["below_min_gap"], counts["identical"], counts["prompts_without_pair"]) == (1, 1, 2)


def test_a_pair_keeps_the_sampled_tokens() -> None:
    (pair,) = pairs_of_prompt(row(1.0, 0.0), data().source, Counter())  # type: ignore[arg-type]
    assert (pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"], pair["gap"]) == ([1, 2], [100], [0], 1.0)


def test_no_prompt_is_on_both_sides_and_the_order_of_rows_changes_nothing() -> None:
    rows = [row(2.0, 1.0, 0.0, -1.0, identity=f"p{i}") for i in range(40)]
    train, heldout, metrics = sampled_pairs(rows, data())
    ids = [{pair["id"] for pair in side} for side in (train, heldout)]
    assert (len(train) + len(heldout), metrics["rows"], ids[0] & ids[1]) == (80, 160, set())
    assert 10 < len(heldout) < 60
    assert sampled_pairs(rows[::-1], data()) == (train, heldout, metrics)
    assert metrics["gap"] == pytest.approx(2.0)  # of 3 and of 1
    assert all(a["id"] != b["id"] for a, b in pairwise(train))


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([row(1.0)], {}, "prompt p has 1 reply, and a pair takes two"),
        ([row(0.1, 0.0, identity=f"p{i}") for i in range(9)], {}, "below_min_gap 9"),
        ([row(2.0, 0.0, identity=f"p{i}") for i in range(9)], {"max_prompt_length": 1}, "too_long 9"),
    ],
)
def test_what_leaves_no_pair_is_refused_with_its_reason(rows: Any, changes: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        sampled_pairs(rows, data().model_copy(update=changes))
