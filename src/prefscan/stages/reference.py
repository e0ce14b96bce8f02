"""The base model's log-probability of every response, once for the whole sweep.

    python -m prefscan.reference train      # data/reference/train.jsonl
    python -m prefscan.reference heldout    # data/reference/heldout.jsonl

Writes one row a pair: `id`, `ref_chosen_logps` and `ref_rejected_logps` (nats, summed over the response) and the token
counts `chosen_tokens` and `rejected_tokens`. Every train cell reads it and makes no reference pass.
"""

import sys

from rich.progress import track

from prefscan.common.config import load
from prefscan.common.errors import UserError, run_stage
from prefscan.common.io import read_jsonl, write_jsonl
from prefscan.common.paths import BASE, SPLITS
from prefscan.logprobs.layouts import load_engine
from prefscan.logprobs.reference import load_base, reference_rows
from prefscan.models.loading import load_tokenizer


def main() -> None:
    params = load()
    train = params.train
    (split,) = sys.argv[1:]
    if split not in SPLITS:
        raise UserError(f"reference of what? got {split!r}; one of {', '.join(SPLITS)}")
    path, reference = SPLITS[split]
    pairs = read_jsonl(path)
    rows = reference_rows(
        load_base(train), load_engine(train.engine), pairs, train.batch_size, load_tokenizer(BASE).pad_token_id
    )
    write_jsonl(reference, list(track(rows, "reference log-probabilities", total=len(pairs))))


if __name__ == "__main__":
    run_stage(main, takes=("split",))
