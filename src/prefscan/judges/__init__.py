"""Judges that score one turn of one answer: one module a kind behind the small protocol `Judge`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol


@dataclass(frozen=True)
class Prompt:
    """FastChat's judge prompt for one turn, filled in; `sample` counts from 0 where a judge is asked several times."""

    system: str
    user: str
    sample: int = 0


@dataclass(frozen=True)
class Verdict:
    """A score from 1 to 10, or the reason why there is none; `text` is the judge's reply as it came.

    `served_by` is the model that a provider says it used, and its fingerprint; empty for a judge on this machine.
    """

    score: float | None
    text: str
    reason: str = ""
    served_by: str = ""


class Judge(Protocol):
    """Scores prompts; a fault of one prompt is a verdict without score, so that the others are kept."""

    def verdicts(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Verdict]]:
        """The place of each prompt and its verdict, in the order in which they are ready."""


def load_judge(judge: Any) -> Judge:
    """The judge of `params.judge`; raises UserError when it cannot be set up."""
    made: Judge = import_module(f"prefscan.judges.{judge.kind}").make(judge)
    return made
