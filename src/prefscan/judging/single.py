"""`judge.mode: single`: each answer by itself, from 1 to 10."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from prefscan.judging.judge import Turn, Verdict

BRACKETED = re.compile(r"\[\[([^\[\]]*)\]\]")
NUMBER = re.compile(r"\s*[-+]?[0-9.]+(/[0-9]+)?\s*")  # what may be meant for a rating, even a wrong one


class Single:
    templates = ("single-v1", "single-math-v1")
    scale = (1.0, 10.0)
    orders = 1
    prefill = "Rating: [["
    options: Mapping[str, float] = MappingProxyType({str(score): float(score) for score in range(1, 11)})
    reminder = (
        "Your reply has no rating that can be read. Answer again with one rating only, a number from 1 to 10 in "
        'exactly this format: "[[rating]]", for example: "Rating: [[5]]".'
    )

    def parse(self, text: str) -> Verdict:
        """The one rating in a reply; no score when there is none, when several differ, or one outside 1 to 10.

        Other brackets beside ratings, as in quoted code `[[ -f x ]]`, are no ratings.
        """
        bracketed = set(BRACKETED.findall(text))
        ratings = {found for found in bracketed if NUMBER.fullmatch(found)} or bracketed
        if len(ratings) != 1:
            found = f"{len(ratings)} different ratings" if ratings else "no rating"
            return Verdict(None, text, f"{found} of the form [[n]] in the reply")
        (rating,) = ratings
        if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]+)?", rating) or not 1 <= float(rating) <= 10:
            return Verdict(None, text, f"rating {rating!r} is not a number from 1 to 10")
        return Verdict(float(rating), text)

    def choose(self, probabilities: Sequence[float]) -> Verdict:
        """The expected score: Σ p(s)·s / Σ p(s), equation 1 of G-Eval (arXiv 2303.16634)."""
        mass = sum(probabilities)
        expected = sum(p * score for p, score in zip(probabilities, self.options.values(), strict=True)) / mass
        return Verdict(expected, f"{self.prefill}{expected:.4f}]] (expected score; P(any score) = {mass:.3f})")

    def layouts(self, answer: Sequence[str], other: Sequence[str] | None) -> list[dict[str, str]]:
        return [answer_fields("answer", answer)]

    def record(
        self, key: str, against: str, judge: str, turns: Sequence[Turn], verdicts: Sequence[Verdict]
    ) -> dict[str, Any]:
        """A record of FastChat's *_single.jsonl."""
        (turn,), (verdict,) = turns, verdicts
        return {
            "question_id": turn.question_id,
            "model": key,
            "judge": [judge, turn.template],
            "user_prompt": turn.prompt.user,
            "judgment": verdict.text,
            "score": verdict.score,
            "turn": turn.turn,
            "sample": turn.prompt.sample,
            "served_by": verdict.served_by,
            "tstamp": 0.0,  # a time would make equal judgements hash differently
        }

    def figures(self, rows: Sequence[Any]) -> dict[str, Any]:
        return {}

    def check_layouts(self, versions: Mapping[str, str]) -> dict[str, dict[str, str]]:
        return {name: answer_fields("answer", [text]) for name, text in versions.items()}

    def contests(self, scores: Mapping[str, float]) -> dict[str, tuple[float, float | None]]:
        good = scores.get("good")
        if good is None:
            return {}
        return {
            name: ((good > score) + (good == score) / 2, good - score)
            for name, score in scores.items()
            if name != "good"
        }


def answer_fields(name: str, turns: Sequence[str]) -> dict[str, str]:
    """FastChat's names of an answer's turns: the first alone, and all in a conversation."""
    return {name: turns[0]} | {f"{name}_{i}": text for i, text in enumerate(turns, start=1)}


MODE = Single()
