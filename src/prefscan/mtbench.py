"""Judge a model's MT-Bench answers with FastChat's prompts, in FastChat's judgement format.

    python -m prefscan.mtbench base
    python -m prefscan.mtbench ipo-0.5-24

A turn that cannot be scored fails the cell with the reason: nothing is averaged over fewer questions in silence. What a
paid judge has replied is kept in .prefscan/judgements, by a hash of judge and prompt, and is not asked for again.
"""

import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from rich.progress import Progress

from prefscan.errors import UserError, run_stage
from prefscan.files import read_json, read_jsonl, write_json, write_jsonl
from prefscan.intervals import mean_interval
from prefscan.judges import Prompt, Verdict, load_judge
from prefscan.params import LocalJudge, OpenAIJudge, load
from prefscan.paths import ANSWERS, CELL_JUDGEMENTS, JUDGE_STORE, MTBENCH_METRICS, QUESTIONS

# FastChat's NEED_REF_CATS as far as MT-Bench has them, which a test compares; importing it costs seconds.
NEED_REFERENCE = {"math", "reasoning", "coding"}


@dataclass(frozen=True)
class Turn:
    """One turn of one answer, ready to be judged."""

    question_id: int
    category: str
    turn: int  # 1 or 2
    template: str  # the name of FastChat's judge prompt
    prompt: Prompt

    def __str__(self) -> str:
        sample = f" sample {self.prompt.sample}" if self.prompt.sample else ""
        return f"question {self.question_id} turn {self.turn}{sample}"


def load_questions() -> tuple[dict[int, Any], dict[str, Any]]:
    """MT-Bench's questions by id, and FastChat's judge prompts by name."""
    questions = {q["question_id"]: q for q in read_jsonl(QUESTIONS / "question.jsonl")}
    return questions, {t["name"]: t for t in read_jsonl(QUESTIONS / "judge_prompts.jsonl")}


def load_references(author: str) -> dict[int, Any]:
    """The reference answers by question id; `author` is stock or corrected."""
    return {r["question_id"]: r for r in read_jsonl(QUESTIONS / f"reference_answer/{author}.jsonl")}


def build_turns(
    questions: dict[int, Any], answers: Sequence[Any], templates: dict[str, Any], references: dict[int, Any]
) -> list[Turn]:
    """Two turns an answer, with FastChat's prompt for each: first turn alone, second turn in its conversation.

    Raises UserError for an answer to an unknown question, and for a category that needs a reference which is missing.
    """
    turns = []
    for answer in answers:
        question = questions.get(answer["question_id"])
        if question is None:
            raise UserError(f"question {answer['question_id']} was answered but is not in question.jsonl; answer again")
        replies = answer["choices"][0]["turns"]
        fields = {"question": question["turns"][0], "answer": replies[0]}
        for i in range(2):
            fields |= {f"question_{i + 1}": question["turns"][i], f"answer_{i + 1}": replies[i]}
        kind = "single"
        if question["category"] in NEED_REFERENCE:
            kind = "single-math"
            reference = references.get(question["question_id"])
            if reference is None:
                raise UserError(
                    f"question {question['question_id']} ({question['category']}) needs a reference answer and "
                    "judge.references has none; choose the other of stock and corrected"
                )
            for i, text in enumerate(reference["choices"][0]["turns"]):
                fields[f"ref_answer_{i + 1}"] = text
        for turn, name in ((1, f"{kind}-v1"), (2, f"{kind}-v1-multi-turn")):
            template = templates[name]
            prompt = Prompt(template["system_prompt"], template["prompt_template"].format(**fields))
            turns.append(Turn(question["question_id"], question["category"], turn, name, prompt))
    return turns


class PaidVerdicts:
    """Replies of a judge that costs money, scored or not, one file each, named by a hash of judge and prompt."""

    def __init__(self, folder: Path, judge: OpenAIJudge) -> None:
        self.folder = folder
        self.identity = {
            "model": judge.name,
            "base_url": judge.base_url or os.environ.get("OPENAI_BASE_URL"),  # as the client does
            "max_tokens": judge.max_tokens,
            "seed": judge.seed,
        }

    def path(self, prompt: Prompt) -> Path:
        content = json.dumps([self.identity, prompt.system, prompt.user, prompt.sample], ensure_ascii=False)
        return self.folder / f"{hashlib.sha256(content.encode()).hexdigest()}.json"

    def get(self, prompt: Prompt) -> Verdict | None:
        path = self.path(prompt)
        return Verdict(**read_json(path)) if path.exists() else None

    def put(self, prompt: Prompt, verdict: Verdict) -> None:
        write_json(self.path(prompt), asdict(verdict))


