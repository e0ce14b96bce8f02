"""The prompts that models continue: training, development and evaluation prompts, none in two of them."""

import hashlib
from pathlib import Path
from typing import Any

from prefscan.common.config import ListedPrompts, RewardSettings, Sample, SentimentReward
from prefscan.common.errors import UserError
from prefscan.common.io import read_jsonl
from prefscan.common.paths import RAW_REWARD
from prefscan.data.reviews import (
    PROMPT_SETS,
    place_by_hash,
    refuse_shared_prompts,
    review_prompts,
    reviews_of,
)

SHARES = {"development": 0.2, "eval": 0.4}  # of the prompts, by hash; the rest are training prompts

Prompt = dict[str, str]  # `id` and `prompt`


def listed_prompts(path: Path) -> dict[str, list[Prompt]]:
    """The prompts of JSON lines with the key `prompt`, in three sets by hash, each in an order by hash.

    Raises UserError for a row without a prompt.
    """
    found: dict[str, str] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        text = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}, row {number}: expected the key prompt with a text, found {row!r:.80}; correct it")
        found.setdefault(hashlib.sha256(text.encode()).hexdigest()[:16], text)
    sets: dict[str, list[Prompt]] = {name: [] for name in PROMPT_SETS}
    for identity in sorted(found):
        at = place_by_hash(identity, 0)
        development, evaluation = SHARES["development"], SHARES["eval"]
        name = "development" if at < development else "eval" if at < development + evaluation else "train"
        sets[name].append({"id": identity, "prompt": found[identity]})
    refuse_shared_prompts(sets)
    return sets


def load_prompts(sample: Sample, reward: RewardSettings, split: str) -> list[Prompt]:
    """The first prompts of a split, `train`, `development` or `eval`, as many as the parameters ask for.

    Raises UserError where there are fewer, and for prompts from reviews that the reward does not split.
    """
    wanted = sample.train_prompts if split == "train" else sample.eval_prompts
    if isinstance(sample.prompts, ListedPrompts):
        sets: dict[str, Any] = listed_prompts(Path(sample.prompts.file))
    else:
        if not isinstance(reward, SentimentReward):
            raise UserError(
                f"sample.prompts.kind: reviews, but the reward {reward.name} has none; set kind: listed and a file"
            )
        parts = reviews_of(reward, RAW_REWARD)
        sets, _ = review_prompts(
            parts.prompts, sample.prompts.words, SHARES["development"], SHARES["eval"], reward.split_seed
        )
    if len(sets[split]) < wanted:
        key = "train_prompts" if split == "train" else "eval_prompts"
        raise UserError(
            f"sample.{key}: {wanted}, but there are {len(sets[split])} prompts of the split {split}; lower it"
        )
    return list(sets[split][:wanted])
