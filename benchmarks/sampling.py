"""Sampled replies of `sample_replies` against transformers' `generate`, at the same batch and one at a time.

    PYTHONPATH=src python benchmarks/sampling.py
    PYTHONPATH=src python benchmarks/sampling.py --rows 64 --threads 1

All sides sample models/base in fp32 at temperature 1 from the whole vocabulary, and stop at the same tokens. Prompts
are pieces of MT-Bench's questions, as plain text of 8 to 12 tokens. The sides take turns over rounds of one batch, so
that a machine that slows down slows all; a round gives one ratio of tokens a second. Their random draws differ, and so
may the lengths: tokens are counted, not replies. One at a time answers a share of the batch. A CPU second is one of all
the process's threads: on a machine that others use, it says more than the clock.

`moved` says what a batch's composition changes: the same replies, by their seeds, in batches of another size.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefscan.common.errors import run
from prefscan.common.io import read_jsonl, write_json
from prefscan.common.paths import BASE, QUESTIONS
from prefscan.generation.sampling import Sampling, end_tokens, sample_replies
from prefscan.models.loading import load_model, load_tokenizer

TEXTS = QUESTIONS / "question.jsonl"
ALONE = 8  # the share of a batch that is sampled one at a time, since it takes some ten times as long: 1 in 8


def make_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str], count: int) -> list[list[int]]:
    """Pieces of the texts of 8 to 12 tokens, all different while the texts last."""
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    found: list[list[int]] = []
    start = 0
    while len(found) < count:
        length = 8 + len(found) % 5
        found.append([ids[(start + i) % len(ids)] for i in range(length)])
        start += length
    return found


def by_transformers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> int:
    """The tokens that transformers' own generation says to these prompts, in one batch padded on the left."""
    ends = end_tokens(model.generation_config, tokenizer)
    width = max(map(len, prompts))
    output: Any = model.generate(
        input_ids=torch.tensor([[ends[0]] * (width - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    said = output[:, width:].tolist()
    return sum(next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in said)


def timed(count_tokens: Callable[[], int]) -> tuple[int, float, float]:
    """Tokens, seconds and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = count_tokens()
    return tokens, time.perf_counter() - wall, time.process_time() - cpu


def moved(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    seeds: list[list[str]],
    settings: Sampling,
) -> dict[str, float]:
    """How the same replies differ between batches of the settings' size and of three eighths of it.

    `largest` is the largest difference of a token's log-probability, in nats, up to where two replies part.
    """
    runs = []
    for rows in (settings.rows, max(settings.rows * 3 // 8, 1)):
        sampled = sample_replies(model, tokenizer, prompts, seeds, replace(settings, batch_size=rows))
        runs.append({(s.prompt, s.number): s.reply for batch in sampled for s in batch})
    largest, other = 0.0, 0
    for place, reply in runs[0].items():
        twin = runs[1][place]
        other += reply.tokens != twin.tokens
        for token, its, mine, theirs in zip(reply.tokens, twin.tokens, reply.logprobs, twin.logprobs, strict=False):
            if token != its:
                break
            largest = max(largest, abs(mine - theirs))
    return {"replies": len(runs[0]), "other_tokens": other, "largest": largest}


def measure(
    folder: Path, texts: list[str], rows: int, each: int, max_new_tokens: int, rounds: int, compared: int
) -> dict[str, Any]:
    model, tokenizer = load_model(folder, "fp32").eval(), load_tokenizer(folder)
    settings = Sampling("sample", max_new_tokens, rows)
    prompts = make_prompts(tokenizer, texts, rows // each)
    repeated = [prompt for prompt in prompts for _ in range(each)]
    sums = {side: [0.0, 0.0, 0.0] for side in ("prefscan", "transformers", "one at a time")}
    ratios = []

    def ours(number: int) -> int:
        seeds = [[f"{number}/{i}/{j}" for j in range(each)] for i in range(len(prompts))]
        batches = sample_replies(model, tokenizer, prompts, seeds, settings)
        return sum(len(sampled.reply.tokens) for batch in batches for sampled in batch)

    def alone() -> int:
        return sum(by_transformers(model, tokenizer, [prompt], max_new_tokens) for prompt in repeated[::ALONE])

    for number in range(rounds):
        torch.manual_seed(number)
        found = {
            "prefscan": timed(lambda number=number: ours(number)),  # type: ignore[misc]
            "transformers": timed(lambda: by_transformers(model, tokenizer, repeated, max_new_tokens)),
            "one at a time": timed(alone),
        }
        for side, figures in found.items():
            sums[side] = [total + figure for total, figure in zip(sums[side], figures, strict=True)]
        speeds = [tokens / seconds for tokens, seconds, _ in found.values()]
        ratios.append(speeds[0] / speeds[1])
        print(f"round {number + 1}: {', '.join(f'{speed:.0f}' for speed in speeds)} tokens a second", flush=True)
    clock = {side: tokens / seconds for side, (tokens, seconds, _) in sums.items()}
    cpu = {side: tokens / seconds for side, (tokens, _, seconds) in sums.items()}
    result = {
        "rows": rows,
        "replies_a_prompt": each,
        "max_new_tokens": max_new_tokens,
        "threads": torch.get_num_threads(),
        "tokens_per_second": clock,
        "tokens_per_cpu_second": cpu,
        "ratio_to_transformers": clock["prefscan"] / clock["transformers"],
        "ratio_to_one_at_a_time": clock["prefscan"] / clock["one at a time"],
        "ratios_to_transformers": ratios,
    }
    if compared:
        prompts = make_prompts(tokenizer, texts, -(-compared // each))
        seeds = [[f"0/{i}/{j}" for j in range(each)] for i in range(len(prompts))]
        result["moved"] = moved(model, tokenizer, prompts, seeds, settings)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Sampling against transformers; the module's text says how.")
    parser.add_argument("--rows", type=int, default=128, help="of a batch")
    parser.add_argument("--each", type=int, default=4, help="replies to a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compared", type=int, default=0, help="replies whose batches are changed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = [turn for question in read_jsonl(TEXTS) for turn in question["turns"]]
    result = measure(BASE, texts, options.rows, options.each, options.max_new_tokens, options.rounds, options.compared)
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    run("sampling", main)
