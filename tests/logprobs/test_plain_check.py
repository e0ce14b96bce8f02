"""A layout is checked against plain forward passes, once a sweep: right, or refused with a way out that was checked."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from prefscan.common.errors import UserError
from prefscan.logprobs.layouts import load_layout
from prefscan.logprobs.plain import probes, refuse_deviation, response_logp
from prefscan.models.loading import load_model
from tiny import plain_logps, random_pairs

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def check(model: Any, pairs: list[Any], layout: str = "packed", batch_size: int = 2) -> float:
    return refuse_deviation(model.eval().requires_grad_(False), layout, pairs, batch_size, 0, "fp32")


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_model_that_a_layout_computes_passes(tiny_model: Path, pairs: list[dict[str, Any]], layout: str) -> None:
    model = load_model(tiny_model, "fp32").requires_grad_(False)
    assert check(model, pairs, layout, batch_size=4) < 1e-4


def test_the_plain_pass_is_that_of_transformers(model: Any, pairs: list[dict[str, Any]]) -> None:
    pair = pairs[0]
    for name, value in zip(("chosen_ids", "rejected_ids"), plain_logps(model, pair), strict=True):
        assert response_logp(model, pair["prompt_ids"], pair[name]) == pytest.approx(value.item(), abs=1e-4)


def test_the_longest_pair_is_checked_beside_the_shortest() -> None:
    pairs = random_pairs([(5, 3, 4), (9, 30, 2), (4, 2, 2), (8, 6, 30)])
    first, longest, uneven = ([pair["id"] for pair in batch] for batch in probes(pairs, 2))
    assert (first, longest, uneven) == (["pair-0", "pair-1"], ["pair-1", "pair-2"], ["pair-1"])


# Position factors that depend on the longest row --------------------------------------------------


@pytest.fixture
def longrope() -> Any:
    """A Phi-3 made for 32 tokens and stretched to 128: its factors change for a row beyond 32."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    }
    config = Phi3Config(**TINY, max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=rope)
    return Phi3ForCausalLM(config)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_longrope_is_refused_where_short_pairs_stand_beside_long_ones(longrope: Any, layout: str) -> None:
    pairs = random_pairs([(6, 8, 7), (7, 6, 9), (30, 40, 35)])
    plain = response_logp(longrope.eval(), pairs[0]["prompt_ids"], pairs[0]["chosen_ids"])
    with torch.no_grad():
        batch = load_layout(layout).collate([pairs[2], pairs[0]], 0)
        beside = load_layout(layout).pair_logps(longrope.requires_grad_(False), batch)[0][1].item()
    assert abs(beside - plain) > 0.1  # what was recorded
    longrope.set_attn_implementation("sdpa")
    with pytest.raises(
        UserError, match=rf"train\.layout: '{layout}' is wrong on a model of type phi3: .* nats"
    ) as caught:
        check(longrope, pairs, layout)
    assert "set train.per_device_train_batch_size: 1" in str(caught.value)
    assert check(longrope, pairs, layout, batch_size=1) < 1e-4  # the advice


def test_longrope_is_refused_where_one_answer_of_a_pair_is_beyond_and_the_other_not(longrope: Any) -> None:
    with pytest.raises(
        UserError, match=r"phi3: .*; train\.layout: padded does not compute it either, so choose another"
    ):
        check(longrope, random_pairs([(6, 8, 7), (7, 6, 9), (10, 8, 60)]), batch_size=1)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_longrope_is_right_where_all_pairs_are_short(longrope: Any, layout: str) -> None:
    assert check(longrope, random_pairs([(6, 8, 7), (7, 6, 9), (10, 12, 11)]), layout) < 1e-4


# What a model does to its logits ------------------------------------------------------------------


class OwnScale(LlamaForCausalLM):
    """A model that divides its logits by a number of which no list has the name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if out.logits is not None:
            out.logits = out.logits / 3
        return out


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_head_that_scales_its_logits_is_refused_by_both_layouts(layout: str) -> None:
    torch.manual_seed(0)
    model = OwnScale(LlamaConfig(**TINY))
    pairs = random_pairs([(6, 8, 7), (7, 6, 9)])
    pattern = (
        r"train\.layout: '(packed|padded)' .* train\.layout: (padded|packed) does not compute it either, so choose"
    )
    with pytest.raises(UserError, match=pattern):
        check(model, pairs, layout)


def test_advice_is_given_only_where_it_passed_the_same_check() -> None:
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=2.0))
    pairs = random_pairs([(6, 8, 7), (7, 6, 9)])
    with pytest.raises(
        UserError, match="needs a frozen, plain LM head, and GraniteForCausalLM has logits_scaling"
    ) as caught:
        check(model, pairs)
    advised = re.search(r"set train\.layout: padded, which agrees", str(caught.value))
    try:
        right = check(model, pairs, "padded") < 1e-3
    except UserError:
        right = False
    assert bool(advised) == right


def test_inklings_logit_multiplier_is_refused() -> None:
    """It divides its hidden states by `logits_mup_width_multiplier` before the head: stock TRL does not."""
    from transformers import InklingForCausalLM, InklingTextConfig

    sizes = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "head_dim": 8, "swa_head_dim": 8, "d_rel": 4}
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    torch.manual_seed(0)
    config = InklingTextConfig(**TINY, **sizes, **experts, mlp_layer_types=["dense"] * 2, max_position_embeddings=128)
    model = InklingForCausalLM(config).eval()
    pairs = random_pairs([(6, 8, 7), (7, 6, 9)])
    for layout in ("packed", "padded"):
        with pytest.raises(UserError, match="does not compute it either, so choose another model"):
            check(model, pairs, layout)


def test_logits_that_are_not_finite_are_refused(tiny_model: Path, pairs: list[dict[str, Any]]) -> None:
    model: Any = load_model(tiny_model, "fp32").requires_grad_(False)
    head: nn.Linear = model.get_output_embeddings()
    head.weight.data[5] = torch.inf
    with pytest.raises(UserError, match=r"is wrong on a model of type llama: the chosen response .* is nan nats"):
        check(model, pairs)
