"""Collect the sweep's metrics into charts, tables, reports/report.html, reports/report.md and metrics/summary.json.

    python -m prefscan.report

It reads the cells that the grid names and no others, and removes the metrics of other cells from the workspace (DVC's
cache keeps them), so that the recorded hash of its inputs belongs to the grid.
"""

from io import StringIO
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import pandas as pd

from prefscan import charts
from prefscan.errors import run_stage
from prefscan.files import new_folder, read_json, read_text, write_json, write_text
from prefscan.params import Cell, LocalJudge, OpenAIJudge, Params, load
from prefscan.paths import (
    ANSWER_METRICS,
    CELL_JUDGEMENTS,
    CURVES,
    JUDGE_METRICS,
    JUDGEMENTS,
    MERGE_METRICS,
    MTBENCH_METRICS,
    PREPARE_METRICS,
    REPORTS,
    SUMMARY,
    TRAIN_METRICS,
)
from prefscan.stats import holm, minimum_detectable_difference, paired_difference, selected_best

FOLDERS = (TRAIN_METRICS, CURVES, MERGE_METRICS, ANSWER_METRICS, MTBENCH_METRICS, CELL_JUDGEMENTS)


def remove_other_cells(folders: tuple[Path, ...], keys: set[str]) -> None:
    """Delete files of cells that are not in the grid."""
    for folder in folders:
        for path in folder.iterdir() if folder.exists() else ():
            if path.stem not in keys:
                path.unlink()


def cell_row(cell: Cell, mtbench: dict[str, Any]) -> dict[str, Any]:
    """One row of the table of cells: parameters, scores, held-out metrics, what the merge kept, cost."""
    key = cell.key
    train, merge = read_json(TRAIN_METRICS / f"{key}.json"), read_json(MERGE_METRICS / f"{key}.json")
    answer = read_json(ANSWER_METRICS / f"{key}.json")
    held = train["heldout"]
    return {
        "cell": key,
        "loss": cell.loss,
        "beta": cell.beta,
        "steps": str(cell.steps),
        **score_columns(mtbench),
        **{name: held[name] for name in ("accuracy", "accuracy_low", "accuracy_high")},
        **{name: held[name] for name in ("margin", "margin_low", "margin_high", "chosen_shift", "rejected_shift")},
        "margin_kept": merge["margin_kept"],
        "weights_changed": merge["weights_changed"],
        "share_cut": answer["share_cut"],
        "mean_tokens": answer["mean_tokens"],
        "repetition": answer["repetition"],
        **{f"divergence{end}": answer["divergence"][f"per_reply{end}"] for end in ("", "_low", "_high")},
        "train_seconds": train["cost"]["seconds"],
        "peak_memory_gib": train["cost"]["peak_memory_gib"],
    }


def score_columns(mtbench: dict[str, Any]) -> dict[str, float]:
    return {
        "score": mtbench["average"],
        "score_low": mtbench["average_low"],
        "score_high": mtbench["average_high"],
        "first_turn": mtbench["first_turn"],
        "second_turn": mtbench["second_turn"],
    }


def question_scores(mtbench: dict[str, Any]) -> list[float]:
    """The mean score of each question, in the questions' order."""
    scores: dict[str, float] = mtbench["questions"]
    return [scores[number] for number in sorted(scores, key=int)]


def differences_to_base(judged: dict[str, Any]) -> pd.DataFrame:
    """Each cell minus the base, paired by question, with Holm's correction over the cells; a row a cell, in order.

    `judged` has the content of metrics/mtbench for each model.
    """
    base = question_scores(judged["base"])
    found = [paired_difference(question_scores(mtbench), base) for key, mtbench in judged.items() if key != "base"]
    table = pd.DataFrame(
        {
            "difference": difference.mean,
            "difference_low": difference.low,
            "difference_high": difference.high,
            "standard_error": difference.standard_error,
            "wins": difference.wins,
            "ties": difference.ties,
            "losses": difference.losses,
        }
        for difference in found
    )
    return table.assign(p_holm=holm([difference.p_value for difference in found]))


