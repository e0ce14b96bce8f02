"""Sampling: exact seeded draws, prompts read once, a second turn from the first's cache, batches that fit in memory."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, FalconH1Config, JambaConfig, MambaConfig, MistralConfig

from prefscan.common.errors import UserError
from prefscan.generation import sampling as generation
from prefscan.generation.kv_cache import read_prompts
from prefscan.generation.sampling import (
    Reply,
    Sampled,
    Sampling,
    SeededSampling,
    batches,
    cache_bytes,
    draw,
    generate,
    pick,
    prompt_ids,
    row_bytes,
    sample_replies,
    settled_batch_size,
)
from tiny import random_adapter

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def drawn(seeds: list[str], temperature: float) -> torch.Tensor:
    """A token a seed, at logits whose softmax at this temperature is that of LOGITS."""
    sampling = SeededSampling(seeds, [temperature] * len(seeds))
    return sampling.draw(temperature * LOGITS.repeat(len(seeds), 1))[0]


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.0])
def test_sampling_draws_from_the_softmax(temperature: float) -> None:
    count = 6000
    counts = torch.bincount(drawn([f"0/{i}/0" for i in range(count)], temperature), minlength=6).numpy()
    right, wrong = (count * (LOGITS.double() / t).softmax(-1).numpy() for t in (1.0, 1.1))
    assert chisquare(counts, right).pvalue > 1e-3
    assert chisquare(counts, wrong).pvalue < 1e-3  # so many draws do tell a temperature that is off by a tenth


def test_successive_draws_of_a_row_are_independent() -> None:
    """The second token's draw, given the first's, is again from the softmax."""
    sampling = SeededSampling([str(i) for i in range(3000)], [1.0] * 3000)
    first, second = (sampling.draw(LOGITS.repeat(3000, 1))[0] for _ in range(2))
    after = torch.bincount(second[first == 0], minlength=6)[:4].double()
    expected = LOGITS[:4].double().softmax(-1) * after.sum()
    assert chisquare(after.numpy(), expected.numpy()).pvalue > 1e-3


def test_a_draw_depends_on_its_seed_and_on_nothing_beside_it() -> None:
    seeds = [f"0/{i}/1" for i in range(64)]
    tokens = drawn(seeds, 1.0)
    assert torch.equal(drawn(seeds, 1.0), tokens)
    assert torch.equal(drawn(seeds[::-1], 1.0).flip(0), tokens)
    assert torch.equal(torch.cat([drawn([seed], 1.0) for seed in seeds]), tokens)
    assert not torch.equal(drawn([f"1/{i}/1" for i in range(64)], 1.0), tokens)
    assert not torch.equal(drawn([f"0/{i}/0" for i in range(64)], 1.0), tokens)


def test_some_of_the_rows_draw_what_they_draw_among_all() -> None:
    """As when others have ended: each goes on with its own numbers."""
    logits = LOGITS.repeat(4, 1)
    whole, some = (SeededSampling(list("abcd"), [1.0, 0.7, 0.0, 2.0]) for _ in range(2))
    expected = [whole.draw(logits) for _ in range(20)]
    for tokens, logprobs in expected:
        own = some.draw(logits[:3], [3, 0, 1])
        assert torch.equal(own[0], tokens[[3, 0, 1]])
        assert torch.equal(own[1], logprobs[[3, 0, 1]])


@pytest.mark.parametrize("temperature", [0.0, 9e-5])
def test_a_temperature_of_0_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 2.9], [1.0, 0.0, 0.0, 0.999]]).bfloat16()
    for seed in "abcdef":
        tokens, logprobs = SeededSampling([seed] * 2, [temperature] * 2).draw(logits)
        assert tokens.tolist() == [1, 0]
        assert torch.allclose(logprobs, logits.float().log_softmax(-1)[[0, 1], [1, 0]])


def test_log_probabilities_are_those_at_temperature_1() -> None:
    for temperatures in ([0.7, 0.0, 2.0], [1.0, 1.0, 1.0]):
        chosen, logprobs = SeededSampling(["a", "b", "c"], temperatures).draw(LOGITS.repeat(3, 1) + 50)
        assert torch.allclose(logprobs, LOGITS.log_softmax(-1)[chosen])
    assert SeededSampling(["b"], [0.0]).draw(LOGITS[None])[0] == 0


ENDS = [0.0, 1 - 2**-53]  # the least and the largest number that a generator gives


def test_a_token_without_probability_is_never_drawn() -> None:
    """At both ends of the interval, where rounding puts a sum below 1, and in the gaps between likely tokens."""
    logits = torch.full((402, 50_000), -torch.inf)
    likely = [7, 300, 49_000]
    logits[:, likely] = torch.tensor([0.0, -1.0, -0.1])
    uniform = torch.cat([torch.tensor(ENDS, dtype=torch.float64), torch.linspace(0, 1, 402, dtype=torch.float64)[1:-1]])
    tokens = draw(logits, uniform[:, None])[0][:, 0].tolist()
    assert set(tokens) == set(likely)
    assert tokens[:2] == [7, 49_000]
    assert tokens[2:] == sorted(tokens[2:])


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1000, 49_152])
def test_a_draw_inverts_the_distribution_function(vocabulary: int) -> None:
    """Against one float64 sum over the vocabulary, wherever a point is not within fp32's rounding of a boundary."""
    rows = 500
    logits = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    logits -= logits.amax(-1, keepdim=True)
    uniform = torch.linspace(0, 1 - 2**-53, rows, dtype=torch.float64)[:, None]
    shares = logits.double().softmax(-1).cumsum(-1)
    tokens, denominators = draw(logits, uniform)
    low = shares.gather(-1, tokens) - logits.double().softmax(-1).gather(-1, tokens)
    assert (low - 1e-6 <= uniform).all()
    assert (uniform <= shares.gather(-1, tokens) + 1e-6).all()
    assert torch.allclose(denominators, logits.logsumexp(-1, keepdim=True), atol=1e-5)
    expected = torch.searchsorted(shares, uniform, right=True).clamp_max(vocabulary - 1)
    assert (tokens == expected).float().mean() > 0.98


