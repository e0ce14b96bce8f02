"""Judge a model's MT-Bench answers with FastChat's prompts, in FastChat's judgement format.

    prefscan mtbench base
    prefscan mtbench ipo-0.5-16

A turn that cannot be scored fails the cell with the reason, or is left out and counted where `judge.unscored` says so:
nothing is averaged over fewer questions in silence.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from statistics import fmean, variance
from typing import Any

from rich.progress import Progress

from prefscan.common.config import LocalJudge, OpenAIJudge
from prefscan.common.errors import UserError
from prefscan.common.intervals import mean_interval
from prefscan.common.paths import QUESTIONS
from prefscan.judging.fastchat import Answer, JudgePrompt, Question, read_records
from prefscan.judging.judge import Mode, Prompt, Turn, Verdict, load_judge, mode_of

# FastChat's NEED_REF_CATS as far as MT-Bench has them, which a test compares; importing it costs seconds.
NEED_REFERENCE = {"math", "reasoning", "coding"}
REASONS = 5  # that an error lists


def load_questions() -> tuple[dict[int, Any], dict[str, Any]]:
    """MT-Bench's questions by id, and FastChat's judge prompts by name."""
    questions = read_records(QUESTIONS / "question.jsonl", Question, ["question_id"])
    prompts = read_records(QUESTIONS / "judge_prompts.jsonl", JudgePrompt, ["name"])
    return {question["question_id"]: question for question in questions}, {prompt["name"]: prompt for prompt in prompts}


def load_references(author: str) -> dict[int, Any]:
    """The reference answers by question id; `author` is stock or corrected."""
    references = read_records(QUESTIONS / f"reference_answer/{author}.jsonl", Answer, ["question_id"])
    return {reference["question_id"]: reference for reference in references}


def for_turn(template: dict[str, Any], turn: int) -> dict[str, Any]:
    """FastChat's template for a second turn, with the conversations up to another: their last exchange repeated."""
    text, system = template["prompt_template"], template["system_prompt"]
    for name in ("answer", "answer_a", "answer_b", "ref_answer") if turn > 2 else ():
        if found := re.search(rf"(?<=\{{{name}_1\}}).*?\{{{name}_2\}}", text, re.DOTALL):
            more = "".join(found[0].replace("_2}", f"_{i}}}") for i in range(3, turn + 1))
            text = text[: found.end()] + more + text[found.end() :]
    if turn > 2:
        system = re.sub(r"\bsecond( user)? question", r"last\1 question", system)
    return template | {"prompt_template": text, "system_prompt": system}


def fill(templates: dict[str, Any], name: str, fields: dict[str, str], turn: int = 1) -> Prompt:
    """FastChat's template of that name with the fields; raises UserError where it is missing or asks for others."""
    if name not in templates:
        raise UserError(f"judge_prompts.jsonl has no {name}; fetch FastChat's again")
    template = for_turn(templates[name], turn)
    try:
        text = template["prompt_template"].format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"judge_prompts.jsonl: the template {name} cannot be filled in ({type(error).__name__}: {error}); it may "
            f"name {', '.join(sorted(fields))}"
        ) from None
    return Prompt(template["system_prompt"], text)


def reference_of(question: Any, references: dict[int, Any]) -> list[str] | None:
    """The turns of the reference answer with which the question is judged; None where it needs none and has none.

    Raises UserError for one that is missing, and for one that has fewer turns than the question.
    """
    number = question["question_id"]
    reference = references.get(number)
    if reference is None:
        if question["category"].lower() in NEED_REFERENCE:
            raise UserError(
                f"question {number} ({question['category']}) needs a reference answer and judge.references has none; "
                "choose the other of stock and corrected, or add one to your own"
            )
        return None
    turns: list[str] = reference["choices"][0]["turns"]
    if len(turns) < len(question["turns"]):
        raise UserError(
            f"the reference answer to question {number} has {len(turns)} turns and the question has "
            f"{len(question['turns'])}; complete the reference"
        )
    return turns