SUMMARY_COLUMNS = (
    "score",
    "score_low",
    "score_high",
    "first_turn",
    "second_turn",
    "accuracy",
    "margin",
    "margin_low",
    "margin_high",
    "margin_kept",
)


def highest_scoring(cells: pd.DataFrame) -> dict[str, str]:
    """The key of each loss's cell with the highest score, the first of equals."""
    ordered = cells.sort_values("score", ascending=False, kind="stable").drop_duplicates("loss")
    return dict(zip(ordered["loss"], ordered["cell"], strict=True))


def summarise(cells: pd.DataFrame, recipe: Cell, base: dict[str, Any]) -> dict[str, Any]:
    """metrics/summary.json: the recipe first, then the base and the highest-scoring cell of each loss."""

    def entry(key: str) -> dict[str, Any]:
        row = cells[cells["cell"] == key].iloc[0]
        values = {name: row[name] for name in SUMMARY_COLUMNS}
        return {"cell": key} | {n: None if pd.isna(value) else round(float(value), 6) for n, value in values.items()}

    return {
        "recipe": entry(recipe.key),
        "base": {name: round(value, 6) for name, value in score_columns(base).items()}
        | {"accuracy": 0.5, "margin": 0.0},
        "highest": {loss: entry(key) for loss, key in highest_scoring(cells).items()},
    }


def score_name(judge: LocalJudge | OpenAIJudge) -> str:
    if judge.mode == "single":
        return "MT-Bench score (1 to 10)"
    return f"win rate against {judge.against}, ties half (0 to 1)"


def difference_sentences(cells: pd.DataFrame, judged: dict[str, Any]) -> list[str]:
    """Which cells differ from the base, what could have been seen, and the highest cells corrected for the picking."""
    significant = cells.loc[cells["p_holm"] <= 0.05, "cell"]
    verdict = f"{', '.join(significant)} differ" if len(significant) else "none differs"
    questions = len(judged["base"]["questions"])
    detectable = minimum_detectable_difference(cells["standard_error"].median() * questions**0.5, questions)
    lines = [
        f"Paired by question, the cells lie {cells['difference'].min():+.2f} to {cells['difference'].max():+.2f} from "
        f"the base; with Holm's correction over {len(cells)} cells {verdict} significantly (smallest corrected p "
        f"{cells['p_holm'].min():.2f}). This many questions and this spread detect a difference of {detectable:.2f} or "
        "more with 80 % power, before the correction."
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
            "The highest cell of a loss is a pick that favours chance; corrected for the picking by bootstrap: "
            f"{'; '.join(picks)}."
        )
    return lines


def judge_sentence(judge: dict[str, Any]) -> str:
    """Whether the judge can tell good answers from bad ones, from metrics/judge.json; the prompt without reference."""
    bad = {
        "the same answer given to another question": judge["without_reference"]["swapped"],
        "its own first quarter": judge["without_reference"]["truncated"],
    }
    ranks = [
        f"{name} with probability {found['auc']:.2f} [{found['auc_low']:.2f}, {found['auc_high']:.2f}]"
        for name, found in bad.items()
    ]
    told = [name for name, found in bad.items() if found["auc_low"] > 0.5]
    if len(told) == len(bad):
        verdict = "it can tell them apart"
    elif told:
        verdict = f"it can tell it from {told[0]} only, so no score below should be read as quality"
    else:
        verdict = "it cannot be shown to tell them apart, so no score below should be read as quality"
    return (
        f"The judge {judge['judge']} ranks a reference answer above {', and above '.join(ranks)} (95 % intervals over "
        f"{judge['questions']} questions; 0.5 is chance): {verdict}."
    )


