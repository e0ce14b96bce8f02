"""What would go wrong during or after training is refused before the first update."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from prefscan.common import paths
from prefscan.common.config import Cell, Train
from prefscan.common.errors import UserError
from prefscan.common.io import read_jsonl
from prefscan.logprobs import plain
from prefscan.stages import reference
from prefscan.training.trainer import refuse_long_warmup
from tiny import plain_logps, write_rows

CELL = Cell(loss="ipo", beta=0.1, steps=8)


def train(params: Any, **changes: Any) -> Train:
    return Train.model_validate(params.train.model_dump() | changes)


def test_a_warmup_longer_than_the_run_is_refused(params: Any) -> None:
    refuse_long_warmup(CELL, train(params, warmup_steps=8), 8)
    with pytest.raises(UserError, match=r"train\.warmup_steps: 9, but ipo-0\.1-8 has 8 updates and would never reach"):
        refuse_long_warmup(CELL, train(params, warmup_steps=9), 8)


def test_a_warmup_that_the_schedule_ignores_is_refused(params: Any) -> None:
    with pytest.raises(ValueError, match="lr_scheduler_type constant has no warm-up, and warmup_steps is 5"):
        train(params, lr_scheduler_type="constant", warmup_steps=5)
    train(params, lr_scheduler_type="constant_with_warmup", warmup_steps=5)


@pytest.fixture
def prepared(in_tmp: Path, tiny_model: Path, pairs: list[dict[str, Any]], params: Any) -> Any:
    paths.BASE.parent.mkdir(parents=True)
    paths.BASE.symlink_to(tiny_model)
    write_rows(paths.TRAIN_PAIRS, pairs[:7])
    changes = {"layout": "packed", "per_device_train_batch_size": 4, "dtype": "fp32", "bnb_4bit_quant_type": "none"}
    changed = params.model_copy(update={"train": train(params, **changes)})
    Path("params.yaml").write_text(yaml.safe_dump(changed.model_dump()))


def test_the_reference_stage_checks_and_writes(prepared: None, pairs: Any, model: Any, capsys: Any) -> None:
    reference.main("train")
    assert "layout packed: within " in capsys.readouterr().out
    rows = read_jsonl(paths.TRAIN_REFERENCE)
    for row, pair in zip(rows, pairs[:7], strict=True):
        chosen, rejected = plain_logps(model, pair)
        assert row["ref_chosen_logps"] == pytest.approx(chosen.item(), abs=1e-4)
        assert row["ref_rejected_logps"] == pytest.approx(rejected.item(), abs=1e-4)


def test_the_reference_stage_refuses_what_differs(prepared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    own = plain.response_logp
    monkeypatch.setattr(plain, "response_logp", lambda *given: own(*given) + 1)
    with pytest.raises(UserError, match=r"train\.layout: 'packed' is wrong on a model of type llama"):
        reference.main("train")
    assert not paths.TRAIN_REFERENCE.exists()
