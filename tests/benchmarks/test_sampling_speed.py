"""The benchmark of sampling, at small size."""

from pathlib import Path
from typing import Any

import pytest

import sampling
from mtbench_data import make_questions

TEXTS = [turn for question in make_questions(2) for turn in question["turns"]]


def test_prompts_are_short_and_all_different(tokenizer: Any) -> None:
    prompts = sampling.make_prompts(tokenizer, ["".join(map(chr, range(33, 120)))], 8)
    assert [len(prompt) for prompt in prompts] == [8, 9, 10, 11, 12, 8, 9, 10]
    assert len({tuple(prompt) for prompt in prompts}) == 8


def test_all_sides_sample_and_the_same_replies_are_compared(tiny_model: Path) -> None:
    result = sampling.measure(tiny_model, TEXTS, rows=16, each=4, max_new_tokens=5, rounds=2, compared=24)
    assert (result["rows"], result["replies_a_prompt"], len(result["ratios_to_transformers"])) == (16, 4, 2)
    speeds = result["tokens_per_second"]
    assert list(speeds) == ["prefscan", "transformers", "one at a time"]
    assert result["ratio_to_transformers"] == speeds["prefscan"] / speeds["transformers"]
    assert result["ratio_to_one_at_a_time"] == speeds["prefscan"] / speeds["one at a time"]
    assert (result["moved"]["replies"], result["moved"]["other_tokens"]) == (24, 0)
    assert result["moved"]["largest"] == pytest.approx(0, abs=1e-4)