def test_a_point_within_a_weight_is_handed_on() -> None:
    shares = torch.tensor([[0.0, 2.0, 0.0, 6.0, 0.0]], dtype=torch.float64).repeat(4, 1)
    index, within = pick(shares, torch.tensor([[0.0], [0.125], [0.25], [0.625]], dtype=torch.float64))
    assert index[:, 0].tolist() == [1, 1, 3, 3]
    assert within[:, 0].tolist() == [0.0, 0.5, 0.0, 0.5]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = LOGITS.repeat(2, 1)
    logits[1, 3] = value
    with pytest.raises(UserError, match=r"^the model's logits are not finite.*set dtype: fp32$"):
        SeededSampling(["a", "b"], [1.0, 0.0]).draw(logits)


def reply_of(tokens: list[int]) -> Reply:
    return Reply("", [1], tokens, [0.0] * len(tokens), truncated=False, seconds=1.0)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [([5] * 8, 4 / 5), ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5), ([1, 2, 3, 4, 5], 0), ([5, 5, 5], 0), ([5] * 4, 0)],
)
def test_repetition_is_the_share_of_4_grams_seen_before(tokens: list[int], share: float) -> None:
    assert reply_of(tokens).repetition == pytest.approx(share)


QUESTIONS = ["Who?", "What is seven plus four, and why would one ask?", "Name a river, then another river."]
AGAIN = ["And then?", "Say that in one word.", "Which of both is longer? Give its length in miles, too."]


def first_turn(model: Any, tokenizer: Any, temperatures: list[float]) -> tuple[list[Reply], Any, list[list[int]]]:
    """Replies to QUESTIONS, their context, and the prompts that ask AGAIN."""
    talks = [[{"role": "user", "content": text}] for text in QUESTIONS]
    prompts = [prompt_ids(tokenizer, talk) for talk in talks]
    replies, context = generate(model, tokenizer, prompts, SeededSampling(["x", "y", "z"], temperatures), 12)
    for talk, reply, text in zip(talks, replies, AGAIN, strict=True):
        talk += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": text}]
    return replies, context, [prompt_ids(tokenizer, talk) for talk in talks]


