"""The first lines of the report: what was compared, what is significant and what cannot be concluded, from the data."""

from typing import Any

import pandas as pd

from prefscan.common.config import LocalJudge, OpenAIJudge, Params
from prefscan.common.paths import BASE
from prefscan.reporting.stats import selected_best


def question_scores(mtbench: dict[str, Any]) -> list[float]:
    """The mean score of each question, in the questions' order."""
    scores: dict[str, float] = mtbench["questions"]
    return [scores[number] for number in sorted(scores, key=int)]


def score_name(judge: LocalJudge | OpenAIJudge) -> str:
    if judge.mode == "single":
        return "MT-Bench score (1 to 10)"
    return f"win rate against {judge.against}, ties half (0 to 1)"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def span(values: pd.Series, form: str) -> str:
    """The smallest and the greatest of the values by this format, or the one that all of them print as."""
    low, high = format(values.min(), form), format(values.max(), form)
    return low if low == high else f"{low} to {high}"


def difference_sentences(cells: pd.DataFrame, judged: dict[str, Any]) -> list[str]:
    """Which cells differ from the base, what could have been seen, and the highest cells corrected for the picking."""
    significant = cells.loc[cells["p_holm"] <= 0.05, "cell"]
    verdict = f"{', '.join(significant)} differ{'s' * (len(significant) == 1)}" if len(significant) else "none differs"
    subject = "cell lies" if len(cells) == 1 else "cells lie"
    lines = [
        f"Paired by question, the {subject} {span(cells['difference'], '+.2f')} from the base; with Holm's correction "
        f"over {counted(len(cells), 'cell')} {verdict} significantly (smallest corrected p "
        f"{cells['p_holm'].min():.2f})."
    ]
    picks = []
    for loss, group in cells.groupby("loss", sort=False):
        if len(group) > 1:
            best = selected_best([question_scores(judged[key]) for key in group["cell"]])
            picks.append(
                f"{loss} {best.corrected:.2f} [{best.low:.2f}, {best.high:.2f}] for {best.apparent:.2f} "
                f"({group['cell'].iloc[best.cell]})"
            )
    if picks:
        lines.append(
            f"The highest cell of a loss is subject to selection bias; corrected by bootstrap: {'; '.join(picks)}."
        )
    return lines


def judge_sentence(judge: dict[str, Any]) -> str:
    """Whether the judge can tell good answers from bad ones, from metrics/judge.json, and what its check could show."""
    names = {
        "swapped": "another question's",
        "truncated": "its own first quarter",
        "padded": "itself padded",
        "claims_rating": "a wrong one that claims a 10",
    }
    found = {name: judge["all"][bad] for bad, name in names.items() if bad in judge["all"]}
    ranks = [f"{name} {f['auc']:.2f} [{f['auc_low']:.2f}, {f['auc_high']:.2f}]" for name, f in found.items()]
    told = [name for name, f in found.items() if f["auc_low"] > 0.5]
    if len(told) == len(found):
        verdict = "it can tell them apart"
    elif told:
        verdict = f"it can tell it from {' and '.join(told)} only, so no score below should be read as quality"
    else:
        verdict = "it cannot be shown to tell them apart, so no score below should be read as quality"
    return (
        f"The judge {judge['judge']} ranks a good answer above a bad one with probability: {', '.join(ranks)} (95 % "
        f"intervals over {judge['questions']} questions; 0.5 is chance, and a judge that is right "
        f"{judge['true_auc']:.0%} of the time would pass each with probability {judge['all']['power']:.2f}): {verdict}."
    )


def sentences(
    params: Params, cells: pd.DataFrame, judged: dict[str, Any], prepared: dict[str, Any], judge: dict[str, Any]
) -> list[str]:
    """What was compared and what may be concluded, computed from the data."""
    lines = [judge_sentence(judge)]
    if params.judge.kind == "local":
        own = params.judge.folder == str(BASE)
        weights = f"the base model {params.model.name} itself" if own else params.judge.folder
        lines.append(
            f"The scores come from a judge on this machine, {params.judge.name} ({weights})"
            + (": they show that the pipeline works, not which method is better." if own else ".")
        )
    base = judged["base"]
    questions = len(base["questions"])
    lines.append(
        f"{counted(len(cells), 'cell')} of {params.model.name} on {params.data.name}: losses {_listed(cells['loss'])}; "
        f"β {_listed(cells['beta'])}; steps {_listed(cells['steps'])}. {prepared['train']} training and "
        f"{prepared['heldout']} held-out pairs of {prepared['rows']}; {questions} MT-Bench questions, two turns each."
    )
    lines.append(
        f"The base scores {base['average']:.2f} [{base['average_low']:.2f}, {base['average_high']:.2f}], the "
        f"{'cell' if len(cells) == 1 else 'cells'} {span(cells['score'], '.2f')}: {score_name(params.judge)}; 95 % "
        f"intervals over {questions} questions, without the variance between trainings."
    )
    lines += difference_sentences(cells, judged)
    if "shorter_accuracy" in cells:
        lines.append(
            f"Held-out reward accuracy is {span(cells['accuracy'], '.2f')} over {prepared['heldout']} pairs, where the "
            f"rule that the shorter response is the chosen one has {cells['shorter_accuracy'].iloc[0]:.2f}. "
            "β means something else in each loss: equal β is not equal strength."
        )
    lines.append(own_loss_sentence(cells))
    kept = cells["margin_kept"].dropna()
    share = f"{span(kept, '.1%')} of the held-out margin" if len(kept) else "no held-out margin"
    merge, answer = params.merge, params.answer
    lines.append(
        f"The merges, in {merge.dtype}, kept {share}, computed in fp32 over the first {cells['merge_pairs'].max()} of "
        f"these pairs; {span(cells['share_truncated'], '.0%')} of the answers were truncated at "
        f"{answer.max_new_tokens} tokens."
    )
    if params.answers_otherwise:
        model = "the base with the adapter" if merge.format == "adapter" else "the merged model"
        above = (cells["margin_answering_low"] > 0).sum()
        lines.append(
            f"The answers come from {model} in {answer.dtype}, whose held-out margin against the base in that "
            f"precision is {span(cells['margin_answering'], '.2f')} nats where training ended with "
            f"{span(cells['margin'], '.2f')}: above zero beyond its 95 % interval, before any correction, "
            f"in {above} of {counted(len(cells), 'cell')}."
            # Weights rounded to bf16 lost 84 % of a small adapter's margin once, for which merge.dtype refuses it.
            + (" With merge.format: adapter the adapter keeps its own precision." if merge.format == "model" else "")
        )
    return lines


def own_loss_sentence(cells: pd.DataFrame) -> str:
    """In how many cells of each loss what was trained fell on held-out pairs, too.

    The margin cannot say it of a loss that averages over tokens, as ipo does: the sum may grow by length alone.
    """
    shares = ", ".join(
        f"{loss} in {(rows['loss_change_high'] < 0).sum()} of {len(rows)}"
        for loss, rows in cells.groupby("loss", sort=False)
    )
    return (
        "What a cell minimised, its own loss, is lower on these pairs than the base's beyond a 95 % interval, before "
        f"any correction, for {shares}."
    )


def _listed(values: pd.Series) -> str:
    return ", ".join(str(value) for value in dict.fromkeys(values))
