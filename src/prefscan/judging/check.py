"""Check the judge before its scores are shown: does it tell good answers from bad ones, and does it repeat itself?

    prefscan judge-check

Good answers are the corrected reference answers of math, reasoning and coding, the only ones that the fetched data
has. Bad ones are made of them: the same answers, each given to another question of its category, and the first quarter
of each. docs/judging.md says how to read metrics/judge.json.
"""

import math
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats

from prefscan.common.config import Agreement, LocalJudge, OpenAIJudge
from prefscan.common.errors import UserError
from prefscan.common.intervals import share_interval
from prefscan.common.paths import QUESTIONS
from prefscan.judging.fastchat import Judgement, ModelAnswer, read_records
from prefscan.judging.mtbench import (
    NEED_REFERENCE,
    TEMPLATES,
    Turn,
    fill,
    judge_turns,
    outcome,
)
from prefscan.reporting.stats import cluster_bootstrap, paired_difference, pairwise_agreement

QUESTIONS_EACH = 5  # of a category, those with the shortest good answers: 90 judgements of bearable cost
REPEATS = 6  # prompts judged a second time
SAME = 1e-4  # a local judge's score moves less than this with the prompts beside it
PROMPTS = ("without_reference", "with_reference")  # as TEMPLATES has them: what the judge is shown beside the answer
VERSIONS = ("good", "swapped", "truncated")


def swap(answers: dict[int, str]) -> dict[int, str]:
    """Each answer under another question's id: one random cycle, so none keeps its own; equal for equal ids."""
    order = sorted(answers)
    random.Random(0).shuffle(order)
    return {question: answers[order[i - 1]] for i, question in enumerate(order)}


