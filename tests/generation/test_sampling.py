"""Generation: exact seeded sampling, a second turn from the first one's cache, and batches that fit into memory."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, FalconH1Config, JambaConfig, MambaConfig, MistralConfig

from prefscan.common.errors import UserError
from prefscan.generation import sampling as generation
from prefscan.generation.sampling import Reply, SeededSampling, cache_bytes, generate, prompt_ids, settled_batch_size
from tiny import random_adapter

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def draw(seeds: list[str], temperature: float) -> torch.Tensor:
    """A token a seed, at logits whose softmax at this temperature is that of LOGITS."""
    sampling = SeededSampling(seeds, [temperature] * len(seeds))
    return sampling(torch.zeros(len(seeds), 1), temperature * LOGITS.repeat(len(seeds), 1)).argmax(-1)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.0])
def test_sampling_draws_from_the_softmax(temperature: float) -> None:
    count = 6000
    drawn = torch.bincount(draw([f"0/{i}/0" for i in range(count)], temperature), minlength=6).numpy()
    right, wrong = (count * (LOGITS.double() / t).softmax(-1).numpy() for t in (1.0, 1.1))
    assert chisquare(drawn, right).pvalue > 1e-3
    assert chisquare(drawn, wrong).pvalue < 1e-3  # so many draws do tell a temperature that is off by a tenth


def test_successive_draws_of_a_row_are_independent() -> None:
    """The second token's draw, given the first's, is again from the softmax."""
    sampling = SeededSampling([str(i) for i in range(3000)], [1.0] * 3000)
    first, second = (sampling(torch.zeros(3000, 1), LOGITS.repeat(3000, 1)).argmax(-1) for _ in range(2))
    after = torch.bincount(second[first == 0], minlength=6)[:4].double()
    expected = LOGITS[:4].double().softmax(-1) * after.sum()
    assert chisquare(after.numpy(), expected.numpy()).pvalue > 1e-3


def test_a_draw_depends_on_its_seed_and_on_nothing_beside_it() -> None:
    seeds = [f"0/{i}/1" for i in range(64)]
    drawn = draw(seeds, 1.0)
    assert torch.equal(draw(seeds, 1.0), drawn)
    assert torch.equal(draw(seeds[::-1], 1.0).flip(0), drawn)
    assert torch.equal(torch.cat([draw([seed], 1.0) for seed in seeds]), drawn)
    assert not torch.equal(draw([f"1/{i}/1" for i in range(64)], 1.0), drawn)
    assert not torch.equal(draw([f"0/{i}/0" for i in range(64)], 1.0), drawn)


@pytest.mark.parametrize("temperature", [0.0, 9e-5])
def test_a_temperature_of_0_leaves_the_logits(temperature: float) -> None:
    scores = SeededSampling(["0"], [temperature])(torch.zeros(1, 1), LOGITS[None].bfloat16())
    assert torch.equal(scores, LOGITS[None].bfloat16().float())


def test_log_probabilities_are_those_at_temperature_1() -> None:
    sampling = SeededSampling(["a", "b", "c"], [0.7, 0.0, 2.0])
    chosen = sampling(torch.zeros(3, 1), LOGITS.repeat(3, 1)).argmax(-1)
    assert torch.allclose(sampling.logprobs[0], LOGITS.log_softmax(-1)[chosen])
    assert chosen[1] == 0


def test_a_token_without_probability_is_never_drawn() -> None:
    """Where rounding puts the last sum below 1, and in the gaps between likely tokens."""
    logits = torch.full((1, 50_000), -torch.inf)
    logits[0, [7, 49_000]] = 0.0
    sampling = SeededSampling([str(i) for i in range(400)], [1.0] * 400)
    assert set(sampling(torch.zeros(400, 1), logits.repeat(400, 1)).argmax(-1).tolist()) == {7, 49_000}


def reply_of(tokens: list[int]) -> Reply:
    return Reply("", [1], tokens, [0.0] * len(tokens), cut=False, seconds=1.0)


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
    # What a prompt adds to the first one but its last token, and no position of padding; then a token at a time.
    added = [len(prompt) - len(reply.prompt) for prompt, reply in zip(prompts, first, strict=True)]
    assert all(count < most for count, most in zip(read, added, strict=False))
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
    for row, reply in enumerate(reused):  # and the context says what the cache now holds
        held = again.tokens[row]
        assert held == (reply.prompt + reply.tokens)[: len(held)]
        assert len(held) >= len(reply.prompt) + len(reply.tokens) - 1
        alone = model(torch.tensor([held])).past_key_values.layers[-1]
        places = slice(again.starts[row], again.starts[row] + len(held))
        layer = again.cache.layers[-1]
        assert torch.allclose(layer.keys[row, :, places], alone.keys[0], atol=1e-5)
        assert torch.allclose(layer.values[row, :, places], alone.values[0], atol=1e-5)


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
    assert not expected[2].cut
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
    replies, context, _ = first_turn(model, tokenizer, [0.0] * 3)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in context.cache.layers)
    slots = context.cache.get_seq_length()
    assert held == len(QUESTIONS) * slots * cache_bytes(model)
    # The memory that was set aside is what the rows can come to.
    whole = sum(memory.nbytes for layer in context.cache.layers for memory in layer.memory)
    longest = max(len(tokens) + start for tokens, start in zip(context.tokens, context.starts, strict=True))
    assert slots == longest
    assert (held == whole) == any(reply.cut for reply in replies)  # the limit of new tokens fills all of it


@pytest.mark.parametrize(
    ("batch_size", "free", "rows"),
    [("auto", 1.0, 1), ("auto", 2.5, 1), ("auto", 12.6, 5), ("auto", 1e6, 40), (3, 3.0, 3), (64, 64.0, 64)],
)
def test_as_many_conversations_as_fit(
    model: Any, monkeypatch: pytest.MonkeyPatch, batch_size: int | str, free: float, rows: int
) -> None:
    """`free` in conversations of 100 tokens; `auto` leaves six tenths of the memory free."""
    monkeypatch.setattr(generation, "free_bytes", lambda: int(free * 100 * cache_bytes(model)))
    assert settled_batch_size(batch_size, 12, model, 100) == rows


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
    monkeypatch.setattr(generation, "free_bytes", lambda: int(free * 100 * cache_bytes(model)))
    with pytest.raises(UserError, match=message):
        settled_batch_size(batch_size, 12, model, 100)


def test_a_conversation_beyond_the_models_context_is_refused(model: Any) -> None:
    limit = model.config.max_position_embeddings
    assert settled_batch_size(1, 12, model, limit) == 1
    with pytest.raises(
        UserError,
        match=rf"^answer\.max_new_tokens: 12 lets .* to {limit + 5} tokens and .* for {limit}; set it 3 lower",
    ):
        settled_batch_size(1, 12, model, limit + 5)
