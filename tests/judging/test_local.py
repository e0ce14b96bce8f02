"""The local judge against probabilities computed another way, and with models whose next token is known."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from mtbench_data import local_judge
from prefscan.common.config import LocalJudge
from prefscan.common.errors import UserError
from prefscan.judging.judge import Prompt, load_judge
from prefscan.judging.local import ExpectedScore, LikeliestWinner
from prefscan.models.loading import load_model, load_tokenizer

PROMPT = Prompt("You judge.", "[Question]\nWhat is 2 + 2?\n[Answer]\nFour β.")


@pytest.fixture
def judge(tiny_model: Path) -> Any:
    return load_judge(LocalJudge.model_validate(local_judge(tiny_model)))


def next_token(judge: ExpectedScore, text: str) -> torch.Tensor:
    """Probabilities of the token after a text, from one full forward pass without cache; shape `[V]`."""
    ids = judge.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return judge.model(input_ids=ids, use_cache=False).logits[0, -1].double().softmax(-1)


def rig(judge: ExpectedScore, follows: dict[str, str], otherwise: str = "x") -> None:
    """Make the model predict, with near certainty, the character that `follows` gives for the last one."""
    token = {char: judge.tokenizer(char, add_special_tokens=False)["input_ids"][0] for char in "[]0123456789x"}
    model: Any = judge.model
    with torch.no_grad():
        for layer in model.model.layers:  # nothing but the last token's embedding reaches the head
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embeddings.zero_()
        head.zero_()
        embeddings[:, 0] = 1
        head[token[otherwise], 0] = 10
        for place, (last, following) in enumerate(follows.items(), start=1):
            embeddings[token[last]] = torch.eye(32)[place]
            head[token[following], place] = 10


def test_probabilities_are_those_of_full_forward_passes(judge: ExpectedScore) -> None:
    text = (
        f"<|im_start|>system\n{PROMPT.system}<|im_end|>\n<|im_start|>user\n{PROMPT.user}<|im_end|>\n"
        "<|im_start|>assistant\nRating: [["
    )
    digits = [judge.tokenizer(str(digit), add_special_tokens=False)["input_ids"][0] for digit in range(10)]
    first, second = next_token(judge, text), next_token(judge, text + "1")
    ten = first[digits[1]] * second[digits[0]]
    expected = torch.stack([first[digits[1]] * (1 - second[digits[0]]), *first[digits[2:]], ten])
    torch.testing.assert_close(
        judge.probabilities(judge.tokens(PROMPT), DynamicCache()), expected, rtol=1e-5, atol=1e-9
    )
    assert expected[9] > 1e-6  # else a forgotten "10" would not show
    ((_, verdict),) = judge.verdicts([PROMPT])
    by_hand = sum(score * p for score, p in enumerate(expected.tolist(), start=1)) / expected.sum().item()
    assert verdict.score == pytest.approx(by_hand, rel=1e-6)
    assert f"P(any score) = {expected.sum():.3f}" in verdict.text


def test_scores_lie_between_1_and_10_and_differ(judge: ExpectedScore) -> None:
    prompts = [Prompt("Judge.", f"Answer {i}: " + "so " * i) for i in range(8)]
    scores = [verdict.score for _, verdict in judge.verdicts(prompts)]
    assert all(score is not None and 1 < score < 10 for score in scores)
    assert len(set(scores)) == 8


def test_verdicts_are_deterministic_and_independent_of_their_neighbours(judge: ExpectedScore) -> None:
    instruction = "Judge as before, please. " * 4  # shared keys and values: most of each prompt
    texts = ["Another", instruction + "First.", instruction + "Second", instruction + "Sec", instruction + "First."]
    prompts = [PROMPT, *(Prompt("Judge.", text) for text in texts)]
    together = dict(judge.verdicts(prompts))
    assert sorted(together) == list(range(6))
    assert dict(judge.verdicts(prompts)) == together
    for place, prompt in enumerate(prompts):
        ((_, alone),) = judge.verdicts([prompt])
        assert together[place].score == pytest.approx(alone.score, abs=1e-5)


def test_a_shared_beginning_is_computed_once(judge: ExpectedScore) -> None:
    """Also where a prompt that shares little stands between them."""
    prompts = [Prompt("Judge.", "The same long instruction. " * 4 + end) for end in ("one", "two", "two")]
    other = Prompt("Judge.", "Unlike these.")
    computed: list[int] = []
    judge.model.model.embed_tokens.register_forward_hook(lambda module, args, output: computed.append(args[0].shape[1]))
    list(judge.verdicts([prompts[0], other, *prompts[1:]]))
    tail = len(judge._encode("one<|im_end|>\n<|im_start|>assistant\nRating: [["))
    rest = len(judge._encode("Unlike these.<|im_end|>\n<|im_start|>assistant\nRating: [["))
    # Each with a "1" after it, in the same pass; the same prompt once more is its last token.
    assert computed == [len(judge.tokens(prompts[0])) + 1, tail + 1, 1 + 1, rest + 1]


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batches_score_as_one_prompt_after_the_other(judge: ExpectedScore, tiny_model: Path, batch_size: int) -> None:
    prompts = [Prompt("Judge.", f"Answer {i}: " + "so it is β " * (i * 7 % 5)) for i in range(7)]
    alone = dict(judge.verdicts(prompts))
    batched = load_judge(LocalJudge.model_validate(local_judge(tiny_model, batch_size)))
    passes: list[tuple[int, int]] = []
    batched.model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: passes.append(tuple(args[0].shape))
    )
    together = dict(batched.verdicts(prompts))
    assert max(rows for rows, _ in passes) == min(batch_size, 7)
    widths = [width for _, width in passes]
    assert widths == sorted(widths, reverse=True)  # longest first
    assert widths[0] == max(len(judge.tokens(prompt)) for prompt in prompts) + 1  # "1", of what may be "10"
    assert sorted(together) == sorted(alone)
    for place, verdict in alone.items():
        assert together[place].score == pytest.approx(verdict.score, abs=1e-4)
    assert max(v.score for v in alone.values()) - min(v.score for v in alone.values()) > 0.01  # else all agree anyway


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_rigged_model_gives_its_score_in_batches_too(judge: ExpectedScore, batch_size: int) -> None:
    judge.batch_size = batch_size
    rig(judge, {"[": "7"})
    (_, first), (_, second) = sorted(judge.verdicts([PROMPT, Prompt("", "β")]))
    assert (first.score, second.score) == (pytest.approx(7, abs=1e-6), pytest.approx(7, abs=1e-6))
    rig(judge, {"[": "x"})
    assert [verdict.score for _, verdict in judge.verdicts([PROMPT, Prompt("", "β")])] == [None, None]


@pytest.mark.parametrize(
    ("follows", "score"),
    [
        *(({"[": str(digit)}, digit) for digit in range(1, 10)),
        ({"[": "1", "1": "]"}, 1),
        ({"[": "1", "1": "0"}, 10),
        ({"[": "1", "1": "1"}, 1),  # "11" is no score of its own: only "10" is told apart from "1"
    ],
)
def test_a_rigged_model_gives_its_score(judge: ExpectedScore, follows: dict[str, str], score: int) -> None:
    rig(judge, follows)
    ((_, verdict),) = judge.verdicts([PROMPT])
    assert verdict.score == pytest.approx(score, abs=1e-6)
    assert verdict.text.startswith(f"Rating: [[{score}.0000]]")


@pytest.mark.parametrize("other", ["x", "0", "]"])
def test_too_little_probability_of_any_score_is_no_score(judge: ExpectedScore, other: str) -> None:
    rig(judge, {"[": other})
    ((_, verdict),) = judge.verdicts([PROMPT])
    assert verdict.score is None
    assert "the judge gives any verdict with probability" in verdict.reason


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_overflows_gives_no_score(judge: ExpectedScore, value: float) -> None:
    with torch.no_grad():
        judge.model.get_output_embeddings().weight.fill_(value)
    ((_, verdict),) = judge.verdicts([PROMPT])
    assert verdict.score is None
    assert "the judge gives any verdict with probability nan" in verdict.reason


def test_a_prompt_longer_than_the_context_is_refused(judge: ExpectedScore) -> None:
    length = len(judge.tokenizer("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n")["input_ids"])
    length += len(judge.tokenizer("<|im_start|>assistant\nRating: [[")["input_ids"])
    judge.model.config.max_position_embeddings = 100
    fits = Prompt("", "x" * (99 - length))  # the second pass adds a token
    assert len(judge.tokens(fits)) == 99
    with pytest.raises(UserError, match=r"^judge\.folder: a prompt of 100 tokens exceeds the judge's context of 100"):
        judge.tokens(Prompt("", fits.user + "x"))


def test_a_tokenizer_that_merges_digits_is_refused(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.add_tokens(["[7"])
    with pytest.raises(UserError, match=r"^judge\.folder: the tokenizer merges '7' into 'Rating: \[\['; choose"):
        ExpectedScore(load_model(tiny_model, "fp32"), tokenizer)


def test_a_folder_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no safetensors file; run `dvc repro`"):
        load_judge(LocalJudge.model_validate(local_judge(tmp_path)))


@pytest.fixture
def chooser(tiny_model: Path) -> LikeliestWinner:
    return LikeliestWinner(load_model(tiny_model, "fp32"), load_tokenizer(tiny_model))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_likeliest_letter_wins(chooser: LikeliestWinner, batch_size: int) -> None:
    """Against full forward passes, on prompts of different lengths."""
    chooser.batch_size = batch_size
    prompts = [Prompt("Judge.", "Which? " + "so it is β " * n) for n in range(5)]
    letters = [chooser.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ABC"]
    for place, verdict in chooser.verdicts(prompts):
        ids = torch.tensor([chooser.tokens(prompts[place])])
        with torch.no_grad():
            expected = chooser.model(input_ids=ids, use_cache=False).logits[0, -1].double().softmax(-1)[letters]
        letter = "ABC"[int(expected.argmax())]
        assert verdict.score == {"A": 1, "B": 0, "C": 0.5}[letter]
        shares = ", ".join(f"P({name}) = {p:.3f}" for name, p in zip("ABC", expected.tolist(), strict=True))
        assert verdict.text == f"My final verdict is: [[{letter}]] ({shares})"


@pytest.mark.parametrize(("letter", "score"), [("A", 1), ("B", 0), ("C", 0.5)])
def test_each_letter_has_its_score(chooser: LikeliestWinner, letter: str, score: float) -> None:
    probabilities = torch.tensor([0.1, 0.1, 0.1], dtype=torch.float64)
    probabilities["ABC".index(letter)] = 0.2
    assert chooser.verdict(probabilities).score == score


def test_the_mode_chooses_the_local_judge(tiny_model: Path) -> None:
    made = load_judge(LocalJudge.model_validate(local_judge(tiny_model) | {"mode": "pair"}))
    assert isinstance(made, LikeliestWinner)
