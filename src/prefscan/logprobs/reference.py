"""The base model's log-probability of every response, once for the whole sweep.

    prefscan reference train      # data/reference/train.jsonl
    prefscan reference heldout    # data/reference/heldout.jsonl

Writes one row a pair: `id`, `ref_chosen_logps` and `ref_rejected_logps` (nats, summed over the response) and the token
counts `chosen_tokens` and `rejected_tokens`. Every train cell reads it and makes no reference pass.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from prefscan.common.config import Train
from prefscan.common.errors import UserError
from prefscan.common.paths import BASE, TRAIN_REFERENCE
from prefscan.logprobs.layouts import Layout
from prefscan.models.loading import load_model

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "chosen_tokens", "rejected_tokens")


def micro_batches(pairs: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


@torch.no_grad()
def reference_rows(
    model: torch.nn.Module, layout: Layout, pairs: list[Any], batch_size: int, pad_token_id: int
) -> Iterator[dict[str, Any]]:
    """One row a pair, in order; computed in micro-batches of the training's size and layout."""
    for batch in micro_batches(pairs, batch_size):
        chosen, rejected = layout.pair_logps(model, layout.collate(batch, pad_token_id))
        for pair, ref_chosen, ref_rejected in zip(batch, chosen.tolist(), rejected.tolist(), strict=True):
            yield {
                "id": pair["id"],
                "ref_chosen_logps": ref_chosen,
                "ref_rejected_logps": ref_rejected,
                "chosen_tokens": len(pair["chosen_ids"]),
                "rejected_tokens": len(pair["rejected_ids"]),
            }


def with_rows(pairs: list[dict[str, Any]], rows: list[dict[str, Any]], source: Path) -> list[dict[str, Any]]:
    """The pairs with the columns of their rows in `source`; raises UserError for a pair that it lacks."""
    found = {row["id"]: row for row in rows}
    if missing := [pair["id"] for pair in pairs if pair["id"] not in found]:
        raise UserError(f"{source} lacks {len(missing)} pairs, the first {missing[0]}; run `dvc repro` again")
    return [pair | found[pair["id"]] for pair in pairs]


def with_reference(pairs: list[dict[str, Any]], reference: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs with the reference stage's columns; raises UserError for a pair that it has not seen."""
    return with_rows(pairs, reference, TRAIN_REFERENCE.parent)


def load_base(train: Train) -> Any:
    """The frozen base model in the dtype and quantisation that training uses."""
    model = load_model(BASE, train.dtype, train.bnb_4bit_quant_type, train.bnb_4bit_use_double_quant)
    return model.requires_grad_(False)
