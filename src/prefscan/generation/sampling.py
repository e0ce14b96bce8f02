"""Replies of a model to many prompts at once: sampling that repeats, for the stages sample, evaluate and answer.

Sampling draws from the softmax by its inverse distribution function, with one number of a row's own generator a token
(Devroye 1986, Non-Uniform Random Variate Generation, III.2), so a row's draws do not depend on what runs beside it.
What does is the last bits of its logits, since the shape of a matrix product decides the order of its sums: in batches
of 96 in place of 256, log-probabilities of SmolLM2-135M moved by up to 3e-5, and 10 of 512 replies of 24 tokens got
another token, where the draw fell among unlikely ones (benchmarks/sampling.py --compared). Therefore the batches are a
function of the prompts and of `Sampling.batch_size` alone, and a resumed stage repeats whole batches.

On a CPU four fifths of a step are the matrix products of layers and LM head, attention is a twelfth, and a draw a
twentieth (SmolLM2-135M, 128 rows, fp32); benchmarks/sampling.py has the speed against transformers' own generation.
"""

import hashlib
import re
import time
from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefscan.common.errors import UserError
from prefscan.generation.kv_cache import Context, keeps_all, read_prompts
from prefscan.models.chat import prompt_ids as prompt_ids
from prefscan.models.chat import turn_end
from prefscan.models.memory import free_bytes

GREEDY_BELOW = 1e-4  # FastChat's limit: a temperature under it means greedy decoding
REPEATED = 4  # tokens of the n-grams whose repetition is counted
BLOCK = 256  # tokens of the vocabulary whose probabilities are summed in fp32; sums of blocks are float64
# Of the free memory, for the cache of keys and values, which is there twice while a second turn's prompts are read.
SHARE = 0.4
LOGITS = 3  # copies of a row's fp32 logits that a draw holds


@dataclass(frozen=True)
class Sampling:
    """How replies are generated; `section` is that of params.yaml, to name its keys in errors."""

    section: str
    max_new_tokens: int
    batch_size: int | Literal["auto"]
    temperature: float = 1.0  # under GREEDY_BELOW: greedy
    most: int = 256  # rows that `auto` takes at most

    @property
    def rows(self) -> int:
        """The batch size; `settled_batch_size` has replaced `auto`."""
        assert self.batch_size != "auto"
        return self.batch_size


