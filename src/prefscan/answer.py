"""Answer the MT-Bench questions with one model, in FastChat's answer format.

    python -m prefscan.answer base
    python -m prefscan.answer ipo-0.5-24

Both turns, the model's own chat template, FastChat's temperature for each category. What is answered is kept in
.prefscan/answers, and a stage that was killed goes on from there with the same bits.
"""

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefscan.errors import UserError, run_stage
from prefscan.files import BAD_JSON, read_jsonl, write_json, write_jsonl
from prefscan.generation import Reply, SeededSampling, generate, prompt_ids, settled_batch_size
from prefscan.intervals import mean_interval
from prefscan.keys import result_key
from prefscan.models import load_cell, load_model, load_tokenizer
from prefscan.params import Answer, load
from prefscan.paths import (
    ADAPTERS,
    ANSWER_COST,
    ANSWER_METRICS,
    ANSWERS,
    BASE,
    MERGED,
    QUESTIONS,
    UNFINISHED_ANSWERS,
)

# FastChat's temperature_config, which a test compares; importing it costs seconds in every answer and judge stage.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}

# What the stage imports, as dvc.yaml lists it.
CODE = (
    "__init__.py",
    "answer.py",
    "errors.py",
    "files.py",
    "generation.py",
    "intervals.py",
    "keys.py",
    "memory.py",
    "models.py",
    "params.py",
    "paths.py",
)


def select_questions(questions: list[Any], count: int) -> list[Any]:
    """The first `count` / categories questions of each category, in order; raises UserError for an uneven split."""
    by_category: dict[str, list[Any]] = defaultdict(list)
    for question in questions:
        by_category[question["category"]].append(question)
    each, rest = divmod(count, len(by_category))
    most = min(map(len, by_category.values()))
    if rest or each > most:
        raise UserError(
            f"answer.questions: {count} cannot be drawn evenly from {len(by_category)} categories of {most} questions; "
            f"choose a multiple of {len(by_category)} up to {len(by_category) * most}"
        )
    chosen = {id(q) for group in by_category.values() for q in group[:each]}
    return [q for q in questions if id(q) in chosen]


def longest_conversation(tokenizer: PreTrainedTokenizerBase, question: Any, max_new_tokens: int) -> int:
    """The most tokens that both turns of a question can come to."""
    first, second = ({"role": "user", "content": text} for text in question["turns"])
    asked = prompt_ids(tokenizer, [first, {"role": "assistant", "content": ""}, second])
    return len(asked) + 2 * max_new_tokens


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Any],
    model_id: str,
    batch_size: int,
    max_new_tokens: int,
    seed: int,
    finished: Container[int] = (),
) -> Iterator[tuple[dict[str, Any], list[Reply]]]:
    """One FastChat answer record a question, with the replies of both turns; in order of the first prompt's length.

    Questions of like length share a batch, so that few positions are padding, and the second turn computes what the
    first has not. A batch whose questions are all `finished` is left out; any other is answered whole, since what
    stands beside a question may change its last bits.
    `answer_id` is a hash of the answer and `tstamp` is 0: a random id or a time would make equal answers hash
    differently.
    """
    by_length = sorted(questions, key=lambda q: len(tokenizer(q["turns"][0])["input_ids"]))
    for start in range(0, len(questions), batch_size):
        batch = by_length[start : start + batch_size]
        if all(question["question_id"] in finished for question in batch):
            continue
        temperatures = [TEMPERATURES.get(q["category"], 0.7) for q in batch]
        conversations: list[list[dict[str, str]]] = [[] for _ in batch]
        turns: list[list[Reply]] = [[] for _ in batch]
        context = None
        for turn in range(2):
            for conversation, question in zip(conversations, batch, strict=True):
                conversation.append({"role": "user", "content": question["turns"][turn]})
            sampling = SeededSampling([f"{seed}/{q['question_id']}/{turn}" for q in batch], temperatures)
            prompts = [prompt_ids(tokenizer, conversation) for conversation in conversations]
            replies, context = generate(model, tokenizer, prompts, sampling, max_new_tokens, context)
            for i, reply in enumerate(replies):
                conversations[i].append({"role": "assistant", "content": reply.text})
                turns[i].append(reply)
        for question, both in zip(batch, turns, strict=True):
            texts = [reply.text for reply in both]
            identity = hashlib.sha256("\0".join([model_id, str(question["question_id"]), *texts]).encode())
            record = {
                "question_id": question["question_id"],
                "answer_id": identity.hexdigest()[:22],
                "model_id": model_id,
                "choices": [
                    {
                        "index": 0,
                        "turns": texts,
                        "tokens": [len(reply.tokens) for reply in both],
                        "cut": [reply.cut for reply in both],
                    }
                ],
                "tstamp": 0.0,
            }
            yield record, both


