"""Prompts to be continued: their split, their order, and what is refused."""

import random
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from prefscan.common.config import Sample
from prefscan.common.errors import UserError
from prefscan.data.prompts import load_prompts, read_prompts, split_of
from tiny import write_rows

TEXTS = [f"The film number {i} of this festival was" for i in range(600)]


def sample(path: Path, **changes: Any) -> Sample:
    given = {
        "prompts": str(path),
        "format": "plain",
        "train_prompts": 4,
        "train_replies": 2,
        "eval_split": "eval",
        "eval_prompts": 3,
        "base_replies": 2,
        "max_new_tokens": 8,
        "batch_size": 4,
        "dtype": "fp32",
        "seed": 0,
    }
    return Sample.model_validate(given | changes)


def write_prompts(folder: Path, texts: list[str]) -> Path:
    return write_rows(folder / "prompts.jsonl", [{"prompt": text} for text in texts])


def test_no_prompt_is_in_two_splits_whatever_its_case_and_white_space(tmp_path: Path) -> None:
    variants = [text.upper() for text in TEXTS] + [f"  {text.replace(' ', chr(10), 1)}\t" for text in TEXTS]
    for text, upper, spaced in zip(TEXTS, variants[:600], variants[600:], strict=True):
        assert split_of(text) == split_of(upper) == split_of(spaced)
    sets = read_prompts(write_prompts(tmp_path, [*TEXTS, *variants]))
    assert list(sets) == ["train", "development", "eval"]
    assert sum(map(len, sets.values())) == 1800  # each text as it stands, and all three in one split
    same = {name: {" ".join(row["prompt"].lower().split()) for row in rows} for name, rows in sets.items()}
    assert all(not one & other for one, other in combinations(same.values(), 2))
    assert sum(map(len, same.values())) == 600


def test_the_splits_have_their_shares() -> None:
    counts = Counter(map(split_of, TEXTS))
    for name, share in {"train": 0.4, "development": 0.2, "eval": 0.4}.items():
        assert abs(counts[name] - 600 * share) < 4 * (600 * share * (1 - share)) ** 0.5


def test_a_prompt_stands_once_and_the_files_order_changes_nothing(tmp_path: Path) -> None:
    shuffled = TEXTS * 2
    random.Random(0).shuffle(shuffled)
    sets = read_prompts(write_prompts(tmp_path / "a", TEXTS))
    assert sets == read_prompts(write_prompts(tmp_path / "b", shuffled))
    assert all(rows == sorted(rows, key=lambda row: row["id"]) for rows in sets.values())
    assert len({row["id"] for rows in sets.values() for row in rows}) == 600


def test_further_prompts_move_none(tmp_path: Path) -> None:
    few, all_of_them = (read_prompts(write_prompts(tmp_path / str(n), TEXTS[:n])) for n in (200, 600))
    for name, rows in few.items():
        assert [row for row in all_of_them[name] if row in rows] == rows


@pytest.mark.parametrize("split", ["train", "development", "eval"])
def test_as_many_prompts_as_the_parameters_ask_for(tmp_path: Path, split: str) -> None:
    path = write_prompts(tmp_path, TEXTS)
    wanted = 4 if split == "train" else 3
    assert load_prompts(sample(path), split) == read_prompts(path)[split][:wanted]


@pytest.mark.parametrize(("split", "key"), [("train", "train_prompts"), ("eval", "eval_prompts")])
def test_too_few_prompts_are_refused(tmp_path: Path, split: str, key: str) -> None:
    path = write_prompts(tmp_path, TEXTS)
    there = len(read_prompts(path)[split])
    assert len(load_prompts(sample(path, **{key: there}), split)) == there
    with pytest.raises(UserError) as caught:
        load_prompts(sample(path, **{key: there + 1}), split)
    assert str(caught.value) == f"sample.{key}: {there + 1}, but {path} has {there} of the split {split}; lower it"


@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": ""}, {"prompt": " \n"}, {"prompt": 3}, ["a"]])
def test_a_row_without_a_prompt_is_refused(tmp_path: Path, row: Any) -> None:
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}, row])
    with pytest.raises(UserError, match=r"prompts\.jsonl, row 2: expected the key prompt with a text, found "):
        read_prompts(path)
