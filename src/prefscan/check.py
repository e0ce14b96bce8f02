"""Refuse wrong parameters before anything is computed.

    python -m prefscan.check

Every stage validates params.yaml as it reads it; this one runs before the first of them, whenever a parameter changes.
Its output never changes, so passing it makes no later stage stale.
"""

from importlib.util import find_spec

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


def check_logging(report_to: str) -> None:
    """Raises UserError where training would log with a package that is not installed."""
    if report_to in ("wandb", "tensorboard") and find_spec(report_to) is None:
        raise UserError(
            f"params.yaml: train.report_to: {report_to} is not installed; "
            f"`pip install -c constraints.txt -e '.[{report_to}]'`, or set it to dvclive or none"
        )


def main() -> None:
    params = load()
    check_losses([params.loss, *params.grid.loss])
    check_logging(params.train.report_to)
    print(f"params.yaml is valid: recipe {params.recipe.key}, {len(params.grid.cells)} cells")
    write_text(CHECKED, "params.yaml was valid\n")


if __name__ == "__main__":
    run_stage(main, takes=())
