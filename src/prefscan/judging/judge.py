"""Judges of the turns of answers: one module a kind behind the small protocol `Judge`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

WINNERS = {"A": 1.0, "B": 0.0, "C": 0.5}  # the verdicts that FastChat's prompts on a pair ask for, and their scores


@dataclass(frozen=True)
class Prompt:
    """FastChat's judge prompt for one turn, filled in; `sample` counts from 0 where a judge is asked several times."""

    system: str
    user: str
    sample: int = 0


@dataclass(frozen=True)
class Verdict:
    """The judge's word on one prompt, or the reason why there is none; `text` is its reply as it came.

    With `judge.mode: single`, `score` is from 1 to 10. With `pair` it is 1 where assistant A is better, 0 where B is,
    and ½ for a tie. `served_by` is the model that a provider says it used, and its fingerprint; empty for a judge on
    this machine, which costs no USD either.
    """

    score: float | None
    text: str
    reason: str = ""
    served_by: str = ""
    usd: float = 0.0


class Judge(Protocol):
    """Scores prompts; a fault of one prompt is a verdict without score, so that the others are kept."""

    def verdicts(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Verdict]]:
        """The place of each prompt and its verdict, in the order in which they are ready."""


def load_judge(judge: Any) -> Judge:
    """The judge of `params.judge`; raises UserError when it cannot be set up."""
    made: Judge = import_module(f"prefscan.judging.{judge.kind}").make(judge)
    return made
