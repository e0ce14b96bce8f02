"""What the cells that are left to run would take, by the measured speed and size of those that have finished."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean

from prefscan.common.config import Cell, Params, Train
from prefscan.common.io import read_json
from prefscan.common.paths import ADAPTERS, ANSWER_COST, MERGED, PREPARE_METRICS, TRAIN_COST, TRAIN_METRICS
from prefscan.repo.pipeline import CELL_STAGES


@dataclass(frozen=True)
class Speed:
    """Seconds of an update and of a cell's answers, and bytes of its adapter and merged model; means over cells."""

    cells: int
    update: float
    answers: float
    size: float


def cells_left(params: Params, workspace: Params, stale: Collection[str] | None) -> list[Cell]:
    """The cells of which `dvc repro` would run a stage, by the workspace's stale stages; all of them with None."""
    if stale is None:
        return params.grid.cells
    known = {cell.key for cell in workspace.grid.cells}
    return [
        cell
        for cell in params.grid.cells
        if cell.key not in known or any(f"{stage}@{cell.key}" in stale for stage in CELL_STAGES)
    ]


def measured_speed(workspace: Params, stale: Collection[str]) -> Speed | None:
    """By the cells of the workspace's grid that are trained and answered, and not stale; None where there are none."""
    updates, answers, sizes = [], [], []
    for key in (cell.key for cell in workspace.grid.cells):
        files = [TRAIN_COST / f"{key}.json", TRAIN_METRICS / f"{key}.json", ANSWER_COST / f"{key}.json"]
        if f"answer@{key}" not in stale and all(file.exists() for file in files):
            cost, metrics, answered = map(read_json, files)
            updates.append(cost["seconds"] / metrics["updates"])
            answers.append(answered["seconds"])
            sizes.append(folder_bytes(ADAPTERS / key) + folder_bytes(MERGED / key))
    return Speed(len(updates), fmean(updates), fmean(answers), fmean(sizes)) if updates else None


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def cell_seconds(cell: Cell, train: Train, speed: Speed) -> float:
    """Training and answers of a cell, without start-ups, held-out metrics, merge, log-ratios and judging."""
    pairs = read_json(PREPARE_METRICS)["train"] if cell.steps == "epoch" else 0
    return train.updates(cell.steps, pairs) * speed.update + speed.answers


def hours_on(workers: int, seconds: list[float]) -> float:
    """Until the last of these cells ends, where each goes to the worker that is free first, in order."""
    free = [0.0] * workers
    for cell in seconds:
        free[free.index(min(free))] += cell
    return max(free) / 3600


def sentences(cells: list[Cell], params: Params, speed: Speed | None, workers: int) -> list[str]:
    """What is left to run, and where a cell has finished also the hours, the expected end and the disk it takes."""
    if not cells:
        return ["No cell is left to run."]
    left = f"{len(cells)} of {len(params.grid.cells)} cells are left to run"
    if speed is None:
        return [f"{left}; none has finished with these parameters, so how long they take is not known."]
    seconds = [cell_seconds(cell, params.train, speed) for cell in cells]
    hours, together = sum(seconds) / 3600, hours_on(workers, seconds)
    gpus = f", {hours * params.launch.num_gpus:,.1f} GPU hours" if params.launch.num_gpus else ""
    end = datetime.now() + timedelta(hours=together)
    return [
        f"{left}: {hours:,.1f} hours of a worker{gpus}, by {speed.update:.2f} s an update and {speed.answers:.0f} s of "
        f"answers (means of {speed.cells} finished cells; start-up, held-out pairs, merge, log-ratios and judging are "
        "not in it).",
        f"On {workers} workers: {together:,.1f} hours, expected end {end:%a %d %b %H:%M} if they began now.",
        f"Disk: {len(cells) * speed.size / 1e9:,.1f} GB of adapters and merged models in DVC's cache.",
    ]
