"""Collect the sweep's metrics into reports/ (pages, charts, tables) and metrics/summary.json.

    prefscan report

It reads the cells that the grid names and no others, and removes the metrics of other cells from the workspace (DVC's
cache keeps them), so that the recorded hash of its inputs belongs to the grid.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from prefscan.common.config import Cell, Params
from prefscan.common.errors import UserError
from prefscan.common.io import read_json, read_jsonl, write_text
from prefscan.common.paths import (
    ANSWER_COST,
    ANSWER_METRICS,
    ANSWERS,
    CELL_JUDGEMENTS,
    CURVES,
    JUDGE_METRICS,
    MERGE_METRICS,
    MTBENCH_METRICS,
    PREPARE_METRICS,
    QUESTIONS,
    TRAIN_COST,
    TRAIN_METRICS,
)
from prefscan.reporting import charts
from prefscan.reporting.findings import score_name, sentences
from prefscan.reporting.pages import Figure, Table, write_answers, write_report
from prefscan.reporting.tables import (
    COLUMNS,
    base_row,
    category_differences,
    category_scores,
    costs,
    curve_table,
    highest_scoring,
    judge_check,
    left_out,
    score_columns,
    span,
    spread,
    table_of_cells,
)

FOLDERS = (
    TRAIN_METRICS,
    TRAIN_COST,
    CURVES,
    MERGE_METRICS,
    ANSWER_METRICS,
    ANSWER_COST,
    ANSWERS,
    MTBENCH_METRICS,
    CELL_JUDGEMENTS,
)

KEY = re.compile(r"[a-z_]+-[0-9.e-]+-([0-9]+|epoch)")  # of a cell
AGAINST = "The other models' answers are judged against this one, whose score is a half by definition."


def remove_other_cells(folders: tuple[Path, ...], keys: set[str]) -> None:
    """Delete files of cells that are not in the grid, which DVC's cache keeps, and hidden ones.

    Raises UserError for others, as another model's answers may be, and leaves all as it is.
    """
    others = [path for folder in folders if folder.exists() for path in folder.iterdir() if path.stem not in keys]
    if foreign := [str(path) for path in others if not (KEY.fullmatch(path.stem) or path.name.startswith("."))]:
        raise UserError(
            f"{', '.join(foreign[:10])}: of no cell, and what stands in that folder is an input of the report; move it "
            "elsewhere"
        )
    for path in others:
        path.unlink()


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
    "loss_change",
    "loss_change_low",
    "loss_change_high",
    "margin_kept",
)


def summarise(cells: pd.DataFrame, recipe: Cell, base: dict[str, Any]) -> dict[str, Any]:
    """metrics/summary.json: the recipe first, then the base and the highest-scoring cell of each loss."""

    def entry(key: str) -> dict[str, Any]:
        row = cells[cells["cell"] == key].iloc[0]
        values = {name: row[name] for name in SUMMARY_COLUMNS}
        return {"cell": key} | {n: None if pd.isna(value) else round(float(value), 6) for n, value in values.items()}

    return {
        "recipe": entry(recipe.key),
        "base": {name: round(value, 6) for name, value in score_columns(base).items()}
        | {"accuracy": 0.5, "margin": 0.0, "loss_change": 0.0},
        "highest": {loss: entry(key) for loss, key in highest_scoring(cells).items()},
    }


def make_figures(
    table: pd.DataFrame, judged: dict[str, Any], base_tokens: float, curves: pd.DataFrame, score_title: str
) -> dict[str, Figure]:
    """Every chart by its file's name, in the report's order."""
    base_score = judged["base"]["average"]
    name = f"{score_title[0].upper()}{score_title[1:]}"
    categories, heat = category_scores(table, judged), category_differences(table, judged)
    cell = ["cell", "loss", "beta", "steps"]

    return {
        "score": Figure(
            f"{name} against β",
            "Bars are 95 % intervals over questions. β means something else in each loss: compare along a line.",
            charts.score_against_beta(table, base_score, score_title),
            table[[*cell, *span("score")]],
        ),
        "differences": Figure(
            "Each cell minus the base, paired by question",
            "Bars are 95 % intervals, before the correction; a filled point is significant with Holm's correction.",
            charts.differences(table, "score minus the base's"),
            table[[*cell, *span("difference"), "p_holm", "wins", "ties", "losses"]],
        ),
        "divergence": Figure(
            f"{name} against the distance from the base",
            "Losses can be compared here: how much score for how much change. Bars are 95 % intervals over questions.",
            charts.score_against_divergence(table, base_score, score_title),
            table[[*cell, *span("score"), *span("divergence")]],
        ),
        "categories": Figure(
            "The base and the highest-scoring cell of each loss, by category",
            "Few questions a category: read it as a description of this run.",
            charts.scores_by_category(categories, score_title),
            categories,
        ),
        "heat": Figure(
            "Each cell's score in each category, minus the base's",
            "Blue is above the base, orange below; without intervals, so a pattern counts and a tile does not.",
            charts.category_heat_map(heat, "score minus the base's"),
            heat,
        ),
        "length": Figure(
            f"{name} against the length of replies",
            "Judges like length: a score that rises with it may say no more than that.",
            charts.score_against_length(table, (base_tokens, base_score), score_title),
            table[[*cell, "mean_tokens", *span("score")]],
        ),
        "accuracy": Figure(
            "Held-out reward accuracy against β",
            "The share of held-out pairs whose chosen response gained more; bars are 95 % Wilson intervals.",
            charts.accuracy_against_beta(table),
            table[[*cell, *span("accuracy")]],
        ),
        "margin": Figure(
            "Held-out margin against β, with 95 % intervals over pairs",
            "How much more log-probability the chosen response gained than the rejected one, against the base.",
            charts.margin_against_beta(table),
            table[[*cell, *span("margin")]],
        ),
        "curves": Figure(
            "Training curves",
            "Each loss has a scale of its own; the values of different losses cannot be compared.",
            charts.training_curves(curves),
            curves[["cell", "step", "loss", "reward_margin"]],
        ),
    }


def answer_pages(
    keys: tuple[str, ...], answers: dict[str, list[Any]], judgements: dict[str, list[Any]], against: str | None
) -> Any:
    """Of each model, by question: both replies, and every judgement's turn, score and words.

    `against` is the model that pairs are judged against, and that is not judged itself.
    """
    models: dict[str, Any] = {}
    for key in keys:
        itself = [{"turn": turn, "score": 0.5, "words": AGAINST} for turn in (1, 2)] if key == against else []
        models[key] = {
            answer["question_id"]: {"turns": answer["choices"][0]["turns"], "judgements": [*itself]}
            for answer in answers[key]
        }
        for judgement in judgements[key]:
            models[key][judgement["question_id"]]["judgements"].append(
                {"turn": judgement["turn"], "score": judgement["score"], "words": words(judgement)}
            )
    return models


def words(judgement: dict[str, Any]) -> str:
    """What the judge said: of a pair, in both orders."""
    if "judgment" in judgement:
        return str(judgement["judgment"])
    return f"{judgement['g1_judgment']}\n\n[in the other order]\n\n{judgement['g2_judgment']}"


class Results(NamedTuple):
    """What the stages made of the models, by their keys, and the questions that were asked."""

    judged: dict[str, Any]
    answers: dict[str, list[Any]]
    judgements: dict[str, list[Any]]
    questions: list[Any]


def read_results(keys: tuple[str, ...]) -> Results:
    judged = {key: read_json(MTBENCH_METRICS / f"{key}.json") for key in keys}
    # With judge.unscored: report, models are compared on the questions that all of them have scores for.
    shared = set.intersection(*(set(metrics["questions"]) for metrics in judged.values()))
    for metrics in judged.values():
        metrics["questions"] = {
            number: metrics["questions"][number] for number in metrics["questions"] if number in shared
        }
    answers = {key: read_jsonl(ANSWERS / f"{key}.jsonl") for key in keys}
    judgements = {key: read_jsonl(CELL_JUDGEMENTS / f"{key}.jsonl") for key in keys}
    answered = {answer["question_id"] for answer in answers["base"]}
    questions = [
        {"number": question["question_id"], "category": question["category"], "turns": question["turns"]}
        for question in read_jsonl(QUESTIONS / "question.jsonl")
        if question["question_id"] in answered
    ]
    return Results(judged, answers, judgements, questions)


def write_pages(params: Params, cells: list[Cell], results: Results, folder: Path, title: str) -> pd.DataFrame:
    """The pages, charts and cells.csv of these cells into the folder; returns the table of them."""
    judged, answers, judgements, questions = results
    keys = tuple(judged)
    prepared, judge = read_json(PREPARE_METRICS), read_json(JUDGE_METRICS)
    table = table_of_cells(cells, params.recipe, judged, answers)
    everything = pd.concat([pd.DataFrame([base_row(judged)]), table])
    base_tokens = everything["mean_tokens"].iloc[0]
    figures = make_figures(table, judged, base_tokens, curve_table(cells), score_name(params.judge))
    reading = (
        "The held-out margin and the shifts are in nats against the base, summed over tokens; the held-out loss is the "
        "cell's own, on a scale of its own, and lower is better. Intervals as in the charts."
    )
    tables = [
        Table("All cells", reading, everything, {name: form for name, form in COLUMNS.items() if name in everything}),
        *spread(keys, judgements),
        costs(keys, judged),
        judge_check(judge),
        left_out(prepared),
    ]
    lines = sentences(params, table, judged, prepared, judge)
    write_report(folder, title, lines, figures, tables, list(dict.fromkeys(table["loss"])), answers=True)
    against = params.judge.against if params.judge.mode == "pair" else None
    write_answers(folder, title, answer_pages(keys, answers, judgements, against), questions)
    write_text(folder / "cells.csv", everything.to_csv(index=False))
    return table
