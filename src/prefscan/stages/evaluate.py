"""Replies of a cell to the evaluation prompts at temperature 1: their reward, and the exact KL to the base.

    prefscan evaluate ipo-0.5-40

Writes data/replies/CELL.jsonl, metrics/evaluate/CELL.json and metrics/cost/evaluate/CELL.json. A stage that was killed
goes on from its last batch.
"""

import time

from prefscan.common.config import load
from prefscan.common.io import read_jsonl, write_json, write_jsonl
from prefscan.common.paths import BASE, EVALUATE_COST, EVALUATE_METRICS, MERGED, REPLIES, REWARD, SAMPLES
from prefscan.generation.kl import exact_kl
from prefscan.generation.replies import prompt_rows, reply_to_all, unfinished_file
from prefscan.models.loading import load_cell, load_model, load_tokenizer
from prefscan.rewards.evaluation import cell_metrics, rewarded
from prefscan.rewards.reward import load_reward


def main(key: str) -> None:
    params = load()
    params.cell(key)
    sample, settings = params.known_reward
    evaluate = params.evaluate
    assert evaluate  # by the schema, where there is a known reward
    started = time.perf_counter()
    base_rows = read_jsonl(SAMPLES / "eval.jsonl")
    unfinished = unfinished_file("evaluate", key, key)
    model, tokenizer = load_cell(MERGED / key, sample.dtype).eval(), load_tokenizer(BASE)
    replies = reply_to_all(model, tokenizer, base_rows, evaluate.replies, sample, unfinished)
    rewards = rewarded(
        load_reward(settings, REWARD),
        [row["prompt"] for row in base_rows],
        [[reply.text for reply in own] for own in replies],
        chat=sample.format == "chat",
    )
    first = [own[0] for own in replies[: evaluate.kl_prompts]]
    found = exact_kl(model, load_model(BASE, sample.dtype), first, sample.batch_size)
    rows = prompt_rows(base_rows, replies, rewards, [kl.nats for kl in found])
    metrics = cell_metrics(rows, base_rows)
    write_jsonl(REPLIES / f"{key}.jsonl", rows)
    write_json(EVALUATE_METRICS / f"{key}.json", metrics)
    write_json(EVALUATE_COST / f"{key}.json", {"seconds": round(time.perf_counter() - started, 1)})
    unfinished.unlink()
    print(
        f"{key}: reward {metrics['reward']:.3f}, gain {metrics['gain']:+.3f} [{metrics['gain_low']:+.3f}, "
        f"{metrics['gain_high']:+.3f}], KL {metrics['kl']:.2f} nats a reply"
    )
