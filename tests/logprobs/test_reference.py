import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prefscan.common import paths
from prefscan.common.errors import UserError
from prefscan.logprobs.layouts import load_layout
from prefscan.logprobs.reference import micro_batches, reference_rows, with_reference
from prefscan.models.loading import load_model
from prefscan.stages import reference
from tiny import plain_logps, write_rows
from train_data import QUIET, changed


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
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_rows_match_the_pairs_in_order(tiny_model: Path, pairs: list[dict[str, Any]], layout: str, size: int) -> None:
    model = load_model(tiny_model, "fp32").requires_grad_(False)
    expected = expected_rows(model, pairs)
    assert list(reference_rows(model, load_layout(layout), pairs, size, pad_token_id=2)) == expected


@pytest.mark.parametrize(("count", "size", "sizes"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 5, [2]), (0, 3, [])])
def test_micro_batches_hold_each_pair_once(count: int, size: int, sizes: list[int]) -> None:
    batches = list(micro_batches(list(range(count)), size))
    assert [len(batch) for batch in batches] == sizes
    assert [pair for batch in batches for pair in batch] == list(range(count))


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_stage_writes_the_rows_of_one_split(
    in_tmp: Path,
    tiny_model: Path,
    pairs: list[dict[str, Any]],
    params: Any,
    layout: str,
    split: str,
) -> None:
    shutil.copytree(tiny_model, paths.BASE)
    sides = {"train": pairs[:7], "heldout": pairs[7:10]}
    for name, (path, _) in paths.SPLITS.items():
        write_rows(path, sides[name])
    changes = {"layout": layout, "per_device_train_batch_size": 4, "dtype": "fp32", "bnb_4bit_quant_type": "none"}
    train, _ = changed(params.train, QUIET, **changes)
    Path("params.yaml").write_text(yaml.safe_dump(params.model_copy(update={"train": train}).model_dump()))
    reference.main(split)
    written = [path for _, path in paths.SPLITS.values() if path.exists()]
    assert written == [paths.SPLITS[split][1]]
    rows = [json.loads(line) for line in written[0].read_text().splitlines()]
    assert rows == expected_rows(load_model(tiny_model, "fp32"), sides[split])


def test_an_unknown_split_is_refused(in_tmp: Path, params: Any) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(params.model_dump()))
    with pytest.raises(UserError, match=r"^reference of what\? got 'test'; one of train, heldout$"):
        reference.main("test")


def test_the_reference_goes_to_its_pair_whatever_the_order() -> None:
    pairs = [{"id": name, "prompt_ids": [1]} for name in "ab"]
    columns = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0, "chosen_tokens": 3, "rejected_tokens": 4}
    reference = [
        {"id": name} | {key: value * scale for key, value in columns.items()} for name, scale in (("b", 2), ("a", 1))
    ]
    first, second = with_reference(pairs, reference)
    assert first == {"id": "a", "prompt_ids": [1]} | columns
    assert second["ref_chosen_logps"] == -2.0
