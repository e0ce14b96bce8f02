"""What every known reward has: texts with their prompts in, a finite number each out.

A reward has two scales. Its `utilities` are what preferences are made of: under Bradley and Terry (1952), y is
preferred to y' with probability σ(r(y) - r(y')). Its `scores` are what the report shows. A monotone function, `score`,
leads from one to the other, so both order replies alike.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from prefscan.common.config import CheckableReward, ModelReward, RewardSettings, SentimentReward
from prefscan.common.errors import UserError

Prompt = str | Sequence[dict[str, str]]  # plain text, or the messages of a chat, the last one the user's


class Reward(ABC):
    """A reward of replies; subclasses compute `_utilities`."""

    name: str  # for sentences and errors
    utility_name: str  # the unit of utilities
    score_name: str  # the unit of scores

    @abstractmethod
    def _utilities(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float]:
        """A utility a reply; the texts are checked, and the caller checks that the numbers are finite."""

    def score(self, utility: float) -> float:
        """The utility on the report's scale; the same number unless a kind says otherwise."""
        return utility

    def utilities(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float]:
        """A finite number a reply, whatever stands beside it; raises UserError naming the reward and the text."""
        if len(prompts) != len(replies):
            raise ValueError(f"{len(prompts)} prompts for {len(replies)} replies")
        for number, reply in enumerate(replies, start=1):
            if reply.encode(errors="replace").decode() != reply:
                raise UserError(
                    f"reward {self.name}: reply {number} ({reply!r:.60}) holds half of a surrogate pair, which UTF-8 "
                    "cannot hold; remove it"
                )
        values = self._utilities(prompts, replies) if replies else []
        for number, (reply, value) in enumerate(zip(replies, values, strict=True), start=1):
            if not isfinite(value):
                raise UserError(
                    f"reward {self.name}: reply {number} ({reply!r:.60}) gets {value}, which is not finite; compute it "
                    "in fp32, or choose another reward"
                )
        return values

    def scores(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float]:
        """The utilities on the report's scale; raises UserError as `utilities` does."""
        return [self.score(utility) for utility in self.utilities(prompts, replies)]


def last_text(prompt: Prompt) -> str:
    """The prompt as text: of a chat the last message, which is the user's."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def load_reward(settings: RewardSettings, folder: Path) -> Reward:
    """The reward that the reward stage wrote to the folder; raises UserError for a folder that holds none.

    Each kind imports its own libraries alone.
    """
    match settings:
        case SentimentReward():
            from prefscan.rewards.sentiment import SentimentClassifier

            return SentimentClassifier.load(folder, settings.name)
        case ModelReward():
            from prefscan.rewards.model import RewardModel

            return RewardModel.load(folder, settings)
        case CheckableReward():
            from prefscan.rewards.checkable import InstructionChecks

            return InstructionChecks.load(folder, settings.name)
