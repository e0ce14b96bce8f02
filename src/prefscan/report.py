"""Collect the sweep's metrics into reports/ (pages, charts, tables) and metrics/summary.json.

    python -m prefscan.report

It reads the cells that the grid names and no others, and removes the metrics of other cells from the workspace (DVC's
cache keeps them), so that the recorded hash of its inputs belongs to the grid.
"""

from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from prefscan import charts
from prefscan.errors import run_stage
from prefscan.files import read_json, read_jsonl, read_text, write_json, write_jsonl, write_text
from prefscan.pages import Figure, Table, write_answers, write_report
from prefscan.params import Cell, load
from prefscan.paths import (
    ANSWER_COST,
    ANSWER_METRICS,
    ANSWERS,
    CELL_JUDGEMENTS,
    CURVES,
    JUDGE_METRICS,
    JUDGEMENTS,
    MERGE_METRICS,
    MTBENCH_METRICS,
    PREPARE_METRICS,
    QUESTIONS,
    REPORTS,
    SUMMARY,
    TRAIN_COST,
    TRAIN_METRICS,
)
from prefscan.sentences import question_scores, score_name, sentences
from prefscan.stats import LengthControlledDifference, holm, length_controlled_difference, paired_difference

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
    }


def score_columns(mtbench: dict[str, Any]) -> dict[str, float]:
    return {
        "score": mtbench["average"],
        "score_low": mtbench["average_low"],
        "score_high": mtbench["average_high"],
        "first_turn": mtbench["first_turn"],
        "second_turn": mtbench["second_turn"],
    }


DIFFERENCE = [
    *("difference", "difference_low", "difference_high", "standard_error"),
    *("wins", "ties", "losses", "p_holm"),
]


def differences(judged: dict[str, Any], keys: list[str], other: str) -> pd.DataFrame:
    """Each cell minus another model, paired by question, with Holm's correction over the cells; a row a cell, in order.

    `judged` has the content of metrics/mtbench for each model. The other model has no difference from itself.
    """
    theirs = question_scores(judged[other])
    compared = [key for key in keys if key != other]
    if not compared:
        return pd.DataFrame(index=keys, columns=DIFFERENCE, dtype=float)
    found = [paired_difference(question_scores(judged[key]), theirs) for key in compared]
    rows = [
        {
            "difference": difference.mean,
            "difference_low": difference.low,
            "difference_high": difference.high,
            "standard_error": difference.standard_error,
            "wins": difference.wins,
            "ties": difference.ties,
            "losses": difference.losses,
            "p_holm": p_holm,
        }
        for difference, p_holm in zip(found, holm([difference.p_value for difference in found]), strict=True)
    ]
    return pd.DataFrame(rows, pd.Index(compared), DIFFERENCE).reindex(keys)


def lengths(answers: list[Any]) -> dict[int, float]:
    """The mean tokens of both replies, by question."""
    return {answer["question_id"]: fmean(answer["choices"][0]["tokens"]) for answer in answers}


def at_equal_length(
    judged: dict[str, Any], answers: dict[str, list[Any]], keys: list[str]
) -> list[LengthControlledDifference | None]:
    """Each cell minus the base at equal length of the replies; None where every reply differs by the same length."""
    base = judged["base"]["questions"]
    found: list[LengthControlledDifference | None] = []
    for key in keys:
        theirs, ours = lengths(answers["base"]), lengths(answers[key])
        scores = [judged[key]["questions"][number] - base[number] for number in base]
        apart = [ours[int(number)] - theirs[int(number)] for number in base]
        same = min(apart) == max(apart) != 0
        found.append(None if same else length_controlled_difference(scores, apart))
    return found


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
    "equal_length": ("at equal length", "{:+.2f}"),
    "equal_length_low": ("95 % low", "{:+.2f}"),
    "equal_length_high": ("95 % high", "{:+.2f}"),
    "recipe_difference": ("minus recipe", "{:+.2f}"),
    "recipe_difference_low": ("95 % low", "{:+.2f}"),
    "recipe_difference_high": ("95 % high", "{:+.2f}"),
    "recipe_p_holm": ("p, Holm", "{:.2f}"),
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
}
COST_COLUMNS = {
    "cell": ("cell", "{}"),
    "train_seconds": ("training, s", "{:.0f}"),
    "train_speed": ("training, tokens/s", "{:.0f}"),
    "peak_memory_gib": ("training, peak GiB", "{:.2f}"),
    "answer_seconds": ("answers, s", "{:.0f}"),
    "answer_speed": ("answers, tokens/s", "{:.0f}"),
    "usd": ("judging, USD", "{:.2f}"),
}


