"""Refuse wrong parameters before anything is computed.

    python -m prefscan.check

Every stage validates params.yaml as it reads it; this one runs before the first of them, whenever a parameter changes.
Its output never changes, so passing it makes no later stage stale.
"""

from prefscan.common.config import load
from prefscan.common.errors import run_stage
from prefscan.common.io import write_text
from prefscan.common.paths import CHECKED
from prefscan.training.settings import check_logging, check_losses


def main() -> None:
    params = load()
    check_losses(params)
    check_logging(params.train.report_to)
    print(f"params.yaml is valid: recipe {params.recipe.key}, {len(params.grid.cells)} cells")
    write_text(CHECKED, "params.yaml was valid\n")


if __name__ == "__main__":
    run_stage(main, takes=())
