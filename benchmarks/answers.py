"""Answers to MT-Bench one question at a time against the answer stage, in one run.

    PYTHONPATH=src python benchmarks/answers.py
    PYTHONPATH=src python benchmarks/answers.py --questions 16 --max-new-tokens 32

Both sides answer both turns with models/base in fp32, with FastChat's temperatures, and stop at the same tokens. One at
a time is transformers' own `generate`, its own sampling, and no cache between the turns. The sides take turns over
groups of as many questions as the stage has in a batch, so that a machine that slows down slows both; a group gives one
ratio of tokens a second. Their random draws differ, and so may the lengths: tokens are counted, not answers.

Greedy replies are compared token by token. Padding and batches change the order of sums and with it a number's last
bits, so two tokens that are all but equally likely may change places; where replies part, the gap is the difference of
their log-probabilities, by a forward pass without padding. A second turn is compared where the first is the same.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefscan.common.errors import run
from prefscan.common.io import read_jsonl, write_json
from prefscan.common.paths import BASE, QUESTIONS
from prefscan.generation.answers import MOST_ROWS, TEMPERATURES, answer_questions, longest_conversation
from prefscan.generation.sampling import GREEDY_BELOW, Sampling, even_groups, prompt_ids, settled_batch_size
from prefscan.judging.fastchat import select_questions
from prefscan.models.loading import load_model, load_tokenizer


class PlainReply(NamedTuple):
    prompt: list[int]
    tokens: list[int]
    text: str


def one_at_a_time(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: Any, max_new_tokens: int
) -> list[PlainReply]:
    """The replies of both turns, by transformers' own generation."""
    temperature = TEMPERATURES.get(question["category"], 0.7)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    conversation: list[dict[str, str]] = []
    replies = []
    for turn in range(2):
        conversation.append({"role": "user", "content": question["turns"][turn]})
        prompt = prompt_ids(tokenizer, conversation)
        output: Any = model.generate(
            torch.tensor([prompt], device=model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **(sampling if temperature >= GREEDY_BELOW else {"do_sample": False}),
        )
        tokens = output[0, len(prompt) :].tolist()
        text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        conversation.append({"role": "assistant", "content": text})
        replies.append(PlainReply(prompt, tokens, text))
    return replies


@torch.no_grad()
def gap(model: PreTrainedModel, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """Nats between the two tokens where replies to the same prompt part."""
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if place is None:
        raise ValueError("one reply is the other's beginning: the sides stop at different tokens")
    logits = model(torch.tensor([prompt + ours[:place]], device=model.device), logits_to_keep=1).logits[0, -1]
    return float(abs(logits[ours[place]] - logits[theirs[place]]))


def measure(folder: Path, questions: list[Any], max_new_tokens: int) -> dict[str, Any]:
    model, tokenizer = load_model(folder, "fp32").eval(), load_tokenizer(folder)
    longest = max(longest_conversation(tokenizer, question, max_new_tokens) for question in questions)
    settings = Sampling("answer", max_new_tokens, "auto", most=MOST_ROWS)
    rows = settled_batch_size(settings, model, longest, turns=2)
    settings = replace(settings, batch_size=rows)
    by_length = sorted(questions, key=lambda question: len(question["turns"][0]))
    sides = {"one at a time": [0, 0.0], "batched": [0, 0.0]}  # tokens, seconds
    ratios, compared, gaps = [], 0, []
    done = 0
    for group in even_groups(by_length, rows):
        started = time.perf_counter()
        batched = {
            question["question_id"]: both
            for question, both in answer_questions(model, tokenizer, group, settings, seed=0)
        }
        seconds = [time.perf_counter() - started]
        alone = {
            question["question_id"]: one_at_a_time(model, tokenizer, question, max_new_tokens) for question in group
        }
        seconds.append(time.perf_counter() - started - seconds[0])
        counts = [
            sum(len(reply.tokens) for both in batched.values() for reply in both),
            sum(len(reply.tokens) for both in alone.values() for reply in both),
        ]
        for side, count, taken in zip(("batched", "one at a time"), counts, seconds, strict=True):
            sides[side] = [sides[side][0] + count, sides[side][1] + taken]
        ratios.append(counts[0] / seconds[0] / (counts[1] / seconds[1]))
        for question in group:
            if TEMPERATURES.get(question["category"], 0.7) >= GREEDY_BELOW:
                continue
            number = question["question_id"]
            for ours, plain in zip(batched[number], alone[number], strict=True):
                if ours.prompt != plain.prompt:
                    break
                compared += 1
                if ours.tokens != plain.tokens:
                    gaps.append(gap(model, plain.prompt, ours.tokens, plain.tokens))
        done += len(group)
        print(f"{done} of {len(questions)} questions, ratio {ratios[-1]:.1f}", flush=True)
    speeds = {side: tokens / seconds for side, (tokens, seconds) in sides.items()}
    return {
        "questions": len(questions),
        "max_new_tokens": max_new_tokens,
        "batch_size": rows,
        "tokens_per_second": speeds,
        "ratio": speeds["batched"] / speeds["one at a time"],
        "ratios": ratios,
        "greedy_replies": compared,
        "greedy_share_identical": 1 - len(gaps) / compared,
        "gaps_where_they_part": sorted(gaps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Batched answers against one at a time; the module's text says how.")
    parser.add_argument("--questions", type=int, default=80)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="a turn")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    questions = select_questions(read_jsonl(QUESTIONS / "question.jsonl"), options.questions)
    result = measure(BASE, questions, options.max_new_tokens)
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    run("answers", main)
