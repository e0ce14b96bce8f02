"""How far a model has moved from the base, by what it says."""

from collections.abc import Sequence
from statistics import fmean

import torch
from transformers import PreTrainedModel

from prefscan.common.intervals import mean_interval
from prefscan.generation.sampling import Reply


@torch.no_grad()
def token_logprobs(replies: Sequence[Reply], model: PreTrainedModel) -> list[list[float]]:
    """log π(token | prompt and the tokens before) in nats, for each token of each reply of a conversation.

    A reply whose prompt begins with the prompt and the tokens of the one before shares its forward pass.
    """
    found: list[list[float]] = []
    passes: list[list[Reply]] = []
    for reply in replies:
        last = passes[-1][-1] if passes else None
        read = last.prompt + last.tokens if last else []
        if last and reply.prompt[: len(read)] == read:
            passes[-1].append(reply)
        else:
            passes.append([reply])
    for together in passes:
        ids = torch.tensor(together[-1].prompt + together[-1].tokens, device=model.device)
        # The place before a token predicts it.
        places = [torch.arange(len(r.prompt), len(r.prompt) + len(r.tokens), device=model.device) - 1 for r in together]
        logits = model(input_ids=ids[None, :-1], logits_to_keep=torch.cat(places)).logits[0].float()
        chosen = logits.log_softmax(-1).gather(-1, ids[torch.cat(places) + 1, None])[:, 0].double()
        found += [part.tolist() for part in chosen.split([len(reply.tokens) for reply in together])]
    return found


def log_ratios(replies: Sequence[Reply], base: PreTrainedModel) -> list[float]:
    """log π(reply | prompt) − log π_base(reply | prompt) in nats, summed over tokens, for each of the replies."""
    return [
        sum(reply.logprobs) - sum(of_base)
        for reply, of_base in zip(replies, token_logprobs(replies, base), strict=True)
    ]


def divergence(answers: Sequence[Sequence[Reply]], base: PreTrainedModel) -> dict[str, float]:
    """Monte-Carlo estimate of KL(policy ‖ base) over the policy's own answers, in nats a reply and a token.

    The mean log-ratio of replies drawn from the policy estimates KL without bias. MT-Bench draws at temperatures from 0
    to 0.7, so this is the mean log-ratio of what the policy says under the benchmark, which can be negative; it is
    comparable between cells. The interval takes a question, both turns together, as one observation.
    """
    ratios = [log_ratios(both, base) for both in answers]
    per_reply, low, high = mean_interval([fmean(both) for both in ratios])
    tokens = sum(len(reply.tokens) for both in answers for reply in both)
    return {
        "per_reply": per_reply,
        "per_reply_low": low,
        "per_reply_high": high,
        "per_token": sum(map(sum, ratios)) / tokens,
    }
