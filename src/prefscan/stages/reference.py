"""The base model's log-probability of every response, once for the whole sweep.

    prefscan reference train      # data/reference/train.jsonl
    prefscan reference heldout    # data/reference/heldout.jsonl

Writes one row a pair: `id`, `ref_chosen_logps` and `ref_rejected_logps` (nats, summed over the response) and the token
counts `chosen_tokens` and `rejected_tokens`. Every train cell reads it and makes no reference pass.
"""

from rich.progress import track

from prefscan.common.config import load
from prefscan.common.errors import UserError
from prefscan.common.io import read_jsonl, write_jsonl
from prefscan.common.paths import BASE, SPLITS
from prefscan.logprobs.layouts import load_layout
from prefscan.logprobs.reference import load_base, reference_rows
from prefscan.models.loading import load_tokenizer


def main(split: str) -> None:
    train = load().train
    if split not in SPLITS:
        raise UserError(f"reference of what? got {split!r}; one of {', '.join(SPLITS)}")
    path, reference = SPLITS[split]
    pairs = read_jsonl(path)
    rows = reference_rows(
        load_base(train),
        load_layout(train.layout),
        pairs,
        train.per_device_train_batch_size,
        load_tokenizer(BASE).pad_token_id,
    )
    write_jsonl(reference, list(track(rows, "reference log-probabilities", total=len(pairs))))
