"""Replies of a chat model to many conversations at once: sampling that repeats, and a cache that later turns reuse.

Sampling draws from the softmax by its inverse distribution function, with one number of a row's own generator a token
(Devroye 1986, Non-Uniform Random Variate Generation, III.2), so a row's draws do not depend on what runs beside it.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    DynamicLayer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from prefscan.common.errors import UserError
from prefscan.models.chat import prompt_ids as prompt_ids
from prefscan.models.chat import turn_end
from prefscan.models.memory import free_bytes

GREEDY_BELOW = 1e-4  # FastChat's limit: a temperature under it means greedy decoding
REPEATED = 4  # tokens of the n-grams whose repetition is counted
# Of the free memory, for the cache of keys and values, which is there twice while the second turn's prompts are read.
SHARE = 0.4
# MT-Bench in two batches: more rows gain little (docs/performance.md), and a killed stage loses the batch it was at.
MOST_ROWS = 40


@dataclass(frozen=True)
class Reply:
    """One turn of one answer; `tokens` has the end token where there is one.

    `logprobs` are the policy's own, of each token, at temperature 1, in nats.
    """

    text: str
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    cut: bool  # by the limit of new tokens
    seconds: float  # the batch's, divided by its rows

    @property
    def repetition(self) -> float:
        """The share of 4-grams that occurred before in the reply; 0 for fewer than 4 tokens.

        seq-rep-4 of Welleck et al. 2020 (arXiv 1908.04319, section 6.1).
        """
        grams = [tuple(self.tokens[i : i + REPEATED]) for i in range(len(self.tokens) - REPEATED + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling, with one random generator and one temperature a row.

    `logprobs` has for each step the log-probabilities at temperature 1 of the chosen tokens, in nats; shape `[rows]`.
    """

    def __init__(self, seeds: Sequence[str], temperatures: Sequence[float]) -> None:
        self.logprobs: list[Tensor] = []
        self.rows = [row for row, temperature in enumerate(temperatures) if temperature >= GREEDY_BELOW]
        self.temperatures = torch.tensor([temperatures[row] for row in self.rows], dtype=torch.float64)[:, None]
        self.generators = [
            torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seeds[row].encode()).digest()[:7], "big"))
            for row in self.rows
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        tokens = scores.argmax(-1, keepdim=True)
        if self.rows:
            # Drawn on the CPU, the same numbers on every device; in float64, so that no token's share is rounded away.
            uniform = torch.cat(
                [torch.rand(1, 1, generator=generator, dtype=torch.float64) for generator in self.generators]
            )
            shares = (scores[self.rows].double() / self.temperatures.to(scores.device)).softmax(-1).cumsum(-1)
            uniform = uniform.to(scores.device) * shares[:, -1:]  # the last sum may miss 1 by rounding
            tokens[self.rows] = torch.searchsorted(shares, uniform, right=True)
        logprobs = scores.gather(-1, tokens) - scores.logsumexp(-1, keepdim=True)
        self.logprobs.append(logprobs[:, 0].cpu())
        sampled = torch.full_like(scores[self.rows], -torch.inf).scatter_(-1, tokens[self.rows], 0)
        scores[self.rows] = sampled
        return scores


class RoomyLayer(DynamicLayer):
    """Keys and values in memory of their final size, where DynamicLayer copies all that it holds for every new token.

    `keys` and `values` have the shape `[rows, heads, slots, size]` and are views of what is filled.
    """

    def __init__(self, like: DynamicLayer, rows: int, slots: int, room: int) -> None:
        """`slots` of `room` are filled with zeros: the weight of 0 that a padding slot has must meet no NaN."""
        super().__init__()
        self.lazy_initialization(like.keys, like.values)
        self.memory = [
            states.new_zeros(rows, states.shape[1], room, states.shape[3]) for states in (like.keys, like.values)
        ]
        self.fill(slots)

    def put(self, row: int, layer: DynamicLayer) -> None:
        """A row's own keys and values, to end where the filled slots end."""
        start = self.get_seq_length() - layer.get_seq_length()
        self.keys[row, :, start:] = layer.keys[0]
        self.values[row, :, start:] = layer.values[0]

    def fill(self, slots: int) -> None:
        self.keys, self.values = (memory[:, :, :slots] for memory in self.memory)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for memory, states in zip(self.memory, (key_states, value_states), strict=True):
            memory[:, :, start:end] = states
        self.fill(end)
        return self.keys, self.values


@dataclass(frozen=True)
class Context:
    """Keys and values of a batch's conversations so far: row `i` has those of `tokens[i]`, from slot `starts[i]` on."""

    cache: Cache
    tokens: list[list[int]]
    starts: list[int]

    def shared(self, row: int, prompt: list[int]) -> DynamicCache:
        """A cache of what the prompt shares with the row's past; at most all but its last token."""
        past = self.tokens[row]
        most = min(len(past), len(prompt) - 1)
        count = next((i for i in range(most) if past[i] != prompt[i]), most)
        places = slice(self.starts[row], self.starts[row] + count)
        cache = DynamicCache()
        for i, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[row : row + 1, :, places], layer.values[row : row + 1, :, places], i)
        return cache


