"""What dvc has put in place before `prefscan train` runs; and the stage, run to its end or to where it is killed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtbench_data import ROOT
from prefscan.common import paths
from prefscan.common.config import Cell, Losses, Runtime, Train
from prefscan.logprobs.layouts import load_layout
from prefscan.logprobs.reference import reference_rows
from prefscan.models.loading import load_model, load_tokenizer
from prefscan.stages import train as train_stage
from prefscan.training.checkpoints import Saving
from prefscan.training.losses import LOSSES
from prefscan.training.trainer import CellSettings
from tiny import write_rows

QUIET = Runtime(gradient_checkpointing=False, report_to="none")


def changed(train: Train, runtime: Runtime, **changes: Any) -> tuple[Train, Runtime]:
    """Both sections with the values changed, each in the section that has its key."""
    assert changes.keys() <= Train.model_fields.keys() | Runtime.model_fields.keys()
    of_runtime = {name: value for name, value in changes.items() if name in Runtime.model_fields}
    of_train = {name: value for name, value in changes.items() if name in Train.model_fields}
    return train.model_copy(update=of_train), runtime.model_copy(update=of_runtime)


def settings_of(cell: Cell, losses: Losses, train: Train, runtime: Runtime = QUIET, seed: int = 0) -> CellSettings:
    options = LOSSES[cell.loss].read_options(getattr(losses, cell.loss).model_dump())
    return CellSettings(cell, train, options, runtime, seed)


def write_inputs(folder: Path, base: Path, pairs: list[Any], heldout: list[Any], params: Any) -> None:
    """The base model, the pairs, their reference, params.yaml, and the code with what it depends on."""
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
    for name in ("dvc.yaml", "src"):
        (folder / name).symlink_to(ROOT / name)


def with_recipe(params: Any, train: Train, seed: int, runtime: Runtime = QUIET, **recipe: Any) -> Any:
    """Parameters whose recipe, `loss`, `beta` and `steps`, is the grid's one cell."""
    grid = params.grid.model_copy(update={name: [value] for name, value in recipe.items()})
    return params.model_copy(update={"grid": grid, "train": train, "runtime": runtime, "seed": seed, **recipe})


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
        patch.setattr(Saving, "on_save", save)
        train_stage.main(key)
