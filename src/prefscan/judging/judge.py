"""What judging is made of: a prompt, a verdict, a judge that gives one for the other, and what a verdict is about."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
class Turn:
    """One turn of one answer, ready to be judged."""

    question_id: int
    category: str
    turn: int  # from 1
    template: str  # the name of FastChat's judge prompt
    prompt: Prompt

    def __str__(self) -> str:
        sample = f" sample {self.prompt.sample}" if self.prompt.sample else ""
        return f"question {self.question_id} turn {self.turn}{sample}"


@dataclass(frozen=True)
class Verdict:
    """The judge's word on one prompt, or the reason why there is none; `text` is its reply as it came.

    `score` is on the mode's scale. `served_by` is the model that a provider says it used, and its fingerprint; empty
    for a judge on this machine, which costs no USD either, and whose probability of giving any verdict is `mass`.
    `passing`: there is no reply, and a later run may bring one.
    """

    score: float | None
    text: str
    reason: str = ""
    served_by: str = ""
    usd: float = 0.0
    mass: float | None = None
    passing: bool = False


class Mode(Protocol):
    """What `judge.mode` decides: what a prompt shows, how a reply is read, and what becomes of the verdicts."""

    templates: tuple[str, str]  # FastChat's prompts for a first turn, without and with a reference
    scale: tuple[float, float]  # the lowest and the highest score
    orders: int  # prompts a turn
    prefill: str  # how a local judge's reply begins
    options: Mapping[str, float]  # what may follow, before the closing brackets, and its score
    reminder: str  # to a judge whose reply has no verdict

    def parse(self, text: str) -> Verdict:
        """The one verdict in a reply; no score when there is none or when several differ."""

    def choose(self, probabilities: Sequence[float]) -> Verdict:
        """The verdict from the probability of each option, of which one at least is above 0."""

    def layouts(self, answer: Sequence[str], other: Sequence[str] | None) -> list[dict[str, str]]:
        """The fields of FastChat's templates for the turns of an answer, and of the one that it is compared with."""

    def record(self, key: str, against: str, judge: str, turns: Sequence[Turn], verdicts: Sequence[Verdict]) -> Any:
        """FastChat's record of one turn of the model `key`, from its scored verdicts, one an order."""

    def figures(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Further metrics, from the records of all turns."""

    def check_layouts(self, versions: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """The fields of what the judge check shows of one question, by a name of its own."""

    def contests(self, scores: Mapping[str, float]) -> dict[str, tuple[float, float | None]]:
        """By bad version, whether the good one won (1, ½ or 0) and by how many points, where both are scored."""


class Judge(Protocol):
    """Scores prompts; a fault of one prompt is a verdict without score, so that the others are kept."""

    def verdicts(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Verdict]]:
        """The place of each prompt and its verdict, in the order in which they are ready."""


def load_judge(judge: Any) -> Judge:
    """The judge of `params.judge`; raises UserError when it cannot be set up."""
    made: Judge = import_module(f"prefscan.judging.{judge.kind}").make(judge)
    return made


def mode_of(judge: Any) -> Mode:
    """What `judge.mode` stands for."""
    from prefscan.judging import pairs, single  # which import this module

    modes: dict[str, Mode] = {"single": single.MODE, "pair": pairs.MODE}
    return modes[judge.mode]
