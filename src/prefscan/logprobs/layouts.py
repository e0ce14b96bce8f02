"""How a micro-batch of pairs becomes log-probabilities: one module a layout behind the small protocol `Engine`.

`shared` computes packed rows with one copy of each prompt; `trl` computes stock TRL's padded batches. The reference
stage and training use the same engine, so that policy and reference are rounded alike.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

from torch import Tensor, nn


class Engine(Protocol):
    """A module with these three functions."""

    def collate(self, pairs: Sequence[Mapping[str, Any]], pad_token_id: int) -> Any:
        """A micro-batch of B pairs with `prompt_ids`, `chosen_ids` and `rejected_ids`, as the engine lays it out."""

    def positions(self, batch: Any) -> int:
        """Tokens that a forward pass of the micro-batch computes, padding included."""

    def pair_logps(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Summed log-probability, in nats, of the chosen `[B]` and of the rejected `[B]` responses."""


def load_engine(name: str) -> Engine:
    return cast(Engine, import_module(f"prefscan.engines.{name}"))
