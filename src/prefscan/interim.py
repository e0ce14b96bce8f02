"""The report of the cells that have finished while others have not, into runs/interim, which git ignores.

    python -m prefscan.interim

For a sweep of days, and for one of whose cells the last few fail. A cell has finished when none of its stages is stale.
Where the recipe has not, the cells are compared with the first that has.
"""

from prefscan.effort import cells_left
from prefscan.errors import UserError, run_stage
from prefscan.params import load
from prefscan.paths import RUNS
from prefscan.pipeline import CELL_STAGES, stale_stages
from prefscan.report import read_results, write_pages

INTERIM = RUNS / "interim"
EXCUSED = {"check", "report"}  # stale where the grid has changed, which makes no finished cell another


def main() -> None:
    params = load()
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


if __name__ == "__main__":
    run_stage(main, takes=())