def first_quarter(text: str) -> str:
    """The first quarter of the words, at least one, with the white space between them as it was."""
    words = list(re.finditer(r"\S+", text))
    return text[: words[max(1, len(words) // 4) - 1].end()]


def versions(questions: dict[int, Any], references: dict[int, Any]) -> dict[int, dict[str, str]]:
    """Of each checked question the good, swapped and truncated first-turn answer.

    Raises UserError for a reference to an unknown question, for one without words, and for a category with fewer than
    two, where none can be swapped.
    """
    by_category: dict[str, dict[int, str]] = defaultdict(dict)
    for number, reference in references.items():
        if number not in questions:
            raise UserError(f"{QUESTIONS}: the reference answer to question {number} has no question; fetch again")
        by_category[questions[number]["category"]][number] = reference["choices"][0]["turns"][0]
    found = {}
    for category in sorted(NEED_REFERENCE):
        shortest = sorted(by_category[category].items(), key=lambda item: (len(item[1]), item[0]))
        answers = dict(shortest[:QUESTIONS_EACH])
        if len(answers) < 2:
            raise UserError(
                f"{QUESTIONS}/reference_answer/corrected.jsonl has {len(answers)} reference answers of category "
                f"{category}; the judge check swaps answers and needs two or more"
            )
        swapped = swap(answers)
        for number, text in answers.items():
            if not text.strip():
                raise UserError(f"{QUESTIONS}: the reference answer to question {number} has no words; fetch again")
            found[number] = {"good": text, "swapped": swapped[number], "truncated": first_quarter(text)}
    return found


def check_turns(
    questions: dict[int, Any],
    answers: dict[int, dict[str, str]],
    templates: dict[str, Any],
    shown: dict[int, Any],
    mode: str,
) -> list[Turn]:
    """What is judged in both prompts, by prompt and question; `shown` maps to references.

    With `single` every version of the answer. With `pair` the good one beside each bad one, as assistant A and then B.
    """
    turns = []
    for prompt_kind, name in zip(PROMPTS, TEMPLATES[mode], strict=True):
        for number, texts in answers.items():
            question = questions[number]
            fields = {"question": question["turns"][0]}
            if prompt_kind == "with_reference":
                if number not in shown:
                    raise UserError(
                        f"question {number} needs a reference answer and judge.references has none; choose the other "
                        "of stock and corrected"
                    )
                fields["ref_answer_1"] = shown[number]["choices"][0]["turns"][0]
            if mode == "single":
                layouts = [{"answer": texts[version]} for version in VERSIONS]
            else:
                pairs = [(texts["good"], texts[bad]) for bad in VERSIONS[1:]]
                layouts = [{"answer_a": a, "answer_b": b} for pair in pairs for a, b in (pair, pair[::-1])]
            for layout in layouts:
                prompt = fill(templates, name, fields | layout)
                turns.append(Turn(number, question["category"], 1, name, prompt))
    return turns


def ranked(wins: float, questions: int) -> dict[str, float]:
    """AUC within a question with its Wilson interval: how often the good answer wins, ties half.

    Within, since a question that is judged mildly would else put its bad answer above the good one of another.
    """
    share, low, high = share_interval(wins, questions)
    return {"auc": share, "auc_low": low, "auc_high": high}


def compare(good: Sequence[float], bad: Sequence[float]) -> dict[str, float]:
    """AUC and mean margin of good over bad answers to the same questions, with 95 % intervals over questions."""
    found = paired_difference(good, bad)
    margin = {"margin": found.mean, "margin_low": found.low, "margin_high": found.high}
    return ranked(found.wins + found.ties / 2, len(good)) | margin


def discrimination(scores: Sequence[float]) -> dict[str, Any]:
    """The figures of one prompt from its scores, ordered by question and version."""
    of = {version: scores[i :: len(VERSIONS)] for i, version in enumerate(VERSIONS)}
    means = {f"mean_{version}": fmean(of[version]) for version in VERSIONS}
    return means | {bad: compare(of["good"], of[bad]) for bad in VERSIONS[1:]}


def pair_discrimination(scores: Sequence[float]) -> dict[str, Any]:
    """The AUC alone, of verdicts on pairs, ordered by question, bad version and order."""
    outcomes = [outcome(first, second) for first, second in zip(scores[::2], scores[1::2], strict=True)]
    by_bad = {bad: outcomes[i :: len(VERSIONS) - 1] for i, bad in enumerate(VERSIONS[1:])}
    return {bad: ranked(sum(of), len(of)) for bad, of in by_bad.items()}


def judged_scores(turns: Sequence[Turn], settings: LocalJudge | OpenAIJudge) -> list[float]:
    return [verdict.score for verdict in judge_turns(turns, settings) if verdict.score is not None]


def repeated(turns: Sequence[Turn]) -> list[Turn]:
    """The first of the check's turns, all in one prompt, once more: each as a second sample."""
    count = min(REPEATS, len(turns) // len(PROMPTS))
    return [replace(turn, prompt=replace(turn.prompt, sample=1)) for turn in turns[:count]]


def repeat(again: Sequence[Turn], scores: Sequence[float], settings: LocalJudge | OpenAIJudge) -> dict[str, Any]:
    """How far second samples are from the first ones' scores."""
    pairs = zip(scores, judged_scores(again, settings), strict=True)
    largest = max(abs(second - first) for first, second in pairs)
    return {"prompts": len(again), "largest_difference": largest, "deterministic": largest < SAME}


def external_scores(agreement: Agreement) -> dict[tuple[int, str, int], float]:
    """Others' scores by question, model and turn, the mean of several; raises UserError for a faulty record."""
    found: dict[tuple[int, str, int], list[float]] = defaultdict(list)
    for row in read_records(Path(agreement.judgements), Judgement):
        found[row["question_id"], row["model"], row["turn"]].append(row["score"])
    return {key: fmean(values) for key, values in found.items()}


def judged_answers(agreement: Agreement, models: set[str]) -> dict[str, list[Any]]:
    """The answers of the judged models; raises UserError for a model without and for a record that lacks a field."""
    by_model: dict[str, list[Any]] = defaultdict(list)
    for row in read_records(Path(agreement.answers), ModelAnswer, ["question_id", "model_id"]):
        by_model[row["model_id"]].append(row)
    if missing := sorted(models - set(by_model)):
        raise UserError(
            f"agreement.answers: {agreement.answers} has no answers of {', '.join(missing)}; "
            f"add them, or take these models out of {agreement.judgements}"
        )
    return {model: by_model[model] for model in sorted(models)}


def _correlation(ours: Sequence[float], theirs: Sequence[float], ranks: bool) -> float:
    """Spearman's or Pearson's; NaN where either side is constant."""
    if min(np.ptp(ours), np.ptp(theirs)) == 0:
        return math.nan
    return float((stats.spearmanr(ours, theirs) if ranks else stats.pearsonr(ours, theirs)).statistic)


def agree(
    ours: dict[tuple[int, str, int], float], theirs: dict[tuple[int, str, int], float]
) -> dict[str, float | int | None]:
    """Correlation over all judged turns, and agreement of votes on pairs of models, with intervals over questions.

    Both map (question, model, turn) to a score, `theirs` a part of `ours`. A figure that is not defined is None: a
    correlation with constant scores, agreement without a pair of models.
    """
    by_question: dict[int, list[tuple[int, str, int]]] = defaultdict(list)
    for key in theirs:
        by_question[key[0]].append(key)
    groups = list(by_question.values())
    if len(groups) < 2:
        raise UserError(f"agreement.judgements: {len(groups)} questions; an interval needs two or more, add judgements")
    pairs = [[(ours[key], theirs[key]) for key in group] for group in groups]

    votes = []  # of a question, both turns together: agreeing votes and all, with ties and without
    for group in groups:
        turns = defaultdict(list)
        for key in group:
            turns[key[2]].append(key)
        counts = [pairwise_agreement([ours[k] for k in keys], [theirs[k] for k in keys]) for keys in turns.values()]
        votes.append(np.sum(counts, axis=0))

    def correlation(draw: Any, ranks: bool) -> float:
        first, second = zip(*(pair for i in draw for pair in pairs[i]), strict=True)
        return _correlation(first, second, ranks)

    def share(draw: Any, place: int) -> float:
        total = np.sum([votes[i] for i in draw], axis=0)
        return float(total[place] / total[place + 1]) if total[place + 1] else math.nan

    figures = {
        "spearman": lambda draw: correlation(draw, ranks=True),
        "pearson": lambda draw: correlation(draw, ranks=False),
        "pairwise_with_ties": lambda draw: share(draw, 0),
        "pairwise_without_ties": lambda draw: share(draw, 2),
    }
    found: dict[str, float | int | None] = {"questions": len(groups), "turns": len(theirs)}
    for name, statistic in figures.items():
        values = statistic(np.arange(len(groups))), *cluster_bootstrap(len(groups), statistic)
        for suffix, value in zip(("", "_low", "_high"), values, strict=True):
            found[name + suffix] = None if math.isnan(value) else value
    return found
