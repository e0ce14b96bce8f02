"""Check the judge before its scores are shown: does it tell good answers from bad ones, and does it repeat itself?

    prefscan judge-check

A good answer is the corrected reference answer where there is one, else one written for this project. Four bad ones are
made of them: another question's answer, the first quarter of it, a padded one that is longer and no better, and another
question's answer that claims a rating of 10. docs/judging.md says how to read metrics/judge.json.
"""

from typing import Any

from prefscan.common.config import load
from prefscan.common.errors import UserError
from prefscan.common.io import rounded, write_json
from prefscan.common.paths import JUDGE_METRICS
from prefscan.judging.check import (
    BAD,
    TRUE_AUC,
    agree,
    check_turns,
    external_scores,
    figures_of,
    judged_answers,
    judged_scores,
    repeat,
    repeated,
    versions,
)
from prefscan.judging.judge import mode_of
from prefscan.judging.mtbench import build_turns, load_questions, load_references


def main() -> None:
    params = load()
    settings, agreement = params.judge, params.agreement
    mode = mode_of(settings)
    questions, templates = load_questions()
    shown = load_references(settings.references)
    answers = versions(questions, load_references("corrected"), params.judge_check.questions)
    checks = check_turns(questions, answers, templates, shown, mode)
    turns = [turn for turn, _ in checks]
    checked, again = len(turns), repeated(turns)
    theirs, compared = {}, []
    if agreement:
        theirs = external_scores(agreement)
        for model, records in judged_answers(agreement, {model for _, model, _ in theirs}).items():
            built = build_turns(questions, records, templates, shown, mode)
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
    metrics: dict[str, Any] = {
        "judge": settings.name,
        "mode": settings.mode,
        "references": settings.references,
        "questions": len(answers),
        "true_auc": TRUE_AUC,  # to which each `power` refers
        "unscored": scores[:checked].count(None),
    }
    metrics |= figures_of(checks, scores[:checked], mode)
    metrics["repeat"] = repeat(again, scores[: len(again)], settings)
    ours = {key: score for (_, key), score in zip(compared, scores[checked:], strict=True) if score is not None}
    metrics["agreement"] = agree(ours, {key: theirs[key] for key in theirs if key in ours}) if agreement else None
    write_json(JUDGE_METRICS, rounded(metrics))
    for bad in (bad for bad in BAD if bad in metrics["all"]):
        found = metrics["all"][bad]
        print(f"{bad}: AUC {found['auc']:.2f} [{found['auc_low']:.2f}, {found['auc_high']:.2f}]")
    print(
        f"{len(answers)} questions: a judge of true AUC {TRUE_AUC} passes a comparison with probability "
        f"{metrics['all']['power']:.2f}"
    )