@torch.no_grad()
def log_ratio(reply: Reply, base: PreTrainedModel) -> float:
    """log π(reply | prompt) − log π_base(reply | prompt) in nats, the sum over the reply's tokens."""
    ids = torch.tensor([reply.prompt + reply.tokens], device=base.device)
    logits = base(input_ids=ids[:, :-1], logits_to_keep=len(reply.tokens)).logits[0].float()
    logprobs = logits.log_softmax(-1).gather(-1, ids[0, -len(reply.tokens) :, None])[:, 0]
    return sum(reply.logprobs) - logprobs.double().sum().item()


def divergence(answers: Sequence[Sequence[Reply]], base: PreTrainedModel) -> dict[str, float]:
    """Monte-Carlo estimate of KL(policy ‖ base) over the policy's own answers, in nats a reply and a token.

    The mean log-ratio of replies drawn from the policy estimates KL without bias. MT-Bench draws at temperatures from 0
    to 0.7, so this is the mean log-ratio of what the policy says under the benchmark, which can be negative; it is
    comparable between cells. The interval takes a question, both turns together, as one observation.
    """
    ratios = [[log_ratio(reply, base) for reply in both] for both in answers]
    per_reply, low, high = mean_interval([fmean(both) for both in ratios])
    tokens = sum(len(reply.tokens) for both in answers for reply in both)
    return {
        "per_reply": per_reply,
        "per_reply_low": low,
        "per_reply_high": high,
        "per_token": sum(map(sum, ratios)) / tokens,
    }


def answers_file(key: str, answer: Answer, seed: int) -> Path:
    """Where a model's answers are kept until all are there; those of its other results are removed."""
    inputs = [QUESTIONS, BASE] if key == "base" else [QUESTIONS, BASE, ADAPTERS / key, MERGED / key]
    digest = result_key({"model": key, "answer": answer.model_dump(), "seed": seed}, inputs, CODE)
    path = UNFINISHED_ANSWERS / key / f"{digest}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.iterdir():
        if other != path:
            other.unlink()
    return path


def read_finished(path: Path) -> dict[int, dict[str, Any]]:
    """The rows of an interrupted stage by question; a last line that was cut short is taken off the file."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except BAD_JSON:
            break
    write_jsonl(path, rows)
    return {row["record"]["question_id"]: row for row in rows}


def main() -> None:
    params = load()
    (key,) = sys.argv[1:]
    if key == "base":
        model = load_model(BASE, params.answer.dtype)
    else:
        params.cell(key)
        model = load_cell(MERGED / key, params.answer.dtype)
    questions = select_questions(read_jsonl(QUESTIONS / "question.jsonl"), params.answer.questions)
    unfinished = answers_file(key, params.answer, params.seed)
    rows = read_finished(unfinished)
    tokenizer = load_tokenizer(BASE)
    batch_size = (
        next(iter(rows.values()))["batch_size"]
        if rows
        else settled_batch_size(
            params.answer,
            model,
            max(longest_conversation(tokenizer, q, params.answer.max_new_tokens) for q in questions),
        )
    )
    with Progress() as progress, unfinished.open("a", encoding="utf-8") as file:
        task = progress.add_task(f"answers of {key}", total=len(questions), completed=len(rows))
        for record, both in answer_questions(
            model.eval(), tokenizer, questions, key, batch_size, params.answer.max_new_tokens, params.seed, rows
        ):
            row = {"record": record, "replies": [asdict(reply) for reply in both], "batch_size": batch_size}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            rows[record["question_id"]] = row
            progress.update(task, completed=len(rows))
    in_order = [rows[question["question_id"]] for question in questions]
    answers = [[Reply(**reply) for reply in row["replies"]] for row in in_order]
    replies = [reply for both in answers for reply in both]
    seconds = sum(reply.seconds for reply in replies)
    tokens = sum(len(reply.tokens) for reply in replies)
    metrics: dict[str, Any] = {
        "questions": len(questions),
        "mean_tokens": tokens / len(replies),
        "share_cut": fmean(reply.cut for reply in replies),
        "repetition": fmean(reply.repetition for reply in replies),
    }
    # Apart from what is the same in every run: later stages and a reviewer's diff see a change only where one is.
    cost = {
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1),
        "batch_size": batch_size,
        "replies": {
            row["record"]["question_id"]: [round(reply.seconds, 3) for reply in both]
            for row, both in zip(in_order, answers, strict=True)
        },
    }
    if key != "base":
        del model  # before the base is loaded: one model in memory at a time
        metrics["divergence"] = divergence(answers, load_model(BASE, params.answer.dtype).eval())
    write_jsonl(ANSWERS / f"{key}.jsonl", [row["record"] for row in in_order])
    write_json(ANSWER_METRICS / f"{key}.json", metrics)
    write_json(ANSWER_COST / f"{key}.json", cost)
    unfinished.unlink()


if __name__ == "__main__":
    run_stage(main)
