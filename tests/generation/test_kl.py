"""Exact KL of replies: against the KL of all replies that a small model has, and against plain forward passes."""

from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig

from prefscan.common.errors import UserError
from prefscan.generation import kl as module
from prefscan.generation.kl import exact_kl
from prefscan.generation.sampling import Reply
from tiny import random_adapter

VOCABULARY, END, LONGEST = 6, 5, 3


def small_model(seed: int, vocabulary: int = VOCABULARY) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def reply_to(prompt: list[int], tokens: list[int]) -> Reply:
    return Reply("", prompt, tokens, [], False, 0.0)


def all_replies(prompt: list[int]) -> list[Reply]:
    """Every reply of up to LONGEST tokens: it ends with the end token, or is truncated."""
    others = range(VOCABULARY - 1)
    found = [
        [*before, last]
        for length in range(1, LONGEST + 1)
        for before in product(others, repeat=length - 1)
        for last in ([END] if length < LONGEST else range(VOCABULARY))
    ]
    return [reply_to(prompt, tokens) for tokens in found]


def plain(model: Any, reply: Reply) -> torch.Tensor:
    """The log-softmax at each place of the reply, by one forward pass, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([reply.prompt + reply.tokens])).logits[0, len(reply.prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def of_tokens(model: Any, reply: Reply) -> torch.Tensor:
    return plain(model, reply)[range(len(reply.tokens)), reply.tokens]


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_the_mean_over_all_replies_is_the_kl_of_the_two_distributions(batch: int) -> None:
    policy, base = small_model(0), small_model(1)
    replies = all_replies([1, 4, 2])
    log_p, log_q = (torch.stack([of_tokens(m, r).sum() for r in replies]) for m in (policy, base))
    assert log_p.exp().sum() == pytest.approx(1, abs=1e-6)  # all replies there are
    expected = (log_p.exp() * (log_p - log_q)).sum().item()
    found = exact_kl(policy, base, replies, batch)
    mean = sum(p * kl.nats for p, kl in zip(log_p.exp().tolist(), found, strict=True))
    assert expected > 0.5
    assert mean == pytest.approx(expected, abs=1e-5)
    # and it varies less than the plain log-ratio, which has the same mean
    spread = sum(p * (kl.nats - mean) ** 2 for p, kl in zip(log_p.exp().tolist(), found, strict=True))
    assert spread < 0.6 * (log_p.exp() * (log_p - log_q - expected) ** 2).sum().item()


REPLIES = [
    reply_to(prompt, tokens)
    for prompt, tokens in [
        ([1, 2, 3], [4, 4, 4, 0, 1, 2, 3, 4, 5]),
        ([1], [2]),
        ([1, 2, 3], [5]),
        ([4, 0], [1, 2, 3, 3, 3]),
        ([1, 2, 3], [0, 0, 5]),
        ([0, 4], [3, 2, 5]),
    ]
]


def check(found: list[Any], replies: list[Reply], policy: Any, base: Any) -> None:
    for kl, reply in zip(found, replies, strict=True):
        p, q = plain(policy, reply), plain(base, reply)
        assert kl.places == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), abs=1e-5)
        assert kl.logprobs == pytest.approx(of_tokens(policy, reply).tolist(), abs=1e-5)
        assert kl.nats == pytest.approx(sum(kl.places))


@pytest.mark.parametrize("chunk", [1, 4, 256])
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_each_place_is_that_of_a_plain_forward_pass(monkeypatch: pytest.MonkeyPatch, batch: int, chunk: int) -> None:
    """Where replies to one prompt share its reading, end at different places, and go on in chunks."""
    policy, base = small_model(0), small_model(1)
    monkeypatch.setattr(module, "HEAD_CHUNK", chunk)
    check(exact_kl(policy, base, REPLIES, batch), REPLIES, policy, base)


def test_no_more_logits_exist_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_model(0)
    monkeypatch.setattr(module, "HEAD_CHUNK", 8)
    places = []
    policy.get_output_embeddings().register_forward_pre_hook(lambda _, given: places.append(given[0][..., 0].numel()))
    exact_kl(policy, small_model(1), [reply_to([1, 2], [3, 4] * 20), reply_to([1, 2], [0] * 30)], 4)
    assert max(places) == 8
    assert sum(places) == 1 + 39 + 29 + 3  # both prompts are one, and the shorter reply ends within a chunk of 4


def test_a_model_has_no_divergence_from_itself() -> None:
    policy = small_model(0, vocabulary=5000)
    for kl in exact_kl(policy, policy, REPLIES, 4):
        assert kl.places == [0.0] * len(kl.places)
    twin = deepcopy(policy)
    assert all(kl.nats == 0 for kl in exact_kl(policy, twin, REPLIES, 4))


@pytest.mark.parametrize("change", [1e-6, 1e-4, 1e-2, 10])
def test_no_place_is_below_0(change: float) -> None:
    policy = small_model(0, vocabulary=5000)
    other = deepcopy(policy)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1 + change)
    kls = [place for kl in exact_kl(policy, other, REPLIES, 4) for place in kl.places]
    assert min(kls) >= 0
    assert change < 1e-2 or min(kls) > 0


def test_an_adapter_is_compared_with_its_base() -> None:
    base = small_model(0)
    policy = random_adapter(deepcopy(base)).eval()
    found = exact_kl(policy, None, REPLIES, 2)
    check(found, REPLIES, policy, base)
    assert all(kl.nats > 1e-3 for kl in found)
    check(exact_kl(policy, base, REPLIES, 2), REPLIES, policy, base)


def test_a_model_with_a_state_is_read_without_a_cache() -> None:
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = MambaConfig(state_size=4, hidden_size=16, num_hidden_layers=2, vocab_size=VOCABULARY)
        models.append(AutoModelForCausalLM.from_config(config).eval())
    check(exact_kl(*models, REPLIES, 3), REPLIES, *models)


def test_log_probabilities_are_those_of_a_plain_forward_pass() -> None:
    policy = small_model(0)
    for kl, reply in zip(exact_kl(policy, small_model(1), REPLIES, 6), REPLIES, strict=True):
        assert kl.logprobs == pytest.approx(of_tokens(policy, reply).tolist(), abs=1e-5)


def test_a_token_that_neither_model_can_say_adds_nothing() -> None:
    """As models have it whose vocabulary is padded and masked."""
    policy, base = small_model(0), small_model(1)

    def masked(_: Any, __: Any, output: Any) -> None:
        output.logits[..., 0] = -torch.inf

    for model in (policy, base):
        model.register_forward_hook(masked)
    replies = [reply for reply in REPLIES if 0 not in reply.tokens]
    for kl, reply in zip(exact_kl(policy, base, replies, 2), replies, strict=True):
        p, q = (plain(model, reply)[:, 1:] for model in (policy, base))
        assert kl.places == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), abs=1e-5)


def test_logits_that_are_not_finite_are_refused() -> None:
    policy = small_model(0)
    with torch.no_grad():
        policy.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match=r"^the KL to the base is not finite: .*set dtype: fp32$"):
        exact_kl(policy, small_model(1), REPLIES, 4)
