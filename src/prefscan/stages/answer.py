"""Answer the MT-Bench questions with one model, in FastChat's answer format.

    prefscan answer base
    prefscan answer ipo-0.5-16

Both turns, the model's own chat template, FastChat's temperature for each category. What is answered is kept in
.prefscan/answers, and a stage that was killed goes on from there with the same bits.
"""

import json
from statistics import fmean
from typing import Any

from rich.progress import Progress

from prefscan.common.config import load
from prefscan.common.io import write_json, write_jsonl
from prefscan.common.paths import ANSWER_COST, ANSWER_METRICS, ANSWERS, BASE, QUESTIONS
from prefscan.generation.answers import ENGINES, answers_file, read_finished
from prefscan.generation.sampling import Reply
from prefscan.judging.fastchat import Question, read_records, select_questions
from prefscan.models.loading import load_tokenizer


def main(key: str) -> None:
    params = load()
    if key != "base":
        params.cell(key)
    asked = read_records(QUESTIONS / "question.jsonl", Question, ["question_id"])
    questions = select_questions(asked, params.answer.questions)
    unfinished = answers_file(key)
    rows = read_finished(unfinished)
    tokenizer = load_tokenizer(BASE)
    before = max((row["elapsed"] for row in rows.values()), default=0.0)  # an interrupted stage's, to its last answer
    with Progress() as progress, unfinished.open("a", encoding="utf-8") as file:
        task = progress.add_task(f"answers of {key}", total=len(questions), completed=len(rows))
        for row in ENGINES[params.answer.engine](key, params, tokenizer, questions, rows):
            row["elapsed"] += before
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            rows[row["record"]["question_id"]] = row
            progress.update(task, completed=len(rows))
    in_order = [rows[question["question_id"]] for question in questions]
    answers = [[Reply(**reply) for reply in row["replies"]] for row in in_order]
    replies = [reply for both in answers for reply in both]
    seconds = max(row["elapsed"] for row in in_order)
    tokens = sum(len(reply.tokens) for reply in replies)
    metrics: dict[str, Any] = {
        "questions": len(questions),
        "mean_tokens": tokens / len(replies),
        "share_truncated": fmean(reply.truncated for reply in replies),
        "repetition": fmean(reply.repetition for reply in replies),
    }
    if params.answer.server is not None:
        metrics["thinking"] = params.answer.server.thinking
    # Apart from what is the same in every run: later stages and a reviewer's diff see a change only where one is.
    cost = {
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1),
        "at_once": in_order[0]["at_once"],
        "replies": {
            row["record"]["question_id"]: [round(reply.seconds, 3) for reply in both]
            for row, both in zip(in_order, answers, strict=True)
        },
    }
    write_jsonl(ANSWERS / f"{key}.jsonl", [row["record"] for row in in_order])
    write_json(ANSWER_METRICS / f"{key}.json", metrics)
    write_json(ANSWER_COST / f"{key}.json", cost)
    unfinished.unlink(missing_ok=True)  # another process may have answered for the same model
