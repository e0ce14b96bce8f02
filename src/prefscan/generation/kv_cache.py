"""Keys and values of a batch of conversations: prompts read once, rows that leave when they end, room for new tokens.

A row is one conversation. All rows end in the same slot, so distances between slots are those between tokens, as
sliding windows count them; where prompts are of unlike length, a row's first slots are padding that a mask hides.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

READ_TOKENS = 4096  # of prompts of one length that a forward pass reads together: its activations stay small


class RoomyLayer(DynamicLayer):
    """Keys and values in memory of their final size, where DynamicLayer copies all that it holds for every new token.

    `memory` holds keys and values of shape `[rows, heads, room, size]`; `keys` and `values` are views of the filled
    slots of its first `live` rows, which are those that a forward pass reads.
    """

    def __init__(self, like: DynamicLayer, rows: int, slots: int, room: int) -> None:
        """`slots` of `room` are filled with zeros: the weight of 0 that a padding slot has must meet no NaN."""
        super().__init__()
        self.lazy_initialization(like.keys, like.values)
        self.memory = [
            states.new_zeros(rows, states.shape[1], room, states.shape[3]) for states in (like.keys, like.values)
        ]
        self.show(rows, slots)

    def show(self, live: int, slots: int) -> None:
        self.keys, self.values = (memory[:live, :, :slots] for memory in self.memory)

    def put(self, rows: Sequence[int], layer: DynamicLayer, sources: Sequence[int]) -> None:
        """Rows `sources` of another layer as these rows, to end where the filled slots end."""
        start = self.get_seq_length() - layer.get_seq_length()
        self.keys[rows, :, start:] = layer.keys[sources]
        self.values[rows, :, start:] = layer.values[sources]

    def swap(self, one: int, other: int) -> None:
        """Two rows change places."""
        if one != other:
            slots = self.get_seq_length()
            for memory in self.memory:
                memory[[one, other], :, :slots] = memory[[other, one], :, :slots]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start, live = self.get_seq_length(), len(key_states)
        end = start + key_states.shape[2]
        for memory, states in zip(self.memory, (key_states, value_states), strict=True):
            memory[:live, :, start:end] = states
        self.show(live, end)
        return self.keys, self.values


class Rows:
    """A batch of conversations that a model goes on reading.

    `order[i]` is the conversation whose keys and values are in row `i` of the memory. The first `live` rows are read;
    those behind them have ended, and their keys and values stay for a later turn. `starts[c]` is the first slot of
    conversation `c`.
    """

    def __init__(self, model: PreTrainedModel, layers: list[RoomyLayer], starts: list[int]) -> None:
        self.model, self.layers, self.starts = model, layers, starts
        self.cache = Cache(layers=layers)
        self.order = list(range(len(starts)))
        self.live = len(starts)

    @property
    def reading(self) -> list[int]:
        """The conversations that have not ended, in the order of their rows."""
        return self.order[: self.live]

    def read(self, ids: Tensor) -> Tensor:
        """Append the tokens `[live, count]`, in the order of `reading`; returns logits `[live, count, vocabulary]`."""
        filled, count = self.cache.get_seq_length(), ids.shape[1]
        device = self.model.device
        starts = torch.tensor([self.starts[c] for c in self.reading], device=device)[:, None]
        padded = max(self.starts) > 0  # without padding there is no mask, and attention copies no keys
        logits: Tensor = self.model(
            input_ids=ids.to(device),
            attention_mask=(torch.arange(filled + count, device=device) >= starts).long() if padded else None,
            position_ids=torch.arange(filled, filled + count, device=device) - starts,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits

    def drop(self, ended: Sequence[int]) -> None:
        """These conversations have ended: each changes places with the last live row."""
        for conversation in ended:
            row, last = self.order.index(conversation), self.live - 1
            self.order[row], self.order[last] = self.order[last], self.order[row]
            self.live = last
            for layer in self.layers:
                layer.swap(row, last)
        for layer in self.layers:
            layer.show(self.live, layer.get_seq_length())


@dataclass(frozen=True)
class Context:
    """What a batch holds of each conversation so far: `tokens[c]`, from slot `rows.starts[c]` on."""

    rows: Rows
    tokens: list[list[int]]

    def shared(self, conversation: int, prompt: list[int]) -> int:
        """How many tokens the prompt shares with the conversation's past; at most all but its last."""
        past = self.tokens[conversation]
        most = min(len(past), len(prompt) - 1)
        return next((i for i in range(most) if past[i] != prompt[i]), most)

    def cache(self, conversations: list[int], count: int) -> DynamicCache:
        """A cache of the first `count` tokens of these conversations."""
        cache = DynamicCache()
        rows = [(self.rows.order.index(c), self.rows.starts[c]) for c in conversations]
        for i, layer in enumerate(self.rows.layers):
            keys, values = (
                torch.cat([memory[row : row + 1, :, start : start + count] for row, start in rows])
                for memory in layer.memory
            )
            cache.update(keys, values, i)
        return cache


def keeps_all(model: PreTrainedModel) -> bool:
    """Whether the model's layers read keys and values of all past tokens, or of the last ones, and nothing else.

    Not so a layer with a state that each token changes. The model must also take the tokens' positions, since padding
    shifts a row's slots.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = DynamicCache(config=model.config).layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return plain and "position_ids" in inspect.signature(base.forward).parameters


def read_prompts(
    model: PreTrainedModel, prompts: list[list[int]], new: int, context: Context | None = None
) -> tuple[Rows, Tensor]:
    """Rows that hold each prompt, with room for `new` tokens, and the logits `[rows, vocabulary]` of what comes next.

    Equal prompts are read once, and prompts of one length together, so no position is padding. Of a prompt that goes
    on from the context only what is new is read; the context's own memory is freed.
    """
    slots = max(map(len, prompts))
    lengths: dict[tuple[int, int], dict[tuple[int, ...], list[int]]] = {}  # rows by shared and whole length, and prompt
    for row, prompt in enumerate(prompts):
        shared = context.shared(row, prompt) if context else 0
        same = lengths.setdefault((shared, len(prompt)), {})
        same.setdefault((row,) if context else tuple(prompt), []).append(row)
    layers: list[RoomyLayer] = []
    logits = torch.empty(0)
    for (shared, length), rows_by_prompt in lengths.items():
        distinct = list(rows_by_prompt.values())
        most = max(READ_TOKENS // (length - shared), 1)
        for group in (distinct[i : i + most] for i in range(0, len(distinct), most)):
            firsts = [rows[0] for rows in group]
            own = context.cache(firsts, shared) if context and shared else DynamicCache()
            ids = torch.tensor([prompts[row][shared:] for row in firsts], device=model.device)
            last = model(input_ids=ids, past_key_values=own, use_cache=True, logits_to_keep=1).logits[:, -1]
            if not layers:
                layers = [RoomyLayer(layer, len(prompts), slots, slots + new) for layer in own.layers]
                logits = last.new_empty(len(prompts), last.shape[-1])
            rows = [row for rows in group for row in rows]
            sources = [i for i, rows in enumerate(group) for _ in rows]
            for layer, filled in zip(layers, own.layers, strict=True):
                layer.put(rows, filled, sources)
            logits[rows] = last[sources]
    if context:
        context.rows.layers.clear()
        context.rows.cache.layers.clear()
    return Rows(model, layers, [slots - len(prompt) for prompt in prompts]), logits
