"""What would fail when a cell is merged is found before the first update."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from prefscan.common.errors import UserError
from prefscan.logprobs.layouts import load_layout
from prefscan.logprobs.packed import own_attention
from prefscan.models.loading import load_model, load_tokenizer
from prefscan.models.saving import refuse_unsavable
from prefscan.training.lora import refuse_unmergeable
from tiny import random_adapter, random_pairs


def test_a_model_that_can_be_saved_passes(tiny_model: Path) -> None:
    refuse_unsavable(load_model(tiny_model, "fp32"), load_tokenizer(tiny_model))


def test_a_generation_configuration_that_cannot_be_saved_is_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.generation_config.num_return_sequences = 3
    with pytest.raises(ValueError, match="num_return_sequences"):  # what the merge stage ended with
        model.save_pretrained(tmp_path / "merged")
    with pytest.raises(UserError, match=r"^model\.source: a merged LlamaForCausalLM could not be saved \(ValueError"):
        refuse_unsavable(model, tokenizer)


def test_a_model_whose_save_raises_is_refused(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("not yet")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(UserError, match=r"could not be saved \(NotImplementedError: not yet\)"):
        refuse_unsavable(model, tokenizer)


def test_a_model_gets_back_the_attention_that_it_was_loaded_with(model: Any) -> None:
    before = model.config._attn_implementation
    pairs = random_pairs([(3, 4, 5)])
    layout = load_layout("packed")
    layout.pair_logps(model.requires_grad_(False), layout.collate(pairs, 0))
    assert model.config._attn_implementation == "prefscan_packed"
    own_attention(model)
    assert model.config._attn_implementation == before == "sdpa"


def test_a_model_without_sdpa_can_be_saved_after_either_layout(tmp_path: Path) -> None:
    """Gemma 2 has none: `set_attn_implementation("sdpa")` fails."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).requires_grad_(False)
    layout = load_layout("padded")
    layout.pair_logps(model, layout.collate(random_pairs([(3, 4, 5)]), 0))
    own_attention(model)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, "fp32")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.plain = nn.Linear(8, 8)


def test_an_adapter_whose_change_cannot_be_merged_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = random_adapter(model)
    refuse_unmergeable(policy)
    layer = policy.base_model.model.model.layers[1].self_attn.q_proj

    def fail(adapter: str) -> Any:
        raise NotImplementedError("no delta")

    monkeypatch.setattr(layer, "get_delta_weight", fail)
    with pytest.raises(UserError, match=r"the adapter of .*q_proj, a Linear, could not be merged .* leave q_proj out"):
        refuse_unmergeable(policy)
    monkeypatch.setattr(layer, "get_delta_weight", lambda adapter: torch.zeros(3, 3))
    with pytest.raises(UserError, match="its change has another shape than the weight"):
        refuse_unmergeable(policy)


def test_layers_that_peft_can_merge_pass(model: Any) -> None:
    policy = get_peft_model(Odd(), LoraConfig(r=2, target_modules=["plain"]))
    refuse_unmergeable(policy)
