"""Answer the MT-Bench questions with one model, in FastChat's answer format.

    prefscan answer base
    prefscan answer ipo-0.5-16

Both turns, the model's own chat template, FastChat's temperature for each category. What is answered is kept in
.prefscan/answers, and a stage that was killed goes on from there with the same bits.
"""

import hashlib
import json
import time
from collections.abc import Container, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefscan.common.config import Answer, Params
from prefscan.common.fingerprint import stage_fingerprint
from prefscan.common.io import BAD_JSON, write_jsonl
from prefscan.common.paths import (
    BASE,
    MERGED,
    RUNS,
    UNFINISHED_ANSWERS,
)
from prefscan.generation.sampling import (
    Reply,
    Sampling,
    SeededSampling,
    end_tokens,
    even_groups,
    generate,
    out_of_memory_is_told,
    prompt_ids,
    settled_batch_size,
)
from prefscan.models.loading import load_cell, load_model, parts_of_cell

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

# In two batches: more rows gain little (docs/performance.md), and a killed stage loses the batch it was at.
MOST_ROWS = 40


def longest_conversation(tokenizer: PreTrainedTokenizerBase, question: Any, max_new_tokens: int) -> int:
    """The most tokens that both turns of a question can come to."""
    first, second = ({"role": "user", "content": text} for text in question["turns"])
    asked = prompt_ids(tokenizer, [first, {"role": "assistant", "content": ""}, second])
    return len(asked) + 2 * max_new_tokens


def answer_record(model_id: str, question: Any, replies: list[Reply]) -> dict[str, Any]:
    """A FastChat answer record with our lengths.

    `answer_id` is a hash of the answer and `tstamp` is 0: a random id or a time would make equal answers hash
    differently.
    """
    texts = [reply.text for reply in replies]
    identity = hashlib.sha256("\0".join([model_id, str(question["question_id"]), *texts]).encode())
    choice = {
        "index": 0,
        "turns": texts,
        "tokens": [len(reply.tokens) for reply in replies],
        "truncated": [reply.truncated for reply in replies],
    }
    return {
        "question_id": question["question_id"],
        "answer_id": identity.hexdigest()[:22],
        "model_id": model_id,
        "choices": [choice],
        "tstamp": 0.0,
    }


def sampling_of(answer: Answer) -> Sampling:
    """The settings of `answer`; each question has its category's temperature."""
    return Sampling("answer", answer.max_new_tokens, answer.batch_size, most=MOST_ROWS)


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Any],
    settings: Sampling,
    seed: int,
    finished: Container[int] = (),
) -> Iterator[tuple[Any, list[Reply]]]:
    """Each question with the replies of both turns; in order of the first prompt's length.

    Questions of like length share a batch, so that few positions are padding, and the second turn computes what the
    first has not. Batches are of even size: a small last one, of the longest prompts, would gain least. A batch whose
    questions are all `finished` is left out; any other is answered whole, since what stands beside a question may
    change its last bits.

    Raises UserError where memory does not suffice.
    """
    by_length = sorted(questions, key=lambda q: len(tokenizer(q["turns"][0])["input_ids"]))
    for batch in even_groups(by_length, settings.rows):
        if all(question["question_id"] in finished for question in batch):
            continue
        with out_of_memory_is_told(settings.section, settings.rows):
            answers = answer_batch(model, tokenizer, batch, settings.max_new_tokens, seed)
        yield from zip(batch, answers, strict=True)


def answer_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: list[Any], max_new_tokens: int, seed: int
) -> list[list[Reply]]:
    """The replies of both turns to each question of a batch."""
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
    return turns


def answers_file(key: str) -> Path:
    """Where a model's answers are kept until all are there; those of its other results are removed."""
    digest = stage_fingerprint("answer-base" if key == "base" else "answer", key)
    path = UNFINISHED_ANSWERS / key / f"{digest}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.iterdir():
        if other != path:
            other.unlink()
    return path


def read_finished(path: Path) -> dict[int, dict[str, Any]]:
    """The rows of an interrupted stage by question; a last line that was cut short is taken off the file."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        if line:
            try:
                rows.append(json.loads(line))
            except BAD_JSON:
                break
    write_jsonl(path, rows)
    return {row["record"]["question_id"]: row for row in rows}


def row_of(record: dict[str, Any], replies: list[Reply], at_once: int, started: float) -> dict[str, Any]:
    """What is kept of a question until all are answered; `elapsed` are the seconds of answering so far."""
    elapsed = time.perf_counter() - started
    return {"record": record, "replies": [asdict(r) for r in replies], "at_once": at_once, "elapsed": elapsed}


def answers_here(
    key: str, params: Params, tokenizer: PreTrainedTokenizerBase, questions: list[Any], rows: dict[int, Any]
) -> Iterator[dict[str, Any]]:
    """A row a question that `rows` lacks, by a model in this process."""
    answer = params.answer
    model = load_model(BASE, answer.dtype) if key == "base" else load_cell(MERGED / key, answer.dtype)
    settings = sampling_of(answer)
    if rows:  # as it began: the batches decide an answer's last bits
        at_once = next(iter(rows.values()))["at_once"]
    else:
        longest = max(longest_conversation(tokenizer, question, answer.max_new_tokens) for question in questions)
        at_once = settled_batch_size(settings, model, longest, turns=2)
    settings = replace(settings, batch_size=at_once)
    started = time.perf_counter()
    for question, both in answer_questions(model.eval(), tokenizer, questions, settings, params.seed, rows):
        yield row_of(answer_record(key, question, both), both, at_once, started)


def answers_of_server(
    key: str, params: Params, tokenizer: PreTrainedTokenizerBase, questions: list[Any], rows: dict[int, Any]
) -> Iterator[dict[str, Any]]:
    """A row a question that `rows` lacks, by the server of `answer.server`, which is started where it has no base_url.

    A reply comes without log-probabilities: `with_logprobs` computes them when all are there.
    """
    # Here, since the openai client takes seconds to import.
    from prefscan.endpoints.chat_client import Session
    from prefscan.endpoints.server import Served, running_server
    from prefscan.generation.server_client import Generation, ask_questions, name_at_server

    answer, server = params.answer, params.answer.server
    assert server  # by the schema
    model, adapter = (BASE, None) if key == "base" else parts_of_cell(MERGED / key)
    missing = [(q, TEMPERATURES.get(q["category"], 0.7)) for q in questions if q["question_id"] not in rows]
    if not missing:  # a stage that was stopped while it computed the log-probabilities
        return
    ends = end_tokens(GenerationConfig.from_pretrained(BASE), tokenizer)
    with ExitStack() as stack:
        if server.base_url is not None:
            url, name = server.base_url, None
        else:
            assert server.kind != "other"  # by the schema
            adapters = {key: adapter} if adapter else {}
            log = RUNS / f"server/{key}.log"
            served = Served(server.kind, model, adapters, answer.dtype)
            url = stack.enter_context(running_server(served, log))
            name = str(model) if server.kind == "transformers" else (key if adapter else "base")
        session = stack.enter_context(Session(server, "answer.server", url))
        name = name or name_at_server(session, server, key)
        generation = Generation(name, tokenizer, answer.max_new_tokens, params.seed, ends)
        started = time.perf_counter()
        for question, both in ask_questions(session, server, generation, missing):
            yield row_of(answer_record(key, question, both), both, server.concurrency, started)


ENGINES = {"transformers": answers_here, "openai": answers_of_server}