def build_turns(
    questions: dict[int, Any],
    answers: Sequence[Any],
    templates: dict[str, Any],
    references: dict[int, Any],
    mode: Mode,
    against: dict[int, Any] | None = None,
) -> list[Turn]:
    """FastChat's prompts for all turns of every answer: the first alone, a later one in its conversation.

    With the answers `against` by question id, as many prompts a turn in a row as the mode has orders. Raises UserError
    for an answer to an unknown question, with another number of turns or without one to compare with, and for a
    category that needs a reference which is missing.
    """
    turns = []
    for answer in answers:
        number = answer["question_id"]
        question = questions.get(number)
        if question is None:
            raise UserError(f"question {number} was answered but is not in question.jsonl; answer again")
        if against is not None and number not in against:
            raise UserError(f"question {number} was not answered by judge.against; answer again")
        answered = [found["choices"][0]["turns"] for found in (answer, *([against[number]] if against else []))]
        if any(len(texts) != len(question["turns"]) for texts in answered):
            raise UserError(
                f"question {number} has {len(question['turns'])} turns and its answer {len(answered[0])}; answer again"
            )
        reference = reference_of(question, references)
        shared = {"question": question["turns"][0]}
        shared |= {f"question_{i}": text for i, text in enumerate(question["turns"], start=1)}
        shared |= {f"ref_answer_{i}": text for i, text in enumerate(reference or (), start=1)}
        layouts = mode.layouts(answered[0], answered[1] if against is not None else None)
        name = mode.templates[reference is not None]
        for i in range(1, len(question["turns"]) + 1):
            used = name if i == 1 else f"{name}-multi-turn"
            turns += [
                Turn(number, question["category"], i, used, fill(templates, used, shared | layout, i))
                for layout in layouts
            ]
    return turns


def judge_turns(turns: Sequence[Turn], settings: LocalJudge | OpenAIJudge) -> list[Verdict]:
    """A verdict a turn; raises UserError with the reasons of turns that have no score, after judging all.

    With `judge.unscored: report`, a reply without a verdict is returned as it is. What was not asked, or got no reply,
    always fails: another run may bring a verdict. A paid judge's reply without a verdict is kept as any other: asking
    the same again would most likely buy the same.
    """
    verdicts: dict[int, Verdict] = {}
    # Closed at once when Ctrl-C comes in here, so that no worker sends a request while the exception is on its way.
    with Progress() as progress, closing(_judged(turns, settings)) as judged:
        task = progress.add_task("judging", total=len(turns))
        for place, verdict in judged:
            verdicts[place] = verdict
            progress.advance(task)
    unscored = [i for i in range(len(turns)) if verdicts[i].score is None]
    failed = [i for i in unscored if settings.unscored == "fail" or verdicts[i].passing]
    if failed:
        reasons: dict[str, list[Turn]] = defaultdict(list)
        for i in sorted(failed, key=lambda i: verdicts[i].reason.startswith("not asked")):
            reasons[verdicts[i].reason].append(turns[i])
        listed = [
            f"{first}{f' and {len(others)} more' if others else ''}: {reason}"
            for reason, (first, *others) in list(reasons.items())[:REASONS]
        ]
        raise UserError(
            f"{len(failed)} of {len(turns)} turns have no score ({'; '.join(listed)}{'; …' * (len(reasons) > REASONS)})"
            "; all replies of a paid judge are kept: run `dvc repro` again to judge the others, and delete a kept "
            "reply without a verdict first to pay for another, or leave such turns out by judge.unscored: report"
        )
    return [verdicts[i] for i in range(len(turns))]


def _judged(turns: Sequence[Turn], settings: LocalJudge | OpenAIJudge) -> Any:
    yield from load_judge(settings).verdicts([turn.prompt for turn in turns])


@dataclass(frozen=True)
class Judged:
    """What a judge said of one model's answers: FastChat's records, and the turns that have none."""

    rows: list[dict[str, Any]]
    categories: dict[int, str]  # of each question
    unscored: list[Turn]
    usd: float = 0.0
    smallest_mass: float | None = None  # the least probability of any verdict, of a judge on this machine


