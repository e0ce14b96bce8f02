"""Tiny things that tests make: a chat model, pairs, an adapter; and a plain way to compute log-probabilities."""

import json
from pathlib import Path
from typing import Any

import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(folder: Path, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE, width: int = 32) -> Path:
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
        hidden_size=width,
        intermediate_size=2 * width,
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


def heads_of_64(layers: int, heads: int, key_heads: int, dtype: str) -> Any:
    """A Llama whose heads have 64 numbers, with an adapter: for measuring what its layers keep."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefscan.models.loading import DTYPES

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64 * heads,
        intermediate_size=160 * heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
    )
    return random_adapter(LlamaForCausalLM(config).to(DTYPES[dtype]))


def make_parrot(folder: Path, says: str) -> Path:
    """A tiny chat model that replies to everything with the same words: each token decides the next.

    No layer adds to a token's embedding; the words are one token of the tokenizer's, the next after the prompt's last.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_tiny_model(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([says])
    tokenizer.save_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    newline, words, end = tokenizer("\n")["input_ids"][-1], tokenizer(says)["input_ids"][-1], tokenizer.eos_token_id
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = model.get_input_embeddings().weight
        head = model.get_output_embeddings().weight
        head.zero_()
        head[words], head[end] = 100 * embeddings[newline], 100 * embeddings[words]
    model.save_pretrained(folder)
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


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_logps(model: Any, pair: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen's and rejected's log-probability, each by one plain forward with full logits and transformers' sdpa."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    causal_lm.set_attn_implementation("sdpa")
    sums = []
    for name in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([pair["prompt_ids"] + pair[name]])
        logps = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        sums.append(logps[-len(pair[name]) :].sum())
    return sums[0], sums[1]


def random_pairs(lengths: list[tuple[int, int, int]], vocabulary: int = 64, seed: int = 0) -> list[dict[str, Any]]:
    """Tokenised pairs of random tokens, of the given lengths of prompt, chosen and rejected."""
    generator = torch.Generator().manual_seed(seed)
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {k: torch.randint(3, vocabulary, (n,), generator=generator).tolist() for k, n in zip(keys, ls, strict=True)}
        | {"id": f"pair-{i}"}
        for i, ls in enumerate(lengths)
    ]


def random_adapter(model: Any, scale: float = 1.0, seed: int = 0) -> Any:
    """The model, frozen, with a LoRA adapter that already differs from zero in both its matrices."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    policy = get_peft_model(model.requires_grad_(False), config)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data *= scale
    return policy


def make_reward_model(folder: Path, outputs: int = 1, kind: str = "llama", **changes: Any) -> Path:
    """A tiny classifier of random weights, with the tokenizer of the tiny chat model; `changes` are to its config."""
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForSequenceClassification,
    )

    make_tiny_model(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "num_labels": outputs,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
    } | changes
    torch.manual_seed(0)
    if kind == "llama":
        LlamaForSequenceClassification(LlamaConfig(**sizes)).save_pretrained(folder)
    else:
        BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(folder)
    return folder
