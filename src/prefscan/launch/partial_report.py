"""The report of the cells that have finished while others have not, into runs/interim, which git ignores.

    prefscan partial-report          # of a sweep that runs on this machine
    prefscan partial-report --pull   # of one on a cluster, whose results travel by the DVC remote

For a sweep of days, and for one of whose cells the last few fail. A cell has finished when none of its stages is stale.
What a launch has finished is taken into the workspace first, as the launch does at its end. Where the recipe has not,
the cells are compared with the first that has.
"""

import argparse

from prefscan.common.config import load
from prefscan.common.errors import UserError
from prefscan.common.paths import RUNS
from prefscan.launch.estimate import cells_left
from prefscan.repo.pipeline import CELL_STAGES, stale_stages, take_over
from prefscan.reporting.report import read_results, write_pages

INTERIM = RUNS / "interim"
EXCUSED = {"check", "report"}  # stale where the grid has changed, which makes no finished cell another


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pull", action="store_true", help="also of what has reached the default DVC remote")


def main(pull: bool) -> None:
    params = load()
    if (stale := stale_stages(missing_data_is_stale=True)) and take_over(stale, pull=pull):
        stale = stale_stages(missing_data_is_stale=True)
    of_cells = {f"{stage}@{cell.key}" for stage in CELL_STAGES for cell in params.grid.cells}
    if shared := sorted(set(stale) - of_cells - EXCUSED):
        raise UserError(f"nothing to report yet: what cells share is stale; `dvc repro {' '.join(shared)}`")
    left = cells_left(params, params, stale)
    cells = [cell for cell in params.grid.cells if cell not in left]
    if not cells:
        raise UserError("nothing to report yet: no cell has finished with these parameters and this code")
    if params.recipe in left:
        params = params.model_copy(update=cells[0].model_dump())
    results = read_results(("base", *(cell.key for cell in cells)))
    title = f"{params.model.name}: {len(cells)} of {len(params.grid.cells)} cells, in the interim"
    write_pages(params, cells, results, INTERIM, title)
    print(f"{INTERIM / 'report.html'}: {len(cells)} of {len(params.grid.cells)} cells")
