"""Judge a model's MT-Bench answers with FastChat's prompts, in FastChat's judgement format.

    prefscan mtbench base
    prefscan mtbench ipo-0.5-16

A turn that cannot be scored fails the cell with the reason: nothing is averaged over fewer questions in silence. With
`judge.mode: pair`, each turn is judged beside that of `judge.against`, in both orders, and its score is 1 for a win, ½
for a tie and 0 for a loss.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean, variance
from typing import Any

from rich.progress import Progress

from prefscan.common.config import LocalJudge, OpenAIJudge
from prefscan.common.errors import UserError
from prefscan.common.intervals import mean_interval
from prefscan.common.paths import QUESTIONS
from prefscan.judging.fastchat import Answer, JudgePrompt, Question, read_records
from prefscan.judging.judge import Prompt, Verdict, load_judge

# FastChat's NEED_REF_CATS as far as MT-Bench has them, which a test compares; importing it costs seconds.
NEED_REFERENCE = {"math", "reasoning", "coding"}
# By judge.mode, FastChat's prompts for a first turn: without and with a reference. "-multi-turn" is the second turn's.
TEMPLATES = {"single": ("single-v1", "single-math-v1"), "pair": ("pair-v2", "pair-math-v1")}


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
    questions = read_records(QUESTIONS / "question.jsonl", Question, ["question_id"])
    prompts = read_records(QUESTIONS / "judge_prompts.jsonl", JudgePrompt, ["name"])
    return {question["question_id"]: question for question in questions}, {prompt["name"]: prompt for prompt in prompts}


def load_references(author: str) -> dict[int, Any]:
    """The reference answers by question id; `author` is stock or corrected."""
    references = read_records(QUESTIONS / f"reference_answer/{author}.jsonl", Answer, ["question_id"])
    return {reference["question_id"]: reference for reference in references}


def fill(templates: dict[str, Any], name: str, fields: dict[str, str]) -> Prompt:
    """FastChat's template of that name with the fields; raises UserError where it is missing or asks for others."""
    if name not in templates:
        raise UserError(f"judge_prompts.jsonl has no {name}; fetch FastChat's again")
    template = templates[name]["prompt_template"]
    try:
        text = template.format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"judge_prompts.jsonl: the template {name} cannot be filled in ({type(error).__name__}: {error}); it may "
            f"name {', '.join(sorted(fields))}"
        ) from None
    return Prompt(templates[name]["system_prompt"], text)


def build_turns(
    questions: dict[int, Any],
    answers: Sequence[Any],
    templates: dict[str, Any],
    references: dict[int, Any],
    against: dict[int, Any] | None = None,
) -> list[Turn]:
    """FastChat's prompts for both turns of every answer: first turn alone, second turn in its conversation.

    With the answers `against` by question id, a turn gives two prompts in a row: the answer as assistant A, then as B.
    Raises UserError for an answer to an unknown question or without one to compare with, and for a category that needs
    a reference which is missing.
    """
    turns = []
    for answer in answers:
        number = answer["question_id"]
        question = questions.get(number)
        if question is None:
            raise UserError(f"question {number} was answered but is not in question.jsonl; answer again")
        needs_reference = question["category"] in NEED_REFERENCE
        shared = {"question": question["turns"][0]}
        for i, text in enumerate(question["turns"], start=1):
            shared[f"question_{i}"] = text
        if needs_reference:
            reference = references.get(number)
            if reference is None:
                raise UserError(
                    f"question {number} ({question['category']}) needs a reference answer and "
                    "judge.references has none; choose the other of stock and corrected"
                )
            for i, text in enumerate(reference["choices"][0]["turns"], start=1):
                shared[f"ref_answer_{i}"] = text
        if against is None:
            layouts = [_answer_fields("answer", answer)]
        else:
            if number not in against:
                raise UserError(f"question {number} was not answered by judge.against; answer again")
            layouts = [
                _answer_fields("answer_a", a) | _answer_fields("answer_b", b)
                for a, b in ((answer, against[number]), (against[number], answer))
            ]
        first = TEMPLATES["single" if against is None else "pair"][needs_reference]
        for (i, name), layout in product(enumerate((first, f"{first}-multi-turn"), start=1), layouts):
            prompt = fill(templates, name, shared | layout)
            turns.append(Turn(number, question["category"], i, name, prompt))
    return turns


def _answer_fields(name: str, answer: Any) -> dict[str, str]:
    """FastChat's names of an answer's turns: the first alone, and both in a conversation."""
    first, second = answer["choices"][0]["turns"]
    return {name: first, f"{name}_1": first, f"{name}_2": second}


def judge_turns(turns: Sequence[Turn], settings: LocalJudge | OpenAIJudge) -> list[Verdict]:
    """A scored verdict a turn; raises UserError with the list of turns that have no score, after judging all.

    A paid judge's reply without a rating is kept as any other: asking the same again would most likely buy the same.
    """
    verdicts: dict[int, Verdict] = {}
    with Progress() as progress:
        task = progress.add_task("judging", total=len(turns))
        for place, verdict in load_judge(settings).verdicts([turn.prompt for turn in turns]):
            verdicts[place] = verdict
            progress.advance(task)
    failed = [f"{turn}: {verdicts[i].reason}" for i, turn in enumerate(turns) if verdicts[i].score is None]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(turns)} turns have no score ({'; '.join(failed[:5])}{'; …' * (len(failed) > 5)}); "
            "all replies of a paid judge are kept: run `dvc repro` again to judge the others, and delete a kept reply "
            "without a rating first to pay for another"
        )
    return [verdicts[i] for i in range(len(turns))]


