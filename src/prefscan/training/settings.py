"""Refuse wrong parameters before anything is computed.

    python -m prefscan.check

Every stage validates params.yaml as it reads it; this one runs before the first of them, whenever a parameter changes.
Its output never changes, so passing it makes no later stage stale.
"""

from importlib.util import find_spec

from prefscan.common.config import Params
from prefscan.common.errors import UserError
from prefscan.training.losses import LOSSES


def check_losses(params: Params) -> None:
    """Raises UserError for the first loss that losses.py does not define, or that has no section in train.losses."""
    known = f"known are {', '.join(LOSSES)}"
    sections = dict(params.train.losses)
    for name in [params.loss, *params.grid.loss]:
        if name not in LOSSES:
            raise UserError(f"params.yaml: grid.loss: {name!r} is no known loss; {known}")
        if name not in sections:
            raise UserError(
                f"params.yaml: train.losses.{name}: missing; add it to conf/train/losses/papers.yaml, as {{}} if the "
                "loss has no hyperparameters"
            )
    for name, section in sections.items():
        if name not in LOSSES:
            raise UserError(f"params.yaml: train.losses.{name}: no known loss; {known}")
        given, taken = set(type(section).model_fields), set(LOSSES[name].options)
        if given != taken:
            wanted = "give it a class with these" if taken else "take its class out"
            raise UserError(
                f"params.yaml: train.losses.{name}: its section has {', '.join(sorted(given)) or 'nothing'}, its "
                f"function takes {', '.join(sorted(taken)) or 'nothing'}; {wanted} in src/prefscan/params.py, where "
                "Losses names it"
            )


def check_logging(report_to: str) -> None:
    """Raises UserError where training would log with a package that is not installed."""
    if report_to in ("wandb", "tensorboard") and find_spec(report_to) is None:
        raise UserError(
            f"params.yaml: train.report_to: {report_to} is not installed; "
            f"`pip install -c constraints.txt -e '.[{report_to}]'`, or set it to dvclive or none"
        )
