"""How far a model is from the base: exact KL of the replies that it draws."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import fsum
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefscan.common.errors import UserError
from prefscan.generation.kv_cache import keeps_all, read_prompts
from prefscan.generation.sampling import Reply

HEAD_CHUNK = 256  # places whose logits exist at once: 50 MB of fp32 logits at a vocabulary of 49,152


@dataclass(frozen=True)
class ReplyKL:
    """Of one reply, at each of its tokens' places, the end token's included: KL(π ‖ π_base) in nats, and log π."""

    places: list[float]
    logprobs: list[float]

    @property
    def nats(self) -> float:
        """Σ over the places: its mean over replies drawn from π at temperature 1 is KL(π ‖ π_base) of whole replies."""
        return fsum(self.places)


def logits_of_places(
    model: PreTrainedModel, replies: Sequence[Reply]
) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    """The logits that predict the replies' tokens, in chunks, so that those of long replies never exist at once.

    Yields (reply, place) of N tokens and their logits `[N, vocabulary]`. A prompt that several replies share is read
    once, and a reply that has ended no further.
    """
    if not keeps_all(model):  # a state cannot be handed from chunk to chunk as keys and values can
        for i, reply in enumerate(replies):
            places = torch.arange(len(reply.tokens), device=model.device) + len(reply.prompt) - 1
            ids = torch.tensor([(reply.prompt + reply.tokens)[:-1]], device=model.device)
            yield [(i, j) for j in range(len(places))], model(input_ids=ids, logits_to_keep=places).logits[0]
        return
    lengths = [len(reply.tokens) for reply in replies]
    rows, logits = read_prompts(model, [reply.prompt for reply in replies], max(lengths) - 1)
    yield [(i, 0) for i in range(len(replies))], logits
    start = 1
    while True:
        rows.drop([i for i in rows.reading if lengths[i] <= start])
        if not rows.live:
            return
        end = min(start + max(HEAD_CHUNK // rows.live, 1), max(lengths[i] for i in rows.reading))
        before = [replies[i].tokens[start - 1 : end - 1] for i in rows.reading]
        # What pads a reply that ends within the chunk stands behind all that is read of it.
        logits = rows.read(torch.tensor([tokens + [0] * (end - start - len(tokens)) for tokens in before]))
        wanted = [(row, i, j) for row, i in enumerate(rows.reading) for j in range(start, min(end, lengths[i]))]
        yield [(i, j) for _, i, j in wanted], logits[[row for row, _, _ in wanted], [j - start for _, _, j in wanted]]
        start = end


Side = tuple[PreTrainedModel, Callable[[], AbstractContextManager[Any]]]  # a model, and what switches it to this side


def chunks_of(side: Side, replies: Sequence[Reply]) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    """`logits_of_places` of one side; between two chunks the model is free for the other."""
    model, switched = side
    chunks = logits_of_places(model, replies)
    while True:
        with switched():
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


def kl_and_logprobs(policy: Tensor, base: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """At N places: Σ_v π(v)·(log π(v) − log π_base(v)), and log π of `tokens`; both `[N]`, fp32, in nats.

    `policy` and `base` are logits `[N, vocabulary]`, `tokens` is `[N]`. A sum that is 0 is never below it by rounding.
    """
    log_p, log_q = policy.float().log_softmax(-1), base.float().log_softmax(-1)
    shares = log_p.exp()
    # A token that π cannot say adds nothing, whatever the base makes of it.
    terms = (shares * (log_p - log_q)).masked_fill(shares == 0, 0)
    return terms.sum(-1).clamp_min(0), log_p.gather(-1, tokens[:, None])[:, 0]


@torch.no_grad()
def exact_kl(
    policy: PreTrainedModel, base: PreTrainedModel | None, replies: Sequence[Reply], batch: int
) -> list[ReplyKL]:
    """KL(policy ‖ base) of each reply, which the policy has drawn at temperature 1, by sums over the whole vocabulary.

    Given a reply's tokens up to a place, the sum at that place is exact, so its spread over replies is that of the
    contexts alone; the plain log-ratio of the same replies adds that of the tokens (Rao-Blackwell). In fp32, `batch`
    replies at once, those with equal prompts side by side.

    Args:
        policy: the model that drew the replies.
        base: None where `policy` is a PEFT model: the same with its adapter off.

    Raises:
        UserError: where the KL at a place is not finite.
    """
    own: Side = (policy, nullcontext)
    other: Side = (policy, policy.disable_adapter) if base is None else (base, nullcontext)
    found = [ReplyKL([0.0] * len(reply.tokens), [0.0] * len(reply.tokens)) for reply in replies]
    order = sorted(range(len(replies)), key=lambda i: (len(replies[i].prompt), replies[i].prompt))
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        together = [replies[i] for i in numbers]
        passes = zip(chunks_of(own, together), chunks_of(other, together), strict=True)
        for (where, of_policy), (_, of_base) in passes:
            tokens = torch.tensor([together[i].tokens[j] for i, j in where], device=of_policy.device)
            kls, logprobs = kl_and_logprobs(of_policy, of_base.to(of_policy.device), tokens)
            if not kls.isfinite().all():
                raise UserError(
                    "the KL to the base is not finite: training diverged, or dtype overflows; lower "
                    "train.learning_rate, or set dtype: fp32"
                )
            for (i, j), kl, logprob in zip(where, kls.tolist(), logprobs.tolist(), strict=True):
                found[numbers[i]].places[j] = kl
                found[numbers[i]].logprobs[j] = logprob
    return found
