"""What tests share: a tiny chat model, a few pairs, and servers on the loopback interface."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

# One tiny model a test needs no second thread, and the same thread count everywhere keeps results bit-identical.
torch.set_num_threads(1)
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(folder: Path, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A Llama of 2 layers and random weights with a byte-level tokenizer, saved as transformers saves them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<unk>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(specials + alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = chat_template
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # at the usual 0.02 so small a model is too uniform for its gradients to show mistakes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sharegpt_rows(count: int = 24) -> list[dict[str, Any]]:
    """Pairs as LLaMA-Factory's file has them: chosen is polite, rejected is curt."""
    return [
        {
            "conversations": [{"from": "human", "value": f"Question {i}: what is {i} plus {i}?"}],
            "chosen": {"from": "gpt", "value": f"Gladly: it is {2 * i}."},
            "rejected": {"from": "gpt", "value": f"No idea{'!' * (i % 4)}"},
        }
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny chat model; do not write to it."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="session")
def pairs(tiny_model: Path) -> list[dict[str, Any]]:
    """24 tokenised pairs of different lengths, as prepare writes them."""
    from prefscan.models import load_tokenizer
    from prefscan.prepare import parse_pair, tokenize

    tokenizer = load_tokenizer(tiny_model)
    return [tokenize(parse_pair(row, "row"), tokenizer) for row in sharegpt_rows()]


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