@dataclass(frozen=True)
class Reply:
    """One reply; `tokens` has the end token where there is one.

    `logprobs` are the policy's own, of each token, at temperature 1, in nats.
    """

    text: str
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    truncated: bool  # by the limit of new tokens
    seconds: float  # the batch's, divided by its rows

    @property
    def repetition(self) -> float:
        """The share of 4-grams that occurred before in the reply; 0 for fewer than 4 tokens.

        seq-rep-4 of Welleck et al. 2020 (arXiv 1908.04319, section 6.1).
        """
        grams = [tuple(self.tokens[i : i + REPEATED]) for i in range(len(self.tokens) - REPEATED + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0


def pick(shares: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse distribution function of each row of weights, and how far within the weight the point lies.

    `shares` is `[rows, n]`, not negative, float64, and need not sum to 1; `points` is `[rows, 1]` in [0, 1]. Returns
    two of `[rows, 1]`. A weight of 0 is never picked, whatever the sums' rounding.
    """
    sums = shares.cumsum(-1)
    total = sums[:, -1:]
    points = torch.minimum(points * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(sums, points, right=True)
    own = shares.gather(-1, index)
    return index, ((points - (sums.gather(-1, index) - own)) / own).clamp(0, 1)


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row's softmax, `[rows, 1]`, and the logarithm of the softmax's denominator, `[rows, 1]`.

    `logits` is fp32 `[rows, vocabulary]` with a maximum of 0, `uniform` float64 `[rows, 1]` in [0, 1). First a block of
    the vocabulary is drawn, then a token within it: the sums are as exact as fp32's exponential, which a cumulative sum
    in fp32 over the vocabulary is not, and no float64 of that size is made.

    Raises UserError for logits that are not finite.
    """
    shares = F.pad(logits.exp(), (0, -logits.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    blocks = shares.sum(-1).double()
    if not blocks.isfinite().all():
        raise UserError(
            "the model's logits are not finite, so no token can be drawn: training diverged, or dtype overflows; "
            "lower train.learning_rate, or set dtype: fp32"
        )
    block, within = pick(blocks, uniform)
    chosen = shares[torch.arange(len(shares), device=shares.device), block[:, 0]]
    return block * BLOCK + pick(chosen.double(), within)[0], blocks.sum(-1, keepdim=True).log().float()


class SeededSampling:
    """Draws tokens for rows that have a random generator, by its seed, and a temperature each."""

    def __init__(self, seeds: Sequence[str], temperatures: Sequence[float]) -> None:
        self.greedy = torch.tensor([temperature < GREEDY_BELOW for temperature in temperatures])
        self.temperatures = torch.tensor(temperatures).masked_fill(self.greedy, 1.0)[:, None]
        self.generators = [
            torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
            for seed in seeds
        ]

    def draw(self, logits: Tensor, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """The next token of each of these rows, of all by default, and its log-probability at temperature 1 in nats.

        `logits` is `[rows, vocabulary]`; returns two of `[rows]`, the second in fp32. Random numbers are drawn on the
        CPU, the same on every device.
        """
        rows = list(range(len(self.generators)) if rows is None else rows)
        uniform = torch.cat([torch.rand(1, 1, generator=self.generators[row], dtype=torch.float64) for row in rows])
        temperatures, greedy = self.temperatures[rows].to(logits.device), self.greedy[rows].to(logits.device)
        logits = logits.float()
        logits = logits - logits.amax(-1, keepdim=True)
        plain = bool((temperatures == 1).all())
        tokens, denominators = draw(logits if plain else logits / temperatures, uniform.to(logits.device))
        if not plain:
            denominators = logits.logsumexp(-1, keepdim=True)
        if greedy.any():
            tokens = torch.where(greedy[:, None], logits.argmax(-1, keepdim=True), tokens)
        return tokens[:, 0], (logits.gather(-1, tokens) - denominators)[:, 0]


class SamplingProcessor(LogitsProcessor):
    """Turns transformers' greedy decoding into `SeededSampling`; `logprobs` has a `[rows]` for each step."""

    def __init__(self, sampling: SeededSampling) -> None:
        self.sampling = sampling
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, logprobs = self.sampling.draw(scores)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0)


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


Said = list[tuple[list[int], list[float]]]  # tokens and their log-probabilities, a row


def decode_by_transformers(
    model: PreTrainedModel, prompts: list[list[int]], sampling: SeededSampling, max_new_tokens: int, ends: list[int]
) -> Said:
    """What each row says, by transformers' own loop and cache, with padded prompts: for models with a state."""
    width = max(map(len, prompts))
    pad = ends[0] if ends else 0
    slots = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    processor = SamplingProcessor(sampling)
    with plain_decoding(model):
        sequences: Any = model.generate(
            input_ids=torch.tensor(slots, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            use_cache=True,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([processor]),
            pad_token_id=pad,
            eos_token_id=ends or None,
        )
    said = []
    logprobs = torch.stack(processor.logprobs, dim=1).tolist()
    for tokens, own in zip(sequences[:, width:].tolist(), logprobs, strict=True):
        count = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        said.append((tokens[:count], own[:count]))
    return said


def decode(
    model: PreTrainedModel,
    prompts: list[list[int]],
    sampling: SeededSampling,
    max_new_tokens: int,
    ends: list[int],
    context: Context | None,
) -> tuple[Said, Context]:
    """What each row says, and the context for the next turn. A row that has ended is computed no further."""
    rows, logits = read_prompts(model, prompts, max_new_tokens - 1, context)
    said: Said = [([], []) for _ in prompts]
    for count in range(1, max_new_tokens + 1):
        tokens, logprobs = sampling.draw(logits, rows.reading)
        for row, token, logprob in zip(rows.reading, tokens.tolist(), logprobs.tolist(), strict=True):
            said[row][0].append(token)
            said[row][1].append(logprob)
        rows.drop([row for row in rows.reading if said[row][0][-1] in ends])
        if not rows.live or count == max_new_tokens:
            break
        logits = rows.read(torch.tensor([[said[row][0][-1]] for row in rows.reading]))[:, -1]
    # A row's last token was chosen and not read.
    return said, Context(rows, [prompt + tokens[:-1] for prompt, (tokens, _) in zip(prompts, said, strict=True)])


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: SeededSampling,
    max_new_tokens: int,
    context: Context | None = None,
    ends: Collection[int] | None = None,
) -> tuple[list[Reply], Context | None]:
    """The reply to each prompt and the context for the next turn; `context`, that of the last one, is used up.

    `ends` are the tokens that end a reply, by default the model's and the tokenizer's. There is no context where the
    model's layers keep something else than keys and values: transformers reads such a model's prompts. An
    out-of-memory error is an error and never an answer: it leaves this function as it is.
    """
    ends = sorted(end_tokens(model.generation_config, tokenizer) if ends is None else ends)
    started = time.perf_counter()
    if keeps_all(model):
        said, after = decode(model, prompts, sampling, max_new_tokens, ends, context)
    else:
        said, after = decode_by_transformers(model, prompts, sampling, max_new_tokens, ends), None
    seconds = (time.perf_counter() - started) / len(prompts)
    replies = []
    for prompt, (tokens, logprobs) in zip(prompts, said, strict=True):
        text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        replies.append(Reply(text, prompt, tokens, logprobs, tokens[-1] not in ends, seconds))
    return replies, after


def even_groups(items: list[Any], most: int) -> list[list[Any]]:
    """The items in order, in as few groups of at most `most` as hold them, whose sizes differ by one at most."""
    count = -(-len(items) // most)
    ends = [len(items) * (i + 1) // count for i in range(count)]
    return [items[start:end] for start, end in pairwise([0, *ends])]


@dataclass(frozen=True)
class Sampled:
    """Reply `number` to prompt `prompt`, both counted from 0."""

    prompt: int
    number: int
    reply: Reply


def batches(prompts: list[list[int]], seeds: list[list[str]], most: int) -> list[list[tuple[int, int]]]:
    """(prompt, number) of the replies of each batch of at most `most` rows.

    In order of the prompts' length, so that few rows have padding. The replies to a prompt share a batch where `most`
    lets them, so that the prompt is read once.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    pieces = [piece for i in by_length for piece in even_groups([(i, number) for number in range(len(seeds[i]))], most)]
    if not pieces:
        return []
    together = most // max(map(len, pieces))
    return [[row for piece in group for row in piece] for group in even_groups(pieces, together)]


def sample_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    seeds: list[list[str]],
    settings: Sampling,
    ends: Collection[int] | None = None,
    finished: Container[tuple[int, int]] = (),
) -> Iterator[list[Sampled]]:
    """Replies to each prompt, one for each of its seeds; yields whole batches, whose composition is always the same.

    A batch whose (prompt, number) are all `finished` is left out; any other is sampled whole. With the batch size that
    it began with, an interrupted stage so ends with the same bits.

    Args:
        prompts: token ids; the caller decides on a chat template or plain text.
        seeds: of each prompt; equal seeds make equal draws, whatever runs beside them.
        ends: the tokens that end a reply, by default the model's and the tokenizer's.

    Raises:
        UserError: for an empty prompt, one that leaves no room within the model's context, max_new_tokens under 1,
            logits that are not finite, and where memory does not suffice.
    """
    check_prompts(model, prompts, settings)
    for batch in batches(prompts, seeds, settings.rows):
        if all(row in finished for row in batch):
            continue
        sampling = SeededSampling([seeds[i][number] for i, number in batch], [settings.temperature] * len(batch))
        with out_of_memory_is_told(settings.section, len(batch)):
            replies, _ = generate(
                model, tokenizer, [prompts[i] for i, _ in batch], sampling, settings.max_new_tokens, ends=ends
            )
        yield [Sampled(i, number, reply) for (i, number), reply in zip(batch, replies, strict=True)]


def check_prompts(model: PreTrainedModel, prompts: list[list[int]], settings: Sampling) -> None:
    """Raises UserError for max_new_tokens under 1, an empty prompt, and one that leaves no room for a reply."""
    section, new = settings.section, settings.max_new_tokens
    if new < 1:
        raise UserError(f"{section}.max_new_tokens: {new} leaves no reply; set 1 or more")
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise UserError(
            f"{section}: {lengths.count(0)} of {len(prompts)} prompts have no token, the first is number "
            f"{lengths.index(0) + 1}; take them out"
        )
    limit = context_limit(model)
    if limit and (over := [i for i, length in enumerate(lengths) if length + new > limit]):
        raise UserError(
            f"{section}.max_new_tokens: {new} after the {lengths[over[0]]} tokens of prompt {over[0] + 1} are more "
            f"than the {limit} that the model was made for, so of {len(over)} prompts; lower it, or shorten them"
        )


@contextmanager
def out_of_memory_is_told(section: str, rows: int) -> Iterator[None]:
    """Raises UserError where memory runs out: torch has an error for a GPU's and none of its own for a CPU's."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        raise UserError(
            f"{section}.batch_size: {rows} conversations at once did not fit into memory "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); set {section}.batch_size lower"
        ) from None


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


def row_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Memory for a conversation of so many tokens: keys and values, and the fp32 logits of one place."""
    return tokens * cache_bytes(model) + LOGITS * 4 * model.config.get_text_config().vocab_size


def context_limit(model: PreTrainedModel) -> int | None:
    """The most tokens of a conversation that the model was made for."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def settled_batch_size(settings: Sampling, model: PreTrainedModel, tokens: int, turns: int = 1) -> int:
    """The batch size, or for `auto` how many conversations of up to so many `tokens` fit into the free memory.

    Raises UserError when the model was not made for so many tokens, when not even one conversation fits, and when
    `batch_size` of them do not.
    """
    section, limit = settings.section, context_limit(model)
    if limit and tokens > limit:
        raise UserError(
            f"{section}.max_new_tokens: {settings.max_new_tokens} lets the longest conversation grow to {tokens} "
            f"tokens and the model was made for {limit}; set it {-(-(tokens - limit) // turns)} lower"
        )
    free, needed = free_bytes(), row_bytes(model, tokens)
    rows = 1 if settings.batch_size == "auto" else settings.batch_size
    if rows * needed > free:
        raise UserError(
            f"{section}.batch_size: {settings.batch_size}, but the keys and values of {rows} of up to {tokens} tokens "
            f"take {rows * needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free; "
            + (f"set {section}.max_new_tokens lower" if rows == 1 else "choose auto, or a smaller number")
        )
    if settings.batch_size != "auto":
        return settings.batch_size
    rows = min(max(int(SHARE * free / needed), 1), settings.most)
    print(f"{rows} conversations at once: {needed / 2**20:.0f} MiB each, {free / 2**30:.1f} GiB free", flush=True)
    return rows