@pytest.mark.parametrize("temperatures", [[0.0, 0.0, 0.0], [0.7, 1.5, 0.0]], ids=["greedy", "sampled"])
def test_a_second_turn_from_the_cache_is_the_one_without(model: Any, tokenizer: Any, temperatures: list[float]) -> None:
    first, context, prompts = first_turn(model, tokenizer, temperatures)
    fresh, _ = generate(model, tokenizer, prompts, SeededSampling(["1", "2", "3"], temperatures), 12)
    read: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    reused, _ = generate(model, tokenizer, prompts, SeededSampling(["1", "2", "3"], temperatures), 12, context)
    assert [reply.tokens for reply in reused] == [reply.tokens for reply in fresh]
    assert [reply.prompt for reply in reused] == prompts
    for ours, theirs in zip(reused, fresh, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    # What a prompt adds to the first one, and no position of padding; then a token at a time.
    added = [len(prompt) - len(reply.prompt) for prompt, reply in zip(prompts, first, strict=True)]
    assert all(count <= most for count, most in zip(read, added, strict=False))
    assert sum(read[:3]) < sum(added)
    assert len(read) > 3
    assert set(read[3:]) == {1}


def test_what_a_template_says_anew_of_the_past_is_computed_anew(model: Any, tokenizer: Any) -> None:
    """As templates do that drop a reply's reasoning, and tokenizers that join what was sampled apart."""
    _, context, prompts = first_turn(model, tokenizer, [1.5, 1.5, 0.0])
    prompts[0][5:9] = [4, 3]
    prompts[1] = prompts[1][:6]  # all of it is in the cache
    fresh, _ = generate(model, tokenizer, prompts, SeededSampling(["1", "2", "3"], [0.0] * 3), 12)
    reused, again = generate(model, tokenizer, prompts, SeededSampling(["1", "2", "3"], [0.0] * 3), 12, context)
    assert [reply.tokens for reply in reused] == [reply.tokens for reply in fresh]
    assert again is not None
    for number, reply in enumerate(reused):  # and the context says what the cache now holds
        held = again.tokens[number]
        assert held == reply.prompt + reply.tokens[:-1]
        alone = model(torch.tensor([held])).past_key_values.layers[-1]
        layer = again.cache([number], len(held)).layers[-1]
        assert torch.allclose(layer.keys[0], alone.keys[0], atol=1e-5)
        assert torch.allclose(layer.values[0], alone.values[0], atol=1e-5)


def by_transformers(model: Any, tokenizer: Any, prompt: list[int], count: int) -> list[int]:
    """A greedy reply to one prompt, by transformers' own generation and cache."""
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=generation.end_tokens(model.generation_config, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    return list(output[0, len(prompt) :].tolist())


def mistral(model: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": model.config.vocab_size}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5, **changes)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("window", [None, 8, 40], ids=["no window", "within a prompt", "within a reply"])
def test_both_turns_are_those_of_transformers_one_by_one(model: Any, tokenizer: Any, window: int | None) -> None:
    """In a batch of unlike lengths, and where layers look back over a sliding window only."""
    other = mistral(model, sliding_window=window)
    replies, context, prompts = first_turn(other, tokenizer, [0.0] * 3)
    again, _ = generate(other, tokenizer, prompts, SeededSampling(["1", "2", "3"], [0.0] * 3), 12, context)
    for reply in [*replies, *again]:
        assert reply.tokens == by_transformers(other, tokenizer, reply.prompt, 12)
    if window:  # and the window does count
        unlimited = mistral(model, sliding_window=None)
        assert any(r.tokens != by_transformers(unlimited, tokenizer, r.prompt, 12) for r in [*replies, *again])


@pytest.mark.parametrize(
    "setting", [{"use_cache": False}, {"cache_implementation": "static"}], ids=lambda setting: next(iter(setting))
)
def test_a_models_own_way_to_cache_does_not_count(model: Any, tokenizer: Any, setting: dict[str, Any]) -> None:
    """As the generation configs of some fine-tuned models have it."""
    expected = [reply.tokens for reply in first_turn(model, tokenizer, [0.0] * 3)[0]]
    model.generation_config.update(**setting)
    replies, context, _ = first_turn(model, tokenizer, [0.0] * 3)
    assert [reply.tokens for reply in replies] == expected
    assert context is not None


OWN: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "encoder_repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "min_length": 1000,
    "min_new_tokens": 12,
    "suppress_tokens": "likely",
    "bad_words_ids": "likely",
    "num_beams": 2,
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("tuned", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("name", OWN)
def test_a_models_own_settings_for_sampling_do_not_count(model: Any, tokenizer: Any, tuned: bool, name: str) -> None:
    """Neither tokens nor log-probabilities of both turns are others, and the model keeps what it had."""
    if tuned:
        model = random_adapter(model).eval()

    def both_turns() -> list[Reply]:
        temperatures = [0.7, 1.5, 0.0]
        first, context, prompts = first_turn(model, tokenizer, temperatures)
        second, _ = generate(model, tokenizer, prompts, SeededSampling(["1", "2", "3"], temperatures), 12, context)
        return [replace(reply, seconds=0.0) for reply in [*first, *second]]

    ended = both_turns()[2].tokens[4]  # with the model's own end token, before the limit
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, ended]
    expected = both_turns()
    assert not expected[2].truncated
    likely = [reply.tokens[0] for reply in expected]
    value = {"suppress_tokens": likely, "bad_words_ids": [[token] for token in likely]}.get(name, OWN[name])
    model.generation_config.update(**{name: value})
    before = model.generation_config.to_dict()
    assert before[name] == value
    assert both_turns() == expected
    assert model.generation_config.to_dict() == before


HEADS = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
STATES = {
    "a state alone": MambaConfig(state_size=4),
    "a state beside keys and values": FalconH1Config(
        **HEADS, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4
    ),
    "layers with a state beside layers with keys and values": JambaConfig(
        **HEADS, attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=4
    ),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_model_with_a_state_answers_without_the_cache(model: Any, tokenizer: Any, kind: str) -> None:
    torch.manual_seed(0)
    config = deepcopy(STATES[kind])
    config.update({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": model.config.vocab_size})
    other = AutoModelForCausalLM.from_config(config).eval()
    replies, context, prompts = first_turn(other, tokenizer, [0.0] * 3)
    assert context is None
    again, _ = generate(other, tokenizer, prompts, SeededSampling(["1", "2", "3"], [0.0] * 3), 12, context)
    for reply in [*replies, *again]:
        assert reply.tokens == by_transformers(other, tokenizer, reply.prompt, 12)


def test_the_cache_takes_the_bytes_that_the_arithmetic_says(model: Any, tokenizer: Any) -> None:
    """The memory that is set aside is what the rows can come to, but for the last token, which is not read."""
    replies, context, _ = first_turn(model, tokenizer, [0.0] * 3)
    whole = sum(memory.nbytes for layer in context.rows.layers for memory in layer.memory)
    longest = max(len(reply.prompt) for reply in replies) + 12 - 1
    assert whole == len(QUESTIONS) * longest * cache_bytes(model)
    assert row_bytes(model, longest) == longest * cache_bytes(model) + 12 * model.config.vocab_size


@pytest.mark.parametrize(
    ("batch_size", "free", "rows"),
    [("auto", 1.0, 1), ("auto", 2.5, 1), ("auto", 12.6, 5), ("auto", 1e6, 40), (3, 3.0, 3), (64, 64.0, 64)],
)
def test_as_many_conversations_as_fit(
    model: Any, monkeypatch: pytest.MonkeyPatch, batch_size: int | str, free: float, rows: int
) -> None:
    """`free` in conversations of 100 tokens; `auto` leaves six tenths of the memory free."""
    monkeypatch.setattr(generation, "free_bytes", lambda: int(free * row_bytes(model, 100)))
    assert settled_batch_size(Sampling("answer", 12, batch_size, most=40), model, 100) == rows


@pytest.mark.parametrize(
    ("batch_size", "free", "message"),
    [
        (
            "auto",
            0.9,
            r"^answer\.batch_size: auto, but .* of 1 of up to 100 tokens .* set answer\.max_new_tokens",
        ),
        (1, 0.9, r"^answer\.batch_size: 1, but .* of 1 of up to 100 tokens .* set answer\.max_new_tokens"),
        (4, 3.9, r"^answer\.batch_size: 4, but .* of 4 of up to 100 tokens .* choose auto, or a smaller number$"),
    ],
)
def test_conversations_that_do_not_fit_are_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch, batch_size: int | str, free: float, message: str
) -> None:
    monkeypatch.setattr(generation, "free_bytes", lambda: int(free * row_bytes(model, 100)))
    with pytest.raises(UserError, match=message):
        settled_batch_size(Sampling("answer", 12, batch_size, most=40), model, 100)


def test_a_conversation_beyond_the_models_context_is_refused(model: Any) -> None:
    limit = model.config.max_position_embeddings
    assert settled_batch_size(Sampling("answer", 12, 1), model, limit) == 1
    with pytest.raises(
        UserError,
        match=rf"^answer\.max_new_tokens: 12 lets .* to {limit + 5} tokens and .* for {limit}; set it 3 lower",
    ):
        settled_batch_size(Sampling("answer", 12, 1), model, limit + 5, turns=2)


WORDS = ["Once", "It was a", "Two men", "Once", "A film", "Once"]


def plain_prompts(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in WORDS]


def seeds_of(count: int, each: int) -> list[list[str]]:
    return [[f"0/{i}/{number}" for number in range(each)] for i in range(count)]


def by_place(found: Iterator[list[Sampled]]) -> dict[tuple[int, int], Reply]:
    return {(s.prompt, s.number): replace(s.reply, seconds=0.0) for batch in found for s in batch}


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 24])
def test_replies_do_not_depend_on_the_batch(model: Any, tokenizer: Any, batch_size: int) -> None:
    """Each is that of its prompt and seed alone, also where rows end before others, as some do here."""
    prompts, seeds = plain_prompts(tokenizer), seeds_of(6, 4)
    replies = by_place(sample_replies(model, tokenizer, prompts, seeds, Sampling("sample", 40, batch_size)))
    assert sorted(replies) == list(product(range(6), range(4)))
    assert {reply.truncated for reply in replies.values()} == {True, False}
    for (i, number), reply in replies.items():
        (alone,), _ = generate(model, tokenizer, [prompts[i]], SeededSampling([seeds[i][number]], [1.0]), 40)
        assert (reply.text, reply.prompt, reply.tokens) == (alone.text, prompts[i], alone.tokens)
        assert reply.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert reply.truncated == (reply.tokens[-1] != tokenizer.eos_token_id)


def test_a_prompt_is_read_once_for_all_its_replies(model: Any, tokenizer: Any) -> None:
    """Those of one length together; then one token a row that has not ended."""
    read: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(tuple(inputs[0].shape)))
    (batch,) = sample_replies(model, tokenizer, plain_prompts(tokenizer), seeds_of(6, 4), Sampling("sample", 40, 24))
    assert read[:4] == [(1, 4), (1, 6), (1, 7), (1, 8)]  # "Once" is there three times
    lengths = [len(sampled.reply.tokens) for sampled in batch]
    assert read[4:] == [(sum(length > place for length in lengths), 1) for place in range(1, max(lengths))]
    assert len({rows for rows, _ in read[4:]}) > 2


@torch.no_grad()
def test_memory_of_all_prompts_of_a_batch_is_that_of_each_alone(model: Any, tokenizer: Any) -> None:
    prompts = plain_prompts(tokenizer)
    rows, logits = read_prompts(model, prompts, 3)
    for i, prompt in enumerate(prompts):
        alone = model(torch.tensor([prompt]))
        assert torch.allclose(logits[i], alone.logits[0, -1], atol=1e-5)
        for ours, theirs in zip(rows.layers, alone.past_key_values.layers, strict=True):
            assert torch.allclose(ours.keys[i, :, rows.starts[i] :], theirs.keys[0], atol=1e-5)
            assert not ours.keys[i, :, : rows.starts[i]].any()
            assert torch.allclose(ours.values[i, :, rows.starts[i] :], theirs.values[0], atol=1e-5)


def test_the_replies_have_the_distribution_of_the_model(model: Any) -> None:
    """All replies of up to three tokens that a model of three tokens and an end has, against their probabilities."""
    tiny = mistral(model)
    tiny.resize_token_embeddings(4)
    tokenizer = type("Tokenizer", (), {"decode": lambda *_, **__: ""})()
    replies = [
        (*before, last)
        for n in range(3)
        for before in product([0, 1, 2], repeat=n)
        for last in ([3] if n < 2 else range(4))
    ]
    with torch.no_grad():
        logprobs = [tiny(torch.tensor([[1, 2, *reply]])).logits[0, 1:-1].log_softmax(-1) for reply in replies]
    chances = torch.tensor(
        [sum(own[range(len(r)), list(r)]).exp().item() for own, r in zip(logprobs, replies, strict=True)]
    ).double()
    assert chances.sum() == pytest.approx(1, abs=1e-5)
    count = 20_000
    found = by_place(
        sample_replies(tiny, tokenizer, [[1, 2]], seeds_of(1, count), Sampling("sample", 3, 4000), ends=[3])
    )
    said = [tuple(reply.tokens) for reply in found.values()]
    counts = torch.tensor([float(said.count(reply)) for reply in replies])
    common = chances * count > 5
    assert common.sum() > 20
    observed, expected = counts[common].double(), chances[common] * count
    assert chisquare(observed.numpy(), (expected * observed.sum() / expected.sum()).numpy()).pvalue > 1e-3
    assert counts[~common].sum() < 2 * chances[~common].sum() * count + 20


@pytest.mark.parametrize("most", [1, 3, 4, 8, 9, 100])
def test_batches_hold_every_reply_once_and_keep_a_prompts_together(most: int) -> None:
    prompts = [[0] * length for length in (5, 2, 9, 2)]
    found = batches(prompts, seeds_of(4, 4), most)
    assert sorted(row for batch in found for row in batch) == list(product(range(4), range(4)))
    assert all(len(batch) <= most for batch in found)
    lengths = [len(prompts[i]) for batch in found for i, _ in batch]
    assert lengths == sorted(lengths)
    if most >= 4:
        assert all(len(batch) % 4 == 0 for batch in found)
    assert batches([], [], most) == []


def test_an_interrupted_stage_samples_only_the_batches_that_are_missing(model: Any, tokenizer: Any) -> None:
    prompts, seeds, settings = plain_prompts(tokenizer), seeds_of(6, 2), Sampling("sample", 8, 4)
    whole = list(sample_replies(model, tokenizer, prompts, seeds, settings))
    done = {(sampled.prompt, sampled.number) for sampled in whole[0]} | {(whole[1][0].prompt, whole[1][0].number)}
    rest = list(sample_replies(model, tokenizer, prompts, seeds, settings, finished=done))
    assert len(whole) == 3
    assert by_place(iter(rest)) == by_place(iter(whole[1:]))  # to the last bit


@pytest.mark.parametrize("kind", STATES)
def test_a_model_with_a_state_is_sampled_by_transformers(model: Any, tokenizer: Any, kind: str) -> None:
    torch.manual_seed(0)
    config = deepcopy(STATES[kind])
    config.update({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": model.config.vocab_size})
    other = AutoModelForCausalLM.from_config(config).eval()
    prompts, seeds = plain_prompts(tokenizer), seeds_of(6, 2)
    replies = by_place(sample_replies(other, tokenizer, prompts, seeds, Sampling("sample", 8, 4)))
    for (i, number), reply in replies.items():
        (alone,), _ = generate(other, tokenizer, [prompts[i]], SeededSampling([seeds[i][number]], [1.0]), 8)
        assert reply.tokens == alone.tokens
        assert reply.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[5], []], 4, r"^evaluate: 1 of 2 prompts have no token, the first is number 2; take them out$"),
        ([[5]], 0, r"^evaluate\.max_new_tokens: 0 leaves no reply; set 1 or more$"),
        (
            [[5], [5] * 8190],
            4,
            r"^evaluate\.max_new_tokens: 4 after the 8190 tokens of prompt 2 are more than the 8192",
        ),
    ],
)
def test_prompts_without_a_reply_are_refused(
    model: Any, tokenizer: Any, prompts: list[list[int]], new: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(sample_replies(model, tokenizer, prompts, seeds_of(len(prompts), 1), Sampling("evaluate", new, 4)))


@pytest.mark.parametrize(
    ("error", "shown", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            UserError,
            r"^sample\.batch_size: 2 .*Tried\); set sample",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), UserError, r"^sample\.batch_size: 2 conv"),
        (RuntimeError("a bug"), RuntimeError, "^a bug$"),
    ],
)
def test_out_of_memory_names_the_key(
    model: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    shown: type[Exception],
    message: str,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(shown, match=message):
        list(sample_replies(model, tokenizer, [[5], [6, 7]], seeds_of(2, 1), Sampling("sample", 4, 8)))
