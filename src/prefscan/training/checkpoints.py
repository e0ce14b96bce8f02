"""A cell in training saves checkpoints; killed and run again, it goes on from the last and ends with the same bits.

A checkpoint is transformers' own: adapter, optimizer, schedule, random states and log, without the base. It lies in
.prefscan/checkpoints/CELL/KEY, outside the stage's outputs. KEY is a digest of everything that the result depends on:
a checkpoint of other parameters, code, data or libraries is never found. One counts only with its seal, which is
written last and holds the digest of every file: one cut short, by a kill or a power failure, is passed over.

SIGTERM, as a machine that is taken back sends it, makes a cell save after its update and stop.
"""

import fcntl
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from torch.distributed import is_torchelastic_launched
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefscan.common.errors import UserError
from prefscan.common.fingerprint import stage_fingerprint
from prefscan.common.io import BAD_JSON, sha256, write_json
from prefscan.common.paths import CHECKPOINTS
from prefscan.training.multi_gpu import in_any, world

SEAL = "seal.json"
FIRST = 30  # seconds of training before a save: a laptop's cell takes two minutes
WAIT = 100  # times the last save's duration until the next: saving takes at most 1 % of the time


def checkpoint_folder(key: str) -> Path:
    """Where this result's checkpoints go; those of the cell's other results are removed, or they would pile up.

    Raises UserError where another process trains the cell: a killed `dvc` leaves the stage that it ran alive.
    """
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    lock = os.open(CHECKPOINTS / f"{key}.lock", os.O_CREAT | os.O_WRONLY)  # held until this process ends
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is training {key} here; end it, and run `dvc repro` again") from None
    folder = CHECKPOINTS / key / stage_fingerprint("train", key)
    remove_others(folder, "*")
    return folder


def remove_others(path: Path, siblings: str) -> None:
    for other in path.parent.glob(siblings):
        if other != path:
            shutil.rmtree(other)


def digests(checkpoint: Path) -> dict[str, str]:
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path != checkpoint / SEAL]
    return {str(path.relative_to(checkpoint)): sha256(path) for path in files}


def last_checkpoint(folder: Path) -> tuple[Path | None, float]:
    """The last whole checkpoint of a folder and the seconds of training that went into it, or None and 0."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            seal = json.loads((checkpoint / SEAL).read_text())
            whole = seal["sha256"] == digests(checkpoint)
        except (OSError, *BAD_JSON):
            continue
        if whole:
            return checkpoint, seal["seconds"]
    return None, 0.0


class Saving(TrainerCallback):
    """Saves while a cell trains, in the trainer's output folder, and seals what it has saved; stops it on SIGTERM.

    Of several processes one may decide for all: their clocks differ, and a signal does not reach all at one update.
    """

    def __init__(self, seconds: float) -> None:
        """`seconds` of training went into the checkpoint that the run starts from."""
        self.wait: float = FIRST
        self.saved = time.perf_counter()
        self.started = self.saved - seconds
        self.signalled = False
        self.terminated = False  # a process was signalled, and all know

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.handler = signal.signal(signal.SIGTERM, self.on_sigterm)

    def on_sigterm(self, *_: Any) -> None:
        self.signalled = True
        # A second one ends the process at once. A launched one may get two at first, its own and the launcher's, which
        # kills it half a minute later.
        signal.signal(signal.SIGTERM, signal.SIG_IGN if is_torchelastic_launched() else signal.SIG_DFL)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.begun = time.perf_counter()
        due, self.terminated = in_any(self.begun - self.saved >= self.wait, self.signalled)
        control.should_save = (due or self.terminated) and state.global_step < state.max_steps

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        world().wait_for_everyone()  # each process has written its random state
        if world().is_main_process:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            seal = {"seconds": self.begun - self.started, "sha256": digests(checkpoint)}
            write_json(checkpoint / SEAL, seal)
            remove_others(checkpoint, "checkpoint-*")  # the one before, now that this one is whole
        world().wait_for_everyone()  # a process that ended now would have the launcher end the main one
        self.saved = time.perf_counter()
        self.wait = max(FIRST, WAIT * (self.saved - self.begun))
        control.should_training_stop = self.terminated

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGTERM, self.handler)
        self.terminated |= self.signalled  # after the last update, too
