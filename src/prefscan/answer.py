"""Answer the MT-Bench questions with one model, in FastChat's answer format.

    python -m prefscan.answer base
    python -m prefscan.answer ipo-0.5-24

Both turns, the model's own chat template, FastChat's temperature for each category. What is answered is kept in
.prefscan/answers, and a stage that was killed goes on from there with the same bits. Sampling adds Gumbel noise to the
logits and takes the largest, which draws from the softmax exactly (Gumbel 1954; Maddison et al., arXiv 1411.0030); each
question has a generator of its own, so its noise does not depend on which questions run beside it.
"""

import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from prefscan.errors import UserError, run_stage
from prefscan.files import BAD_JSON, read_jsonl, write_json, write_jsonl
from prefscan.intervals import mean_interval
from prefscan.keys import result_key
from prefscan.models import load_cell, load_model, load_tokenizer
from prefscan.params import Answer, load
from prefscan.paths import ADAPTERS, ANSWER_METRICS, ANSWERS, BASE, MERGED, QUESTIONS, UNFINISHED_ANSWERS

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
REPEATED = 4  # tokens of the n-grams whose repetition is counted

# What the stage imports, as dvc.yaml lists it.
CODE = (
    "__init__.py",
    "answer.py",
    "errors.py",
    "files.py",
    "intervals.py",
    "keys.py",
    "models.py",
    "params.py",
    "paths.py",
)


@dataclass(frozen=True)
class Reply:
    """One turn of one answer; `tokens` has the end token where there is one.

    `logprobs` are the policy's own, of each token, at temperature 1, in nats.
    """

    text: str
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    cut: bool  # by the limit of new tokens

    @property
    def repetition(self) -> float:
        """The share of 4-grams that occurred before in the reply; 0 for fewer than 4 tokens.

        seq-rep-4 of Welleck et al. 2020 (arXiv 1908.04319, section 6.1).
        """
        grams = [tuple(self.tokens[i : i + REPEATED]) for i in range(len(self.tokens) - REPEATED + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling, with one random generator and one temperature a row.

    `logprobs` has for each step the log-probabilities at temperature 1 of the chosen tokens, in nats; shape `[rows]`.
    """

    def __init__(self, seeds: Sequence[str], temperatures: Sequence[float]) -> None:
        self.temperatures = temperatures
        self.logprobs: list[Tensor] = []
        self.generators = [
            torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
            for seed in seeds
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        logprobs = scores.log_softmax(-1)
        for row, (generator, temperature) in enumerate(zip(self.generators, self.temperatures, strict=True)):
            if temperature >= GREEDY_BELOW:
                # In float64 on the CPU: the same numbers on every device, and log(−log u) never infinite.
                uniform = torch.rand(scores.shape[1], generator=generator, dtype=torch.float64).clamp_(min=1e-300)
                noise = -torch.log(-torch.log(uniform))
                scores[row] = scores[row] / temperature + noise.to(scores.device, scores.dtype)
        self.logprobs.append(logprobs.gather(-1, scores.argmax(-1, keepdim=True))[:, 0].cpu())
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
) -> list[Reply]:
    """The reply to each conversation.

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
    width = inputs["input_ids"].shape[1]
    logprobs = torch.stack(sampling.logprobs, dim=1)
    for row, prompt in enumerate(inputs["input_ids"].tolist()):
        tokens = output[row, width:].tolist()
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        tokens = tokens if end is None else tokens[: end + 1]
        text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        padding = width - int(inputs["attention_mask"][row].sum())
        replies.append(Reply(text, prompt[padding:], tokens, logprobs[row, : len(tokens)].tolist(), cut=end is None))
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
    finished: Container[int] = (),
) -> Iterator[tuple[dict[str, Any], list[Reply]]]:
    """One FastChat answer record a question, with the replies of both turns; in order of the first prompt's length.

    Questions of like length share a batch, so that few positions are padding. A batch whose questions are all
    `finished` is left out; any other is answered whole, since what stands beside a question may change its last bits.
    `answer_id` is a hash of the answer and `tstamp` is 0: a random id or a time would make equal answers hash
    differently.
    """
    by_length = sorted(questions, key=lambda q: len(tokenizer(q["turns"][0])["input_ids"]))
    for start in range(0, len(questions), answer.batch_size):
        batch = by_length[start : start + answer.batch_size]
        if all(question["question_id"] in finished for question in batch):
            continue
        temperatures = [TEMPERATURES.get(q["category"], 0.7) for q in batch]
        conversations: list[list[dict[str, str]]] = [[] for _ in batch]
        turns: list[list[Reply]] = [[] for _ in batch]
        for turn in range(2):
            for conversation, question in zip(conversations, batch, strict=True):
                conversation.append({"role": "user", "content": question["turns"][turn]})
            sampling = SeededSampling([f"{seed}/{q['question_id']}/{turn}" for q in batch], temperatures)
            replies = generate(model, tokenizer, conversations, sampling, answer.max_new_tokens)
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
    begun = time.perf_counter()
    with Progress() as progress, unfinished.open("a", encoding="utf-8") as file:
        task = progress.add_task(f"answers of {key}", total=len(questions), completed=len(rows))
        for record, both in answer_questions(
            model.eval(), load_tokenizer(BASE), questions, key, params.answer, params.seed, rows
        ):
            now = time.perf_counter()
            row = {"record": record, "replies": [asdict(reply) for reply in both], "seconds": now - begun}
            begun = now
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            rows[record["question_id"]] = row
            progress.update(task, completed=len(rows))
    in_order = [rows[question["question_id"]] for question in questions]
    answers = [[Reply(**reply) for reply in row["replies"]] for row in in_order]
    replies = [reply for both in answers for reply in both]
    seconds = sum(row["seconds"] for row in in_order)
    tokens = sum(len(reply.tokens) for reply in replies)
    metrics = {
        "questions": len(questions),
        "mean_tokens": tokens / len(replies),
        "share_cut": fmean(reply.cut for reply in replies),
        "repetition": fmean(reply.repetition for reply in replies),
        "cost": {"seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds, 1)},
    }
    if key != "base":
        del model  # before the base is loaded: one model in memory at a time
        metrics["divergence"] = divergence(answers, load_model(BASE, params.answer.dtype).eval())
    write_jsonl(ANSWERS / f"{key}.jsonl", [row["record"] for row in in_order])
    write_json(ANSWER_METRICS / f"{key}.json", metrics)
    unfinished.unlink()


if __name__ == "__main__":
    run_stage(main)
