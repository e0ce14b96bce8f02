"""Refuse wrong parameters before anything is computed.

    prefscan check

Every stage validates params.yaml as it reads it; this one runs before the first of them, whenever a parameter changes.
Its output never changes, so passing it makes no later stage stale.
"""

from prefscan.common.config import check_logging, load
from prefscan.common.io import write_text
from prefscan.common.paths import CHECKED
from prefscan.training.losses import check_losses


def main() -> None:
    params = load()
    check_losses(params)
    check_logging(params.runtime.report_to)
    print(f"params.yaml is valid: recipe {params.recipe.key}, {len(params.grid.cells)} cells")
    write_text(CHECKED, "params.yaml was valid\n")
