"""Refuse wrong parameters before anything is computed.

    python -m prefscan.check

Every stage validates params.yaml as it reads it; this one runs before the first of them, whenever a parameter changes.
Its output never changes, so passing it makes no later stage stale.
"""

from prefscan.errors import UserError, run_stage
from prefscan.files import write_text
from prefscan.losses import LOSSES
from prefscan.params import load
from prefscan.paths import CHECKED


def check_losses(names: list[str]) -> None:
    """Raises UserError for the first name that losses.py does not define."""
    for name in names:
        if name not in LOSSES:
            raise UserError(f"params.yaml: grid.loss: {name!r} is no known loss; known are {', '.join(LOSSES)}")


def main() -> None:
    params = load()
    check_losses([params.loss, *params.grid.loss])
    print(f"params.yaml is valid: recipe {params.recipe.key}, {len(params.grid.cells)} cells")
    write_text(CHECKED, "params.yaml was valid\n")


if __name__ == "__main__":
    run_stage(main)
