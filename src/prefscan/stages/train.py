"""Tune a LoRA adapter with one loss, at one β, for a number of steps.

    prefscan train ipo-0.5-16

The trainer is TRL's DPOTrainer: optimizer, schedule, accumulation and logging are its own. The loss comes from
losses.py, the layout of a micro-batch from logprobs/, the reference's log-probabilities from the reference stage. With
`train.accelerate`, several processes train the cell: multi_gpu.py.
"""

import shutil
from typing import Any

from torch.distributed import is_torchelastic_launched

from prefscan.common.config import load
from prefscan.common.io import new_folder, read_jsonl, write_json, write_jsonl, write_text
from prefscan.common.paths import (
    ADAPTERS,
    BASE,
    CHECKPOINTS,
    CURVES,
    HELDOUT_PAIRS,
    HELDOUT_POLICY,
    HELDOUT_REFERENCE,
    TRAIN_COST,
    TRAIN_METRICS,
    TRAIN_PAIRS,
    TRAIN_REFERENCE,
)
from prefscan.logprobs.reference import load_base, with_reference
from prefscan.models.loading import clean_adapter_config, load_tokenizer
from prefscan.training.checkpoints import checkpoint_folder
from prefscan.training.multi_gpu import from_main, launch, world
from prefscan.training.trainer import CellSettings, PairTrainer, Sides, curve_csv, train_cell


def write_cell(key: str, trainer: PairTrainer, metrics: dict[str, Any], cost: dict[str, float]) -> None:
    weights = trainer.accelerator.get_state_dict(trainer.model)  # of all processes: FSDP gathers it
    if not world().is_main_process:
        return
    with new_folder(ADAPTERS / key) as folder:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder, state_dict=weights)
        clean_adapter_config(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    write_jsonl(HELDOUT_POLICY / f"{key}.jsonl", trainer.held_out_rows)
    write_text(CURVES / f"{key}.csv", curve_csv(trainer.state.log_history))
    write_json(TRAIN_METRICS / f"{key}.json", metrics)
    write_json(TRAIN_COST / f"{key}.json", cost)
    shutil.rmtree(CHECKPOINTS / key)
    held = metrics["heldout"]
    print(
        f"{key}: held-out accuracy {held['accuracy']:.2f}, margin {held['margin']:.2f} nats "
        f"[{held['margin_low']:.2f}, {held['margin_high']:.2f}], {cost['seconds']:.0f} s"
    )


def main(key: str) -> None:
    params = load()
    settings = CellSettings.of(params, key)
    if not is_torchelastic_launched():
        print(f"train {key}: cell {params.grid.cells.index(settings.cell) + 1} of {len(params.grid.cells)}", flush=True)
        if params.train.accelerate:
            return launch(params.train.accelerate, "prefscan", "train", key)
    checkpoints = from_main(lambda: checkpoint_folder(key))
    sides = Sides(
        with_reference(read_jsonl(TRAIN_PAIRS), read_jsonl(TRAIN_REFERENCE)),
        with_reference(read_jsonl(HELDOUT_PAIRS), read_jsonl(HELDOUT_REFERENCE)),
    )
    trainer, metrics, cost = train_cell(settings, sides, load_base(params.train), load_tokenizer(BASE), checkpoints)
    write_cell(key, trainer, metrics, cost)
    trainer.accelerator.end_training()
