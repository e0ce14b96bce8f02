"""The local judge against probabilities computed another way, and with models whose next token is known."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from mtbench_data import local_judge
from prefscan.common.config import LocalJudge
from prefscan.common.errors import UserError
from prefscan.judging.judge import Prompt, load_judge
from prefscan.judging.local import TokenJudge
from prefscan.judging.pairs import MODE as PAIRS
from prefscan.judging.single import MODE as SINGLE
from prefscan.models.loading import load_model, load_tokenizer
from tiny import CHAT_TEMPLATE

PROMPT = Prompt("You judge.", "[Question]\nWhat is 2 + 2?\n[Answer]\nFour β.")


@pytest.fixture
def judge(tiny_model: Path) -> Any:
    return load_judge(LocalJudge.model_validate(local_judge(tiny_model)))


def next_token(judge: TokenJudge, text: str) -> torch.Tensor:
    """Probabilities of the token after a text, from one full forward pass without cache; shape `[V]`."""
    ids = judge.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return judge.model(input_ids=ids, use_cache=False).logits[0, -1].double().softmax(-1)


def rig(judge: TokenJudge, follows: dict[str, str], otherwise: str = "x") -> None:
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


def option_probability(judge: TokenJudge, text: str, option: str) -> float:
    """Of a verdict and its closing bracket, token by token, each from a full forward pass."""
    p = 1.0
    for token in judge.tokenizer(f"{option}]", add_special_tokens=False)["input_ids"]:
        p *= next_token(judge, text)[token].item()
        text += judge.tokenizer.decode([token])
    return p


def test_probabilities_are_those_of_full_forward_passes(judge: TokenJudge) -> None:
    text = (
        f"<|im_start|>system\n{PROMPT.system}<|im_end|>\n<|im_start|>user\n{PROMPT.user}<|im_end|>\n"
        "<|im_start|>assistant\nRating: [["
    )
    expected = torch.tensor([option_probability(judge, text, str(n)) for n in range(1, 11)], dtype=torch.float64)
    torch.testing.assert_close(
        judge.probabilities(judge.tokens(PROMPT), DynamicCache()), expected, rtol=1e-4, atol=1e-12
    )
    ((_, verdict),) = judge.verdicts([PROMPT])
    by_hand = sum(score * p for score, p in enumerate(expected.tolist(), start=1)) / expected.sum().item()
    assert verdict.score == pytest.approx(by_hand, rel=1e-5)
    assert verdict.mass == pytest.approx(expected.sum().item(), rel=1e-4)


def test_scores_lie_between_1_and_10_and_differ(judge: TokenJudge) -> None:
    prompts = [Prompt("Judge.", f"Answer {i}: " + "so " * i) for i in range(8)]
    scores = [verdict.score for _, verdict in judge.verdicts(prompts)]
    assert all(score is not None and 1 < score < 10 for score in scores)
    assert len(set(scores)) == 8


def test_verdicts_are_deterministic_and_independent_of_their_neighbours(judge: TokenJudge) -> None:
    instruction = "Judge as before, please. " * 4  # shared keys and values: most of each prompt
    texts = ["Another", instruction + "First.", instruction + "Second", instruction + "Sec", instruction + "First."]
    prompts = [PROMPT, *(Prompt("Judge.", text) for text in texts)]
    together = dict(judge.verdicts(prompts))
    assert sorted(together) == list(range(6))
    assert dict(judge.verdicts(prompts)) == together
    for place, prompt in enumerate(prompts):
        ((_, alone),) = judge.verdicts([prompt])
        assert together[place].score == pytest.approx(alone.score, abs=1e-5)


def test_a_shared_beginning_is_computed_once(judge: TokenJudge) -> None:
    """Also where a prompt that shares little stands between them."""
    prompts = [Prompt("Judge.", "The same long instruction. " * 4 + end) for end in ("one", "two", "two")]
    other = Prompt("Judge.", "Unlike these.")
    computed: list[int] = []
    judge.model.model.embed_tokens.register_forward_hook(lambda module, args, output: computed.append(args[0].shape[1]))
    list(judge.verdicts([prompts[0], other, *prompts[1:]]))
    tail = len(judge._encode("one<|im_end|>\n<|im_start|>assistant\nRating: [["))
    rest = len(judge._encode("Unlike these.<|im_end|>\n<|im_start|>assistant\nRating: [["))
    # Each with the tokens of the verdicts after it; the same prompt once more is its last token.
    options = [len(place) for place in judge.places if place]
    prompt = len(judge.tokens(prompts[0]))
    assert computed == [n for read in (prompt, tail, 1, rest) for n in (read, *options)]


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batches_score_as_one_prompt_after_the_other(judge: TokenJudge, tiny_model: Path, batch_size: int) -> None:
    prompts = [Prompt("Judge.", f"Answer {i}: " + "so it is β " * (i * 7 % 5)) for i in range(7)]
    alone = dict(judge.verdicts(prompts))
    batched = load_judge(LocalJudge.model_validate(local_judge(tiny_model, batch_size)))
    passes: list[tuple[int, int]] = []
    batched.model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: passes.append(tuple(args[0].shape))
    )
    together = dict(batched.verdicts(prompts))
    assert max(rows for rows, _ in passes) == min(batch_size, 7)
    widths = [width for _, width in passes if width > 2]  # those of the prompts
    assert widths == sorted(widths, reverse=True)  # longest first
    assert widths[0] == max(len(judge.tokens(prompt)) for prompt in prompts)
    assert sorted(together) == sorted(alone)
    for place, verdict in alone.items():
        assert together[place].score == pytest.approx(verdict.score, abs=1e-4)
    assert max(v.score for v in alone.values()) - min(v.score for v in alone.values()) > 0.01  # else all agree anyway


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_rigged_model_gives_its_score_in_batches_too(judge: TokenJudge, batch_size: int) -> None:
    judge.batch_size, judge.least_mass = batch_size, 0.1
    rig(judge, {"[": "7", "7": "]"})
    (_, first), (_, second) = sorted(judge.verdicts([PROMPT, Prompt("", "β")]))
    assert (first.score, second.score) == (pytest.approx(7, abs=1e-6), pytest.approx(7, abs=1e-6))
    rig(judge, {"[": "x"})
    assert [verdict.score for _, verdict in judge.verdicts([PROMPT, Prompt("", "β")])] == [None, None]


@pytest.mark.parametrize(
    ("follows", "score"),
    [
        *(({"[": str(digit), str(digit): "]"}, digit) for digit in range(1, 10)),
        ({"[": "1", "1": "0", "0": "]"}, 10),
    ],
)
def test_a_rigged_model_gives_its_score(judge: TokenJudge, follows: dict[str, str], score: int) -> None:
    judge.least_mass = 0.1
    rig(judge, follows)
    ((_, verdict),) = judge.verdicts([PROMPT])
    assert verdict.score == pytest.approx(score, abs=1e-6)
    assert verdict.text.startswith(f"Rating: [[{score}.0000]]")


@pytest.mark.parametrize("follows", [{"[": "x"}, {"[": "0"}, {"[": "]"}, {"[": "7"}, {"[": "1", "1": "1"}], ids=str)
def test_too_little_probability_of_any_verdict_is_no_score(judge: TokenJudge, follows: dict[str, str]) -> None:
    """Also of a number that no bracket closes: 7.5, or 11."""
    judge.least_mass = 0.1
    rig(judge, follows)
    ((_, verdict),) = judge.verdicts([PROMPT])
    assert verdict.score is None
    assert re.match(
        r"the judge gives any verdict with probability .* only, under judge\.least_mass \(0\.1\)", verdict.reason
    )


def test_a_mass_of_a_twentieth_is_no_verdict_and_the_smallest_is_recorded(judge: TokenJudge) -> None:
    judge.least_mass = 0.1
    for mass, scored in ((0.05, False), (0.2, True)):
        judge.probabilities = lambda *_, mass=mass: torch.full((10,), mass / 10)  # type: ignore[method-assign]
        ((_, verdict),) = judge.verdicts([PROMPT])
        assert verdict.mass == pytest.approx(mass)
        assert (verdict.score is not None) == scored


def test_ten_as_one_token_keeps_its_probability(tiny_model: Path) -> None:
    """Llama 3 and GPT have "10" as a token; a judge that is sure of it says 10, not what is left of "1"."""
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.add_tokens(["10"])
    model = load_model(tiny_model, "fp32")
    model.resize_token_embeddings(len(tokenizer))
    judge = TokenJudge(model, tokenizer, SINGLE, settings_of(tiny_model))
    ten = tokenizer("10", add_special_tokens=False)["input_ids"]
    assert len(ten) == 1
    assert judge.options[-1] == (ten, False)
    with torch.no_grad():
        for layer in judge.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embeddings.zero_()
        head.zero_()
        bracket, nine, close = (tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "[9]")
        embeddings[bracket, 0] = embeddings[nine, 1] = embeddings[ten[0], 1] = 1
        # 89 % of 10 and 11 % of 9, each followed by the bracket.
        head[ten[0], 0], head[nine, 0], head[close, 1] = 20 + math.log(8) / 32**0.5, 20, 20
    ((_, verdict),) = judge.verdicts([PROMPT])
    assert verdict.score == pytest.approx(10 * 8 / 9 + 1, abs=1e-3)


def settings_of(folder: Path, **changes: Any) -> LocalJudge:
    return LocalJudge.model_validate(local_judge(folder) | changes)


@pytest.mark.parametrize("merged", ["[7", "[[7", "7]", "]]", "[["])
def test_a_vocabulary_that_merges_brackets_and_digits_scores_all_the_same(tiny_model: Path, merged: str) -> None:
    """Against full forward passes over whatever tokens each verdict has."""
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.add_tokens([merged])
    model = load_model(tiny_model, "fp32")
    model.resize_token_embeddings(len(tokenizer))
    judge = TokenJudge(model, tokenizer, SINGLE, settings_of(tiny_model))
    found = judge.probabilities(judge.tokens(PROMPT), DynamicCache())
    before = str(tokenizer.decode(judge.tokens(PROMPT))).removesuffix(judge.prefill)
    for option, p in zip(range(1, 11), found.tolist(), strict=True):
        whole = judge._encode(f"{before}Rating: [[{option}]")
        shared = len(judge._encode(before + judge.prefill))
        with torch.no_grad():
            following = model(input_ids=torch.tensor([whole])).logits[0].double().softmax(-1)
        expected = math.prod(following[i - 1, whole[i]].item() for i in range(shared, len(whole) - 1))
        last = following[-2]
        closes = tokenizer.decode([whole[-1]]) == "]"
        expected *= last[judge.closing].sum().item() if closes else last[whole[-1]].item()
        assert p == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + CHAT_TEMPLATE,
        CHAT_TEMPLATE.replace(
            "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
        ),
    ],
    ids=["refuses", "leaves out"],
)
def test_a_template_without_a_system_role_gets_its_text_in_the_users_turn(
    tiny_model: Path, template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = template
    judge = TokenJudge(load_model(tiny_model, "fp32"), tokenizer, SINGLE, settings_of(tiny_model))
    text = tokenizer.decode(judge.tokens(PROMPT))
    assert f"user\n{PROMPT.system}\n\n{PROMPT.user}" in text
    assert len(list(judge.verdicts([PROMPT, PROMPT]))) == 2
    assert capsys.readouterr().out.count("has no system role; the system text opens the user's turn") == 1


def test_a_template_that_renders_nothing_is_a_sentence(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = "{{ raise_exception('tools only') }}"
    judge = TokenJudge(load_model(tiny_model, "fp32"), tokenizer, SINGLE, settings_of(tiny_model))
    with pytest.raises(UserError, match=r"^judge\.folder: the chat template refuses the conversation \(tools only\)"):
        judge.tokens(PROMPT)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_overflows_gives_no_score(judge: TokenJudge, value: float) -> None:
    with torch.no_grad():
        judge.model.get_output_embeddings().weight.fill_(value)
    ((_, verdict),) = judge.verdicts([PROMPT])
    assert verdict.score is None
    assert "the judge gives any verdict with probability nan" in verdict.reason


def test_a_prompt_longer_than_the_context_is_refused(judge: TokenJudge) -> None:
    length = len(judge.tokenizer("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n")["input_ids"])
    length += len(judge.tokenizer("<|im_start|>assistant\nRating: [[")["input_ids"])
    judge.model.config.max_position_embeddings = 100
    fits = Prompt("", "x" * (98 - length))  # the verdicts add two tokens
    assert len(judge.tokens(fits)) == 98
    with pytest.raises(UserError, match=r"^judge\.folder: a prompt of 99 tokens exceeds the judge's context of 100"):
        judge.tokens(Prompt("", fits.user + "x"))


def test_a_folder_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no safetensors file; run `dvc repro`"):
        load_judge(LocalJudge.model_validate(local_judge(tmp_path)))


@pytest.fixture
def chooser(tiny_model: Path) -> TokenJudge:
    return TokenJudge(load_model(tiny_model, "fp32"), load_tokenizer(tiny_model), PAIRS, settings_of(tiny_model))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_likeliest_letter_wins(chooser: TokenJudge, batch_size: int) -> None:
    """Against full forward passes, on prompts of different lengths."""
    chooser.batch_size = batch_size
    prompts = [Prompt("Judge.", "Which? " + "so it is β " * n) for n in range(5)]
    for place, verdict in chooser.verdicts(prompts):
        text = chooser.tokenizer.decode(chooser.tokens(prompts[place]))
        assert text.endswith(PAIRS.prefill)
        expected = [option_probability(chooser, text, letter) for letter in "ABC"]
        letter = "ABC"[expected.index(max(expected))]
        assert verdict.score == {"A": 1, "B": 0, "C": 0.5}[letter]
        shares = ", ".join(f"P({name}) = {p:.3f}" for name, p in zip("ABC", expected, strict=True))
        assert verdict.text == f"My final verdict is: [[{letter}]] ({shares})"


@pytest.mark.parametrize(("letter", "score"), [("A", 1), ("B", 0), ("C", 0.5)])
def test_each_letter_has_its_score(letter: str, score: float) -> None:
    probabilities = [0.1, 0.1, 0.1]
    probabilities["ABC".index(letter)] = 0.2
    assert PAIRS.choose(probabilities).score == score


def test_the_mode_chooses_the_local_judge(tiny_model: Path) -> None:
    made: Any = load_judge(settings_of(tiny_model, mode="pair"))
    assert made.mode is PAIRS
