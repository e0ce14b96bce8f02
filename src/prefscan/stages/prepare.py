"""Turn raw preference pairs into tokens, and split them into training and held-out pairs.

    prefscan prepare

Three shapes of row are understood, told apart by their keys: Orca's (`system`, `question`, `chosen`, `rejected`),
UltraFeedback's (`chosen` and `rejected` are lists of messages that differ in the last), and ShareGPT-like ones
(`conversations`, then one `chosen` and one `rejected` message). Each becomes prompt messages, a chosen and a rejected
text, rendered by the tokenizer's own chat template. For KTO, the chosen are the good examples, the rejected the bad.

With `data.source.kind: sampled`, pairs are made of the base's own replies: data/preferences.py.

Nothing is truncated: a pair that does not fit the length limit is dropped and counted in metrics/prepare.json.
"""

from pathlib import Path

from prefscan.common.config import SampledPairs, load
from prefscan.common.io import read_jsonl, write_json, write_jsonl
from prefscan.common.paths import BASE, HELDOUT_PAIRS, PREPARE_METRICS, TRAIN_PAIRS
from prefscan.data.pairs import prepare
from prefscan.data.preferences import sampled_pairs
from prefscan.models.loading import load_tokenizer, positions


def main() -> None:
    data = load().data
    if isinstance(data.source, SampledPairs):
        train, heldout, metrics = sampled_pairs(read_jsonl(Path(data.folder)), data)
    else:
        train, heldout, metrics = prepare(data, load_tokenizer(BASE), Path(data.folder), positions(BASE))
    write_jsonl(TRAIN_PAIRS, train)
    write_jsonl(HELDOUT_PAIRS, heldout)
    write_json(PREPARE_METRICS, metrics)
    print(f"{metrics['rows']} rows: {len(train)} training pairs, {len(heldout)} held out, dropped {metrics['dropped']}")
