"""Hours, disk and the expected end, against numbers worked out by hand."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from prefscan.common.config import Cell, Params
from prefscan.common.io import write_json
from prefscan.launch.estimate import Speed, cell_seconds, cells_left, hours_on, measured_speed, sentences


def finish(cell: Cell, seconds: float, updates: int, answers: float, size: int) -> None:
    write_json(Path(f"metrics/cost/train/{cell.key}.json"), {"seconds": seconds})
    write_json(Path(f"metrics/train/{cell.key}.json"), {"updates": updates})
    write_json(Path(f"metrics/cost/answer/{cell.key}.json"), {"seconds": answers})
    for folder in ("adapters", "merged"):
        path = Path(f"models/{folder}/{cell.key}/weights")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * size)


def test_speed_and_size_are_means_over_finished_cells(in_tmp: Path, params: Params) -> None:
    assert measured_speed(params, ()) is None
    first, second, third = params.grid.cells[:3]
    finish(first, seconds=100, updates=20, answers=30, size=1000)
    finish(second, seconds=60, updates=20, answers=50, size=3000)
    write_json(Path(f"metrics/cost/train/{third.key}.json"), {"seconds": 1.0})  # its answers are not there yet
    assert measured_speed(params, ()) == Speed(cells=2, update=4.0, answers=40.0, size=4000.0)
    stale = [f"answer@{second.key}", f"train@{third.key}"]
    assert measured_speed(params, stale) == Speed(cells=1, update=5.0, answers=30.0, size=2000.0)


@pytest.mark.parametrize(
    ("workers", "hours"), [(1, 6.0), (2, 4.0), (3, 3.0), (10, 3.0)]
)  # 1, 2 and 3 hours: on two workers 1 + 3 and 2
def test_cells_go_to_the_worker_that_is_free_first(workers: int, hours: float) -> None:
    assert hours_on(workers, [3600.0, 7200.0, 10800.0]) == hours


def test_an_epoch_is_one_pass_over_the_training_pairs(in_tmp: Path, params: Params) -> None:
    write_json(Path("metrics/prepare.json"), {"train": 49})
    speed = Speed(1, update=2.0, answers=10.0, size=0)
    train = params.train.model_copy(update={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    assert cell_seconds(Cell(loss="ipo", beta=0.1, steps="epoch"), train, speed) == 7 * 2 + 10
    assert cell_seconds(Cell(loss="ipo", beta=0.1, steps=200), train, speed) == 200 * 2 + 10


def test_a_cell_is_left_when_one_of_its_stages_is_stale_or_it_is_new(
    params: Params,
) -> None:
    first, second, *others = params.grid.cells
    fewer = params.model_copy(update={"grid": params.grid.model_copy(update={"loss": [first.loss]})})
    left = cells_left(params, fewer, ["report", f"mtbench@{second.key}"])
    assert first not in left
    assert second in left
    assert [cell for cell in others if cell.loss != first.loss] == [cell for cell in left if cell.loss != first.loss]
    assert cells_left(params, params, None) == params.grid.cells


def test_sentences_say_what_is_known(params: Params) -> None:
    cells = params.grid.cells
    assert sentences([], params, None, 1) == ["No cell is left to run."]
    (unknown,) = sentences(cells, params, None, 2)
    assert unknown.startswith(f"{len(cells)} of {len(cells)} cells are left to run; none has finished")
    gpus = params.model_copy(update={"launch": params.launch.model_copy(update={"num_gpus": 2.0})})
    work: Any = [Cell(loss="ipo", beta=0.1, steps=100), Cell(loss="ipo", beta=0.5, steps=100)]
    began = datetime.now()
    hours, end, disk = sentences(work, gpus, Speed(3, update=30.0, answers=600.0, size=2e9), 2)
    ends = {f"{now + timedelta(hours=1):%a %d %b %H:%M}" for now in (began, datetime.now())}
    assert "2.0 hours of a worker, 4.0 GPU hours, by 30.00 s an update and 600 s of answers (means of 3" in hours
    assert end in {f"On 2 workers: 1.0 hours, expected end {then} if they began now." for then in ends}
    assert disk == "Disk: 4.0 GB of adapters and merged models in DVC's cache."