def costs(keys: tuple[str, ...], judged: dict[str, Any]) -> Table:
    rows = []
    for key in keys:
        answer = read_json(ANSWER_COST / f"{key}.json")
        train = read_json(TRAIN_COST / f"{key}.json") if key != "base" else {}
        rows.append(
            {
                "cell": key,
                "train_seconds": train.get("seconds"),
                "train_speed": train.get("tokens_per_second"),
                "peak_memory_gib": train.get("peak_memory_gib"),
                "answer_seconds": answer["seconds"],
                "answer_speed": answer["tokens_per_second"],
                "usd": judged[key]["usd"],
            }
        )
    reading = "Of the run that made each file; a cell from DVC's cache has the cost of the machine that computed it."
    return Table("Cost", reading, pd.DataFrame(rows), COST_COLUMNS)


def left_out(prepared: dict[str, Any]) -> Table:
    rows = [{"reason": reason.replace("_", " "), "pairs": pairs} for reason, pairs in prepared["dropped"].items()]
    reading = f"Of {prepared['rows']} pairs, {prepared['train']} are trained on and {prepared['heldout']} held out."
    return Table(
        "Pairs left out", reading, pd.DataFrame(rows), {"reason": ("reason", "{}"), "pairs": ("pairs", "{:.0f}")}
    )


def judge_check(judge: dict[str, Any]) -> Table:
    columns = {"prompt": ("prompt", "{}"), "bad": ("bad answer", "{}")}
    for value, heading in (("auc", "ranked below the good one"), ("margin", "margin, points")):
        columns |= {value: (heading, "{:.2f}"), f"{value}_low": ("95 % low", "{:.2f}")}
        columns |= {f"{value}_high": ("95 % high", "{:.2f}")}
    kinds = {"without_reference": "without reference", "with_reference": "with reference"}
    rows = [
        {"prompt": prompt, "bad": bad} | judge[kind][bad]
        for kind, prompt in kinds.items()
        if kind in judge
        for bad in ("swapped", "truncated")
    ]
    reading = (
        "Good answers are the references; the bad ones are another question's reference (swapped) and a reference's "
        "first quarter (truncated). 0.5 is chance."
    )
    return Table("Judge check", reading, pd.DataFrame(rows), columns)


def category_differences(table: pd.DataFrame, judged: dict[str, Any]) -> pd.DataFrame:
    """Each cell's score in each category minus the base's; a row a cell and category."""
    base = judged["base"]["categories"]
    return pd.DataFrame(
        {"loss": row["loss"], "beta": row["beta"], "steps": row["steps"], "category": category}
        | {"difference": score - base[category]}
        for row in table.to_dict("records")
        for category, score in judged[row["cell"]]["categories"].items()
    )


def make_figures(
    table: pd.DataFrame, judged: dict[str, Any], base_tokens: float, curves: pd.DataFrame, score_title: str
) -> dict[str, Figure]:
    """Every chart by its file's name, in the report's order."""
    base_score = judged["base"]["average"]
    name = f"{score_title[0].upper()}{score_title[1:]}"
    categories, heat = category_scores(table, judged), category_differences(table, judged)
    cell = ["cell", "loss", "beta", "steps"]

    def spans(*values: str) -> list[str]:
        return [f"{value}{end}" for value in values for end in ("", "_low", "_high")]

    return {
        "score": Figure(
            f"{name} against β",
            "Bars are 95 % intervals over questions. β means something else in each loss: compare along a line.",
            charts.score_against_beta(table, base_score, score_title),
            table[[*cell, *spans("score")]],
        ),
        "differences": Figure(
            "Each cell minus the base, paired by question",
            "Bars are 95 % intervals; one that crosses the dashed line is no evidence of a difference.",
            charts.differences(table, "score minus the base's"),
            table[[*cell, *spans("difference"), "p_holm", "wins", "ties", "losses"]],
        ),
        "divergence": Figure(
            f"{name} against the distance from the base",
            "Losses can be compared here: how much score for how much change. Bars are 95 % intervals over questions.",
            charts.score_against_divergence(table, base_score, score_title),
            table[[*cell, *spans("score", "divergence")]],
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
            table[[*cell, "mean_tokens", *spans("score")]],
        ),
        "accuracy": Figure(
            "Held-out reward accuracy against β",
            "The share of held-out pairs whose chosen response gained more; bars are 95 % Wilson intervals.",
            charts.accuracy_against_beta(table),
            table[[*cell, *spans("accuracy")]],
        ),
        "margin": Figure(
            "Held-out margin against β, with 95 % intervals over pairs",
            "How much more log-probability the chosen response gained than the rejected one, against the base.",
            charts.margin_against_beta(table),
            table[[*cell, *spans("margin")]],
        ),
        "curves": Figure(
            "Training curves",
            "Each loss has a scale of its own; the values of different losses cannot be compared.",
            charts.training_curves(curves),
            curves[["cell", "step", "loss", "reward_margin"]],
        ),
    }