def judge_answers(
    key: str, answers: Sequence[Any], settings: LocalJudge | OpenAIJudge, against: Sequence[Any] | None = None
) -> Judged:
    """The records of all turns of every answer, one a sample; with the answers `against`, of pairs."""
    mode = mode_of(settings)
    questions, templates = load_questions()
    references = load_references(settings.references)
    others = None if against is None else {answer["question_id"]: answer for answer in against}
    samples = settings.samples if isinstance(settings, OpenAIJudge) else 1  # a local judge repeats itself
    built = build_turns(questions, answers, templates, references, mode, others)
    turns = [
        replace(turn, prompt=replace(turn.prompt, sample=sample))
        for start in range(0, len(built), mode.orders)
        for sample in range(samples)
        for turn in built[start : start + mode.orders]
    ]
    verdicts = judge_turns(turns, settings)
    rows, unscored = [], []
    for i in range(0, len(turns), mode.orders):
        found = verdicts[i : i + mode.orders]
        if any(verdict.score is None for verdict in found):
            unscored.append(turns[i])
        else:
            rows.append(mode.record(key, settings.against, settings.name, turns[i : i + mode.orders], found))
    if not rows:
        raise UserError(f"none of {len(unscored)} turns has a score ({unscored[0]}: {verdicts[0].reason}); see to them")
    masses = [verdict.mass for verdict in verdicts if verdict.mass is not None]
    return Judged(
        rows,
        {turn.question_id: turn.category for turn in turns},
        unscored,
        sum(verdict.usd for verdict in verdicts),
        min(masses, default=None),
    )


def self_comparison(answers: Sequence[Any]) -> Judged:
    """A tie on every turn: what a model scores against its own answers, for which no judge is asked."""
    questions, _ = load_questions()
    rows = [
        {"question_id": answer["question_id"], "turn": turn, "score": 0.5}
        for answer in answers
        for turn in range(1, len(questions[answer["question_id"]]["turns"]) + 1)
    ]
    return Judged(rows, {row["question_id"]: questions[row["question_id"]]["category"] for row in rows}, [])


def scores(judged: Judged, mode: Mode, report_unscored: bool = False) -> dict[str, Any]:
    """Averages over first turns, second turns and all turns, as FastChat's show_result prints them, and by category.

    The interval of the average treats a question, all its turns and samples together, as one observation; Student's t
    knows no end of the scale, where the interval is cut. `questions`, by which models are compared, has those alone
    whose turns all have a score. `sample_sd` is the standard deviation between samples of a turn, pooled over turns;
    None where each was judged once. With `report_unscored`, the turns without score behind each average are counted.
    """
    by_turn, by_question, by_category = defaultdict(list), defaultdict(list), defaultdict(list)
    samples = defaultdict(list)
    for row in judged.rows:
        by_turn[row["turn"]].append(row["score"])
        by_question[row["question_id"]].append(row["score"])
        by_category[judged.categories[row["question_id"]]].append(row["score"])
        samples[row["question_id"], row["turn"]].append(row["score"])
    several = all(len(values) > 1 for values in samples.values())
    incomplete = {turn.question_id for turn in judged.unscored}
    questions = {
        str(number): fmean(values) for number, values in sorted(by_question.items()) if number not in incomplete
    }
    if len(questions) < 2:
        raise UserError(
            f"{len(questions)} questions have a score on all turns, and an interval needs two; add questions"
        )
    _, low, high = mean_interval(list(questions.values()))
    lowest, highest = mode.scale
    later = {f"turn_{turn}": fmean(values) for turn, values in sorted(by_turn.items()) if turn > 2}
    found = {
        "first_turn": fmean(by_turn[1]) if by_turn[1] else None,
        "second_turn": fmean(by_turn[2]) if by_turn[2] else None,
        **later,
        "average": fmean(row["score"] for row in judged.rows),
        "average_low": max(low, lowest),
        "average_high": min(high, highest),
        "sample_sd": fmean(variance(values) for values in samples.values()) ** 0.5 if several else None,
        "categories": {category: fmean(values) for category, values in sorted(by_category.items())},
        "questions": questions,
    }
    if report_unscored:
        turns = Counter(turn.turn for turn in judged.unscored)
        found["unscored"] = {
            "average": len(judged.unscored),
            "first_turn": turns[1],
            "second_turn": turns[2],
            **{f"turn_{turn}": count for turn, count in sorted(turns.items()) if turn > 2},
            "categories": dict(sorted(Counter(turn.category for turn in judged.unscored).items())),
            "questions": len(incomplete),
        }
    return found
