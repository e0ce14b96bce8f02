"""Merge a cell's adapter into the base, and measure what the merge kept.

    prefscan merge ipo-0.5-16

Rounding can erase a small adapter: merged in bf16, an early one kept 16 % of its margin. So can another base: one
trained on a 4-bit base is merged into the base as published. So the stage compares the held-out margin of the merged
weights with that of base + adapter, the 4-bit base as trained or else the base in fp32, and counts the weights that
changed at all. Where training computed in fp32, its own figures of the pairs are those of base + adapter. One model is
in memory at a time.
With `merge.format: adapter` it writes a manifest of hashes instead of a model, and later stages apply the adapter. The
cell then answers with other numbers than were merged, as it does in another `answer.dtype` than fp32: its margin as the
answer stage loads it is measured as well, over all held-out pairs.
"""

from prefscan.common.config import load
from prefscan.common.io import new_folder, read_jsonl, write_json
from prefscan.common.paths import (
    ADAPTERS,
    BASE,
    HELDOUT_PAIRS,
    HELDOUT_POLICY,
    HELDOUT_REFERENCE,
    MERGE_METRICS,
    MERGED,
)
from prefscan.logprobs.layouts import load_layout
from prefscan.logprobs.packed import own_attention
from prefscan.logprobs.reference import with_reference, with_rows
from prefscan.merging.merge import margin_answering, merge_cell
from prefscan.models.loading import DTYPES, MANIFEST, load_tokenizer, manifest


def main(key: str) -> None:
    params = load()
    params.cell(key)
    pairs = with_reference(read_jsonl(HELDOUT_PAIRS), read_jsonl(HELDOUT_REFERENCE))
    recorded = HELDOUT_POLICY / f"{key}.jsonl"
    pairs = with_rows(pairs, read_jsonl(recorded), recorded)
    merge, dtype = params.merge, params.answer.dtype
    merged, metrics = merge_cell(BASE, ADAPTERS / key, pairs[: merge.check_pairs], merge, params.train)
    with new_folder(MERGED / key) as folder:
        if merge.format == "adapter":
            write_json(folder / MANIFEST, manifest(BASE, ADAPTERS / key))
        else:
            own_attention(merged)
            merged.to(DTYPES[merge.dtype]).save_pretrained(folder)
            load_tokenizer(BASE).save_pretrained(folder)
    del merged
    if params.answers_otherwise:
        metrics |= margin_answering(BASE, MERGED / key, pairs, load_layout(params.train.layout), dtype)
    write_json(MERGE_METRICS / f"{key}.json", metrics)
    kept = metrics["margin_kept"]
    print(f"{key}: the merge kept {'nothing to keep' if kept is None else f'{kept:.1%}'} of the held-out margin")
