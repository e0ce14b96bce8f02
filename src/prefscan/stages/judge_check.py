"""Check the judge before its scores are shown: does it tell good answers from bad ones, and does it repeat itself?

    prefscan judge-check

Good answers are the corrected reference answers of math, reasoning and coding, the only ones that the fetched data
has. Bad ones are made of them: the same answers, each given to another question of its category, and the first quarter
of each. docs/judging.md says how to read metrics/judge.json.
"""

from typing import Any

from prefscan.common.config import load
from prefscan.common.errors import UserError
from prefscan.common.io import rounded, write_json
from prefscan.common.paths import JUDGE_METRICS
from prefscan.judging.check import (
    PROMPTS,
    VERSIONS,
    agree,
    check_turns,
    discrimination,
    external_scores,
    judged_answers,
    judged_scores,
    pair_discrimination,
    repeat,
    repeated,
    versions,
)
from prefscan.judging.mtbench import build_turns, load_questions, load_references


def main() -> None:
    params = load()
    settings, agreement = params.judge, params.agreement
    questions, templates = load_questions()
    shown = load_references(settings.references)
    answers = versions(questions, load_references("corrected"))
    turns = check_turns(questions, answers, templates, shown, settings.mode)
    checked, again = len(turns), repeated(turns)
    theirs, compared = {}, []
    if agreement:
        theirs = external_scores(agreement)
        for model, records in judged_answers(agreement, {model for _, model, _ in theirs}).items():
            built = build_turns(questions, records, templates, shown)
            wanted = [(turn, (turn.question_id, model, turn.turn)) for turn in built]
            compared += [(turn, key) for turn, key in wanted if key in theirs]
        if lost := set(theirs) - {key for _, key in compared}:
            number, model, turn_number = min(lost)
            raise UserError(
                f"agreement.answers: {agreement.answers} has no answer of {model} to question {number} turn "
                f"{turn_number}, which {agreement.judgements} judges; add it, or take the judgement out"
            )
    turns += [turn for turn, _ in compared]
    scores = judged_scores(turns, settings)
    half = checked // len(PROMPTS)
    metrics: dict[str, Any] = {
        "judge": settings.name,
        "mode": settings.mode,
        "references": settings.references,
        "questions": len(answers),
    }
    figures = discrimination if settings.mode == "single" else pair_discrimination
    for i, name in enumerate(PROMPTS):
        metrics[name] = figures(scores[i * half : (i + 1) * half])
    metrics["repeat"] = repeat(again, scores[: len(again)], settings)
    ours = {key: score for (_, key), score in zip(compared, scores[checked:], strict=True)}
    metrics["agreement"] = agree(ours, theirs) if agreement else None
    write_json(JUDGE_METRICS, rounded(metrics))
    for name in PROMPTS:
        for bad in VERSIONS[1:]:
            found = metrics[name][bad]
            print(f"{name}, {bad}: AUC {found['auc']:.2f} [{found['auc_low']:.2f}, {found['auc_high']:.2f}]")
