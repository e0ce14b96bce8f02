import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prefscan import paths, reference
from prefscan.engines import load_engine
from prefscan.models import load_model
from prefscan.reference import micro_batches, reference_rows
from tiny import plain_logps, write_rows


def expected_rows(model: Any, pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """From plain forwards, one response at a time."""
    rows = []
    with torch.no_grad():
        for pair in pairs:
            chosen, rejected = plain_logps(model, pair)
            rows.append(
                {
                    "id": pair["id"],
                    "ref_chosen_logps": pytest.approx(chosen.item(), abs=1e-4),
                    "ref_rejected_logps": pytest.approx(rejected.item(), abs=1e-4),
                    "chosen_tokens": len(pair["chosen_ids"]),
                    "rejected_tokens": len(pair["rejected_ids"]),
                }
            )
    return rows


@pytest.mark.parametrize("size", [1, 5, 24])
@pytest.mark.parametrize("engine", ["shared", "trl"])
def test_rows_match_the_pairs_in_order(tiny_model: Path, pairs: list[dict[str, Any]], engine: str, size: int) -> None:
    model = load_model(tiny_model, "fp32").requires_grad_(False)
    expected = expected_rows(model, pairs)
    assert list(reference_rows(model, load_engine(engine), pairs, size, pad_token_id=2)) == expected


@pytest.mark.parametrize(("count", "size", "sizes"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 5, [2]), (0, 3, [])])
def test_micro_batches_hold_each_pair_once(count: int, size: int, sizes: list[int]) -> None:
    batches = list(micro_batches(list(range(count)), size))
    assert [len(batch) for batch in batches] == sizes
    assert [pair for batch in batches for pair in batch] == list(range(count))


@pytest.mark.parametrize("engine", ["shared", "trl"])
def test_the_stage_writes_training_pairs_then_held_out_ones(
    in_tmp: Path, tiny_model: Path, pairs: list[dict[str, Any]], params: Any, engine: str
) -> None:
    shutil.copytree(tiny_model, paths.BASE)
    write_rows(paths.TRAIN_PAIRS, pairs[:7])
    write_rows(paths.HELDOUT_PAIRS, pairs[7:10])
    train = params.train.model_copy(update={"engine": engine, "batch_size": 4, "dtype": "fp32", "quantization": "none"})
    Path("params.yaml").write_text(yaml.safe_dump(params.model_copy(update={"train": train}).model_dump()))
    reference.main()
    rows = [json.loads(line) for line in paths.REFERENCE.read_text().splitlines()]
    assert rows == expected_rows(load_model(tiny_model, "fp32"), pairs[:10])
