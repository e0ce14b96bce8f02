"""Collect the sweep's metrics into reports/ (pages, charts, tables) and metrics/summary.json.

    prefscan report

It reads the cells that the grid names and no others, and removes the metrics of other cells from the workspace (DVC's
cache keeps them), so that the recorded hash of its inputs belongs to the grid.
"""

from prefscan.common.config import load
from prefscan.common.io import rounded, write_json, write_jsonl, write_table
from prefscan.common.paths import JUDGEMENTS, RECIPE_CURVE, REPORTS, SUMMARY, TRAINING_CURVES
from prefscan.reporting.evaluation import PROMPT_REWARDS, prompt_table
from prefscan.reporting.findings import counted
from prefscan.reporting.report import (
    CELL_FOLDERS,
    MTBENCH_FOLDERS,
    read_results,
    remove_other_cells,
    summarise,
    write_pages,
)
from prefscan.reporting.tables import QUESTION_SCORES, curve_table, question_table


def main() -> None:
    params = load()
    cells = params.grid.cells
    keys = ("base", *(cell.key for cell in cells))
    answered = ("base", *(cell.key for cell in params.stages.mtbench.cells))
    remove_other_cells(CELL_FOLDERS, set(keys))
    remove_other_cells(MTBENCH_FOLDERS, set(answered))
    results = read_results(answered)
    table = write_pages(params, cells, results, REPORTS, title=f"{params.model.name}: {counted(len(cells), 'cell')}")
    # In git, unlike metrics/mtbench: reviews and comparisons pair by question or prompt without DVC's cache.
    write_table(QUESTION_SCORES, question_table(results.questions, results.judged))
    write_table(PROMPT_REWARDS, prompt_table(cells if params.reward else []))
    # What `dvc plots` draws: all cells in one file, and apart the recipe's, which two revisions are compared by.
    curves = curve_table(cells).drop(columns=["loss_name", "beta", "steps"])
    write_table(TRAINING_CURVES, curves[["cell", *curves.columns.drop("cell")]])
    write_table(RECIPE_CURVE, curves[curves["cell"] == params.recipe.key].drop(columns="cell"))
    # One file for all models, where FastChat's show_result looks for it.
    combined = [judgement for key in answered for judgement in results.judgements[key]]
    write_jsonl(JUDGEMENTS / f"{params.judge.name}_{params.judge.mode}.jsonl", combined)
    write_json(SUMMARY, rounded(summarise(table, params.recipe)))
