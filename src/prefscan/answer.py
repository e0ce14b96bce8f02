"""Answer the MT-Bench questions with one model, in FastChat's answer format.

    python -m prefscan.answer base
    python -m prefscan.answer ipo-0.5-24

Both turns, the model's own chat template, FastChat's temperature for each category. Sampling adds Gumbel noise to the
logits and takes the largest, which draws from the softmax exactly (Gumbel 1954; Maddison et al., arXiv 1411.0030); each
question has a generator of its own, so its noise does not depend on which questions run beside it.
"""

import hashlib
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from prefscan.errors import UserError, run_stage
from prefscan.files import read_jsonl, write_json, write_jsonl
from prefscan.models import load_cell, load_model, load_tokenizer
from prefscan.params import Answer, load
from prefscan.paths import ANSWER_METRICS, ANSWERS, BASE, MERGED, QUESTIONS

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
GREEDY_BELOW = 1e-4  # FastChat's limit: a temperature under it means greedy decoding


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling, with one random generator and one temperature a row."""

    def __init__(self, seeds: Sequence[str], temperatures: Sequence[float]) -> None:
        self.temperatures = temperatures
        self.generators = [
            torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
            for seed in seeds
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        for row, (generator, temperature) in enumerate(zip(self.generators, self.temperatures, strict=True)):
            if temperature >= GREEDY_BELOW:
                # In float64 on the CPU: the same numbers on every device, and log(−log u) never infinite.
                uniform = torch.rand(scores.shape[1], generator=generator, dtype=torch.float64).clamp_(min=1e-300)
                noise = -torch.log(-torch.log(uniform))
                scores[row] = scores[row] / temperature + noise.to(scores.device, scores.dtype)
        return scores


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


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict[str, str]]],
    sampling: SeededSampling,
    max_new_tokens: int,
) -> list[tuple[str, int, bool]]:
    """Of each conversation: the reply, its length in tokens with the end token, and whether the limit cut it.

    An out-of-memory error is an error and never an answer: it leaves this function as it is.
    """
    texts = [str(tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False)) for c in conversations]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt").to(
        model.device
    )
    output: Any = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([sampling]),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(model, tokenizer),
    )
    replies = []
    ends = set(end_tokens(model, tokenizer))
    for tokens in output[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        length = len(tokens) if end is None else end + 1
        reply = str(tokenizer.decode(tokens[:length], skip_special_tokens=True)).strip()
        replies.append((reply, length, end is None))
    return replies


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a turn: the model's own and the tokenizer's."""
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Any],
    model_id: str,
    answer: Answer,
    seed: int,
) -> Iterator[tuple[dict[str, Any], list[tuple[int, bool]]]]:
    """One FastChat answer record a question, in order, with each turn's number of tokens and whether it was cut.

    `answer_id` is a hash of the answer and `tstamp` is 0: a random id or a time would make equal answers hash
    differently.
    """
    for start in range(0, len(questions), answer.batch_size):
        batch = questions[start : start + answer.batch_size]
        temperatures = [TEMPERATURES.get(q["category"], 0.7) for q in batch]
        conversations: list[list[dict[str, str]]] = [[] for _ in batch]
        turns: list[list[str]] = [[] for _ in batch]
        sizes: list[list[tuple[int, bool]]] = [[] for _ in batch]
        for turn in range(2):
            for conversation, question in zip(conversations, batch, strict=True):
                conversation.append({"role": "user", "content": question["turns"][turn]})
            sampling = SeededSampling([f"{seed}/{q['question_id']}/{turn}" for q in batch], temperatures)
            replies = generate(model, tokenizer, conversations, sampling, answer.max_new_tokens)
            for i, (reply, length, cut) in enumerate(replies):
                conversations[i].append({"role": "assistant", "content": reply})
                turns[i].append(reply)
                sizes[i].append((length, cut))
        for question, texts, size in zip(batch, turns, sizes, strict=True):
            identity = hashlib.sha256("\0".join([model_id, str(question["question_id"]), *texts]).encode())
            record = {
                "question_id": question["question_id"],
                "answer_id": identity.hexdigest()[:22],
                "model_id": model_id,
                "choices": [{"index": 0, "turns": texts}],
                "tstamp": 0.0,
            }
            yield record, size


def main() -> None:
    params = load()
    (key,) = sys.argv[1:]
    if key == "base":
        model = load_model(BASE, params.answer.dtype)
    else:
        params.cell(key)
        model = load_cell(MERGED / key, params.answer.dtype)
    questions = select_questions(read_jsonl(QUESTIONS / "question.jsonl"), params.answer.questions)
    records: list[dict[str, Any]] = []
    sizes: list[tuple[int, bool]] = []
    started = time.perf_counter()
    with Progress() as progress:
        task = progress.add_task(f"answers of {key}", total=len(questions))
        for record, size in answer_questions(
            model.eval(), load_tokenizer(BASE), questions, key, params.answer, params.seed
        ):
            records.append(record)
            sizes += size
            progress.advance(task)
    seconds = time.perf_counter() - started
    tokens = sum(length for length, _ in sizes)
    metrics = {
        "questions": len(questions),
        "mean_tokens": tokens / len(sizes),
        "share_cut": sum(cut for _, cut in sizes) / len(sizes),
        "cost": {"seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds, 1)},
    }
    write_jsonl(ANSWERS / f"{key}.jsonl", records)
    write_json(ANSWER_METRICS / f"{key}.json", metrics)


if __name__ == "__main__":
    run_stage(main)
