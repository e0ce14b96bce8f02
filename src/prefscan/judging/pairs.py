"""`judge.mode: pair`: each answer beside that of `judge.against`, in both orders.

1 is a win, ½ a tie, 0 a loss. As in FastChat, a win needs both orders.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any

from prefscan.judging.judge import Turn, Verdict
from prefscan.judging.single import BRACKETED, answer_fields


class Pairs:
    templates = ("pair-v2", "pair-math-v1")
    scale = (0.0, 1.0)
    orders = 2
    prefill = "My final verdict is: [["
    # The verdicts that FastChat's prompts ask for, and A's score by each.
    options: Mapping[str, float] = MappingProxyType({"A": 1.0, "B": 0.0, "C": 0.5})
    reminder = (
        "Your reply has no verdict that can be read. Answer again with one verdict only, in exactly this format: "
        '"[[A]]" if assistant A is better, "[[B]]" if assistant B is better, and "[[C]]" for a tie.'
    )

    def parse(self, text: str) -> Verdict:
        winners = set(BRACKETED.findall(text)) & set(self.options)
        if len(winners) != 1:
            found = f"{len(winners)} different verdicts" if winners else "no verdict"
            return Verdict(None, text, f"{found} of the form [[A]], [[B]] or [[C]] in the reply")
        return Verdict(self.options[winners.pop()], text)

    def choose(self, probabilities: Sequence[float]) -> Verdict:
        """The most probable of A, B and C, the first of equals."""
        named = dict(zip(self.options, probabilities, strict=True))
        letter = max(named, key=named.__getitem__)
        shares = ", ".join(f"P({name}) = {p:.3f}" for name, p in named.items())
        return Verdict(self.options[letter], f"{self.prefill}{letter}]] ({shares})")

    def layouts(self, answer: Sequence[str], other: Sequence[str] | None) -> list[dict[str, str]]:
        """The answer as assistant A, then as B."""
        assert other is not None  # whoever judges pairs has both
        orders = ((answer, other), (other, answer))
        return [answer_fields("answer_a", a) | answer_fields("answer_b", b) for a, b in orders]

    def record(
        self, key: str, against: str, judge: str, turns: Sequence[Turn], verdicts: Sequence[Verdict]
    ) -> dict[str, Any]:
        """A record of FastChat's *_pair.jsonl from the two orders of a turn, with its outcome as `score`."""
        winners = {1.0: ("model_1", "model_2"), 0.0: ("model_2", "model_1"), 0.5: ("tie", "tie")}
        first, second = (verdict.score for verdict in verdicts)
        assert first is not None  # records are made of scored verdicts only
        assert second is not None
        return {
            "question_id": turns[0].question_id,
            "model_1": key,
            "model_2": against,
            "g1_winner": winners[first][0],
            "g2_winner": winners[second][1],
            "judge": [judge, turns[0].template],
            "g1_user_prompt": turns[0].prompt.user,
            "g1_judgment": verdicts[0].text,
            "g2_user_prompt": turns[1].prompt.user,
            "g2_judgment": verdicts[1].text,
            "score": outcome(first, second),
            "turn": turns[0].turn,
            "sample": turns[0].prompt.sample,
            "served_by": " ".join(sorted({verdict.served_by for verdict in verdicts} - {""})),
            "tstamp": 0.0,
        }

    def figures(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Counts of wins, losses and ties, and the share of turns on which both orders agree."""
        counts = Counter(row["score"] for row in rows)
        return {
            "wins": counts[1.0],
            "losses": counts[0.0],
            "ties": counts[0.5],
            "orders_agree": fmean(row["g1_winner"] == row["g2_winner"] for row in rows),
        }

    def check_layouts(self, versions: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """The good version beside each bad one, as assistant A and then B."""
        return {
            f"{bad}/{order}": fields
            for bad, text in versions.items()
            if bad != "good"
            for order, fields in zip("AB", self.layouts([versions["good"]], [text]), strict=True)
        }

    def contests(self, scores: Mapping[str, float]) -> dict[str, tuple[float, float | None]]:
        bad = {name.partition("/")[0] for name in scores}
        return {
            name: (outcome(scores[f"{name}/A"], scores[f"{name}/B"]), None)
            for name in bad
            if {f"{name}/A", f"{name}/B"} <= set(scores)
        }


def outcome(first: float, second: float) -> float:
    """1 for a win, 0 for a loss, ½ for a tie, as FastChat: whoever wins does so in both orders.

    `first` is the score of assistant A where A is the answer, `second` where A is what it is compared with.
    """
    return {(1.0, 0.0): 1.0, (0.0, 1.0): 0.0}.get((first, second), 0.5)


MODE = Pairs()
