"""A small evaluation by a known reward, as the stages sample and evaluate leave it in a workspace."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from mtbench_data import write_lines
from prefscan.common.io import write_json
from prefscan.rewards.evaluation import cell_metrics
from sweep_data import CELLS, write_sweep

PROMPTS = 40
BASE_REPLIES, REPLIES = 8, 2
# What each cell adds to the base's utility, and its KL in nats a reply.
EFFECTS = {"sigmoid-0.1-8": (1.0, 3.0), "sigmoid-0.5-8": (0.4, 1.0), "ipo-0.1-8": (1.2, 4.0), "ipo-0.5-8": (0.3, 0.5)}
SETTINGS: dict[str, Any] = {
    "reward": {
        "kind": "sentiment",
        "name": "sentiment",
        "source": {"kind": "file", "file": "data/reviews.csv"},
        "excerpt_words": 30,
        "prompt_words": 8,
        "check_share": 0.2,
        "prompts_share": 0.3,
        "split_seed": 0,
    },
    "sample": {
        "prompts": "models/reward/prompts.jsonl",
        "format": "plain",
        "train_prompts": 4,
        "train_replies": 4,
        "eval_split": "eval",
        "eval_prompts": PROMPTS,
        "base_replies": BASE_REPLIES,
        "max_new_tokens": 24,
        "batch_size": 64,
        "dtype": "fp32",
        "seed": 0,
    },
    "evaluate": {"replies": REPLIES, "kl_prompts": 16},
    "seeding": "nested",
}


def rows_of(effect: float, kl: float | None, replies: int) -> list[dict[str, Any]]:
    """Rows of a model whose utilities are the base's plus an effect; the same numbers at every call."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(str(effect).encode()).digest()[:4], "big"))
    level = np.random.default_rng(0).normal(0, 0.5, PROMPTS)
    rows = []
    for i in range(PROMPTS):
        utilities = level[i] + rng.normal(effect, 1.0, replies)
        rows.append(
            {
                "id": f"p{i}",
                "prompt": f"The film number {i} is",
                "prompt_ids": [1, i],
                "replies": [
                    {
                        "text": f"reply {number} <b>to</b> {i}",
                        "tokens": [2, 3],
                        "logprob": -40.0,
                        "length": 24,
                        "truncated": bool((i + number) % 2),
                        "repetition": 0.0,
                        "utility": float(utility),
                        "score": float(1 / (1 + np.exp(-utility))),
                        "kl": None if kl is None or number or i >= 16 else kl + i / 100,
                    }
                    for number, utility in enumerate(utilities)
                ],
            }
        )
    return rows


def write_evaluation(root: Path, **params: Any) -> None:
    """The small sweep of sweep_data.py with a known reward."""
    write_sweep(root, **(SETTINGS | params))
    base = rows_of(0.0, None, BASE_REPLIES)
    write_lines(root / "data/samples/eval.jsonl", base)
    for key in CELLS:
        rows = rows_of(*EFFECTS[key], REPLIES)
        write_lines(root / f"data/replies/{key}.jsonl", rows)
        write_json(root / f"metrics/evaluate/{key}.json", cell_metrics(rows, base))
        write_json(root / f"metrics/cost/evaluate/{key}.json", {"seconds": 9.0})
    auc = {"value": 0.84, "low": 0.82, "high": 0.86}
    check = {"held_out_snippets": {"texts": 900, "auc": auc, "accuracy": auc}}
    metrics = {"kind": "sentiment", "name": "sentiment", "score": "P(positive)", "check": check}
    write_json(root / "metrics/reward.json", metrics)