def answer_pages(keys: tuple[str, ...], answers: dict[str, list[Any]], judgements: dict[str, list[Any]]) -> Any:
    """Of each model, by question: both replies, and every judgement's turn, score and words."""
    models: dict[str, Any] = {}
    for key in keys:
        models[key] = {
            answer["question_id"]: {"turns": answer["choices"][0]["turns"], "judgements": []} for answer in answers[key]
        }
        for judgement in judgements[key]:
            models[key][judgement["question_id"]]["judgements"].append(
                {"turn": judgement["turn"], "score": judgement.get("score"), "words": words(judgement)}
            )
    return models


def words(judgement: dict[str, Any]) -> str:
    """What the judge said: of a pair, in both orders."""
    if "judgment" in judgement:
        return str(judgement["judgment"])
    return f"{judgement['g1_judgment']}\n\n[in the other order]\n\n{judgement['g2_judgment']}"


def main() -> None:
    params = load()
    cells = params.grid.cells
    keys = ("base", *(cell.key for cell in cells))
    remove_other_cells(FOLDERS, set(keys))
    judged = {key: read_json(MTBENCH_METRICS / f"{key}.json") for key in keys}
    base, prepared, judge = judged["base"], read_json(PREPARE_METRICS), read_json(JUDGE_METRICS)
    answers = {key: read_jsonl(ANSWERS / f"{key}.jsonl") for key in keys}
    judgements = {key: read_jsonl(CELL_JUDGEMENTS / f"{key}.jsonl") for key in keys}
    tuned = [cell.key for cell in cells]
    to_recipe = differences(judged, tuned, params.recipe.key).drop(columns=["standard_error", "wins", "ties", "losses"])
    table = (
        pd.DataFrame([cell_row(cell, judged[cell.key]) for cell in cells])
        .join(differences(judged, tuned, "base"), on="cell")
        .join(to_recipe.add_prefix("recipe_"), on="cell")
    )
    at_equal = at_equal_length(judged, answers, tuned)
    table["equal_length"], table["equal_length_low"], table["equal_length_high"] = (
        [value and getattr(value, name) for value in at_equal] for name in ("mean", "low", "high")
    )
    answered = read_json(ANSWER_METRICS / "base.json")
    base_row = {"cell": "base", **score_columns(base), "accuracy": 0.5}
    base_row |= dict.fromkeys(("margin", "chosen_shift", "rejected_shift"), 0.0)
    base_row |= {name: answered[name] for name in ("share_cut", "mean_tokens", "repetition")}
    everything = pd.concat([pd.DataFrame([base_row]), table])
    figures = make_figures(table, judged, answered["mean_tokens"], curve_table(cells), score_name(params.judge))
    reading = "The held-out margin and the shifts are in nats against the base; intervals as in the charts."
    tables = [
        Table("All cells", reading, everything, COLUMNS),
        costs(keys, judged),
        judge_check(judge),
        left_out(prepared),
    ]
    questions = [
        {"number": question["question_id"], "category": question["category"], "turns": question["turns"]}
        for question in read_jsonl(QUESTIONS / "question.jsonl")
        if question["question_id"] in {answer["question_id"] for answer in answers["base"]}
    ]
    title = f"{params.model.name}: {len(cells)} cells"
    write_report(title, sentences(params, table, judged, prepared, judge), figures, tables)
    write_answers(title, answer_pages(keys, answers, judgements), questions)
    write_text(REPORTS / "cells.csv", everything.to_csv(index=False))
    # One file for all models, where FastChat's show_result looks for it.
    combined = [judgement for key in keys for judgement in judgements[key]]
    write_jsonl(JUDGEMENTS / f"{params.judge.name}_{params.judge.mode}.jsonl", combined)
    write_json(SUMMARY, summarise(table, params.recipe, base))


if __name__ == "__main__":
    run_stage(main)