def outcome(first: float, second: float) -> float:
    """1 for a win, 0 for a loss, ½ for a tie, as FastChat: whoever wins does so in both orders.

    `first` is the score of assistant A where A is the answer, `second` where A is what it is compared with.
    """
    return {(1.0, 0.0): 1.0, (0.0, 1.0): 0.0}.get((first, second), 0.5)


SCALES = {"single": (1.0, 10.0), "pair": (0.0, 1.0)}  # by judge.mode, the lowest and the highest score


def scores(judgements: Sequence[dict[str, Any]], categories: dict[int, str], mode: str) -> dict[str, Any]:
    """Averages over first turns, second turns and all turns, as FastChat's show_result prints them, and by category.

    The interval of the average treats a question, both turns and all samples together, as one observation; Student's t
    knows no end of the scale, where the interval is cut. `sample_sd` is the standard deviation between samples of a
    turn, pooled over turns; None where each was judged once.
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
    lowest, highest = SCALES[mode]
    return {
        "first_turn": fmean(by_turn[1]),
        "second_turn": fmean(by_turn[2]),
        "average": fmean(judgement["score"] for judgement in judgements),
        "average_low": max(low, lowest),
        "average_high": min(high, highest),
        "sample_sd": fmean(variance(values) for values in samples.values()) ** 0.5 if several else None,
        "categories": {category: fmean(values) for category, values in sorted(by_category.items())},
        "questions": questions,
    }


def judgement_row(key: str, judge: str, turn: Turn, verdict: Verdict) -> dict[str, Any]:
    """A record of FastChat's *_single.jsonl."""
    return {
        "question_id": turn.question_id,
        "model": key,
        "judge": [judge, turn.template],
        "user_prompt": turn.prompt.user,
        "judgment": verdict.text,
        "score": verdict.score,
        "turn": turn.turn,
        "sample": turn.prompt.sample,
        "served_by": verdict.served_by,
        "tstamp": 0.0,  # a time would make equal judgements hash differently
    }


def pair_row(key: str, against: str, judge: str, turns: Sequence[Turn], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """A record of FastChat's *_pair.jsonl from the two orders of a turn, with its outcome as `score`."""
    winners = {1.0: ("model_1", "model_2"), 0.0: ("model_2", "model_1"), 0.5: ("tie", "tie")}
    first, second = (verdict.score for verdict in verdicts)
    assert first is not None  # judge_turns returns scored verdicts only
    assert second is not None
    return {
        "question_id": turns[0].question_id,
        "model_1": key,
        "model_2": against,
        "g1_winner": winners[first][0],
        "g2_winner": winners[second][1],
        "judge": [judge, turns[0].template],
        "g1_user_prompt": turns[0].prompt.user,
        "g1_judgment": verdicts[0].text,
        "g2_user_prompt": turns[1].prompt.user,
        "g2_judgment": verdicts[1].text,
        "score": outcome(first, second),
        "turn": turns[0].turn,
        "sample": turns[0].prompt.sample,
        "served_by": " ".join(sorted({verdict.served_by for verdict in verdicts} - {""})),
        "tstamp": 0.0,
    }


def judge_answers(
    key: str, answers: Sequence[Any], settings: LocalJudge | OpenAIJudge, against: Sequence[Any] | None = None
) -> tuple[list[dict[str, Any]], dict[int, str], float]:
    """FastChat's judgement records of both turns of every answer, one a sample, each question's category, and USD.

    With the answers `against`, records of pairs.
    """
    questions, templates = load_questions()
    references = load_references(settings.references)
    others = None if against is None else {answer["question_id"]: answer for answer in against}
    samples = settings.samples if isinstance(settings, OpenAIJudge) else 1  # a local judge repeats itself
    built = build_turns(questions, answers, templates, references, others)
    orders = 1 if against is None else 2
    turns = [
        replace(turn, prompt=replace(turn.prompt, sample=sample))
        for start in range(0, len(built), orders)
        for sample in range(samples)
        for turn in built[start : start + orders]
    ]
    verdicts = judge_turns(turns, settings)
    if against is None:
        rows = [judgement_row(key, settings.name, turn, verdict) for turn, verdict in zip(turns, verdicts, strict=True)]
    else:
        rows = [
            pair_row(key, settings.against, settings.name, turns[i : i + 2], verdicts[i : i + 2])
            for i in range(0, len(turns), 2)
        ]
    categories = {turn.question_id: turn.category for turn in turns}
    return rows, categories, sum(verdict.usd for verdict in verdicts)


def pair_figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of wins, losses and ties, and the share of turns on which both orders agree."""
    counts = Counter(row["score"] for row in rows)
    return {
        "wins": counts[1.0],
        "losses": counts[0.0],
        "ties": counts[0.5],
        "orders_agree": fmean(row["g1_winner"] == row["g2_winner"] for row in rows),
    }


def self_comparison(answers: Sequence[Any]) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """A tie on every turn: what a model scores against its own answers, for which no judge is asked."""
    questions, _ = load_questions()
    numbers = [answer["question_id"] for answer in answers]
    rows = [{"question_id": number, "turn": turn, "score": 0.5} for number in numbers for turn in (1, 2)]
    return rows, {number: questions[number]["category"] for number in numbers}
