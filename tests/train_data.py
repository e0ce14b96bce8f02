"""What dvc has put in place before `prefscan.train` runs; and the stage, run to its end or to where it is killed."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefscan.common import paths
from prefscan.logprobs.layouts import load_layout
from prefscan.logprobs.reference import reference_rows
from prefscan.models.loading import load_model, load_tokenizer
from prefscan.training import trainer as train_stage
from prefscan.training.checkpoints import Saving
from tiny import write_rows


def write_inputs(folder: Path, base: Path, pairs: list[Any], heldout: list[Any], params: Any) -> None:
    """The base model, the pairs, their reference and params.yaml."""
    train = params.train
    model = load_model(base, train.dtype, train.bnb_4bit_quant_type).requires_grad_(False)
    layout, pad = load_layout(train.layout), load_tokenizer(base).pad_token_id
    shutil.copytree(base, folder / paths.BASE)
    for rows, (place, reference) in zip((pairs, heldout), paths.SPLITS.values(), strict=True):
        write_rows(folder / place, rows)
        write_rows(
            folder / reference, list(reference_rows(model, layout, rows, train.per_device_train_batch_size, pad))
        )
    (folder / "params.yaml").write_text(yaml.safe_dump(params.model_dump()))


def with_recipe(params: Any, train: Any, seed: int, **recipe: Any) -> Any:
    """Parameters whose recipe, `loss`, `beta` and `steps`, is the grid's one cell."""
    grid = params.grid.model_copy(update={name: [value] for name, value in recipe.items()})
    return params.model_copy(update={"grid": grid, "train": train, "seed": seed, **recipe})


class Killed(Exception):
    pass


def run_train(key: str, kill_at: int | None = None, before_seal: bool = False) -> None:
    """The stage; `kill_at` ends it as a kill would, after the save of that update or between the save and its seal."""
    on_save = Saving.on_save

    def save(self: Saving, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kill = state.global_step == kill_at
        if not (kill and before_seal):
            on_save(self, args, state, control, **kwargs)
        if kill:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", key])
        patch.setattr(Saving, "on_save", save)
        train_stage.main()
