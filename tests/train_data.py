"""What dvc has put in place before `prefscan.train` runs."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from prefscan import paths
from prefscan.engines import load_engine
from prefscan.models import load_model, load_tokenizer
from prefscan.reference import reference_rows
from tiny import write_rows


def write_inputs(folder: Path, base: Path, pairs: list[Any], heldout: list[Any], params: Any) -> None:
    """The base model, the pairs, their reference and params.yaml."""
    train = params.train
    model = load_model(base, train.dtype, train.quantization).requires_grad_(False)
    engine, pad = load_engine(train.engine), load_tokenizer(base).pad_token_id
    shutil.copytree(base, folder / paths.BASE)
    write_rows(folder / paths.TRAIN_PAIRS, pairs)
    write_rows(folder / paths.HELDOUT_PAIRS, heldout)
    rows = reference_rows(model, engine, pairs + heldout, train.batch_size, pad)
    write_rows(folder / paths.REFERENCE, list(rows))
    (folder / "params.yaml").write_text(yaml.safe_dump(params.model_dump()))


def with_recipe(params: Any, train: Any, seed: int, **recipe: Any) -> Any:
    """Parameters whose recipe, `loss`, `beta` and `steps`, is the grid's one cell."""
    grid = params.grid.model_copy(update={name: [value] for name, value in recipe.items()})
    return params.model_copy(update={"grid": grid, "train": train, "seed": seed, **recipe})
