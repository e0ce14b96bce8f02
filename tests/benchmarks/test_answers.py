"""The benchmark of answers, at small size."""

from pathlib import Path

import pytest
import torch

import answers
from mtbench_data import make_questions
from prefscan.models.loading import load_model


def test_both_sides_answer_both_turns_and_greedy_ones_are_compared(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MOST_ROWS", 6)
    result = answers.measure(tiny_model, make_questions(2), max_new_tokens=5)
    assert (result["questions"], result["batch_size"], len(result["ratios"])) == (16, 6, 3)
    assert result["greedy_replies"] == 16  # both turns of two questions of four categories
    assert result["greedy_share_identical"] == 1
    assert result["gaps_where_they_part"] == []
    speeds = result["tokens_per_second"]
    assert result["ratio"] == speeds["batched"] / speeds["one at a time"]


def test_the_gap_is_that_of_the_log_probabilities_where_replies_part(tiny_model: Path) -> None:
    model = load_model(tiny_model, "fp32").eval()
    reply = model.generate(torch.tensor([[1, 40, 41]]), max_new_tokens=3, do_sample=False)[0, 3:].tolist()
    logprobs = model(torch.tensor([[1, 40, 41, *reply[:2]]])).logits[0, -1].log_softmax(-1)
    other = (reply[2] + 1) % 200
    found = answers.gap(model, [1, 40, 41], reply, [*reply[:2], other, 9])
    assert found == pytest.approx((logprobs[reply[2]] - logprobs[other]).item(), abs=1e-5)
    assert found > 0
    with pytest.raises(ValueError, match="stop at different tokens"):
        answers.gap(model, [1, 40, 41], reply, reply[:2])