def sentences(
    params: Params, cells: pd.DataFrame, judged: dict[str, Any], prepared: dict[str, Any], judge: dict[str, Any]
) -> list[str]:
    """What was compared and what may be concluded, computed from the data."""
    lines = [judge_sentence(judge)]
    if params.judge.kind == "local":
        lines.append(
            f"The scores come from the small local judge {params.judge.name}: they show that the pipeline works, "
            "not which method is better."
        )
    base = judged["base"]
    questions = len(base["questions"])
    lines.append(
        f"{len(cells)} cells of {params.model.name} on {params.data.name}: losses {_listed(cells['loss'])}; "
        f"β {_listed(cells['beta'])}; steps {_listed(cells['steps'])}. {prepared['train']} training and "
        f"{prepared['heldout']} held-out pairs of {prepared['rows']}; {questions} MT-Bench questions, two turns each."
    )
    lines.append(
        f"The base scores {base['average']:.2f} [{base['average_low']:.2f}, {base['average_high']:.2f}], the cells "
        f"{cells['score'].min():.2f} to {cells['score'].max():.2f}: {score_name(params.judge)}; 95 % intervals over "
        f"{questions} questions. One seed was trained, so nothing here tells a loss from the luck of a seed."
    )
    lines += difference_sentences(cells, judged)
    moved = (cells["margin_low"] > 0).sum()
    lines.append(
        f"Held-out reward accuracy is {cells['accuracy'].min():.2f} to {cells['accuracy'].max():.2f} beside the base's "
        f"0.5, over all {prepared['heldout']} held-out pairs; the held-out margin is above zero beyond its 95 % "
        f"interval in {moved} of {len(cells)} cells. "
        "β means something else in each loss: equal β is not equal strength."
    )
    kept = cells["margin_kept"].dropna()
    share = f"{kept.min():.1%} to {kept.max():.1%} of the held-out margin" if len(kept) else "no held-out margin"
    lines.append(
        f"The merges, in {params.merge.dtype}, kept {share}; {cells['share_cut'].min():.0%} to "
        f"{cells['share_cut'].max():.0%} of the answers were cut at {params.answer.max_new_tokens} tokens."
    )
    return lines


def _listed(values: pd.Series) -> str:
    return ", ".join(str(value) for value in dict.fromkeys(values))


def category_scores(cells: pd.DataFrame, judged: dict[str, Any]) -> pd.DataFrame:
    """The base's and each loss's highest-scoring cell's score in every category, the losses in the grid's order."""
    highest = highest_scoring(cells)
    keys = [highest[loss] for loss in dict.fromkeys(cells["loss"])]
    sources = {key: judged[key] for key in ("base", *keys)}
    return pd.DataFrame(
        [
            {"model": name, "category": category, "score": score}
            for name, metrics in sources.items()
            for category, score in metrics["categories"].items()
        ]
    )


def curve_table(cells: list[Cell]) -> pd.DataFrame:
    return pd.concat(
        pd.read_csv(StringIO(read_text(CURVES / f"{cell.key}.csv"))).assign(
            cell=cell.key, loss_name=cell.loss, beta=cell.beta, steps=str(cell.steps)
        )
        for cell in cells
    )