def judge_turns(turns: Sequence[Turn], settings: LocalJudge | OpenAIJudge, store: Path) -> list[Verdict]:
    """A scored verdict a turn; raises UserError with the list of turns that have no score, after keeping all replies.

    A reply without a rating was paid for as well, and asking the same again would most likely buy the same.
    """
    paid = PaidVerdicts(store, settings) if isinstance(settings, OpenAIJudge) else None
    verdicts = {i: known for i, turn in enumerate(turns) if paid and (known := paid.get(turn.prompt))}
    waiting = [i for i in range(len(turns)) if i not in verdicts]
    with Progress() as progress:
        task = progress.add_task("judging", total=len(turns), completed=len(verdicts))
        judge = load_judge(settings) if waiting else None
        for place, verdict in judge.verdicts([turns[i].prompt for i in waiting]) if judge else ():
            verdicts[waiting[place]] = verdict
            if paid and verdict.text:
                paid.put(turns[waiting[place]].prompt, verdict)
            progress.advance(task)
    failed = [
        f"{turn}: {verdicts[i].reason}" + (f", kept in {paid.path(turn.prompt)}" if paid and verdicts[i].text else "")
        for i, turn in enumerate(turns)
        if verdicts[i].score is None
    ]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(turns)} turns have no score ({'; '.join(failed[:5])}{'; …' * (len(failed) > 5)}); "
            "all replies of a paid judge are kept: run `dvc repro` again to judge the others, and delete a kept reply "
            "without a rating first to pay for another"
        )
    return [verdicts[i] for i in range(len(turns))]


def scores(judgements: Sequence[dict[str, Any]], categories: dict[int, str]) -> dict[str, Any]:
    """Averages over first turns, second turns and all turns, as FastChat's show_result prints them, and by category.

    The interval of the average treats a question, both turns and all samples together, as one observation. `sample_sd`
    is the standard deviation between samples of a turn, pooled over turns; None where each was judged once.
    """
    by_turn, by_question, by_category = defaultdict(list), defaultdict(list), defaultdict(list)
    samples = defaultdict(list)
    for judgement in judgements:
        by_turn[judgement["turn"]].append(judgement["score"])
        by_question[judgement["question_id"]].append(judgement["score"])
        by_category[categories[judgement["question_id"]]].append(judgement["score"])
        samples[judgement["question_id"], judgement["turn"]].append(judgement["score"])
    several = all(len(values) > 1 for values in samples.values())
    questions = {str(question): fmean(values) for question, values in sorted(by_question.items())}
    _, low, high = mean_interval(list(questions.values()))
    return {
        "first_turn": fmean(by_turn[1]),
        "second_turn": fmean(by_turn[2]),
        "average": fmean(judgement["score"] for judgement in judgements),
        "average_low": low,
        "average_high": high,
        "sample_sd": fmean(variance(values) for values in samples.values()) ** 0.5 if several else None,
        "categories": {category: fmean(values) for category, values in sorted(by_category.items())},
        "questions": questions,
    }


def judge_answers(
    key: str, answers: Sequence[Any], settings: LocalJudge | OpenAIJudge
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """FastChat's judgement records of both turns of every answer, one a sample, and the category of each question."""
    questions, templates = load_questions()
    references = load_references(settings.references)
    samples = settings.samples if isinstance(settings, OpenAIJudge) else 1  # a local judge repeats itself
    turns = [
        replace(turn, prompt=replace(turn.prompt, sample=sample))
        for turn in build_turns(questions, answers, templates, references)
        for sample in range(samples)
    ]
    judgements = [
        {
            "question_id": turn.question_id,
            "model": key,
            "judge": [settings.name, turn.template],
            "user_prompt": turn.prompt.user,
            "judgment": verdict.text,
            "score": verdict.score,
            "turn": turn.turn,
            "sample": turn.prompt.sample,
            "served_by": verdict.served_by,
            "tstamp": 0.0,  # a time would make equal judgements hash differently
        }
        for turn, verdict in zip(turns, judge_turns(turns, settings, JUDGE_STORE), strict=True)
    ]
    return judgements, {turn.question_id: turn.category for turn in turns}


def main() -> None:
    params = load()
    (key,) = sys.argv[1:]
    settings = params.judge
    judgements, categories = judge_answers(key, read_jsonl(ANSWERS / f"{key}.jsonl"), settings)
    metrics = scores(judgements, categories)
    write_jsonl(CELL_JUDGEMENTS / f"{key}.jsonl", judgements)
    provenance = {
        "judge": settings.name,
        "references": settings.references,
        "served_by": sorted({row["served_by"] for row in judgements} - {""}),
    }
    write_json(MTBENCH_METRICS / f"{key}.json", metrics | provenance)
    print(f"{key}: {metrics['average']:.3f} [{metrics['average_low']:.3f}, {metrics['average_high']:.3f}]")


if __name__ == "__main__":
    run_stage(main)