def keeps_all(model: PreTrainedModel) -> bool:
    """Whether the model's layers read keys and values of all past tokens, or of the last ones, and nothing else.

    Not so a layer with a state that each token changes.
    """
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def read_prompts(model: PreTrainedModel, prompts: list[list[int]], new: int, context: Context | None) -> Cache:
    """A cache of all but each prompt's last token, with room for that one and the `new` ones but their last.

    Each prompt is read by itself, so no position is padding. All end in the same slot, so distances between slots are
    those between tokens, as sliding windows count them. The context's own cache is emptied.
    """
    slots = max(map(len, prompts)) - 1
    layers: list[RoomyLayer] = []
    for row, prompt in enumerate(prompts):
        own = context.shared(row, prompt) if context else DynamicCache()
        if rest := prompt[own.get_seq_length() : -1]:
            ids = torch.tensor([rest], device=model.device)
            model(input_ids=ids, past_key_values=own, use_cache=True, logits_to_keep=1)
        layers = layers or [RoomyLayer(layer, len(prompts), slots, slots + new) for layer in own.layers]
        for layer, filled in zip(layers, own.layers, strict=True):
            layer.put(row, filled)
    if context:
        context.cache.layers.clear()
    return Cache(layers=layers)


@contextmanager
def plain_decoding(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model's own generation config sets nothing.

    transformers takes from it whatever a call leaves unset, and no value for a list such as `suppress_tokens` stands
    for none. Emptied in place, since PEFT's wrapper and the model within hold the same config.
    """
    config = model.generation_config
    own = vars(config)
    config.__dict__ = vars(GenerationConfig())
    try:
        yield
    finally:
        config.__dict__ = own


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: SeededSampling,
    max_new_tokens: int,
    context: Context | None = None,
) -> tuple[list[Reply], Context | None]:
    """The reply to each prompt, of two tokens or more, and the context for the next turn; `context` is used up.

    There is no context where the model's layers keep something else than keys and values: transformers reads such a
    model's prompts, padded. An out-of-memory error is an error and never an answer: it leaves this function as it is.
    """
    pad: Any = tokenizer.pad_token_id
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    slots = [[pad] * count + prompt for count, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * count + [1] * len(prompt) for count, prompt in zip(padding, prompts, strict=True)]
    ends = end_tokens(model.generation_config, tokenizer)
    started = time.perf_counter()
    cache = read_prompts(model, prompts, max_new_tokens, context) if keeps_all(model) else None
    with plain_decoding(model):
        sequences: Any = model.generate(
            input_ids=torch.tensor(slots, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            past_key_values=cache,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([sampling]),
            pad_token_id=pad,
            eos_token_id=ends,
        )
    seconds = (time.perf_counter() - started) / len(prompts)
    replies = []
    logprobs = torch.stack(sampling.logprobs, dim=1)
    said = sequences[:, width:]
    for row, prompt in enumerate(prompts):
        tokens = said[row].tolist()
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        tokens = tokens if end is None else tokens[: end + 1]
        text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        replies.append(Reply(text, prompt, tokens, logprobs[row, : len(tokens)].tolist(), end is None, seconds))
    if cache is None:
        return replies, None
    # The last token was chosen and not read, and what follows an end token was read and not said.
    read = said.shape[1] - 1
    return replies, Context(cache, [reply.prompt + reply.tokens[:read] for reply in replies], padding)


def end_tokens(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a turn: the model's own, the tokenizer's and the chat template's."""
    own = generation.eos_token_id
    return sorted({tokenizer.eos_token_id, turn_end(tokenizer), *(own if isinstance(own, list) else [own])} - {None})


def cache_bytes(model: PreTrainedModel) -> int:
    """Memory for a token's keys and values: 2 × layers × key-value heads × head size × bytes a number."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize


def settled_batch_size(
    batch_size: int | Literal["auto"], max_new_tokens: int, model: PreTrainedModel, tokens: int
) -> int:
    """`batch_size`, or for `auto` how many conversations of up to so many `tokens` fit into the free memory.

    Raises UserError when the model was not made for so many tokens, when not even one conversation fits, and when
    `batch_size` of them do not.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and tokens > limit:
        raise UserError(
            f"answer.max_new_tokens: {max_new_tokens} lets the longest conversation grow to {tokens} tokens and "
            f"the model was made for {limit}; set it {-(-(tokens - limit) // 2)} lower"
        )
    free, needed = free_bytes(), tokens * cache_bytes(model)
    rows = 1 if batch_size == "auto" else batch_size
    if rows * needed > free:
        raise UserError(
            f"answer.batch_size: {batch_size}, but the keys and values of {rows} of up to {tokens} tokens take "
            f"{rows * needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free; "
            + ("set answer.max_new_tokens lower" if rows == 1 else "choose auto, or a smaller number")
        )
    if batch_size != "auto":
        return batch_size
    rows = min(max(int(SHARE * free / needed), 1), MOST_ROWS)
    print(f"{rows} conversations at once: {needed / 2**20:.0f} MiB each, {free / 2**30:.1f} GiB free", flush=True)
    return rows
