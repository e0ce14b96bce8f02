"""Collect the sweep's metrics into reports/ (pages, charts, tables) and metrics/summary.json.

    prefscan report

It reads the cells that the grid names and no others, and removes the metrics of other cells from the workspace (DVC's
cache keeps them), so that the recorded hash of its inputs belongs to the grid.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from prefscan.common.config import Cell, Params
from prefscan.common.errors import UserError
from prefscan.common.io import read_json, read_jsonl, write_table
from prefscan.common.paths import (
    ANSWER_COST,
    ANSWER_METRICS,
    ANSWERS,
    CELL_JUDGEMENTS,
    CURVES,
    EVALUATE_COST,
    EVALUATE_METRICS,
    JUDGE_METRICS,
    MERGE_METRICS,
    MTBENCH_METRICS,
    PREPARE_METRICS,
    QUESTIONS,
    REPLIES,
    REWARD_METRICS,
    SAMPLES,
    TRAIN_COST,
    TRAIN_METRICS,
)
from prefscan.reporting import charts
from prefscan.reporting.evaluation import (
    cell_table,
    compare_losses,
    contrast_table,
    loss_table,
    possible_table,
    read_evaluation,
)
from prefscan.reporting.findings import score_name, sentences
from prefscan.reporting.pages import Figure, Page, Table, write_answers, write_report
from prefscan.reporting.reward_findings import caveats, check_sentence, headline
from prefscan.reporting.tables import (
    COLUMNS,
    base_row,
    category_differences,
    category_scores,
    costs,
    curve_table,
    judge_check,
    left_out,
    mtbench_table,
    span,
    spread,
    training_table,
    with_interval,
)

CELL_FOLDERS = (TRAIN_METRICS, TRAIN_COST, CURVES, MERGE_METRICS, EVALUATE_METRICS, EVALUATE_COST, REPLIES)
MTBENCH_FOLDERS = (ANSWER_METRICS, ANSWER_COST, ANSWERS, MTBENCH_METRICS, CELL_JUDGEMENTS)

KEY = re.compile(r"[a-z_]+-[0-9.e+-]+-([0-9]+|epoch)")  # of a cell
UNMOVED = ("margin", "loss_change", "chosen_shift", "rejected_shift")  # of the base, which no training moved
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
    "reward",
    "gain",
    "gain_low",
    "gain_high",
    "kl",
    "win_rate",
    "score",
    "score_low",
    "score_high",
    "accuracy",
    "margin",
    "margin_low",
    "margin_high",
    "margin_kept",
)


def summarise(table: pd.DataFrame, recipe: Cell) -> dict[str, Any]:
    """metrics/summary.json: the recipe first, then the base and the cell of each loss with the highest value.

    The value is the reward where one is known, else MT-Bench's score.
    """
    columns = [name for name in SUMMARY_COLUMNS if name in table]

    def entry(key: str) -> dict[str, Any]:
        row = table[table["cell"] == key].iloc[0]
        values = {name: row[name] for name in columns if not pd.isna(row[name])}
        return {"cell": key} | {name: float(value) for name, value in values.items()}

    value = "gain" if "gain" in table else "score"
    ordered = table.dropna(subset=[value, "loss"]).sort_values(value, ascending=False, kind="stable")
    best = ordered.drop_duplicates("loss")
    places = dict(zip(best["loss"], best["cell"], strict=True))
    in_order = [loss for loss in dict.fromkeys(table["loss"].dropna()) if loss in places]
    return {
        "recipe": entry(recipe.key),
        "base": entry("base"),
        "highest": {loss: entry(places[loss]) for loss in in_order},
    }


TRAINING_READING = (
    "Of held-out pairs. Accuracy stands beside that of the rule that the shorter response is the chosen one. The "
    "margin is in nats against the base, summed over tokens. Intervals are 95 %, over pairs of this one training: the "
    "variance between trainings is not in them."
)
TRAINING_COLUMNS = (
    "cell",
    "accuracy",
    "shorter_accuracy",
    "balanced_accuracy",
    "margin",
    "margin_low",
    "margin_high",
    "margin_kept",
)
MTBENCH_COLUMNS = (
    "cell",
    "score",
    "score_low",
    "score_high",
    "difference",
    "difference_low",
    "difference_high",
    "p_holm",
)
LOSS_COLUMNS = {
    "loss": ("loss", "{}"),
    "mean_gain": ("mean gain", "{:+.3f}"),
    "significant": ("cells that gain", "{}"),
    "best": ("highest cell", "{}"),
    "best_gain": ("its gain", "{:+.3f}"),
    "kl_range": ("KL, nats a reply", "{}"),
    "win_rate": ("its win rate", "{:.0%}"),
}
CONTRAST_COLUMNS = {
    "losses": ("losses", "{}"),
    "where": ("compared", "{}"),
    "difference": ("difference", "{:+.3f}"),
    "low": ("95 % low", "{:+.3f}"),
    "high": ("95 % high", "{:+.3f}"),
    "p_holm": ("p, Holm", "{:.2f}"),
    "reason": ("why not", "{}"),
}
CELL_COLUMNS = {
    "cell": ("cell", "{}"),
    **with_interval("gain", "gain", "{:+.3f}"),
    "gain_p_holm": ("p, Holm", "{:.3f}"),
    "kl": ("KL, nats", "{:.2f}"),
    "win_rate": ("win rate", "{:.0%}"),
    "share": ("of what is possible", "{:.0%}"),
}
POSSIBLE_COLUMNS = {
    "policy": ("policy", "{}"),
    "parameter": ("n or λ", "{:.3g}"),
    **with_interval("gain", "gain", "{:+.3f}"),
    "kl": ("KL, nats", "{:.2f}"),
    "effective": ("effective samples", "{:.1f}"),
}


def mtbench_figures(
    table: pd.DataFrame, judged: dict[str, Any], base_tokens: float, score_title: str
) -> dict[str, Figure]:
    """The charts of MT-Bench by their files' names, in the report's order."""
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
    }


def training_figures(table: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """What training did on held-out pairs, by the charts' file names."""
    cell = ["cell", "loss", "beta", "steps"]
    return {
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
    """What the stages made of the models that answered MT-Bench, by their keys, and the questions that were asked."""

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


class Part(NamedTuple):
    """What one way of measuring adds to the report; `answer` is the part's own in at most three sentences."""

    answer: list[str]
    figures: dict[str, Figure]
    tables: list[Table]
    caveats: list[str]
    details: list[Table]
    cells: pd.DataFrame


def mtbench_part(params: Params, cells: list[Cell], results: Results) -> Part:
    """MT-Bench of the cells that answered it."""
    judged, answers, judgements, _ = results
    keys = tuple(judged)
    prepared, judge = read_json(PREPARE_METRICS), read_json(JUDGE_METRICS)
    table = mtbench_table(cells, params.recipe, judged, answers)
    base = base_row(judged)
    everything = pd.concat([pd.DataFrame([base]), table])
    lines = sentences(params, table, judged, prepared, judge)
    shown = {name: COLUMNS[name] for name in MTBENCH_COLUMNS}
    reading = "Intervals are 95 %, over questions. cells.csv has all columns."
    return Part(
        answer=lines[:3],
        figures=mtbench_figures(table, judged, base["mean_tokens"], score_name(params.judge)),
        tables=[Table("MT-Bench", reading, everything, shown)],
        caveats=lines[3:],
        details=[*spread(keys, judgements), judge_check(judge)],
        cells=everything,
    )


def reward_part(params: Params, cells: list[Cell]) -> Part:
    """What the cells' replies earn by the known reward."""
    assert params.reward  # the caller's choice
    found = read_evaluation(cells, nested=params.seeding == "nested")
    compared, check = compare_losses(found), read_json(REWARD_METRICS)
    unit = check["score"]
    table, possible = cell_table(found, compared), possible_table(compared.possible)
    contrasts = contrast_table(compared)
    name = ["cell", "loss", "beta", "steps"]
    beside = "Gain over the base, paired by prompt; p with Holm's correction over the cells. cells.csv has all columns."
    between = "Intervals are 95 %, for other prompts and other trainings; p with Holm's correction over rows of a kind."
    figures = {
        "reward": Figure(
            f"Mean reward against KL: {unit}",
            "A point a cell, with 95 % intervals over prompts. Nearer to the grey curves is better.",
            charts.reward_against_kl(table, possible, found.base_reward, f"mean {unit}"),
            table[[*name, *span("reward"), *span("kl"), "win_rate"]],
        ),
        "gain": Figure(
            "Gain over the base against β",
            "Bars are 95 % intervals over prompts. β means something else in each loss: compare along a line.",
            charts.gain_against_beta(table),
            table[[*name, *span("gain"), "gain_p_holm"]],
        ),
        "kl": Figure(
            "Exact KL to the base against β",
            "Nats a reply, at temperature 1; bars are 95 % intervals over prompts.",
            charts.kl_against_beta(table),
            table[[*name, *span("kl")]],
        ),
    }
    return Part(
        answer=headline(found, table, compared, unit),
        figures=figures,
        tables=[
            Table("The losses", "Over the cells of the grid.", loss_table(found, table), LOSS_COLUMNS),
            *([Table("Loss against loss", between, contrasts, CONTRAST_COLUMNS)] if len(contrasts) else []),
        ],
        caveats=[check_sentence(check), *caveats(params, found, table, compared)],
        details=[
            Table("Cells", beside, table, CELL_COLUMNS),
            Table(
                "What is possible",
                "Policies made of the base's own samples: the best of n, and the optimum under a KL constraint at "
                "temperature λ. KL of best of n is its upper bound.",
                possible,
                POSSIBLE_COLUMNS,
            ),
        ],
        cells=table,
    )


def reply_pages(keys: Sequence[str]) -> tuple[dict[str, Any], list[Any]]:
    """Every reply to the evaluation prompts, by model and prompt, with its reward, as answers.html takes it."""
    rows = {"base": read_jsonl(SAMPLES / "eval.jsonl")} | {
        key: read_jsonl(REPLIES / f"{key}.jsonl") for key in keys if key != "base"
    }
    shown = min(len(row["replies"]) for found in rows.values() for row in found)
    prompts = [
        {"number": f"prompt {i}", "category": "evaluation prompts", "turns": [row["prompt"]] * shown}
        for i, row in enumerate(rows["base"], start=1)
    ]
    models = {
        key: {
            prompt["number"]: {
                "turns": [reply["text"] for reply in row["replies"][:shown]],
                "judgements": [
                    {"turn": turn, "score": round(reply["score"], 4), "words": reply_words(reply)}
                    for turn, reply in enumerate(row["replies"][:shown], start=1)
                ],
            }
            for prompt, row in zip(prompts, found, strict=True)
        }
        for key, found in rows.items()
    }
    return models, prompts


def reply_words(reply: dict[str, Any]) -> str:
    kl = "" if reply["kl"] is None else f", KL {reply['kl']:.2f} nats"
    return f"{reply['length']} tokens, log-probability {reply['logprob']:.1f} nats{kl}"


def write_pages(params: Params, cells: list[Cell], results: Results, folder: Path, title: str) -> pd.DataFrame:
    """The pages, charts and cells.csv of these cells into the folder; returns the table of them, the base first."""
    answered = [cell for cell in cells if cell.key in results.judged]
    keys = ["base", *(cell.key for cell in cells)]
    training = training_table(cells)
    parts = [reward_part(params, cells)] if params.reward else []
    if answered:
        parts.append(mtbench_part(params, answered, results))
    first, *rest = parts
    table = pd.concat([pd.DataFrame([{"cell": "base"} | dict.fromkeys(UNMOVED, 0.0)]), training])
    for part in parts:
        new = ["cell", *(name for name in part.cells if name not in table)]
        table = table.merge(part.cells[new], on="cell", how="left", validate="one_to_one")
    of_training = {name: COLUMNS[name] for name in TRAINING_COLUMNS if name in training}
    further = [
        line if number else f"MT-Bench: {line}"
        for part in rest
        for number, line in enumerate(part.answer + part.caveats)
    ]
    write_report(
        folder,
        Page(
            title,
            answer=first.answer,
            figures={name: figure for part in parts for name, figure in part.figures.items()}
            | training_figures(training, curve_table(cells)),
            tables=first.tables,
            caveats=first.caveats + further,
            details=[
                *first.details,
                *(more for part in rest for more in (*part.tables, *part.details)),
                Table("Training", TRAINING_READING, training, of_training),
                costs(keys, results.judged),
                left_out(read_json(PREPARE_METRICS)),
            ],
            shown=list(dict.fromkeys(cell.loss for cell in cells)),
            answers=True,
        ),
    )
    against = params.judge.against if params.judge.mode == "pair" else None
    models = answer_pages(tuple(results.judged), results.answers, results.judgements, against)
    questions = results.questions
    if params.reward:
        replies, prompts = reply_pages(keys)
        models = {key: models.get(key, {}) | replies[key] for key in replies}
        questions = [*prompts, *questions]
    write_answers(folder, title, models, questions)
    write_table(folder / "cells.csv", table)
    return table
