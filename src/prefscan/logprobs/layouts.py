"""How a micro-batch of pairs becomes log-probabilities: one module a layout behind the small protocol `Layout`.

`packed` computes one row without padding and with one copy of each prompt; `padded` computes stock TRL's batches. The
reference stage and training use the same layout, so that policy and reference are rounded alike.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

from torch import Tensor, nn

Pair = Mapping[str, Any]  # with the token lists `prompt_ids`, `chosen_ids` and `rejected_ids`


class Layout(Protocol):
    """A module with these functions."""

    FUSED_LORA: bool  # whether training may replace PEFT's layer by training.lora.FusedLora

    def collate(self, pairs: Sequence[Pair], pad_token_id: int) -> Any:
        """A micro-batch of B pairs, laid out."""

    def positions(self, batch: Any) -> int:
        """Tokens that a forward pass of the micro-batch computes, padding included."""

    def most_positions(self, pairs: Sequence[Pair], batch_size: int) -> int:
        """Tokens of the largest micro-batch that these pairs can make."""

    def pair_logps(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Summed log-probability, in nats, of the chosen `[B]` and of the rejected `[B]` responses."""

    def refuse_long(self, model: nn.Module, pairs: Sequence[Pair], what: str, lower: str) -> None:
        """Raises UserError for a pair too long for what the layout computes; `lower` names the keys to lower."""


def load_layout(name: str) -> Layout:
    return cast(Layout, import_module(f"prefscan.logprobs.{name}"))


def lengths_of(pair: Pair) -> tuple[int, int, int]:
    """Tokens of prompt, chosen and rejected response."""
    return len(pair["prompt_ids"]), len(pair["chosen_ids"]), len(pair["rejected_ids"])
