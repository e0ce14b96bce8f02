"""Judge a model's MT-Bench answers with FastChat's prompts, in FastChat's judgement format.

    prefscan mtbench base
    prefscan mtbench ipo-0.5-16

A turn that cannot be scored fails the cell with the reason, unless `judge.unscored: report` leaves it out and counts
it. With `judge.mode: pair`, each turn is judged beside that of `judge.against`, in both orders, and its score is 1 for
a win, ½ for a tie and 0 for a loss.
"""

from typing import Any

from prefscan.common.config import load
from prefscan.common.io import write_json, write_jsonl
from prefscan.common.paths import ANSWERS, CELL_JUDGEMENTS, MTBENCH_METRICS
from prefscan.judging.fastchat import Answer, read_records
from prefscan.judging.judge import mode_of
from prefscan.judging.mtbench import judge_answers, scores, self_comparison


def main(key: str) -> None:
    params = load()
    if key != "base":
        params.cell(key)
    settings = params.judge
    mode = mode_of(settings)
    answers = read_records(ANSWERS / f"{key}.jsonl", Answer, ["question_id"])
    itself = mode.orders > 1 and key == settings.against
    if itself:
        judged = self_comparison(answers)
    elif mode.orders > 1:
        others = read_records(ANSWERS / f"{settings.against}.jsonl", Answer, ["question_id"])
        judged = judge_answers(key, answers, settings, others)
    else:
        judged = judge_answers(key, answers, settings)
    rows = [] if itself else judged.rows
    metrics: dict[str, Any] = scores(judged, mode, settings.unscored == "report")
    if mode.orders > 1 and not itself:
        metrics |= mode.figures(rows) | {"against": settings.against}
    write_jsonl(CELL_JUDGEMENTS / f"{key}.jsonl", rows)
    metrics |= {"judge": settings.name, "mode": settings.mode, "references": settings.references}
    metrics["served_by"] = sorted({row["served_by"] for row in rows} - {""})
    if judged.smallest_mass is not None:
        metrics["smallest_mass"] = judged.smallest_mass
    metrics["usd"] = round(judged.usd, 6)
    write_json(MTBENCH_METRICS / f"{key}.json", metrics)
    print(f"{key}: {metrics['average']:.3f} [{metrics['average_low']:.3f}, {metrics['average_high']:.3f}]")
