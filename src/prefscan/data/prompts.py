"""The prompts that models continue: training, development and evaluation prompts, none in two of them."""

import hashlib
from pathlib import Path

from prefscan.common.config import Sample
from prefscan.common.errors import UserError
from prefscan.common.io import read_jsonl

SHARES = {"development": 0.2, "eval": 0.4}  # of the prompts; the rest are training prompts

Prompt = dict[str, str]  # `id` and `prompt`


def split_of(text: str) -> str:
    """`train`, `development` or `eval`, by a hash of the text whatever its case and white space.

    So adding prompts moves none, and two that differ in these alone are in one split.
    """
    same = " ".join(text.lower().split())
    at = int(hashlib.sha256(same.encode()).hexdigest()[:8], 16) / 2**32
    for name, share in SHARES.items():
        if at < share:
            return name
        at -= share
    return "train"


def read_prompts(path: Path) -> dict[str, list[Prompt]]:
    """The prompts of JSON lines with the key `prompt`, by split, each once and in an order by hash.

    Raises UserError for a row without a prompt.
    """
    found: dict[str, str] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        text = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}, row {number}: expected the key prompt with a text, found {row!r:.80}; correct it")
        found.setdefault(hashlib.sha256(text.encode()).hexdigest()[:16], text)
    sets: dict[str, list[Prompt]] = {"train": [], "development": [], "eval": []}
    for identity in sorted(found):
        sets[split_of(found[identity])].append({"id": identity, "prompt": found[identity]})
    return sets


def load_prompts(sample: Sample, split: str) -> list[Prompt]:
    """The first prompts of a split, as many as the parameters ask for; raises UserError where there are fewer."""
    key = "train_prompts" if split == "train" else "eval_prompts"
    wanted, there = getattr(sample, key), read_prompts(Path(sample.prompts))[split]
    if len(there) < wanted:
        raise UserError(f"sample.{key}: {wanted}, but {sample.prompts} has {len(there)} of the split {split}; lower it")
    return there[:wanted]
