"""The plainest way to a log-probability, and the check of a layout against it, once a sweep.

One response at a time, without padding, through the model's own attention, head and whatever it does to its logits. A
layout that computes a model otherwise than its authors wrote it is found here, whatever the reason: a scale or cap in
the head, position factors that depend on the longest row, a mask of the model's own.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import torch

from prefscan.common.errors import UserError
from prefscan.logprobs.layouts import Layout, lengths_of, load_layout
from prefscan.logprobs.packed import own_attention

Pair = Mapping[str, Any]
# Nats by which rounding may move a token's log-probability, as a standard deviation: bf16 leaves a logit of 20 steps of
# an eighth, fp16 of a sixty-fourth. A sum over n tokens may be off by √n times as much.
ROUNDING = {"fp32": 3e-4, "fp16": 0.05, "bf16": 0.3}
LAYOUTS = ("packed", "padded")
CHUNK = 256  # positions whose full logits are in fp32 at once


@torch.no_grad()
def response_logp(model: Any, prompt: Sequence[int], response: Sequence[int]) -> float:
    """Log-probability of a response after a prompt, in nats, by one forward pass with full logits."""
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    targets = ids[0, len(prompt) :]
    total = 0.0
    for part, tokens in zip(logits.split(CHUNK), targets.split(CHUNK), strict=True):
        total += part.float().log_softmax(-1).gather(1, tokens[:, None]).double().sum().item()
    return total


def probes(pairs: Sequence[Pair], batch_size: int) -> list[list[Pair]]:
    """Micro-batches to check: the first, the longest pair beside the shortest, and the pair of most unlike answers.

    Training shuffles, so that every pair comes to stand beside every other.
    """

    def longest(pair: Pair) -> int:
        prompt, chosen, rejected = lengths_of(pair)
        return prompt + max(chosen, rejected)

    by_length = sorted(pairs, key=longest)
    uneven = max(pairs, key=lambda pair: abs(len(pair["chosen_ids"]) - len(pair["rejected_ids"])))
    return [list(pairs[:batch_size]), [by_length[-1], *by_length[:-1][: batch_size - 1]], [uneven]]


def plain_values(model: Any, batches: Sequence[Sequence[Pair]]) -> dict[str, dict[str, float]]:
    """`response_logp` of the chosen and of the rejected response, by the pair's id."""
    own_attention(model)
    return {
        pair["id"]: {
            side: response_logp(model, pair["prompt_ids"], pair[f"{side}_ids"]) for side in ("chosen", "rejected")
        }
        for batch in batches
        for pair in batch
    }


def deviation(
    model: Any, layout: Layout, batches: Sequence[Sequence[Pair]], plain: Mapping[str, Any], pad_token_id: int
) -> tuple[float, str]:
    """The largest difference from the plain log-probabilities, over the root of a response's tokens; and where."""
    worst, where = 0.0, ""
    for batch in batches:
        with torch.no_grad():
            found = layout.pair_logps(model, layout.collate(batch, pad_token_id))
        for side, name in zip(found, ("chosen", "rejected"), strict=True):
            for pair, value in zip(batch, side.tolist(), strict=True):
                expected = plain[pair["id"]][name]
                share = abs(value - expected) / sqrt(len(pair[f"{name}_ids"]))
                if not share <= worst:  # NaN as well
                    worst, where = share, f"the {name} response of pair {pair['id']} is {value:.2f} nats, "
                    where += f"where a plain forward pass gives {expected:.2f}"
                if worst != worst:
                    return worst, where
    return worst, where


def refuse_deviation(
    model: Any, name: str, pairs: Sequence[Pair], batch_size: int, pad_token_id: int, dtype: str
) -> float:
    """Check a layout on this model and these pairs; returns the largest deviation, as `deviation` has it.

    Raises UserError where the layout refuses the model, and where it differs from plain forward passes beyond rounding.
    The sentence advises a way out that passed the same check, or none.
    """
    batches = probes(pairs, batch_size)
    plain = plain_values(model, batches)
    kind = getattr(model.config, "model_type", type(model).__name__)

    def fault(name: str, batches: Sequence[Sequence[Pair]]) -> tuple[float, str]:
        """How far the layout is off, and in words where that is too far."""
        own_attention(model)
        try:
            share, where = deviation(model, load_layout(name), batches, plain, pad_token_id)
        except UserError as error:
            return 0.0, str(error)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's own code or TRL's raises in a layout that is not made for it
            reason = " ".join(str(error).split())[:150]
            return 0.0, f"train.layout: {name!r} fails on a model of type {kind} ({type(error).__name__}: {reason})"
        within = share <= ROUNDING[dtype]
        return share, "" if within else f"train.layout: {name!r} is wrong on a model of type {kind}: {where}"

    share, wrong = fault(name, batches)
    if not wrong:
        return share
    other = next(layout for layout in LAYOUTS if layout != name)
    alone = [[pair] for batch in batches for pair in batch]
    choices = [(other, batches, f"set train.layout: {other}")]
    if batch_size > 1:
        choices += [
            (
                name,
                alone,
                "set train.per_device_train_batch_size: 1 and raise train.gradient_accumulation_steps as much",
            ),
            (other, alone, f"set train.layout: {other} and train.per_device_train_batch_size: 1"),
        ]
    for layout, rows, advice in choices:
        if not fault(layout, rows)[1]:
            raise UserError(f"{wrong}; {advice}, which agrees")
    raise UserError(f"{wrong}; train.layout: {other} does not compute it either, so choose another model")
