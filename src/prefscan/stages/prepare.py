"""Turn raw preference pairs into tokens, and split them into training and held-out pairs.

    prefscan prepare

Three shapes of row are understood, told apart by their keys: Orca's (`system`, `question`, `chosen`, `rejected`),
UltraFeedback's (`chosen` and `rejected` are lists of messages that differ in the last), and ShareGPT-like ones
(`conversations`, then one `chosen` and one `rejected` message). Each becomes prompt messages, a chosen and a rejected
text, rendered by the tokenizer's own chat template. For KTO, the chosen are the good examples, the rejected the bad.

Nothing is truncated: a pair that does not fit the length limit is dropped and counted in metrics/prepare.json.
"""

from prefscan.common.config import load
from prefscan.common.io import write_json, write_jsonl
from prefscan.common.paths import BASE, HELDOUT_PAIRS, PREPARE_METRICS, RAW_PAIRS, TRAIN_PAIRS
from prefscan.data.pairs import prepare
from prefscan.models.loading import load_tokenizer, positions


def main() -> None:
    params = load()
    train, heldout, metrics = prepare(params.data, load_tokenizer(BASE), RAW_PAIRS, positions(BASE))
    write_jsonl(TRAIN_PAIRS, train)
    write_jsonl(HELDOUT_PAIRS, heldout)
    write_json(PREPARE_METRICS, metrics)
    print(f"{metrics['rows']} rows: {len(train)} training pairs, {len(heldout)} held out, dropped {metrics['dropped']}")