def write_report(
    folder: Path, title: str, lines: list[str], figures: dict[str, tuple[str, Any]], table: pd.DataFrame
) -> None:
    """Charts as SVG and PNG, the page, the Markdown and the table of cells, all into one folder.

    `figures` maps a file name to its caption and chart. The templates escape text from models and data.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prefscan"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    svgs = {}
    for name, (_, chart) in figures.items():
        chart.save(folder / f"{name}.svg")
        chart.save(folder / f"{name}.png", scale_factor=2)
        svgs[name] = read_text(folder / f"{name}.svg")
    captions = {name: caption for name, (caption, _) in figures.items()}
    rows = table.to_dict("records")
    page = environment.get_template("report.html").render(
        title=title, lines=lines, captions=captions, svgs=svgs, columns=COLUMNS, rows=rows
    )
    write_text(folder / "report.html", page)
    markdown = jinja2.Environment(loader=jinja2.PackageLoader("prefscan"), autoescape=False, trim_blocks=True)
    text = markdown.get_template("report.md").render(
        title=title, lines=lines, captions=captions, columns=COLUMNS, rows=rows
    )
    write_text(folder / "report.md", text)
    table.to_csv(folder / "cells.csv", index=False)


# Column of the table of cells → heading and how a value is printed.
COLUMNS = {
    "cell": ("cell", "{}"),
    "score": ("score", "{:.2f}"),
    "score_low": ("95 % low", "{:.2f}"),
    "score_high": ("95 % high", "{:.2f}"),
    "difference": ("minus base", "{:+.2f}"),
    "difference_low": ("95 % low", "{:+.2f}"),
    "difference_high": ("95 % high", "{:+.2f}"),
    "p_holm": ("p, Holm", "{:.2f}"),
    "wins": ("won", "{:.0f}"),
    "ties": ("tied", "{:.0f}"),
    "losses": ("lost", "{:.0f}"),
    "first_turn": ("first turn", "{:.2f}"),
    "second_turn": ("second turn", "{:.2f}"),
    "accuracy": ("held-out accuracy", "{:.2f}"),
    "margin": ("held-out margin, nats", "{:.2f}"),
    "margin_low": ("95 % low", "{:.2f}"),
    "margin_high": ("95 % high", "{:.2f}"),
    "chosen_shift": ("chosen shift, nats", "{:.2f}"),
    "rejected_shift": ("rejected shift, nats", "{:.2f}"),
    "margin_kept": ("margin kept by merge", "{:.1%}"),
    "share_cut": ("answers cut", "{:.0%}"),
    "mean_tokens": ("tokens a reply", "{:.0f}"),
    "repetition": ("repeated 4-grams", "{:.0%}"),
    "divergence": ("log-ratio to the base, nats a reply", "{:.2f}"),
    "divergence_low": ("95 % low", "{:.2f}"),
    "divergence_high": ("95 % high", "{:.2f}"),
    "train_seconds": ("training, s", "{:.0f}"),
}


def main() -> None:
    params = load()
    cells = params.grid.cells
    keys = ("base", *(cell.key for cell in cells))
    remove_other_cells(FOLDERS, set(keys))
    judged = {key: read_json(MTBENCH_METRICS / f"{key}.json") for key in keys}
    base = judged["base"]
    prepared = read_json(PREPARE_METRICS)
    table = pd.DataFrame([cell_row(cell, judged[cell.key]) for cell in cells]).join(differences_to_base(judged))
    score_title = score_name(params.judge)
    base_row = {
        "cell": "base",
        **score_columns(base),
        "accuracy": 0.5,
        "margin": 0.0,
        "chosen_shift": 0.0,
        "rejected_shift": 0.0,
    }
    answered = read_json(ANSWER_METRICS / "base.json")
    base_row |= {name: answered[name] for name in ("share_cut", "mean_tokens", "repetition")}
    figures: dict[str, tuple[str, alt.TopLevelMixin]] = {
        "score": (
            f"{score_title[0].upper()}{score_title[1:]} against β; bars are 95 % intervals over questions",
            charts.score_against_beta(table, base["average"], score_title),
        ),
        "categories": (
            "The base and the highest-scoring cell of each loss, by category",
            charts.scores_by_category(category_scores(table, judged), score_title),
        ),
        "accuracy": (
            "Held-out reward accuracy against β, with 95 % Wilson intervals",
            charts.accuracy_against_beta(table),
        ),
        "margin": ("Held-out margin against β, with 95 % intervals over pairs", charts.margin_against_beta(table)),
        "curves": ("Training curves", charts.training_curves(curve_table(cells))),
    }
    judgements = "".join(read_text(CELL_JUDGEMENTS / f"{key}.jsonl") for key in keys)
    with new_folder(REPORTS) as folder:
        write_report(
            folder,
            f"{params.model.name}: {len(cells)} cells",
            sentences(params, table, judged, prepared, read_json(JUDGE_METRICS)),
            figures,
            pd.concat([pd.DataFrame([base_row]), table]),
        )
    # One file for all models, where FastChat's show_result looks for it.
    write_text(JUDGEMENTS / f"{params.judge.name}_{params.judge.mode}.jsonl", judgements)
    write_json(SUMMARY, summarise(table, params.recipe, base))


if __name__ == "__main__":
    run_stage(main)
