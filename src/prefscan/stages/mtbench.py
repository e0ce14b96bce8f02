"""Judge a model's MT-Bench answers with FastChat's prompts, in FastChat's judgement format.

    prefscan mtbench base
    prefscan mtbench ipo-0.5-16

A turn that cannot be scored fails the cell with the reason: nothing is averaged over fewer questions in silence. With
`judge.mode: pair`, each turn is judged beside that of `judge.against`, in both orders, and its score is 1 for a win, ½
for a tie and 0 for a loss.
"""

from typing import Any

from prefscan.common.config import load
from prefscan.common.io import write_json, write_jsonl
from prefscan.common.paths import ANSWERS, CELL_JUDGEMENTS, MTBENCH_METRICS
from prefscan.judging.fastchat import Answer, read_records
from prefscan.judging.mtbench import judge_answers, pair_figures, scores, self_comparison


def main(key: str) -> None:
    params = load()
    if key != "base":
        params.cell(key)
    settings = params.judge
    answers = read_records(ANSWERS / f"{key}.jsonl", Answer, ["question_id"])
    judgements: list[dict[str, Any]] = []
    provenance: dict[str, Any] = {"judge": settings.name, "mode": settings.mode, "references": settings.references}
    if settings.mode == "single":
        judgements, categories, usd = judge_answers(key, answers, settings)
        metrics = scores(judgements, categories, settings.mode)
    elif key == settings.against:
        metrics, usd = scores(*self_comparison(answers), settings.mode), 0.0
    else:
        against = read_records(ANSWERS / f"{settings.against}.jsonl", Answer, ["question_id"])
        judgements, categories, usd = judge_answers(key, answers, settings, against)
        metrics = (
            scores(judgements, categories, settings.mode) | pair_figures(judgements) | {"against": settings.against}
        )
    write_jsonl(CELL_JUDGEMENTS / f"{key}.jsonl", judgements)
    provenance["served_by"] = sorted({row["served_by"] for row in judgements} - {""})
    provenance["usd"] = round(usd, 6)
    write_json(MTBENCH_METRICS / f"{key}.json", metrics | provenance)
    print(f"{key}: {metrics['average']:.3f} [{metrics['average_low']:.3f}, {metrics['average_high']:.3f}]")
